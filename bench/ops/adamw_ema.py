"""adamw_ema on the fp32 parameters of one encoder block with one EMA, as in training.

Compared with torch's fused AdamW followed by a foreach EMA, which are two passes.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from bench.ops._description import Description, Op, Shapes, bare_shapes
from fastmask.kernels import adamw_ema
from fastmask.kernels.adamw_ema import adamw_ema_reference

BETAS, EPS, DECAY = (0.9, 0.999), 1e-8, 0.9999
# Linears with bias by their outputs and inputs, in widths: qkv, proj, the two of the MLP, and the modulation's.
BLOCK = ((3, 1), (1, 1), (4, 1), (1, 4), (6, 1))
LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs")


def op(shapes: Shapes, linears: tuple[tuple[int, int], ...] = BLOCK, averages: int = 1, **more: bool) -> Op:
    """Describe the update of some Linears.

    Args:
        shapes: the shapes; of them only the width counts.
        linears: outputs and inputs of each Linear, in widths.
        averages: number of EMAs.
        more: ``copies``: also update bf16 copies; ``scaled``: scale the gradients.
    """
    width, copies, scaled = shapes.width, more.get("copies", False), more.get("scaled", False)
    sizes = [size for out, into in linears for size in ((out * width, into * width), (out * width,))]
    changed = ("params", "exp_avgs", "exp_avg_sqs", *(f"averages{k}" for k in range(averages)))

    def listed(function: Callable[..., Any], **options: Any) -> Callable[..., tuple[Tensor, ...]]:
        def call(lr: Tensor, step: Tensor, rates: Tensor, **named: Tensor) -> tuple[Tensor, ...]:
            lists: dict[str, list[Tensor]] = {}
            for name, tensor in named.items():
                lists.setdefault(name.rpartition(".")[0] or name, []).append(tensor)
            given: dict[str, Any] = {name: lists[name] for name in (*LISTS, *(("copies",) if copies else ()))}
            given |= {name: named[name] for name in ("factor", "found_inf") if scaled}
            given |= {"averages": [lists[f"averages{k}"] for k in range(averages)], "steps": [step] * len(sizes)}
            function(**given, lr=lr, rates=rates, betas=BETAS, eps=EPS, **options)
            return tuple(tensor for name in changed for tensor in lists[name])

        return call

    def by_torch(steps: list[Tensor], betas: tuple[float, float], averages: Any, rates: Any, **rest: Any) -> None:
        before = [step - 1 for step in steps]  # it increments them
        params, *others = (rest.pop(name) for name in LISTS)
        options = {"beta1": betas[0], "beta2": betas[1], "weight_decay": 0.0, "amsgrad": False, "maximize": False}
        adamw(params, *others, [], before, fused=True, **options, **rest)
        torch._foreach_lerp_(averages[0], params, 1 - DECAY)

    inputs = {
        f"{name}.{i}": shapes.normal(*size, dtype=torch.float32)
        for name in (*LISTS, *changed[3:])
        for i, size in enumerate(sizes)
    }
    inputs = {name: t.square() if name.startswith("exp_avg_sqs") else t for name, t in inputs.items()}
    inputs |= {"lr": shapes.scalar(1e-4), "step": shapes.scalar(100.0)}
    inputs["rates"] = torch.full((averages,), 1 - DECAY, device=shapes.device)
    if copies:
        inputs |= {f"copies.{i}": shapes.normal(*size, dtype=torch.bfloat16) for i, size in enumerate(sizes)}
    if scaled:
        inputs |= {"factor": shapes.scalar(0.5), "found_inf": shapes.scalar(0.0)}
    count = sum(map(math.prod, sizes))
    return Op(
        name="adamw_ema",
        shape=f"N={count}, one block of D={width}",
        inputs=inputs,
        leaves=(),
        again=(),
        reference=listed(adamw_ema_reference, weight_decay=0.0),
        fused=listed(adamw_ema, weight_decay=0.0, impl="fused"),
        kernel="adamw_ema",
        others={"torch fused": listed(by_torch)},
        in_place=True,
    )


def launches(widths: list[int]) -> Iterator[tuple[str, Op]]:
    """No, one and two EMAs, with and without copies, of scaled gradients."""
    _, shapes = next(bare_shapes(max(widths)))
    for averages, copies in ((0, False), (1, False), (1, True), (2, True)):
        label = f"{averages} EMA{' bf16 copy' if copies else ''}"
        yield label, op(shapes, ((1, 1),), averages, copies=copies, scaled=True)


DESCRIPTION = Description(
    forms={"block": op},
    directions=("forward",),
    counted=functools.partial(op, linears=((4, 1),)),
    launches=launches,
    narrow={"_adamw_ema_kernel": 16},  # table entries, bias corrections, EMA rates, and three for the step
)
