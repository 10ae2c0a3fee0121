"""The masked diffusion transformer (MaskDiT, arXiv 2306.09305), with the published parameter names.

Published checkpoints load unchanged.
"""

import abc
import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fastmask.kernels import Impl, Mask, embed_kept_patches, gather_tokens, restore_tokens
from fastmask.kernels.modulate_norm import Norm
from fastmask.models.block_config import BlockConfig
from fastmask.models.condition import ClassConditional, Condition, is_readable
from fastmask.models.layers import (
    Block,
    LabelEmbedding,
    ModulatedLinear,
    PatchEmbedding,
    TimeEmbedding,
    sincos_position,
)
from fastmask.models.stack import Grid, LossOn, NetworkConfig, Stack, Tap, check_patches, check_width, run_stack

# Condition embedding, form of the ops, whether blocks are recomputed, grids of patches, tap: the last arguments of
# `run_stack`.
Options = tuple[Tensor, Impl | None, bool, list[Grid], Tap | None]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MaskDiTConfig(BlockConfig):
    """The sizes of a `MaskDiT`; without a decoder it is a plain DiT, which trains unmasked."""

    name: ClassVar[str] = "maskdit"
    loss_on: ClassVar[LossOn] = "split"

    patch_size: int = 2
    """Side of a patch in pixels (of the latent, where latents are trained on)."""
    width: int = 96
    """Width of the encoder."""
    depth: int = 4
    """Number of blocks of the encoder."""
    num_heads: int = 2
    """Number of attention heads of the encoder."""
    decoder_width: int = 64
    """Width of the decoder."""
    decoder_depth: int = 2
    """Number of blocks of the decoder; 0 is a plain DiT, which trains unmasked."""
    decoder_num_heads: int = 2
    """Number of attention heads of the decoder."""
    frequency_shift: int = 0
    """Shift of the time embedding's frequencies, 10000^(-i / (128 - shift)): 0 as published, 1 as in diffusers' DiT."""

    @property
    def masked(self) -> bool:
        """Whether it can be trained on a part of the tokens."""
        return self.decoder_depth > 0

    def check(self, input_size: int) -> None:
        """Raise a ValueError that names the first size that cannot be, for images of this side."""
        check_patches(self.patch_size, input_size)
        if self.depth < 1 or self.decoder_depth < 0:
            raise ValueError(
                f"depth must be at least 1 and decoder_depth at least 0, not {self.depth} and {self.decoder_depth}"
            )
        sides = [("", self.width, self.num_heads), ("decoder_", self.decoder_width, self.decoder_num_heads)]
        if self.frequency_shift not in (0, 1):
            raise ValueError(f"frequency_shift must be 0 or 1, not {self.frequency_shift}")
        for side in sides if self.masked else sides[:1]:
            check_width(*side, self)

    def build(self, channels: int, input_size: int, num_classes: int) -> "MaskDiT":
        """Return a freshly initialised network for images of (channels, input_size, input_size)."""
        return MaskDiT(input_size, in_channels=channels, num_classes=num_classes, **dataclasses.asdict(self))


