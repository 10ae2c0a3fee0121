"""`python -m bench.traffic`: exact memory traffic of each op on a GPU, forward and backward.

Four counts at the shapes of a preset, in MB (10^6 bytes):

    least      minimum traffic: every input read once, every output written once
    ours       reads and writes of our launches, including partial sums. Tensors that many programs read, modulations
               and position tables below 1 MB, stay in the L2 cache of any GPU here and count once
    compiled   buffers of the kernels that torch.compile generates for the reference (Inductor's own count, on the CPU)
    eager      inputs and outputs of every operation of the reference that is not a view
"""

import argparse
import contextlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor import metrics
from torch._inductor.async_compile import AsyncCompile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.compile import recorded
from bench.launches import empty
from bench.tables import header, line
from fastmask.diffusion.masking import kept_count
from fastmask.files import atomic_write
from fastmask.kernels import Mask
from fastmask.kernels._triton import (
    adamw_ema,
    add_gated_norm,
    embed_kept_patches,
    masked_loss,
    modulate_norm,
    restore_tokens,
)
from fastmask.kernels.adamw_ema import adamw_ema_reference
from fastmask.kernels.add_gated_norm import add_gated_norm_reference
from fastmask.kernels.embed_kept_patches import embed_kept_patches_reference
from fastmask.kernels.masked_loss import masked_loss_reference
from fastmask.kernels.modulate_norm import modulate_norm_reference
from fastmask.kernels.restore_tokens import restore_tokens_reference
from fastmask.presets import PRESETS
from fastmask.training.config import preset_config

_BATCH = 128


class _BytesOfOperations(TorchDispatchMode):
    """Adds up the bytes that operations read and write, each tensor once per operation; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        copies = func is torch.ops.aten.copy_.default  # copy_ does not read its target
        read = {id(t): t for t in tree_leaves((args[copies:], kwargs)) if isinstance(t, Tensor)}
        written = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        storages = {t.untyped_storage()._cdata for t in read.values()}
        is_view = all(t.untyped_storage()._cdata in storages for t in written)
        if not is_view and "empty" not in func.name():
            self.total += sum(size(t) for t in (*read.values(), *written))
        return out


def size(t: Tensor) -> int:
    """Return the bytes of a tensor's values; expanded dimensions count once."""
    values = 1
    for length, stride in zip(t.shape, t.stride(), strict=True):
        values *= length if stride else 1
    return values * t.element_size()


def ours(call: Callable[[], Any], reached: Sequence[Tensor] = ()) -> int:
    """Return the traffic of a launcher: its kernels' arguments, and the final sums in PyTorch.

    Args:
        call: the launcher call.
        reached: tensors that a kernel reads or writes by addresses in a table, rather than as arguments.
    """
    with _BytesOfOperations() as operations:
        launches = recorded(call)
    arguments = [value for launch in launches for value in launch.arguments.values() if isinstance(value, Tensor)]
    counted = [t for t in arguments if not any(t is other for other in reached)]
    return operations.total + sum(size(t) for t in (*counted, *reached))


def eager(op: Callable[..., Any], inputs: list[Tensor], others: list[Tensor]) -> tuple[int, int]:
    """Return the traffic of a reference's operations, forward and backward."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    with _BytesOfOperations() as forward:
        out = op(*leaves, *others)
    outs = [out] if isinstance(out, Tensor) else list(out)
    grads = [torch.empty_like(o) for o in outs]
    with _BytesOfOperations() as backward:
        torch.autograd.grad(outs, leaves, grads)
    return forward.total, backward.total


def compiled(op: Callable[..., Any], inputs: list[Tensor], others: list[Tensor]) -> tuple[int, int]:
    """Return the traffic of Inductor's kernels, forward and backward, counted on tensors of zeros."""
    real = [torch.zeros(t.shape, dtype=t.dtype, requires_grad=True) for t in inputs]
    real += [torch.zeros(t.shape, dtype=t.dtype) for t in others]
    with _inductor():
        out = torch.compile(op)(*real)
        forward = metrics.num_bytes_accessed
        outs = [out] if isinstance(out, Tensor) else list(out)
        torch.autograd.backward(outs, [torch.ones_like(o) for o in outs])
    return int(forward), int(metrics.num_bytes_accessed - forward)


