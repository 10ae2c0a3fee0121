"""Layers of adaLN diffusion transformers (DiT, arXiv 2212.09748), with the published parameter names."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmask.kernels import Impl, add_gated_linear, attention, gelu_linear, modulated_linear, silu_linear
from fastmask.kernels._layout import sample_of_row
from fastmask.kernels.modulate_norm import Norm
from fastmask.models.block_config import BlockConfig
from fastmask.models.rotary import rotate
from fastmask.models.swiglu import swiglu_linear, swiglu_width


def sincos_position(rows: int, columns: int, width: int) -> Tensor:
    """Return the fixed 2-D position table of a grid of patches (MAE, arXiv 2111.06377).

    The first half of the channels encodes the column, the second half the row; each half is the sines, then the
    cosines, of the coordinate times 10000^(-i / (width / 4)).

    Returns:
        Shape (1, rows * columns, width), fp32, positions in row-major order.
    """
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(max(rows, columns), dtype=torch.float64)[:, None] * frequency  # (side, width / 4)
    encoded = torch.cat([angle.sin(), angle.cos()], dim=1)  # (side, width / 2)
    table = torch.cat([encoded[:columns].repeat(rows, 1), encoded[:rows].repeat_interleave(columns, 0)], dim=1)
    return table.float()[None]


class PatchEmbedding(nn.Module):
    """Weights of the patch embedding, in the layout of a convolution."""

    def __init__(self, in_channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, patch_size)
        nn.init.xavier_uniform_(self.proj.weight.view(width, -1))
        nn.init.zeros_(self.proj.bias)  # type: ignore[arg-type]


def time_frequencies(shift: int = 0, device: torch.device | None = None) -> Tensor:
    """Return the frequencies of the time embedding, 10000^(-i / (128 - shift)), fp32, shape (128,)."""
    half = TimeEmbedding.FEATURES // 2
    return torch.exp(torch.arange(half, device=device) * (-math.log(10000.0) / (half - shift)))


class TimeEmbedding(nn.Module):
    """Timestep embedding, c_noise (B,) -> (B, D): 256 sinusoidal features, then an MLP."""

    FEATURES = 256

    def __init__(self, width: int, frequency_shift: int = 0) -> None:
        super().__init__()
        self.frequency_shift = frequency_shift
        into, out_of = nn.Linear(self.FEATURES, width), nn.Linear(width, width)
        for linear in (into, out_of):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        self.mlp = nn.Sequential(into, nn.SiLU(), out_of)

    def forward(self, c_noise: Tensor) -> Tensor:
        """Return the embedding (B, D) of c_noise (B,)."""
        frequency = time_frequencies(self.frequency_shift, c_noise.device)
        angle = c_noise[:, None].to(torch.promote_types(c_noise.dtype, torch.float32)) * frequency
        features = torch.cat([angle.cos(), angle.sin()], dim=1)
        out: Tensor = self.mlp(features.to(next(self.mlp.parameters()).dtype))
        return out


class LabelEmbedding(nn.Module):
    """Label embedding, (B,) -> (B, D): a column of the table, or zeros for label ``num_classes`` (no label)."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Linear(num_classes, width, bias=False)
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, labels: Tensor) -> Tensor:
        """Return the embedding (B, D) of int64 labels (B,)."""
        known = (labels < self.num_classes)[:, None]
        rows = F.embedding(labels.clamp(max=self.num_classes - 1), self.embedding_table.weight.t())
        return torch.where(known, rows, 0.0)


class Packing(NamedTuple):
    """Sample boundaries of packed tokens (N, D), None for dense tokens (B, K, D), and rotations by position.

    Attributes:
        cu_seqlens: int32, shape (B + 1,): sample b is in rows cu_seqlens[b] .. cu_seqlens[b + 1] - 1.
        max_seqlen: upper bound of the number of tokens of a sample.
        rotation: rows of a `rotary_table` for the tokens, (B or 1, K, 2, head width / 2) or (N, 2, head width / 2);
            None without RoPE.
    """

    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    rotation: Tensor | None = None


