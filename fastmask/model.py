"""The masked diffusion transformer (MaskDiT, arXiv 2306.09305; blocks of DiT, arXiv 2212.09748).

Parameters carry the published names, so published checkpoints load as they are.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastmask.kernels import (
    Impl,
    Mask,
    add_gated_linear,
    attention,
    embed_kept_patches,
    gelu_linear,
    modulated_linear,
    restore_tokens,
    silu_linear,
)


def sincos_position(rows: int, columns: int, width: int) -> Tensor:
    """Return the fixed 2-D position table of a grid of patches (MAE, arXiv 2111.06377).

    The first half of an entry encodes the column of the patch, the second half its row; each half is sines, then
    cosines, of the coordinate times 10000^(-i / (width / 4)).

    Returns:
        Shape (1, rows * columns, width), fp32, positions row by row.
    """
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(max(rows, columns), dtype=torch.float64)[:, None] * frequency  # (side, width / 4)
    encoded = torch.cat([angle.sin(), angle.cos()], dim=1)  # (side, width / 2)
    table = torch.cat([encoded[:columns].repeat(rows, 1), encoded[:rows].repeat_interleave(columns, 0)], dim=1)
    return table.float()[None]


class PatchEmbedding(nn.Module):
    """Holds the weights of the patch embedding in the layout of a convolution."""

    def __init__(self, in_channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, patch_size)
        nn.init.xavier_uniform_(self.proj.weight.view(width, -1))
        nn.init.zeros_(self.proj.bias)  # type: ignore[arg-type]


class TimeEmbedding(nn.Module):
    """c_noise (B,) -> (B, D): a sinusoid of 256 features, then an MLP."""

    FEATURES = 256

    def __init__(self, width: int) -> None:
        super().__init__()
        into, out_of = nn.Linear(self.FEATURES, width), nn.Linear(width, width)
        for linear in (into, out_of):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        self.mlp = nn.Sequential(into, nn.SiLU(), out_of)

    def forward(self, c_noise: Tensor) -> Tensor:
        """Return the embedding of (B,) noise conditions."""
        half = self.FEATURES // 2
        frequency = torch.exp(torch.arange(half, device=c_noise.device) * (-math.log(10000.0) / half))
        angle = c_noise[:, None].to(torch.promote_types(c_noise.dtype, torch.float32)) * frequency
        features = torch.cat([angle.cos(), angle.sin()], dim=1)
        out: Tensor = self.mlp(features.to(next(self.mlp.parameters()).dtype))
        return out


class LabelEmbedding(nn.Module):
    """Labels (B,) -> (B, D): one column of the table; label ``num_classes`` means no label and is the zero vector."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Linear(num_classes, width, bias=False)
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, labels: Tensor) -> Tensor:
        """Return the embedding of (B,) int64 labels."""
        known = (labels < self.num_classes)[:, None]
        rows = F.embedding(labels.clamp(max=self.num_classes - 1), self.embedding_table.weight.t())
        return torch.where(known, rows, 0.0)


class Packing(NamedTuple):
    """Where the samples of packed tokens (N, D) lie, for those that are not dense (B, K, D).

    Attributes:
        cu_seqlens: int32, shape (B + 1,): sample b is in rows cu_seqlens[b] .. cu_seqlens[b + 1] - 1.
        max_seqlen: no sample has more tokens.
    """

    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None


