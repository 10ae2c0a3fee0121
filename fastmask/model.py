"""The masked diffusion transformer (MaskDiT, arXiv 2306.09305; blocks of DiT, arXiv 2212.09748).

Parameters carry the published names, so published checkpoints load as they are.
"""

import functools
import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmask.kernels import (
    Impl,
    Mask,
    add_gated_linear,
    attention,
    embed_kept_patches,
    gelu_linear,
    modulated_linear,
    restore_tokens,
)


def sincos_position(length: int, width: int) -> Tensor:
    """Return the fixed 2-D position table of a square grid (MAE, arXiv 2111.06377), shape (1, length, width), fp32.

    The first half of a row encodes the column of the patch, the second half its row; each half is sines, then cosines,
    of the coordinate times 10000^(-i / (width / 4)).
    """
    side = math.isqrt(length)
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * frequency  # (side, width / 4)
    encoded = torch.cat([angle.sin(), angle.cos()], dim=1)  # (side, width / 2)
    table = torch.cat([encoded.repeat(side, 1), encoded.repeat_interleave(side, 0)], dim=1)
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


class Attention(nn.Module):
    """Multi-head self-attention. Its first Linear, `qkv`, is computed together with the norm before it."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = _linear(width, 3 * width)
        self.proj = _linear(width, width)

    def forward(self, qkv: Tensor) -> Tensor:
        """Return attention among the tokens of each sample, (B, K, D), from their (B, K, 3 D) projections."""
        q, k, v = qkv.view(*qkv.shape[:2], 3, self.num_heads, -1).unbind(2)  # (B, K, H, D/H)
        out: Tensor = self.proj(attention(q, k, v).flatten(2))
        return out


class MLP(nn.Module):
    """Linear D -> 4 D, tanh-GELU, Linear 4 D -> D. The first, `fc1`, is computed together with the norm before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = _linear(width, 4 * width)
        self.fc2 = _linear(4 * width, width)

    def forward(self, hidden: Tensor, impl: Impl | None) -> Tensor:
        """Return the rest of the MLP, (B, K, D), from the hidden values before GELU, (B, K, 4 D)."""
        return gelu_linear(hidden, self.fc2.weight, self.fc2.bias, impl=impl)


class Block(nn.Module):
    """The weights of an adaLN-Zero block; `run_blocks` chains the residuals and norms of several."""

    def __init__(self, width: int, num_heads: int, condition_width: int) -> None:
        super().__init__()
        self.attn = Attention(width, num_heads)
        self.mlp = MLP(width)
        self.adaLN_modulation = _modulation(condition_width, 6 * width)


