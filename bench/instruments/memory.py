"""`python -m bench.instruments.memory`: exact bytes saved for backward, per image and by kind, without data or a GPU.

The passes run on fake tensors, whose ops only compute shapes. Tensors saved by autograd are counted once per storage,
without parameters and tensors derived from them, as the difference between batches of eight and four images. Peak
memory of forward and backward is tracked from the allocation and release of each storage.
"""

import argparse
import collections
import contextlib
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastmask.diffusion import Denoiser, Objective
from fastmask.diffusion.masking import kept_count
from fastmask.diffusion.objective import TOTAL
from fastmask.kernels import Impl, Mask
from fastmask.models.stack import all_blocks
from fastmask.presets import PRESETS
from fastmask.training.config import build_model, preset_config

# The published implementation, measured the same way at XL/2, 256x256, mask ratio 0.5, in MB per image.
PUBLISHED = {"bf16": 256.4, "fp32": 423.3}


@contextlib.contextmanager
def fake_forward(
    preset: str, impl: Impl, precision: str, batch: int, checkpoint_blocks: bool
) -> Iterator[tuple[Objective, Callable[[], Tensor]]]:
    """Yield a network with its loss on fake tensors, and a call that runs its forward pass.

    Args:
        preset: name of a preset.
        impl: implementation of the ops.
        precision: "fp32", or "bf16" for autocast.
        batch: number of images.
        checkpoint_blocks: recompute the blocks in backward.
    """
    config = preset_config(preset, PRESETS)
    size = config.data.image_size // 8
    with FakeTensorMode():
        model = build_model(config, 4, size)
        model.impl, model.checkpoint_blocks = impl, checkpoint_blocks
        objective = Objective(Denoiser(model, config.process), config.objective.terms(model.config))
        keep = kept_count(model.length, config.masking.mask_ratio)
        mask = None
        if keep < model.length:
            ids_keep = torch.zeros(batch, keep, dtype=torch.int32)
            mask = Mask(ids_keep, torch.zeros(batch, model.length, dtype=torch.int32))
        images, sigma = torch.randn(batch, 4, size, size), torch.rand(batch)
        labels = torch.zeros(batch, dtype=torch.int64)
        condition = model.drop_path(labels, torch.zeros(batch, dtype=torch.bool)) if model.path_drop else labels

        def forward() -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
                loss: Tensor = objective(images, condition, mask, sigma, torch.randn_like(images))[TOTAL].mean()
            return loss

        yield objective, forward


def saved_tensors(preset: str, impl: Impl, precision: str, batch: int, checkpoint_blocks: bool = False) -> list[Tensor]:
    """Return the tensors that one training forward pass saves, one (fake) tensor per storage, in order."""
    kept: dict[int, Tensor] = {}

    def keep_one(t: Tensor) -> Tensor:
        kept.setdefault(t.untyped_storage()._cdata, t)
        return t

    with fake_forward(preset, impl, precision, batch, checkpoint_blocks) as (objective, forward):
        if checkpoint_blocks:  # checkpointing holds the arguments of each block, which autograd's hooks do not see
            for block in all_blocks(objective.net.model.stacks):
                block.register_forward_pre_hook(
                    lambda _, args: [keep_one(t) for t in tree_leaves(args) if isinstance(t, Tensor)] and None
                )
        with saved_tensors_hooks(keep_one, lambda t: t):
            forward()
        own = {t.untyped_storage()._cdata for t in (*objective.parameters(), *objective.buffers())}
    return [t for key, t in kept.items() if key not in own]


def per_image(preset: str, impl: Impl, precision: str, checkpoint_blocks: bool = False) -> dict[str, int]:
    """Return the bytes saved per image by kind, from the growth between batches of four and eight images."""
    four, eight = (saved_tensors(preset, impl, precision, batch, checkpoint_blocks) for batch in (4, 8))
    kinds: collections.Counter[str] = collections.Counter()
    for small, large in zip(four, eight, strict=True):
        grown = (large.untyped_storage().nbytes() - small.untyped_storage().nbytes()) // 4
        kinds[f"{grown // large.element_size()} x {str(large.dtype).removeprefix('torch.')}"] += grown
    return {kind: size for kind, size in kinds.most_common() if size}


class Live(TorchDispatchMode):
    """Counts the bytes of live storages allocated by ops.

    Args:
        known: tensors whose storages are not counted.

    Attributes:
        now: current bytes.
        most: peak bytes.
    """

    def __init__(self, known: Iterator[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known = {t.untyped_storage()._cdata for t in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and (storage := t.untyped_storage())._cdata not in self._known:
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def high_water(preset: str, precision: str, batch: int, checkpoint_blocks: bool = False) -> tuple[int, int]:
    """Return the peak bytes of two micro-batches, and the bytes between the passes of the second.

    Weights, gradients and optimizer state are not included.

    Args:
        preset: name of a preset; the ops are fused.
        precision: "fp32", or "bf16" for autocast.
        batch: images per micro-batch.
        checkpoint_blocks: recompute the blocks in backward.
    """
    with (
        fake_forward(preset, "fused", precision, batch, checkpoint_blocks) as (objective, forward),
        Live(iter((*objective.parameters(), *objective.buffers()))) as live,
    ):
        for _ in range(2):
            loss = forward()
            between = live.now
            loss.backward()  # type: ignore[no-untyped-call]
            del loss
    return live.most, between


def table(preset: str, checkpoint_blocks: bool) -> Iterator[str]:
    """Yield the lines of a preset's report."""
    yield f"{preset}: bytes kept for backward, MB (10^6) per image"
    for precision in ("bf16", "fp32"):
        forms: tuple[Impl, ...] = ("fused",) if checkpoint_blocks else ("reference", "fused")
        for impl in forms:
            kinds = per_image(preset, impl, precision, checkpoint_blocks)
            yield f"{precision} {impl:<9} {sum(kinds.values()) / 1e6:8.1f}"
            if impl == "fused":
                yield from (f"    {size / 1e6:8.2f}  as {kind}" for kind, size in kinds.items())
        if preset == "xl2-in256" and not checkpoint_blocks:
            yield f"{precision} published {PUBLISHED[precision]:8.1f}"
        most, _ = high_water(preset, precision, 32, checkpoint_blocks)
        yield f"{precision} at most in two micro-batches of 32, beside weights and their state: {most / 1e9:.2f} GB"


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(prog="python -m bench.instruments.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="xl2-in256", choices=PRESETS)
    parser.add_argument("--checkpoint-blocks", action="store_true", help="recompute the blocks in backward")
    options = parser.parse_args()
    sys.stdout.write("\n".join(table(options.preset, options.checkpoint_blocks)) + "\n")


if __name__ == "__main__":
    main()
