"""Calls ops with arguments that do not fit: `python tests/kernels/hostile.py --seconds 600 --threads 2 --seed 7`.

A case is a valid call of an op, of which a few arguments are changed: shapes, strides, dtypes, devices, values. It may
raise. It may not crash the process, and where it returns, all that it returns was written: memory that is allocated
without values is filled with NaN. A case is known by the seed and its number, which `--log` holds while it runs;
`--case N` runs one again and prints it.

Where the kernels are native the registered ops are called as well, which nothing checks but the kernels themselves.
"""

import argparse
import itertools
import os
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from calls import CALLS
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastmask import kernels

INTEGERS = (-(2**63), -1, 0, 1, 2, 3, 5, 7, 8, 2**41, 2**62)  # none that memory could just hold
INDICES = (-(2**31), -1, 0, 1, 4, 9, 2**31 - 1)
FLOATS = (float("nan"), float("inf"), -1.0, 0.0, 1e-300, 3e38)
# Ops that take no `impl`, those without gradients, and what the fused forms are differentiable in, if not in all.
PLAIN = ("patchify", "unpatchify", "random_normal", "random_uniform")
WITHOUT_GRADIENTS = (*PLAIN, "adamw_ema", "sample_mask")
DIFFERENTIABLE = {
    "embed_kept_patches": ["images", "weight", "bias", "shift", "scale"],
    "masked_loss": ["raw"],
    "restore_tokens": ["x", "mask_token", "shift", "scale"],
}
DTYPES = (torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool, torch.cfloat)


class Call(NamedTuple):
    """A function and the arguments of a valid call of it; `bare`: it is a registered op."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    bare: bool


class Recorder(TorchDispatchMode):
    """Keeps the first call of each op of this library."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, Call] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = f"{func.name()}{len(args)}{[a is None for a in args]}"
        if func.namespace == "fastmask" and name not in self.calls:
            self.calls[name] = Call(func.name(), func, fresh(args), {}, True)
        return func(*args, **(kwargs or {}))


def valid_calls(bare: bool) -> list[Call]:
    """Return a call of every public op and, with ``bare``, of every registered one, dense and packed."""
    torch.manual_seed(0)
    calls, recorder = [], Recorder()
    for op, packed in itertools.product(sorted(CALLS), (False, True)):
        call = Call(op, getattr(kernels, op), (), CALLS[op](packed), False)
        calls.append(call)
        if bare and op not in PLAIN:
            again = call._replace(kwargs=fresh(call.kwargs) | {"impl": "fused"})
            with recorder:
                run(again, [] if op in WITHOUT_GRADIENTS else DIFFERENTIABLE.get(op, floats(call)))
    return calls + list(recorder.calls.values())


def floats(call: Call) -> list[str]:
    """Return the names of a call's floating arguments."""
    return [name for name, value in call.kwargs.items() if isinstance(value, Tensor) and value.is_floating_point()]


def run(call: Call, tracked: Sequence[str]) -> list[Tensor]:
    """Return the tensors that a call gives or updates, and the gradients of the tracked arguments."""
    leaves = [call.kwargs[name].requires_grad_() for name in tracked]
    result = call.function(*call.args, **call.kwargs)
    outs = tensors_of((call.args, call.kwargs) if call.name.endswith("adamw_ema") else result)
    roots = [out for out in outs if out.requires_grad]
    found: tuple[Tensor | None, ...] = ()
    if roots and leaves:
        found = torch.autograd.grad(roots, leaves, [out.detach() for out in roots], allow_unused=True)
    return [*(out.detach() for out in outs), *(grad for grad in found if grad is not None)]


def fresh(tree: Any) -> Any:
    """Return a copy of arguments, with memory of their own."""
    return pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, tree)


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def other_shape(t: Tensor, choose: random.Random) -> Tensor:
    if t.ndim == 0:
        return t.expand(choose.choice([(1,), (2,), (0,)])).clone()
    dim = choose.randrange(t.ndim)
    grown = torch.cat([t, t.new_ones((*t.shape[:dim], 1, *t.shape[dim + 1 :]))], dim)
    shapes = [grown, t.unsqueeze(dim), t.flatten(), t.narrow(dim, 0, 0), t.transpose(0, -1).contiguous()]
    if t.shape[dim]:
        shapes += [t.narrow(dim, 0, t.shape[dim] - 1), t.select(dim, 0)]
    return choose.choice(shapes).clone()


def other_strides(t: Tensor, choose: random.Random) -> Tensor:
    if choose.random() < 0.3 and t.numel():
        return t.flatten()[:1].clone().expand(t.numel()).view(t.shape)  # all values are one
    return torch.stack([t, t], -1)[..., 0] if choose.random() < 0.5 or t.ndim < 2 else t.mT.contiguous().mT


def other_values(t: Tensor, choose: random.Random) -> tuple[Tensor, bool]:
    """Return a tensor of other values, and whether results may be infinite or NaN for them."""
    t = t.clone(memory_format=torch.contiguous_format)
    if not t.numel() or t.device.type == "meta":
        return t, True
    flat, at = t.view(-1), choose.randrange(t.numel())
    if t.is_floating_point() or t.is_complex():
        flat[at] = choose.choice([*FLOATS[:-1], 1e4])
        return t, False
    if t.dtype == torch.bool:
        return ~t, True
    kinds = ["index", "index", "index", "same", "reversed", "ends", "sorted"]
    kind = choose.choice(kinds)
    if kind == "index":
        flat[at] = min(choose.choice([*INDICES, 2**62]), torch.iinfo(t.dtype).max) if t.dtype != torch.uint8 else 7
    elif kind == "same":
        flat[at] = flat[choose.randrange(t.numel())].item()
    elif kind == "reversed":
        t = t.flip(-1) if t.ndim else t
    elif kind == "ends":
        flat[-1] = flat[-1] + choose.choice([-1, 1, 2_000_000])
    else:
        t = t.sort(-1).values if t.ndim else t
    return t, True


