"""TREAD (arXiv 2501.04765): a DiT whose middle blocks see a random part of the tokens in training.

    f   = blocks 0 .. start - 1 of all tokens
    g   = blocks start .. end - 1 of the kept tokens of f
    out = blocks end .. depth - 1 of all tokens: g at the kept positions, f at the others

It has the weights of a plain DiT, and without a mask it is one. The loss is on all tokens.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fastmask.kernels import Mask
from fastmask.models.condition import Condition
from fastmask.models.maskdit import Options, Undecoded, UndecodedConfig
from fastmask.models.stack import LossOn, Stack, check_route, run_stack


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RoutedConfig(UndecodedConfig):
    """The sizes of a `Routed` network."""

    loss_on: ClassVar[LossOn] = "all"

    route_start: int = 1
    """First block that sees the kept tokens only, counted from 0."""
    route_end: int = 3
    """First block after these, which sees all tokens again."""

    def check(self, input_size: int) -> None:
        """Raise a ValueError that names the first invalid size, for images of this side."""
        UndecodedConfig.check(self, input_size)
        check_route(self.route_start, self.route_end, self.depth)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TreadConfig(RoutedConfig):
    """The sizes of a `Tread` network."""

    name: ClassVar[str] = "tread"

    def build(self, channels: int, input_size: int, num_classes: int) -> "Tread":
        """Return a freshly initialised network for images of (channels, input_size, input_size)."""
        return Tread(self, channels, input_size, num_classes)


class Routed(Undecoded):
    """A DiT of blocks of one width, of which those from `route_start` to `route_end` see the kept tokens only.

    Arguments as in `Undecoded`.
    """

    def __init__(self, config: RoutedConfig, channels: int, input_size: int, num_classes: int) -> None:
        super().__init__(config, channels, input_size, num_classes)
        self.route = config.route_start, config.route_end

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The blocks before the route, in it, and after it."""
        return self._split()

    def _split(self) -> tuple[Stack, Stack, Stack]:
        start, end = self.route
        return (
            Stack(self.blocks[:start], None, "all"),
            Stack(self.blocks[start:end], None, "kept"),
            Stack(self.blocks[end:], self.final_layer, "all"),
        )


class Tread(Routed):
    """The network F of TREAD; arguments as in `Routed`, called as `MaskDiT`."""

    def _run_stacks(
        self,
        embedded: list[Tensor],
        images: Sequence[Tensor],
        labels: Condition,
        masks: Sequence[Mask | None],
        options: Options,
    ) -> list[Tensor]:
        everywhere: list[Mask | None] = [None] * len(images)
        if masks == everywhere:
            return run_stack(Stack(self.blocks, self.final_layer, "all"), embedded, everywhere, *options)
        before, route, after = self.stacks
        first = run_stack(before, embedded, everywhere, *options)
        kept = [self._keep(part, mask) for part, mask in zip(first, masks, strict=True)]
        routed = run_stack(route, kept, masks, *options)
        merged = [self._merge(*part) for part in zip(first, routed, masks, strict=True)]
        return run_stack(after, merged, everywhere, *options)

    def _merge(self, first: Tensor, routed: Tensor, mask: Mask | None) -> Tensor:
        """Return the routed tokens at their positions, and those of before the route elsewhere: (B, L, D)."""
        if mask is None:
            return routed
        placed = self._place(routed, torch.zeros_like(first[0, 0]), mask)
        return torch.where(mask.dropped[..., None], first, placed)