class ModulatedLinear(nn.Module):
    """The weights of a modulated norm followed by a Linear: the bridge to the decoder, and the head."""

    def __init__(self, width: int, out_width: int, condition_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out_width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.adaLN_modulation = _modulation(condition_width, 2 * width)


def run_blocks(
    x: Tensor, condition: Tensor, blocks: Iterable[Block], exit_layer: ModulatedLinear, impl: Impl | None
) -> Tensor:
    """Return the output of a stack of blocks and the modulated Linear that follows it.

    Each residual addition is done together with the norm and the Linear that follow it, whether in the same block, the
    next one or the exit layer.

    Args:
        x: tokens, shape (B, K, D).
        condition: c, shape (B, condition width).
        blocks: the blocks, at least one.
        exit_layer: its norm ends the last block's residual.
        impl: form of the ops.

    Returns:
        Shape (B, K, out width of ``exit_layer``).
    """
    gates: list[tuple[Tensor, Callable[[Tensor], Tensor]]] = []
    entries = []
    for block in blocks:
        shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(condition).chunk(6, dim=1)
        gates += [(gate1, block.attn), (gate2, functools.partial(block.mlp, impl=impl))]
        entries += [(shift1, scale1, block.attn.qkv), (shift2, scale2, block.mlp.fc1)]
    entries.append((*exit_layer.adaLN_modulation(condition).chunk(2, dim=1), exit_layer.linear))

    shift, scale, linear = entries[0]
    entered = modulated_linear(x, shift, scale, linear.weight, linear.bias, impl=impl)
    for (gate, branch), (shift, scale, linear) in zip(gates, entries[1:], strict=True):
        out = branch(entered)
        x, entered = add_gated_linear(x, out, gate, shift, scale, linear.weight, linear.bias, impl=impl)
    return entered


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
        impl: form of the ops: "fused", "reference", or None for the default of the device that `forward` runs on.

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
        impl: Impl | None = None,
    ) -> None:
        super().__init__()
        self.impl = impl
        check_sizes(input_size, patch_size, width, depth, num_heads, decoder_width, decoder_depth, decoder_num_heads)
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.num_classes = num_classes
        self.num_heads, self.decoder_num_heads = num_heads, decoder_num_heads
        self.length = (input_size // patch_size) ** 2
        values = patch_size * patch_size * in_channels

        self.x_embedder = PatchEmbedding(in_channels, width, patch_size)
        self.register_buffer("pos_embed", sincos_position(self.length, width))
        self.t_embedder = TimeEmbedding(width)
        if num_classes:
            self.y_embedder = LabelEmbedding(num_classes, width)
        self.blocks = nn.ModuleList(Block(width, num_heads, width) for _ in range(depth))
        if decoder_depth:
            self.decoder_layer = ModulatedLinear(width, decoder_width, width)
            self.mask_token = nn.Parameter(torch.randn(1, 1, decoder_width) * 0.02)
            self.register_buffer("decoder_pos_embed", sincos_position(self.length, decoder_width))
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_width, decoder_num_heads, width) for _ in range(decoder_depth)
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
            mask: the positions that the encoder sees; None is all.
            image_scale: shape (B,), multiplies ``x``; None is 1.

        Returns:
            Shape (B, L, P), laid out (p, p, C) with channels fastest.
        """
        if x.shape[1:] != (self.in_channels, self.input_size, self.input_size):
            expected = (x.shape[0], self.in_channels, self.input_size, self.input_size)
            raise ValueError(f"images must have shape {expected}, not {tuple(x.shape)}")
        if c_noise.shape != x.shape[:1]:
            raise ValueError(f"c_noise must have shape ({x.shape[0]},), not {tuple(c_noise.shape)}")
        if self.num_classes and (labels.shape != x.shape[:1] or labels.dtype not in (torch.int32, torch.int64)):
            raise ValueError(
                f"labels must be int64 of shape ({x.shape[0]},), not {labels.dtype} of shape {tuple(labels.shape)}"
            )
        if mask is not None and not self.decoder_blocks:
            raise ValueError(
                "a network without a decoder (decoder_depth=0) cannot fill in dropped patches: pass no mask"
            )
        condition = self.t_embedder(c_noise)
        if self.num_classes:
            condition = condition + self.y_embedder(labels)
        proj = self.x_embedder.proj
        tokens = embed_kept_patches(
            x,
            proj.weight,
            proj.bias,  # type: ignore[arg-type]
            self.pos_embed[0],
            None if mask is None else mask.ids_keep,
            patch_size=self.patch_size,
            image_scale=image_scale,
            impl=self.impl,
        )  # (B, K, D)
        if not self.decoder_blocks:
            return run_blocks(tokens, condition, self.blocks, self.final_layer, self.impl)  # type: ignore[arg-type]
        kept = run_blocks(tokens, condition, self.blocks, self.decoder_layer, self.impl)  # type: ignore[arg-type]  # (B, K, E)
        if mask is None:
            restored = kept + self.decoder_pos_embed
        else:
            position, token = self.decoder_pos_embed[0], self.mask_token[0, 0]
            restored = restore_tokens(kept, token, position, mask.ids_restore, impl=self.impl)
        return run_blocks(restored, condition, self.decoder_blocks, self.final_layer, self.impl)  # type: ignore[arg-type]


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
