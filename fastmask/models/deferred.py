"""Deferred masking (micro-diffusion, arXiv 2407.15811): a light patch mixer sees all tokens before most are dropped.

    f = mixer blocks, of a width of their own, of all tokens
    h = Linear(modulated norm(f)), of the network's width
    F = head(blocks of the kept tokens of h)

The kept tokens know of the dropped ones from the mixer. The dropped ones have no output, so the loss is on the kept
ones. Patches are embedded in the mixer's width, with the position table, once: the blocks after it have none of their
own. The condition of all blocks is the same.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from fastmask.kernels import Mask
from fastmask.models.condition import Condition
from fastmask.models.layers import Block, ModulatedLinear, PatchEmbedding, sincos_position
from fastmask.models.maskdit import Options, Undecoded, UndecodedConfig
from fastmask.models.stack import LossOn, Stack, check_width, run_stack


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DeferredConfig(UndecodedConfig):
    """The sizes of a `Deferred` network."""

    name: ClassVar[str] = "deferred"
    loss_on: ClassVar[LossOn] = "kept"

    mixer_width: int = 64
    """Width of the patch mixer, whose blocks see all tokens."""
    mixer_depth: int = 2
    """Number of blocks of the patch mixer."""
    mixer_num_heads: int = 2
    """Number of attention heads of the patch mixer."""

    def check(self, input_size: int) -> None:
        """Raise a ValueError that names the first invalid size, for images of this side."""
        if self.depth < 1 or self.mixer_depth < 1:
            raise ValueError(
                f"depth and mixer_depth must be at least 1, not {self.depth} and {self.mixer_depth}; without a mixer "
                f"the network is maskdit"
            )
        UndecodedConfig.check(self, input_size)
        check_width("mixer_", self.mixer_width, self.mixer_num_heads, self)

    def build(self, channels: int, input_size: int, num_classes: int) -> "Deferred":
        """Return a freshly initialised network for images of (channels, input_size, input_size)."""
        return Deferred(self, channels, input_size, num_classes)


class Deferred(Undecoded):
    """The network F of deferred masking, called as `MaskDiT`; the raw tokens of dropped positions are zero.

    Arguments as in `Undecoded`.
    """

    def __init__(self, config: DeferredConfig, channels: int, input_size: int, num_classes: int) -> None:
        super().__init__(config, channels, input_size, num_classes)
        width, side = config.mixer_width, input_size // config.patch_size
        self.x_embedder = PatchEmbedding(channels, width, config.patch_size)
        self.pos_embed = sincos_position(side, side, width)
        self.mixer = nn.ModuleList(
            Block(width, config.mixer_num_heads, config.width, config) for _ in range(config.mixer_depth)
        )
        self.mixer_exit = ModulatedLinear(width, config.width, config.width, config)
        # Zeros, as in the head, would stay: the tokens have no position table after them, and a norm of zeros is zero.
        nn.init.xavier_uniform_(self.mixer_exit.linear.weight)

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The patch mixer, and the blocks of the kept tokens."""
        return Stack(self.mixer, self.mixer_exit, "all"), Stack(self.blocks, self.final_layer, "kept")

    def _run_stacks(
        self,
        embedded: list[Tensor],
        images: Sequence[Tensor],
        labels: Condition,
        masks: Sequence[Mask | None],
        options: Options,
    ) -> list[Tensor]:
        mixer, backbone = self.stacks
        mixed = run_stack(mixer, embedded, [None] * len(images), *options)
        # The residual stream has the dtype of the embedded patches: autocast's Linears return 16 bits.
        kept = [self._keep(part, mask).to(embedded[0].dtype) for part, mask in zip(mixed, masks, strict=True)]
        raw = run_stack(backbone, kept, masks, *options)
        return [part if mask is None else self._all_values(part, mask) for part, mask in zip(raw, masks, strict=True)]

    def _all_values(self, raw: Tensor, mask: Mask) -> Tensor:
        """Return raw tokens of all positions, (B, L, P): the kept ones in place, and zeros elsewhere."""
        values = raw.shape[-1]
        # The widths of the fused kernel are multiples of 8.
        padded = F.pad(raw, (0, -values % 8)) if values % 8 else raw
        return self._place(padded, padded.new_zeros(padded.shape[-1]), mask)[..., :values]