@contextlib.contextmanager
def _inductor() -> Iterator[None]:
    """Reset Inductor's counters, and disable its caches.

    Inductor counts the buffers of the kernels that it generates, so they do not have to be compiled: a stand-in for the
    C++ compiler fills the buffers with zeros, which are valid indices.
    """

    def stand_in(*source: Any, **options: Any) -> Callable[..., None]:
        def fill(*buffers: Any) -> None:
            for t in buffers:
                if isinstance(t, Tensor):
                    t.zero_()

        return fill

    # Inductor only counts if this logger is enabled.
    logging.getLogger("torch._inductor.compile_fx.__inductor_metrics").setLevel(logging.INFO)
    torch._dynamo.reset()
    metrics.reset()
    with (
        inductor_config.patch(force_disable_caches=True),
        mock.patch.object(AsyncCompile, "cpp_pybinding", stand_in),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


class Op(NamedTuple):
    """An op at a preset's shapes.

    Attributes:
        name: name of the op.
        reference: the reference, called with ``inputs``, then ``read``.
        inputs: the tensors that get gradients, without data.
        forward: the launcher call of forward.
        backward: the launcher call of backward.
        read: further tensors that forward reads.
        written: the results.
        again: the tensors of ``inputs``, ``read`` and ``written`` that backward reads; it also reads the gradients of
            the results, where they have one, and writes the gradients of ``inputs``.
        kept: statistics, written by forward and read by backward.
    """

    name: str
    reference: Callable[..., Any]
    inputs: list[Tensor]
    forward: Callable[[], Any]
    backward: Callable[[], Any]
    read: list[Tensor]
    written: list[Tensor]
    again: list[Tensor]
    kept: list[Tensor]

    def least(self) -> tuple[int, int]:
        """Return the minimum traffic, forward and backward."""
        forward = [*self.inputs, *self.read, *self.written, *self.kept]
        backward = [*self.written, *self.inputs, *self.again, *self.kept]
        return sum(map(size, forward)), sum(map(size, backward))


def ops(preset: str, low: torch.dtype) -> Iterator[Op]:
    """Yield the ops of a preset's network: fp32 residual, other tensors in ``low``."""
    config = preset_config(preset, PRESETS)
    network, side = config.network, config.data.image_size // 8
    patch, width, narrow = network.patch_size, network.width, network.decoder_width
    length = (side // patch) ** 2
    keep = kept_count(length, config.masking.mask_ratio)
    # Norms of the encoder's blocks.
    x, branch = empty(_BATCH, keep, width), empty(_BATCH, keep, width, dtype=low)
    flat, low_flat, stats = x.view(-1, width), branch.view(-1, width), empty(2, _BATCH * keep)
    m = empty(_BATCH, width, dtype=low)
    pair, triple = (m, m, None, False), (m, m, m, None, False)
    yield Op(
        "modulate_norm",
        lambda *t: modulate_norm_reference(*t, out_dtype=low),
        [x, m, m],
        lambda: modulate_norm.launch_fwd(flat, *pair, 1e-6, low),
        lambda: modulate_norm.launch_bwd(low_flat, flat, stats, *pair, False),
        [],
        [branch],
        [x, m, m],
        [stats],
    )
    yield Op(
        "add_gated_norm",
        lambda *t: add_gated_norm_reference(*t, out_dtype=low),
        [x, branch, m, m, m],
        lambda: add_gated_norm.launch_fwd(flat, low_flat, *triple, 1e-6, low),
        lambda: add_gated_norm.launch_bwd(flat, low_flat, flat, stats, low_flat, *triple, False),
        [],
        [x, branch],
        [x, branch, m, m, m],
        [stats],
    )
    # Patch embedding.
    images, ids_keep = empty(_BATCH, 4, side, side), empty(_BATCH, keep, dtype=torch.int32)
    weight, bias = empty(width, 4, patch, patch, dtype=low), empty(width, dtype=low)
    position, scale = empty(length, width), empty(_BATCH)
    yield Op(
        "embed_kept_patches",
        lambda w, b, image, table, ids, factor: embed_kept_patches_reference(
            image, w, b, table, ids, patch_size=patch, image_scale=factor
        ),
        [weight, bias],
        lambda: embed_kept_patches.launch_fwd(
            images, weight, bias, position, ids_keep, scale, None, low, torch.float32, None, None, False, 1e-6
        ),
        lambda: embed_kept_patches.launch_bwd(flat, images, weight, ids_keep, scale, None, low, low),
        [images, position, ids_keep, scale],
        [x],
        [images, ids_keep, scale],
        [],
    )
    # The decoder's input.
    kept, token, ids = empty(_BATCH, keep, narrow, dtype=low), empty(narrow, dtype=low), empty(_BATCH, length).int()
    table, whole = empty(length, narrow), empty(_BATCH, length, narrow)
    yield Op(
        "restore_tokens",
        restore_tokens_reference,
        [kept, token],
        lambda: restore_tokens.launch_fwd(kept.view(-1, narrow), token, table, ids, None, None, None, False, 1e-6),
        lambda: restore_tokens.launch_bwd(whole.view(-1, narrow), None, token, ids, None, _BATCH * keep, low),
        [table, ids],
        [whole],
        [ids],
        [],
    )
    # The loss.
    raw, factor, loss = empty(_BATCH, length, 4 * patch**2, dtype=low), empty(_BATCH), empty(_BATCH)
    factors = [factor] * 3
    inputs = (raw, images, images, *factors, ids, None, keep, patch)

    def reference(*given: Tensor) -> Any:
        *tensors, ids = given
        return masked_loss_reference(*tensors, Mask(ids[:, :keep], ids), patch_size=patch)

    yield Op(
        "masked_loss",
        reference,
        [raw],
        lambda: masked_loss.launch_fwd(*inputs),
        lambda: masked_loss.launch_bwd(loss, loss, *inputs),
        [images, images, *factors, ids],
        [loss, loss],
        [raw, images, images, *factors, ids],
        [],
    )


def update(preset: str) -> tuple[int, int, int, int]:
    """Return the four counts of `adamw_ema` with one EMA, for the parameters of one Linear of an MLP."""
    width = preset_config(preset, PRESETS).network.width
    shapes = ((4 * width, width), (4 * width,))
    betas, eps, weight_decay = (0.9, 0.999), 1e-8, 0.01

    def tensors(make: Callable[..., Tensor]) -> tuple[list[list[Tensor]], list[Tensor], Tensor, Tensor]:
        return [[make(*s) for s in shapes] for _ in range(5)], [make(1), make(1)], make(1), make(1)

    def reference(lists: list[list[Tensor]], steps: list[Tensor], lr: Tensor, rates: Tensor) -> None:
        options = {"betas": betas, "eps": eps, "weight_decay": weight_decay}
        adamw_ema_reference(*lists[:4], steps, lr=lr, averages=lists[4:], rates=rates, **options)

    arguments = lists, steps, lr, rates = tensors(empty)
    written = [lists[i] for i in (0, 2, 3, 4)]
    reached = [t for tensors in (*lists, *written) for t in tensors]
    scalars = (lr, rates, None, None, *betas, eps, weight_decay)
    with _BytesOfOperations() as operations:
        reference(*arguments)
    with _inductor():
        torch.compile(reference)(*tensors(torch.ones))
    return (
        sum(map(size, (*reached, *steps, lr, rates))),
        ours(lambda: adamw_ema.launch(*lists[:4], lists[4], [], steps, *scalars), reached),
        int(metrics.num_bytes_accessed),
        operations.total,
    )


def table(preset: str) -> Iterator[list[str]]:
    """Yield the rows of the table: op, dtype, direction and the four counts."""
    for name, low in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        for op in ops(preset, low):
            counts = (
                op.least(),
                (ours(op.forward), ours(op.backward)),
                compiled(op.reference, op.inputs, op.read),
                eager(op.reference, op.inputs, op.read),
            )
            for direction, of in zip(("forward", "backward"), zip(*counts, strict=True), strict=True):
                yield [op.name, name, direction, *_cells(of)]
    yield ["adamw_ema", "fp32", "step", *_cells(update(preset))]


def _cells(counts: tuple[int, ...]) -> list[str]:
    return [f"{count / 1e6:.1f}" for count in counts] + [f"{counts[1] / counts[0]:.3f}"]


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(prog="python -m bench.traffic", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="xl2-in256", choices=PRESETS)
    parser.add_argument("--out", type=Path, help="also write the table to this file, as Markdown")
    options = parser.parse_args()
    columns = ["op", "dtypes", "direction", "least MB", "ours MB", "compiled MB", "eager MB", "ours / least"]
    lines = [*header(columns), *map(line, table(options.preset))]
    sys.stdout.write("\n".join(lines) + "\n")
    if options.out:
        head = f"{options.preset}, {_BATCH} images, counted by `python -m bench.traffic`; no GPU was used.\n\n"
        with atomic_write(options.out) as partial:
            partial.write_text(head + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