class Attention(nn.Module):
    """Multi-head self-attention. Its first Linear, `qkv`, is computed together with the norm before it."""

    def __init__(self, width: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = _linear(width, 3 * width)
        self.proj = _linear(width, width)
        self.qk_norm = qk_norm
        if qk_norm:
            self.q_norm, self.k_norm = (nn.RMSNorm(width // num_heads, eps=1e-6) for _ in range(2))

    def forward(self, qkv: Tensor, packing: Packing) -> Tensor:
        """Return attention among the tokens of each sample, (B, K, D) or (N, D), from their three projections."""
        q, k, v = qkv.view(*qkv.shape[:-1], 3, self.num_heads, -1).unbind(-3)  # (B, K, H, D/H) or (N, H, D/H)
        if self.qk_norm:
            q, k = _rms_norm(q, self.q_norm), _rms_norm(k, self.k_norm)
        attended = attention(q, k, v, cu_seqlens=packing.cu_seqlens, max_seqlen=packing.max_seqlen)
        out: Tensor = self.proj(attended.flatten(-2))
        return out


def _rms_norm(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """Return a norm in the dtype of ``x``, to which the scale is rounded: PyTorch fuses it for one dtype alone."""
    return F.rms_norm(x, x.shape[-1:], norm.weight.to(x.dtype), norm.eps)


class MLP(nn.Module):
    """Linear D -> 4 D, tanh-GELU, Linear 4 D -> D. The first, `fc1`, is computed together with the norm before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = _linear(width, 4 * width)
        self.fc2 = _linear(4 * width, width)

    def forward(self, hidden: Tensor, impl: Impl | None) -> Tensor:
        """Return the rest of the MLP, (..., D), from the hidden values before GELU, (..., 4 D)."""
        return gelu_linear(hidden, self.fc2.weight, self.fc2.bias, impl=impl)


class Stream(NamedTuple):
    """The residual stream between blocks: x + gate * branch, which the next norm adds up as it reads them.

    Attributes:
        x: tokens, shape (B, K, D) or (N, D).
        branch: of the shape of ``x``; None before the first block.
        gate: shape (B, D).
    """

    x: Tensor
    branch: Tensor | None = None
    gate: Tensor | None = None

    def enter(
        self, shift: Tensor, scale: Tensor, linear: nn.Linear, packing: Packing, impl: Impl | None
    ) -> tuple[Tensor, Tensor]:
        """Return the residual added up, and a Linear of its modulated norm."""
        weights = shift, scale, linear.weight, linear.bias
        if self.branch is None or self.gate is None:
            return self.x, modulated_linear(self.x, *weights, cu_seqlens=packing.cu_seqlens, impl=impl)
        return add_gated_linear(self.x, self.branch, self.gate, *weights, cu_seqlens=packing.cu_seqlens, impl=impl)


class Block(nn.Module):
    """An adaLN-Zero block, but for its last residual addition, which is done with the norm that follows."""

    def __init__(self, width: int, num_heads: int, condition_width: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.attn = Attention(width, num_heads, qk_norm)
        self.mlp = MLP(width)
        self.adaLN_modulation = _modulation(condition_width, 6 * width)

    def forward(self, stream: Stream, condition: Tensor, packing: Packing, impl: Impl | None) -> Stream:
        """Return the stream after this block; ``condition`` is c, of shape (B, condition width)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = _modulated(self.adaLN_modulation, condition, impl).chunk(
            6, dim=1
        )
        x, qkv = stream.enter(shift1, scale1, self.attn.qkv, packing, impl)
        x, hidden = Stream(x, self.attn(qkv, packing), gate1).enter(shift2, scale2, self.mlp.fc1, packing, impl)
        return Stream(x, self.mlp(hidden, impl), gate2)


class ModulatedLinear(nn.Module):
    """A modulated norm followed by a Linear: the bridge to the decoder, and the head."""

    def __init__(self, width: int, out_width: int, condition_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out_width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.adaLN_modulation = _modulation(condition_width, 2 * width)

    def forward(self, stream: Stream, condition: Tensor, packing: Packing, impl: Impl | None) -> Tensor:
        """Return the Linear of the norm of a stream, shape (..., out width)."""
        shift, scale = _modulated(self.adaLN_modulation, condition, impl).chunk(2, dim=1)
        return stream.enter(shift, scale, self.linear, packing, impl)[1]


class MaskDiT(nn.Module):
    """The network F: noised images and conditions to raw patch tokens.

    With ``decoder_depth=0`` it is a plain DiT, which knows no masks: the blocks, then the head.

    Args:
        input_size: side of the (latent) image.
        patch_size: p.
        in_channels: C.
        width: D, of the encoder.
        depth: blocks of the encoder.
        num_heads: attention heads of the encoder.
        num_classes: labels are 0 .. num_classes - 1, and num_classes means none; 0 is an unconditional network.
        decoder_width: E.
        decoder_depth: blocks of the decoder.
        decoder_num_heads: attention heads of the decoder.
        qk_norm: normalise queries and keys of each head (arXiv 2302.05442), with trained scales.
        impl: form of the ops: "fused", "reference", or None for the default of the device that `forward` runs on.

    Attributes:
        checkpoint_blocks: keep of each block its input alone for backward, and compute it again there.

    Raises:
        ValueError: sizes that do not divide.
    """

    pos_embed: Tensor
    decoder_pos_embed: Tensor

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
        impl: Impl | None = None,
    ) -> None:
        super().__init__()
        self.impl = impl
        self.checkpoint_blocks = False
        check_sizes(input_size, patch_size, width, depth, num_heads, decoder_width, decoder_depth, decoder_num_heads)
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.num_classes, self.qk_norm = num_classes, qk_norm
        self.num_heads, self.decoder_num_heads = num_heads, decoder_num_heads
        side = input_size // patch_size
        self.length = side**2
        values = patch_size * patch_size * in_channels

        self.x_embedder = PatchEmbedding(in_channels, width, patch_size)
        self.register_buffer("pos_embed", sincos_position(side, side, width))
        self.t_embedder = TimeEmbedding(width)
        if num_classes:
            self.y_embedder = LabelEmbedding(num_classes, width)
        self.blocks = nn.ModuleList(Block(width, num_heads, width, qk_norm) for _ in range(depth))
        if decoder_depth:
            self.decoder_layer = ModulatedLinear(width, decoder_width, width)
            self.mask_token = nn.Parameter(torch.randn(1, 1, decoder_width) * 0.02)
            self.register_buffer("decoder_pos_embed", sincos_position(side, side, decoder_width))
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_width, decoder_num_heads, width, qk_norm) for _ in range(decoder_depth)
        )
        self.final_layer = ModulatedLinear(decoder_width if decoder_depth else width, values, width)

    def forward(
        self, x: Tensor, c_noise: Tensor, labels: Tensor, mask: Mask | None = None, image_scale: Tensor | None = None
    ) -> Tensor:
        """Return F(image_scale * x) as raw tokens of every position.

        Args:
            x: noised images, shape (B, C, input_size, input_size).
            c_noise: EDM's noise condition, shape (B,).
            labels: int64, shape (B,).
            mask: the positions that the encoder sees; None is all. Samples may keep unequal numbers of them.
            image_scale: shape (B,), multiplies ``x``; None is 1.

        Returns:
            Shape (B, L, P), laid out (p, p, C) with channels fastest.
        """
        if x.shape[1:] != (self.in_channels, self.input_size, self.input_size):
            expected = (x.shape[0], self.in_channels, self.input_size, self.input_size)
            raise ValueError(f"images must have shape {expected}, not {tuple(x.shape)}")
        return self.forward_mixed([x], c_noise, labels, [mask], image_scale)[0]

    def forward_mixed(
        self,
        images: Sequence[Tensor],
        c_noise: Tensor,
        labels: Tensor,
        masks: Sequence[Mask | None],
        image_scale: Tensor | None = None,
    ) -> list[Tensor]:
        """Return what `forward` does for images of several sizes, which go through the blocks together, packed.

        Args:
            images: noised images, each tensor of one size: (B1, C, H1, W1), (B2, C, H2, W2), .., with sides that divide
                into patches. The position table of each is that of its own grid.
            c_noise: EDM's noise condition of all images, one tensor after the other, shape (B1 + B2 + ..,).
            labels: int64, of the shape of ``c_noise``.
            masks: a mask, or None, for each tensor of ``images``.
            image_scale: of the shape of ``c_noise``.

        Returns:
            For each tensor of ``images`` the raw tokens, as in `forward`.
        """
        self._check(images, c_noise, labels, masks)
        condition = self.t_embedder(c_noise)
        if self.num_classes:
            condition = condition + self.y_embedder(labels)
        counts = [len(x) for x in images]
        scales = [None] * len(counts) if image_scale is None else torch.split(image_scale, counts)
        embedded = [self._embed(x, mask, scale) for x, mask, scale in zip(images, masks, scales, strict=True)]
        if not self.decoder_blocks:
            return _run_blocks(self, embedded, masks, condition, self.blocks, self.final_layer)
        kept = _run_blocks(self, embedded, masks, condition, self.blocks, self.decoder_layer)
        restored = [self._restore(part, x, mask) for part, x, mask in zip(kept, images, masks, strict=True)]
        return _run_blocks(self, restored, [None] * len(counts), condition, self.decoder_blocks, self.final_layer)

    def _embed(self, x: Tensor, mask: Mask | None, image_scale: Tensor | None) -> Tensor:
        """Return the embedded kept patches of images of one size, (B, K, D), or (N, D) for unequal numbers of them."""
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
        """Return tokens of every position, (B, L, E), with the decoder's position table."""
        position = self._positions(x, self.decoder_pos_embed)
        if mask is None:
            return kept + position
        token = self.mask_token[0, 0]
        cu_seqlens = mask.cu_seqlens
        return restore_tokens(kept, token, position, mask.ids_restore, cu_seqlens=cu_seqlens, impl=self.impl)  # type: ignore[no-any-return]

    def _positions(self, x: Tensor, table: Tensor) -> Tensor:
        """Return the position table of the grid of images, shape (L, width)."""
        rows, columns = (side // self.patch_size for side in x.shape[2:])
        if rows * columns == self.length and rows == columns:
            return table[0]
        return sincos_position(rows, columns, table.shape[2])[0].to(table)

    def _check(self, images: Sequence[Tensor], c_noise: Tensor, labels: Tensor, masks: Sequence[Mask | None]) -> None:
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
        if self.num_classes and (labels.shape != (batch,) or labels.dtype not in (torch.int32, torch.int64)):
            raise ValueError(
                f"labels must be int64 of shape ({batch},), not {labels.dtype} of shape {tuple(labels.shape)}"
            )
        if any(mask is not None for mask in masks) and not self.decoder_blocks:
            raise ValueError(
                "a network without a decoder (decoder_depth=0) cannot fill in dropped patches: pass no mask"
            )


def _run_blocks(
    model: MaskDiT,
    parts: Sequence[Tensor],
    masks: Sequence[Mask | None],
    condition: Tensor,
    blocks: nn.ModuleList,
    exit_layer: ModulatedLinear,
) -> list[Tensor]:
    """Return the output of a stack of blocks and the modulated Linear that follows it, for tokens of several sizes."""
    x, packing = _pack(parts, masks)
    stream = Stream(x)
    for block in blocks:
        if model.checkpoint_blocks and torch.is_grad_enabled():
            stream = checkpoint(
                block, stream, condition, packing, model.impl, use_reentrant=False, preserve_rng_state=False
            )
        else:
            stream = block(stream, condition, packing, model.impl)
    out: Tensor = exit_layer(stream, condition, packing, model.impl)
    if len(parts) == 1:
        return [out]
    rows = torch.split(out, [part.shape[:-1].numel() for part in parts])
    return [part.view(*shape.shape[:-1], -1) for part, shape in zip(rows, parts, strict=True)]


def _pack(parts: Sequence[Tensor], masks: Sequence[Mask | None]) -> tuple[Tensor, Packing]:
    """Return tokens as the blocks take them: dense if all samples have as many, else packed."""
    if len(parts) == 1 and parts[0].ndim == 3:
        return parts[0], Packing()
    longest, counts = 0, []
    for part, mask in zip(parts, masks, strict=True):
        if part.ndim == 3:
            batch, length = part.shape[:2]
            counts.append(torch.full((batch,), length, dtype=torch.int32, device=part.device))
        else:
            assert mask is not None
            assert mask.cu_seqlens is not None
            length = mask.ids_restore.shape[1]
            counts.append(mask.cu_seqlens.diff())
        longest = max(longest, length)
    cu_seqlens = F.pad(torch.cat(counts).cumsum(0, dtype=torch.int32), (1, 0))
    return torch.cat([part.flatten(0, -2) for part in parts]), Packing(cu_seqlens, longest)


def check_sizes(
    input_size: int,
    patch_size: int,
    width: int,
    depth: int,
    num_heads: int,
    decoder_width: int,
    decoder_depth: int,
    decoder_num_heads: int,
) -> None:
    """Raise a ValueError that names the first size of a network that cannot be built."""
    if patch_size < 1 or input_size < patch_size or input_size % patch_size:
        raise ValueError(f"an image side of {input_size} does not divide into patches of {patch_size}")
    if depth < 1 or decoder_depth < 0:
        raise ValueError(f"depth must be at least 1 and decoder_depth at least 0, not {depth} and {decoder_depth}")
    sides = [("", width, num_heads), ("decoder_", decoder_width, decoder_num_heads)]
    for name, size, heads in sides if decoder_depth else sides[:1]:
        if size < 4 or size % 4:
            raise ValueError(f"{name}width must be a multiple of 4 (the position table has four parts), not {size}")
        if heads < 1 or size % heads:
            raise ValueError(f"{name}width {size} does not divide into {name}num_heads {heads}")


def _linear(in_width: int, out_width: int) -> nn.Linear:
    linear = nn.Linear(in_width, out_width)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _modulation(condition_width: int, out_width: int) -> nn.Sequential:
    linear = nn.Linear(condition_width, out_width)
    # Zero, so that every block starts as the identity (adaLN-Zero).
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.SiLU(), linear)


def _modulated(modulation: nn.Sequential, condition: Tensor, impl: Impl | None) -> Tensor:
    """Return SiLU and the Linear of a condition, the shifts, scales and gates: (B, out width)."""
    linear = cast(nn.Linear, modulation[1])
    return silu_linear(condition, linear.weight, linear.bias, impl=impl)