class MaskDiT(ClassConditional, nn.Module):
    """The network F, from noised images and conditions to raw patch tokens.

    With ``decoder_depth=0`` it is a plain DiT without masking: the blocks, then the head.

    Args:
        input_size: side of the (latent) image.
        patch_size: p.
        in_channels: C.
        width: D, hidden width of the encoder.
        depth: number of encoder blocks.
        num_heads: number of attention heads of the encoder.
        num_classes: labels are 0 .. num_classes - 1, and num_classes means no label; 0 is an unconditional network.
        decoder_width: E, hidden width of the decoder.
        decoder_depth: number of decoder blocks.
        decoder_num_heads: number of attention heads of the decoder.
        qk_norm: normalise the queries and keys of each head (arXiv 2302.05442), with learned scales.
        frequency_shift: see `fastmask.models.layers.time_frequencies`.
        norm: "layer" or "rms", see `BlockConfig`, as for the next two.
        mlp: "gelu" or "swiglu".
        rope: rotate queries and keys by their positions, see `fastmask.models.rotary`.
        impl: form of the ops: "fused", "reference", or None for the default of the device that `forward` runs on.

    Attributes:
        config: its sizes, but for images and classes.
        condition_width: width of the condition's embedding.
        path_drop: probability of dropping the middle of the network for a sample in training, see `drop_path`.
        checkpoint_blocks: keep only the input of each block for backward, and recompute the rest.

    Raises:
        ValueError: sizes that are not divisible as needed.
    """

    config: NetworkConfig
    pos_embed: Tensor
    decoder_pos_embed: Tensor
    path_drop: float = 0.0

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        width: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        num_classes: int = 1000,
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        qk_norm: bool = False,
        frequency_shift: int = 0,
        norm: Norm = "layer",
        mlp: Literal["gelu", "swiglu"] = "gelu",
        rope: bool = False,
        impl: Impl | None = None,
    ) -> None:
        super().__init__()
        self.impl = impl
        self.checkpoint_blocks = False
        self.config = config = MaskDiTConfig(
            patch_size=patch_size,
            width=width,
            depth=depth,
            num_heads=num_heads,
            decoder_width=decoder_width,
            decoder_depth=decoder_depth,
            decoder_num_heads=decoder_num_heads,
            qk_norm=qk_norm,
            frequency_shift=frequency_shift,
            norm=norm,
            mlp=mlp,
            rope=rope,
        )
        self.config.check(input_size)
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.num_classes, self.qk_norm = num_classes, qk_norm
        self.num_heads, self.decoder_num_heads = num_heads, decoder_num_heads
        side = input_size // patch_size
        self.length, self.condition_width = side**2, width
        values = patch_size * patch_size * in_channels

        self.x_embedder = PatchEmbedding(in_channels, width, patch_size)
        self.register_buffer("pos_embed", sincos_position(side, side, width))
        self.t_embedder = TimeEmbedding(width, frequency_shift)
        if num_classes:
            self.y_embedder = LabelEmbedding(num_classes, width)
        self.blocks = nn.ModuleList(Block(width, num_heads, width, config) for _ in range(depth))
        if decoder_depth:
            self.decoder_layer = ModulatedLinear(width, decoder_width, width, config)
            self.mask_token = nn.Parameter(torch.randn(1, 1, decoder_width) * 0.02)
            self.register_buffer("decoder_pos_embed", sincos_position(side, side, decoder_width))
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_width, decoder_num_heads, width, config) for _ in range(decoder_depth)
        )
        self.final_layer = ModulatedLinear(decoder_width if decoder_depth else width, values, width, config)

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The encoder (kept tokens) and the decoder (all tokens); a plain DiT is one stack over all tokens."""
        if not self.decoder_blocks:
            return (Stack(self.blocks, self.final_layer, "all"),)
        return Stack(self.blocks, self.decoder_layer, "kept"), Stack(self.decoder_blocks, self.final_layer, "all")

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        labels: Condition,
        mask: Mask | None = None,
        image_scale: Tensor | None = None,
        tap: Tap | None = None,
    ) -> Tensor:
        """Return F(image_scale * x), raw tokens of all positions.

        Args:
            x: noised images, shape (B, C, input_size, input_size).
            c_noise: time conditioning, shape (B,), from the coefficients of a process.
            labels: the condition: int64, shape (B,); ``num_classes`` means no label.
            mask: positions that the encoder sees; None is all. Samples can keep unequal numbers of positions.
            image_scale: scale of each image, shape (B,); None is 1.
            tap: collects the hidden state after its block.

        Returns:
            Shape (B, L, P), laid out (p, p, C) with channels fastest.
        """
        if x.shape[1:] != (self.in_channels, self.input_size, self.input_size):
            expected = (x.shape[0], self.in_channels, self.input_size, self.input_size)
            raise ValueError(f"images must have shape {expected}, not {tuple(x.shape)}")
        return self.forward_mixed([x], c_noise, labels, [mask], image_scale, tap)[0]

    def forward_mixed(
        self,
        images: Sequence[Tensor],
        c_noise: Tensor,
        labels: Condition,
        masks: Sequence[Mask | None],
        image_scale: Tensor | None = None,
        tap: Tap | None = None,
    ) -> list[Tensor]:
        """`forward` for images of several sizes, packed into one sequence of blocks.

        Args:
            images: noised images, each tensor of one size: (B1, C, H1, W1), (B2, C, H2, W2), .., with sides divisible
                by the patch size. Each has the position table of its own grid.
            c_noise: time conditioning, concatenated over the tensors of ``images``, shape (B1 + B2 + ..,).
            labels: int64, same shape as ``c_noise``.
            masks: a mask, or None, for each tensor of ``images``.
            image_scale: same shape as ``c_noise``.
            tap: as in `forward`.

        Returns:
            The raw tokens of each tensor of ``images``, as in `forward`.
        """
        self._check(images, c_noise, labels, masks)
        condition = self.t_embedder(c_noise)
        if self.conditional:
            condition = condition + self.embed_condition(labels)
        counts = [len(x) for x in images]
        scales = [None] * len(counts) if image_scale is None else torch.split(image_scale, counts)
        embedded = [self._embed(x, mask, scale) for x, mask, scale in zip(images, masks, scales, strict=True)]
        grids = [self._grid(x) for x in images]
        options = condition, self.impl, self.checkpoint_blocks, grids, tap
        return self._run_stacks(embedded, images, labels, masks, options)

    def embed_condition(self, labels: Condition) -> Tensor:
        """Return the embedding of the condition, (B, D), which is added to that of the time."""
        embedding: Tensor = self.y_embedder(labels)
        return embedding

    def drop_path(self, condition: Condition, chosen: Tensor | None = None) -> Condition:
        """Return the condition with the middle of the network dropped, for a network that can run without it.

        Args:
            condition: the condition of B samples.
            chosen: bool, shape (B,), on the same device; None is all samples, for which the middle is not run.

        Raises:
            ValueError: this network has no path to drop.
        """
        raise ValueError(f"network {self.config.name} has no path to drop, as network sprint has")

    def _run_stacks(
        self,
        embedded: list[Tensor],
        images: Sequence[Tensor],
        labels: Condition,
        masks: Sequence[Mask | None],
        options: Options,
    ) -> list[Tensor]:
        """Return the raw tokens of each tensor of embedded patches, which are the kept ones; see `forward_mixed`."""
        if not self.decoder_blocks:
            return run_stack(self.stacks[0], embedded, masks, *options)
        encoder, decoder = self.stacks
        kept = run_stack(encoder, embedded, masks, *options)
        restored = [self._restore(part, x, mask) for part, x, mask in zip(kept, images, masks, strict=True)]
        return run_stack(decoder, restored, [None] * len(images), *options)

    def _embed(self, x: Tensor, mask: Mask | None, image_scale: Tensor | None) -> Tensor:
        """Embed the kept patches of images of one size: (B, K, D), or packed (N, D)."""
        proj = self.x_embedder.proj
        tokens: Tensor = embed_kept_patches(
            x,
            proj.weight,
            proj.bias,  # type: ignore[arg-type]
            self._positions(x, self.pos_embed),
            None if mask is None else mask.ids_keep,
            cu_seqlens=None if mask is None else mask.cu_seqlens,
            patch_size=self.patch_size,
            image_scale=image_scale,
            impl=self.impl,
        )
        return tokens

    def _restore(self, kept: Tensor, x: Tensor, mask: Mask | None) -> Tensor:
        """Return tokens of all positions, (B, L, E), with the decoder's position table added."""
        position = self._positions(x, self.decoder_pos_embed)
        if mask is None:
            return kept + position
        token = self.mask_token[0, 0]
        cu_seqlens = mask.cu_seqlens
        return restore_tokens(kept, token, position, mask.ids_restore, cu_seqlens=cu_seqlens, impl=self.impl)  # type: ignore[no-any-return]

    def _keep(self, tokens: Tensor, mask: Mask | None) -> Tensor:
        """Return the kept ones of tokens (B, L, D): (B, K, D), or packed (N, D)."""
        if mask is None:
            return tokens
        kept: Tensor = gather_tokens(tokens, mask.ids_keep, cu_seqlens=mask.cu_seqlens, impl=self.impl)
        return kept

    def _place(self, kept: Tensor, token: Tensor, mask: Mask) -> Tensor:
        """Return tokens of all positions, (B, L, D): the kept ones in place, and ``token`` (D,) elsewhere."""
        position = torch.zeros((mask.ids_restore.shape[1], kept.shape[-1]), dtype=kept.dtype, device=kept.device)
        rows = mask.cu_seqlens
        return restore_tokens(kept, token, position, mask.ids_restore, cu_seqlens=rows, impl=self.impl)  # type: ignore[no-any-return]

    def _positions(self, x: Tensor, table: Tensor) -> Tensor:
        """Return the position table for the patch grid of ``x``, shape (L, width)."""
        rows, columns = self._grid(x)
        if rows * columns == self.length and rows == columns:
            return table[0]
        return sincos_position(rows, columns, table.shape[2])[0].to(table)

    def _grid(self, x: Tensor) -> Grid:
        """Return the rows and columns of patches of images (B, C, H, W)."""
        return x.shape[2] // self.patch_size, x.shape[3] // self.patch_size

    def _check(
        self, images: Sequence[Tensor], c_noise: Tensor, labels: Condition, masks: Sequence[Mask | None]
    ) -> None:
        p = self.patch_size
        if not images or len(masks) != len(images):
            raise ValueError(f"a list of images needs a list of as many masks, not {len(images)} and {len(masks)}")
        for x in images:
            if x.ndim != 4 or x.shape[1] != self.in_channels or x.shape[2] % p or x.shape[3] % p:
                raise ValueError(
                    f"images must have shape (B, {self.in_channels}, H, W) of sides that patches of {p} divide, not "
                    f"{tuple(x.shape)}"
                )
        batch = sum(x.shape[0] for x in images)
        if c_noise.shape != (batch,):
            raise ValueError(f"c_noise must have shape ({batch},), not {tuple(c_noise.shape)}")
        self.check_condition(labels, batch, values=is_readable(labels))
        if any(mask is not None for mask in masks) and not self.config.masked:
            raise ValueError(
                "a network without a decoder (decoder_depth=0) cannot fill in dropped patches: pass no mask"
            )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class UndecodedConfig(BlockConfig, abc.ABC):
    """The sizes of an `Undecoded` network."""

    name: ClassVar[str]
    loss_on: ClassVar[LossOn]
    masked: ClassVar[bool] = True

    patch_size: int = 2
    """Side of a patch in pixels (of the latent, where latents are trained on)."""
    width: int = 96
    """Width of the network."""
    depth: int = 4
    """Number of blocks."""
    num_heads: int = 2
    """Number of attention heads."""

    def check(self, input_size: int) -> None:
        """Raise a ValueError that names the first invalid size, for images of this side."""
        check_patches(self.patch_size, input_size)
        check_width("", self.width, self.num_heads, self)

    @abc.abstractmethod
    def build(self, channels: int, input_size: int, num_classes: int) -> "Undecoded":
        """Return a freshly initialised network for images of (channels, input_size, input_size)."""


class Undecoded(MaskDiT):
    """A network without MaskDiT's decoder that embeds all patches, masked or not; the mask applies to later stacks.

    Args:
        config: its sizes.
        channels: C.
        input_size: side of the (latent) image.
        num_classes: as in `MaskDiT`.

    Raises:
        ValueError: sizes that are not divisible as needed.
    """

    def __init__(self, config: UndecodedConfig, channels: int, input_size: int, num_classes: int) -> None:
        config.check(input_size)
        super().__init__(
            input_size,
            config.patch_size,
            channels,
            config.width,
            config.depth,
            config.num_heads,
            num_classes,
            decoder_depth=0,
            **config.options(),
        )
        self.config = config

    def _embed(self, x: Tensor, mask: Mask | None, image_scale: Tensor | None) -> Tensor:
        """Embed all patches: (B, L, width of the first stack)."""
        return super()._embed(x, None, image_scale)
