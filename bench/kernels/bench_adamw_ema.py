"""adamw_ema on the fp32 parameters of one encoder block with one EMA, as in training.

Compared with torch's fused AdamW followed by a foreach EMA, which are two passes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from bench.kernels._cases import Op, Shapes
from fastmask.kernels import adamw_ema
from fastmask.kernels.adamw_ema import adamw_ema_reference

DIRECTIONS = ("forward",)
BETAS, EPS, DECAY = (0.9, 0.999), 1e-8, 0.9999


def op(shapes: Shapes) -> Op:
    width = shapes.width
    # qkv, proj, the two Linears of the MLP and the modulation's Linear, each with bias.
    sizes = [size for out, into in ((3, 1), (1, 1), (4, 1), (1, 4), (6, 1)) for size in (out * into * width, out)]
    sizes = [size * width for size in sizes]
    count = sum(sizes)

    def listed(function: Callable[..., Any], **options: Any) -> Callable[..., tuple[Tensor, ...]]:
        def call(lr: Tensor, step: Tensor, rates: Tensor, **flat: Tensor) -> tuple[Tensor, ...]:
            lists = {name: list(t.split(sizes)) for name, t in flat.items()}
            average = lists.pop("average")
            steps = [step] * len(sizes)
            function(**lists, steps=steps, lr=lr, betas=BETAS, eps=EPS, averages=[average], rates=rates, **options)
            return tuple(flat[name] for name in ("params", "exp_avgs", "exp_avg_sqs", "average"))

        return call

    def by_torch(steps: list[Tensor], betas: tuple[float, float], averages: Any, rates: Any, **rest: Any) -> None:
        before = [step - 1 for step in steps]  # it increments them
        lists = (rest.pop(name) for name in ("params", "grads", "exp_avgs", "exp_avg_sqs"))
        params, *others = lists
        options = {"beta1": betas[0], "beta2": betas[1], "weight_decay": 0.0, "amsgrad": False, "maximize": False}
        adamw(params, *others, [], before, fused=True, **options, **rest)
        torch._foreach_lerp_(averages[0], params, 1 - DECAY)

    names, still = ("params", "grads", "exp_avgs", "average"), {"weight_decay": 0.0}
    return Op(
        name="adamw_ema",
        shape=f"N={count}, one block of D={width}",
        inputs={
            **{name: shapes.normal(count, dtype=torch.float32) for name in names},
            "exp_avg_sqs": shapes.normal(count, dtype=torch.float32).square(),
            "lr": torch.tensor(1e-4, device=shapes.device),
            "step": torch.tensor(100.0, device=shapes.device),
            "rates": torch.tensor([1 - DECAY], device=shapes.device),
        },
        leaves=(),
        again=(),
        reference=listed(adamw_ema_reference, **still),
        fused=listed(adamw_ema, impl="fused"),
        kernel="adamw_ema",
        others={"torch fused": listed(by_torch)},
        in_place=True,
    )


FORMS = {"block": op}


def bench_adamw_ema(kernel_case, timed):
    kernel_case.check()
    timed(kernel_case)