def changed(leaf: Any, others: list[Any], choose: random.Random) -> tuple[Any, bool]:
    """Return something that does not fit in place of an argument, and whether results must still be finite."""
    if choose.random() < 0.06:
        return choose.choice([None, *others]), False
    if isinstance(leaf, Tensor):
        kind = choose.choice(["shape", "shape", "values", "values", "strides", "dtype", "meta"])
        if kind == "shape":
            return other_shape(leaf, choose), True
        if kind == "values":
            return other_values(leaf, choose)
        if kind == "strides":
            return other_strides(leaf, choose), True
        if kind == "meta":
            return leaf.to("meta"), False
        return leaf.to(choose.choice(DTYPES)), False
    if isinstance(leaf, bool):
        return not leaf, True
    if isinstance(leaf, int):
        return choose.choice(INTEGERS), False
    if isinstance(leaf, float):
        return choose.choice(FLOATS), False
    if isinstance(leaf, torch.dtype):
        return choose.choice(DTYPES), False
    return choose.choice(["rms", "meta", "", None]), False


def change(call: Call, choose: random.Random) -> tuple[Call, bool]:
    """Return a call of which one to three arguments do not fit, and whether its results must be finite."""
    args, kwargs = fresh((call.args, call.kwargs))
    if call.bare and choose.random() < 0.05:  # memory that is gone, as FSDP leaves parameters
        choose.choice(tensors_of(args)).untyped_storage().resize_(0)
        return call._replace(args=args), False
    leaves, spec = pytree.tree_flatten((args, kwargs))
    finite = True
    for _ in range(choose.choice([1, 1, 1, 2, 3])):
        i = choose.randrange(len(leaves))
        leaves[i], fine = changed(leaves[i], leaves, choose)
        finite &= fine
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    if call.name.endswith("adamw_ema") and choose.random() < 0.3:
        lists = [v for v in [*args, *kwargs.values()] if isinstance(v, list)]
        chosen = choose.choice(lists)
        chosen[:] = choose.choice([chosen[:1], [], chosen + chosen, chosen[::-1]])
    if not call.bare and call.name not in PLAIN:
        kwargs["impl"] = choose.choice(["fused", "fused", None, "reference"])
    return call._replace(args=args, kwargs=kwargs), finite


def unwritten(outs: list[Tensor]) -> list[int]:
    """Return which results have values that were not written, as they are NaN or the largest integer."""
    bad = []
    for i, out in enumerate(outs):
        if type(out) is not Tensor or out.device.type != "cpu":
            continue
        nothing = out.isnan()
        if out.dtype in (torch.int32, torch.int64):
            nothing = out == torch.iinfo(out.dtype).max
        if nothing.any():
            bad.append(i)
    return bad


def described(call: Call) -> str:
    def of(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        shown = leaf.device.type == "cpu" and not leaf.is_floating_point() and leaf.untyped_storage().size()
        values = leaf.tolist() if shown and leaf.numel() < 20 else ""
        return f"<{leaf.dtype} {tuple(leaf.shape)} strides {leaf.stride()} on {leaf.device} {values}>"

    return f"{call.name} {pytree.tree_map(of, (call.args, call.kwargs))}"


def cases(seed: int, bare: bool, first: int = 0) -> Iterator[tuple[int, Call, bool, list[str]]]:
    """Yield numbered cases without end: the call, whether its results must be finite, what is differentiated."""
    calls = valid_calls(bare)
    for number in itertools.count(first):
        choose = random.Random(f"{seed} {number}")
        torch.manual_seed(number)
        call, finite = change(calls[number % len(calls)], choose)
        names = [] if call.bare or call.name in WITHOUT_GRADIENTS else DIFFERENTIABLE.get(call.name, floats(call))
        if choose.random() < 0.1:
            names = floats(call)
        names = [name for name in names if name in floats(call)] if choose.random() < 0.7 else []
        yield number, call, finite, names


def main() -> int:
    """Run cases for a time; return 1 if one returned what was not written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run one alone, and print it first")
    parser.add_argument("--log", type=Path, default=Path(os.devnull), help="holds the number of the case that runs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what is allocated without values with NaN
    bare = any(row.kernel == "native" for row in kernels.backends())
    end = time.monotonic() + options.seconds
    returned = 0
    with options.log.open("w") as log:
        for number, call, finite, tracked in cases(options.seed, bare, options.case or 0):
            log.seek(0)
            log.write(f"{number}\n")
            log.flush()
            if options.case is not None:
                sys.stdout.write(f"{described(call)}\n")
                sys.stdout.flush()
            try:
                outs = run(call, tracked)
            except Exception as error:  # noqa: BLE001  (any that Python can report)
                outs = []
                if options.case is not None:
                    sys.stdout.write(f"{type(error).__name__}: {error}\n")
            returned += bool(outs)
            if finite and unwritten(outs):
                where = f"results {unwritten(outs)} of {described(call)}"
                sys.stdout.write(f"case {number} returned what was not written: {where}\n")
                return 1
            if options.case is not None or time.monotonic() > end:
                break
    sys.stdout.write(f"{number + 1} cases, {returned} returned\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
