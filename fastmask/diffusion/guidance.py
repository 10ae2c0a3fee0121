"""Guidance: classifier-free (arXiv 2207.12598), within an interval of noise levels, or by a weaker model.

The weaker model is another one, or the network itself without its middle path (SPRINT, arXiv 2510.21986).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastmask.diffusion.denoiser import Denoiser
from fastmask.diffusion.solvers import Denoise
from fastmask.models.condition import Condition, count_of, joined

Net = Callable[[Tensor, Tensor, Condition], Tensor]

ALL_LEVELS = (0.0, math.inf)


def guided(
    net: Denoiser,
    condition: Condition,
    cfg_scale: float,
    *,
    interval: tuple[float, float] = ALL_LEVELS,
    guide: Denoiser | None = None,
    path_drop: bool = False,
) -> Denoise:
    """Return the guided denoiser D_weak + scale * (D - D_weak), for float64 states.

    D_weak is the network without a condition, evaluated in one batch with D, or another model with the same condition
    (autoguidance, arXiv 2406.02507).

    Args:
        net: the denoiser.
        condition: what the network is told: labels, int64, shape (B,).
        cfg_scale: guidance scale; 1 evaluates only D.
        interval: noise levels b/a, (low, high], in which guidance applies (arXiv 2404.07724); elsewhere only D is
            evaluated.
        guide: the other model; None is the network without a condition.
        path_drop: whether D_weak is also without the middle path of the network, which is not run for it.

    Raises:
        ValueError: guidance by the condition for a network without one, a guide that does not fit the network, or no
            path to drop.
    """
    dtype, twice = net.model.pos_embed.dtype, condition
    weaker, without = guide, condition
    if guide is not None and path_drop:
        raise ValueError("the guide is either another model or the network without its path: give one of them")
    if guide is not None:
        check_guide(net, guide)
    elif path_drop:
        chosen = torch.ones(count_of(condition), dtype=torch.bool, device=net.model.pos_embed.device)
        weaker, without = net, net.model.drop_path(net.model.drop(condition, chosen))
    elif cfg_scale != 1:
        if not net.model.conditional:
            raise ValueError(
                "guidance needs a network with classes (num_classes above 0), or another model as a guide: leave "
                "cfg_scale out, or give it 1"
            )
        chosen = torch.ones(count_of(condition), dtype=torch.bool, device=net.model.pos_embed.device)
        twice = joined(condition, net.model.drop(condition, chosen))
    low, high = interval

    def evaluate(net: Net, inputs: Tensor, t: Tensor, condition: Condition) -> Tensor:
        times = torch.full((len(inputs),), float(t), dtype=inputs.dtype, device=inputs.device)
        return net(inputs, times, condition).double()

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        inputs = x.to(dtype)
        if cfg_scale == 1 or not low < net.process.level(t) <= high:
            return evaluate(net, inputs, t, condition)
        if weaker is None:
            strong, weak = evaluate(net, inputs.repeat(2, 1, 1, 1), t, twice).chunk(2)
        else:
            strong, weak = evaluate(net, inputs, t, condition), evaluate(weaker, inputs, t, without)
        return weak + cfg_scale * (strong - weak)

    return denoise


def check_guide(net: Denoiser, guide: Denoiser) -> None:
    """Raise a ValueError unless a model can guide another: same images, classes (or none) and kind of process."""
    ours, theirs = net.model, guide.model
    shapes = [(model.in_channels, model.input_size, model.input_size) for model in (ours, theirs)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the guide draws images of shape {shapes[1]}, and the network of {shapes[0]}")
    if theirs.num_classes not in (0, ours.num_classes):
        raise ValueError(f"the guide knows {theirs.num_classes} classes, and the network {ours.num_classes}")
    if type(net.process) is not type(guide.process):
        raise ValueError(f"the guide is of process {guide.process.name}, and the network of {net.process.name}")