class Attention(nn.Module):
    """Multi-head self-attention. Its first Linear, `qkv`, is fused with the preceding norm."""

    def __init__(self, width: int, num_heads: int, options: BlockConfig) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = _linear(width, 3 * width)
        self.proj = _linear(width, width)
        self.qk_norm = options.qk_norm
        if options.qk_norm:
            self.q_norm, self.k_norm = (nn.RMSNorm(width // num_heads, eps=1e-6) for _ in range(2))

    def forward(self, qkv: Tensor, packing: Packing) -> Tensor:
        """Return the output, (B, K, D) or (N, D), from the packed projections, (..., 3 D)."""
        q, k, v = qkv.view(*qkv.shape[:-1], 3, self.num_heads, -1).unbind(-3)  # (B, K, H, D/H) or (N, H, D/H)
        q, k = self._prepared(q, k, packing.rotation)
        attended = attention(q, k, v, cu_seqlens=packing.cu_seqlens, max_seqlen=packing.max_seqlen)
        out: Tensor = self.proj(attended.flatten(-2))
        return out

    def _prepared(self, q: Tensor, k: Tensor, rotation: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return queries and keys as attention takes them: normalised, then rotated, each if it is asked for."""
        if self.qk_norm:
            q, k = _rms_norm(q, self.q_norm), _rms_norm(k, self.k_norm)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        return q, k


def _rms_norm(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """Return the RMSNorm with the scale cast to the dtype of ``x``: PyTorch fuses it only for equal dtypes."""
    return F.rms_norm(x, x.shape[-1:], norm.weight.to(x.dtype), norm.eps)


class MLP(nn.Module):
    """Linear D -> M, tanh-GELU, Linear M -> D with M = 4 D, or SwiGLU: Linear D -> 2 M, silu(a) * b, Linear M -> D.

    The first Linear, `fc1`, is fused with the preceding norm.
    """

    def __init__(self, width: int, options: BlockConfig) -> None:
        super().__init__()
        self.gated = options.mlp == "swiglu"
        hidden = swiglu_width(width) if self.gated else 4 * width
        self.fc1 = _linear(width, 2 * hidden if self.gated else hidden)
        self.fc2 = _linear(hidden, width)

    def forward(self, hidden: Tensor, impl: Impl | None) -> Tensor:
        """Return the output, (..., D), from the output of `fc1`, (..., M or 2 M); SwiGLU has one form."""
        if self.gated:
            return swiglu_linear(hidden, self.fc2)
        return gelu_linear(hidden, self.fc2, impl=impl)


class Stream(NamedTuple):
    """Residual stream between blocks, x + gate * branch, with the addition deferred to the next norm kernel.

    Attributes:
        x: tokens, shape (B, K, D) or (N, D).
        branch: same shape as ``x``; None before the first block.
        gate: shape (B, D).
    """

    x: Tensor
    branch: Tensor | None = None
    gate: Tensor | None = None

    def enter(
        self, shift: Tensor, scale: Tensor, linear: nn.Linear, norm: Norm, packing: Packing, impl: Impl | None
    ) -> tuple[Tensor, Tensor]:
        """Return the updated residual, and a Linear of its modulated norm."""
        rows, modulation = packing.cu_seqlens, (shift, scale, linear)
        if self.branch is None or self.gate is None:
            return self.x, modulated_linear(self.x, *modulation, norm=norm, cu_seqlens=rows, impl=impl)
        return add_gated_linear(self.x, self.branch, self.gate, *modulation, norm=norm, cu_seqlens=rows, impl=impl)

    def settle(self, packing: Packing) -> Tensor:
        """Return the residual stream with the addition done, in the dtype of ``x``."""
        if self.branch is None or self.gate is None:
            return self.x
        rows = packing.cu_seqlens
        gate = self.gate[:, None] if rows is None else self.gate[sample_of_row(rows, len(self.x))]
        return self.x + gate.to(self.x.dtype) * self.branch


class Block(nn.Module):
    """An adaLN-Zero block; its last residual addition is fused with the norm that follows."""

    def __init__(self, width: int, num_heads: int, condition_width: int, options: BlockConfig) -> None:
        super().__init__()
        self.attn = Attention(width, num_heads, options)
        self.mlp = MLP(width, options)
        self.options = options
        self.adaLN_modulation = _modulation(condition_width, 6 * width)

    def forward(self, stream: Stream, condition: Tensor, packing: Packing, impl: Impl | None) -> Stream:
        """Return the stream after this block; ``condition`` has shape (B, condition width)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = _modulated(self.adaLN_modulation, condition, impl).chunk(
            6, dim=1
        )
        x, qkv = stream.enter(shift1, scale1, self.attn.qkv, self.options.norm, packing, impl)
        stream = Stream(x, self.attn(qkv, packing), gate1)
        x, hidden = stream.enter(shift2, scale2, self.mlp.fc1, self.options.norm, packing, impl)
        return Stream(x, self.mlp(hidden, impl), gate2)


class ModulatedLinear(nn.Module):
    """Modulated norm and Linear: the projection to the decoder, and the head."""

    def __init__(self, width: int, out_width: int, condition_width: int, options: BlockConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out_width)
        self.norm: Norm = options.norm
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.adaLN_modulation = _modulation(condition_width, 2 * width)

    def forward(self, stream: Stream, condition: Tensor, packing: Packing, impl: Impl | None) -> Tensor:
        """Return the output, shape (..., out width)."""
        shift, scale = _modulated(self.adaLN_modulation, condition, impl).chunk(2, dim=1)
        return stream.enter(shift, scale, self.linear, self.norm, packing, impl)[1]


def _linear(in_width: int, out_width: int) -> nn.Linear:
    linear = nn.Linear(in_width, out_width)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _modulation(condition_width: int, out_width: int) -> nn.Sequential:
    linear = nn.Linear(condition_width, out_width)
    # Zero initialisation: every block starts as the identity (adaLN-Zero).
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.SiLU(), linear)


def _modulated(modulation: nn.Sequential, condition: Tensor, impl: Impl | None) -> Tensor:
    """Return shifts, scales and gates, (B, out width), from a condition."""
    return silu_linear(condition, modulation[1], impl=impl)
