"""SPRINT (arXiv 2510.21986): a DiT whose middle blocks see a few of the tokens, with a connection around them.

    f   = blocks 0 .. start - 1 of all tokens
    g   = blocks start .. end - 1 of the kept tokens of f, and the mask token at the other positions
    h   = Linear([g; f]) = W_g g + W_f f + b
    out = blocks end .. depth - 1 of h

W_g is applied before the tokens are put back in place, to the kept ones and to the mask token, which is the same and
less work. The loss is on all tokens. In training the middle path is dropped for some samples: g is the mask token
everywhere. The network without its middle and without a label is what guides it in sampling (path-drop guidance).
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmask.fields import check_share, recorded
from fastmask.kernels import Mask
from fastmask.models.condition import Condition
from fastmask.models.maskdit import Options
from fastmask.models.stack import Stack, run_stack
from fastmask.models.tread import Routed, RoutedConfig


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SprintConfig(RoutedConfig):
    """The sizes of a `Sprint` network."""

    name: ClassVar[str] = "sprint"

    path_drop: float = recorded(0.1)
    """Probability of dropping the middle path of a sample in training, for path-drop guidance."""

    def check(self, input_size: int) -> None:
        """Raise a ValueError that names the first invalid size, for images of this side."""
        RoutedConfig.check(self, input_size)
        check_share(self, "path_drop")

    def build(self, channels: int, input_size: int, num_classes: int) -> "Sprint":
        """Return a freshly initialised network for images of (channels, input_size, input_size)."""
        return Sprint(self, channels, input_size, num_classes)


class PathDrop(NamedTuple):
    """A condition, and the samples whose middle path is dropped.

    Attributes:
        condition: the condition of B samples.
        dropped: bool, shape (B,).
    """

    condition: Condition
    dropped: Tensor


class NoPath(NamedTuple):
    """A condition of samples whose middle path is dropped: the middle is not run."""

    condition: Condition


class Sprint(Routed):
    """The network F of SPRINT; arguments as in `Routed`, called as `MaskDiT`.

    Its condition is that of `MaskDiT`, or a `PathDrop` or `NoPath` of one.
    """

    def __init__(self, config: SprintConfig, channels: int, input_size: int, num_classes: int) -> None:
        super().__init__(config, channels, input_size, num_classes)
        width = config.width
        self.path_drop = config.path_drop
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        # The halves of one Linear of 2 D inputs, initialised as one.
        self.fuse_middle, self.fuse_first = nn.Linear(width, width, bias=False), nn.Linear(width, width)
        bound = (6 / (3 * width)) ** 0.5
        for linear in (self.fuse_middle, self.fuse_first):
            nn.init.uniform_(linear.weight, -bound, bound)
        nn.init.zeros_(self.fuse_first.bias)

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The first blocks, the middle, and the last blocks."""
        first, middle, last = self._split()
        return first._replace(linears=(self.fuse_first,)), middle._replace(linears=(self.fuse_middle,)), last

    def drop_path(self, condition: Condition, chosen: Tensor | None = None) -> Condition:
        """Return the condition with the middle path dropped for the chosen samples; None is all, see `MaskDiT`."""
        return NoPath(condition) if chosen is None else PathDrop(condition, chosen)

    def check_condition(self, condition: Condition, batch: int, *, values: bool = True) -> None:
        """Raise a ValueError unless this is a condition of ``batch`` samples; see `ClassConditional`."""
        super().check_condition(_inner(condition), batch, values=values)
        if not isinstance(condition, PathDrop):
            return
        dropped = condition.dropped
        if dropped.shape != (batch,) or dropped.dtype != torch.bool:
            raise ValueError(
                f"dropped must be bool of shape ({batch},), not {dropped.dtype} of shape {tuple(dropped.shape)}"
            )

    def embed_condition(self, labels: Condition) -> Tensor:
        """Return the embedding of the condition, (B, D), which is added to that of the time."""
        return super().embed_condition(_inner(labels))

    def _run_stacks(
        self,
        embedded: list[Tensor],
        images: Sequence[Tensor],
        labels: Condition,
        masks: Sequence[Mask | None],
        options: Options,
    ) -> list[Tensor]:
        everywhere: list[Mask | None] = [None] * len(images)
        before, middle, after = self.stacks
        first = run_stack(before, embedded, everywhere, *options)
        skipped = [self.fuse_first(part) for part in first]
        if isinstance(labels, NoPath):
            restored = [self._token(part.dtype) for part in skipped]
        else:
            kept = [self._keep(part, mask) for part, mask in zip(first, masks, strict=True)]
            ran = [self.fuse_middle(part) for part in run_stack(middle, kept, masks, *options)]
            restored = self._restored(ran, masks, labels.dropped if isinstance(labels, PathDrop) else None)
        # The sum has the dtype of the residual stream: autocast's Linears return 16 bits.
        fused = [g.to(part.dtype) + f for g, f, part in zip(restored, skipped, first, strict=True)]
        return run_stack(after, fused, everywhere, *options)

    def _restored(self, ran: list[Tensor], masks: Sequence[Mask | None], dropped: Tensor | None) -> list[Tensor]:
        """Return W_g g of all positions, (B, L, D) each, from that of the kept ones."""
        if dropped is None and all(mask is None for mask in masks):
            return ran
        token = self._token(ran[0].dtype)
        placed = [
            part if mask is None else self._place(part, token, mask) for part, mask in zip(ran, masks, strict=True)
        ]
        if dropped is None:
            return placed
        split = torch.split(dropped, [len(part) for part in placed])
        return [torch.where(d[:, None, None], token, part) for d, part in zip(split, placed, strict=True)]

    def _token(self, dtype: torch.dtype) -> Tensor:
        """Return W_g of the mask token, shape (D,)."""
        return F.linear(self.mask_token[0], self.fuse_middle.weight)[0].to(dtype)


def _inner(condition: Condition) -> Condition:
    """Return the condition without what it says of the path."""
    return condition.condition if isinstance(condition, PathDrop | NoPath) else condition
