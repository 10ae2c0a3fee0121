# Copyright The fastmask authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""A diffusion transformer (MaskDiT, arXiv 2306.09305, or without its decoder DiT, arXiv 2212.09748), for sampling."""

import math

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn


def _rotary_table(side, head_width):
    """Cosines and sines of a square's positions, (2, side^2, head_width / 2): rows, then columns (arXiv 2104.09864)."""
    quarter = head_width // 4
    angle = torch.arange(side)[:, None] * 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angle = torch.cat([angle.repeat_interleave(side, 0), angle.repeat(side, 1)], dim=1)
    return torch.stack([angle.cos(), angle.sin()]).float()


def _rotated(x, table):
    (cos, sin), (first, second) = table, x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x.dtype)


class _Attention(nn.Module):
    def __init__(self, width, num_heads, qk_norm, rope):
        super().__init__()
        self.num_heads, self.rope = num_heads, rope
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm = nn.RMSNorm(width // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(width // num_heads, eps=1e-6) if qk_norm else nn.Identity()

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rope:
            table = _rotary_table(math.isqrt(x.shape[1]), q.shape[-1]).to(x.device)
            q, k = _rotated(q, table), _rotated(k, table)
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, width, gated):
        super().__init__()
        self.gated, hidden = gated, 8 * -(-width // 3) if gated else 4 * width
        self.fc1, self.fc2 = nn.Linear(width, 2 * hidden if gated else hidden), nn.Linear(hidden, width)

    def forward(self, x):
        if not self.gated:
            return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)


def _modulated(x, shift, scale, norm):
    normed = F.rms_norm(x, x.shape[-1:], eps=1e-6) if norm == "rms" else F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return normed * (1 + scale) + shift


class _Block(nn.Module):
    def __init__(self, width, num_heads, condition_width, qk_norm, norm, mlp, rope):
        super().__init__()
        self.attn, self.mlp, self.norm = _Attention(width, num_heads, qk_norm, rope), _MLP(width, mlp == "swiglu"), norm
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(condition_width, 6 * width))

    def forward(self, x, condition):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition)[:, None].chunk(6, dim=2)
        x = x + gate1 * self.attn(_modulated(x, shift1, scale1, self.norm))
        return x + gate2 * self.mlp(_modulated(x, shift2, scale2, self.norm))


class _ModulatedLinear(nn.Module):
    def __init__(self, width, out_width, condition_width, norm):
        super().__init__()
        self.norm = norm
        self.linear = nn.Linear(width, out_width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(condition_width, 2 * width))

    def forward(self, x, condition):
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=2)
        return self.linear(_modulated(x, shift, scale, self.norm))


class MaskDiTModel(ModelMixin, ConfigMixin):
    """The network F, from noised images and conditions to its raw prediction. All positions are seen."""

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        sample_size=32,
        in_channels=4,
        num_classes=1000,
        patch_size=2,
        width=1152,
        depth=28,
        num_heads=16,
        decoder_width=512,
        decoder_depth=8,
        decoder_num_heads=16,
        qk_norm=False,
        frequency_shift=0,
        norm="layer",
        mlp="gelu",
        rope=False,
    ):
        super().__init__()
        options = {"qk_norm": qk_norm, "norm": norm, "mlp": mlp, "rope": rope}
        length, last = (sample_size // patch_size) ** 2, decoder_width if decoder_depth else width
        self.x_embedder, self.t_embedder = nn.Module(), nn.Module()
        self.x_embedder.proj = nn.Conv2d(in_channels, width, patch_size, patch_size)
        self.register_buffer("pos_embed", torch.zeros(1, length, width))
        self.t_embedder.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        if num_classes:
            self.y_embedder = nn.Module()
            self.y_embedder.embedding_table = nn.Linear(num_classes, width, bias=False)
        self.blocks = nn.ModuleList(_Block(width, num_heads, width, **options) for _ in range(depth))
        if decoder_depth:
            self.decoder_layer = _ModulatedLinear(width, decoder_width, width, norm)
            self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))  # for masked training only
            self.register_buffer("decoder_pos_embed", torch.zeros(1, length, decoder_width))
        self.decoder_blocks = nn.ModuleList(
            _Block(decoder_width, decoder_num_heads, width, **options) for _ in range(decoder_depth)
        )
        self.final_layer = _ModulatedLinear(last, patch_size * patch_size * in_channels, width, norm)

    def forward(self, x, c_noise, labels):
        """Return F(x; c_noise, labels), the shape of ``x``.

        Args:
            x: shape (B, C, sample_size, sample_size), scaled by the process's c_in.
            c_noise: time conditioning, shape (B,).
            labels: int64, shape (B,); ``num_classes`` means no label.
        """
        condition = self._condition(c_noise, labels)
        tokens = self.x_embedder.proj(x).flatten(2).mT + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens, condition)
        if self.config.decoder_depth:
            tokens = self.decoder_layer(tokens, condition) + self.decoder_pos_embed
            for block in self.decoder_blocks:
                tokens = block(tokens, condition)
        raw = self.final_layer(tokens, condition)
        patch, side = self.config.patch_size, self.config.sample_size // self.config.patch_size
        pixels = raw.unflatten(2, (patch, patch, -1)).unflatten(1, (side, side))  # (B, h, w, p, q, C)
        return pixels.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)

    def _condition(self, c_noise, labels):
        exponent = -math.log(10000.0) / (128 - self.config.frequency_shift)
        frequency = torch.exp(torch.arange(128, device=c_noise.device) * exponent)
        angle = c_noise[:, None].float() * frequency
        features = torch.cat([angle.cos(), angle.sin()], dim=1)
        condition = self.t_embedder.mlp(features.to(self.dtype))
        if self.config.num_classes:
            table = self.y_embedder.embedding_table.weight.t()
            known = (labels < self.config.num_classes)[:, None]
            condition = condition + torch.where(known, table[labels.clamp(max=self.config.num_classes - 1)], 0.0)
        return condition
