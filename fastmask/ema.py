"""The exponential moving average of the weights, which is what samples are drawn with."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class EMA:
    """Averaged parameters of a module, in fp32 and on its device.

    Args:
        module: whose parameters are averaged; the average starts at their present values.
        decay: share of the average that stays at each update.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights: dict[str, Tensor] = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average toward the module: average = decay * average + (1 - decay) * parameter."""
        parameters = [p.detach() for p in module.parameters()]
        torch._foreach_lerp_(list(self.weights.values()), parameters, 1 - self.decay)

    @contextlib.contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Let the module compute with the averaged weights inside the block, without copying."""
        own = {name: p.data for name, p in module.named_parameters()}
        try:
            for name, parameter in module.named_parameters():
                parameter.data = self.weights[name]
            yield
        finally:
            for name, parameter in module.named_parameters():
                parameter.data = own[name]
