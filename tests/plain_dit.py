"""A DiT in plain PyTorch, from the paper (arXiv 2212.09748) and the names of its published weights.

SiT (arXiv 2401.08740) is the same network; it reads a time in [0, 1] in place of the timestep, and predicts a velocity.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

SIZES = {"side": 8, "patch": 2, "channels": 3, "width": 16, "depth": 2, "heads": 2, "classes": 5}


def sincos(side, width):
    """The fixed table of positions, (1, side^2, width): columns, then rows, each as sines, then cosines."""
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    at = torch.arange(side, dtype=torch.float64)[:, None] * frequency
    encoded = torch.cat([at.sin(), at.cos()], 1)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.cat([encoded[columns.flatten()], encoded[rows.flatten()]], 1).float()[None]


class _Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        b, n, width = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT / math.sqrt(width // self.heads)).softmax(-1)
        return self.proj((scores @ v).transpose(1, 2).reshape(b, n, width))


class _MLP(nn.Module):
    def __init__(self, width, ratio):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, ratio * width), nn.Linear(ratio * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class _Block(nn.Module):
    def __init__(self, width, heads, ratio):
        super().__init__()
        self.attn, self.mlp = _Attention(width, heads), _MLP(width, ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, 2)
        x = x + gate1 * self.attn(F.layer_norm(x, x.shape[2:], eps=1e-6) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(F.layer_norm(x, x.shape[2:], eps=1e-6) * (1 + scale2) + shift2)


class _Head(nn.Module):
    def __init__(self, width, values):
        super().__init__()
        self.linear = nn.Linear(width, values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, 2)
        return self.linear(F.layer_norm(x, x.shape[2:], eps=1e-6) * (1 + scale) + shift)


class PlainDiT(nn.Module):
    """F(x, t, y), shape (B, C or 2C, H, W); the label ``classes`` is none. No weight is zero."""

    def __init__(self, side, patch, channels, width, depth, heads, classes, *, sigma=True, ratio=4, seed=0):
        super().__init__()
        self.side, self.patch, self.out = side, patch, 2 * channels if sigma else channels
        self.x_embedder, self.t_embedder, self.y_embedder = nn.Module(), nn.Module(), nn.Module()
        self.x_embedder.proj = nn.Conv2d(channels, width, patch, patch)
        self.t_embedder.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.y_embedder.embedding_table = nn.Embedding(classes + 1, width)
        self.pos_embed = nn.Parameter(sincos(side // patch, width), requires_grad=False)
        self.blocks = nn.ModuleList(_Block(width, heads, ratio) for _ in range(depth))
        self.final_layer = _Head(width, patch * patch * self.out)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name != "pos_embed":
                    fan_in = parameter[0].numel() if parameter.ndim > 1 else 10
                    parameter.normal_(std=fan_in**-0.5, generator=generator)

    @torch.no_grad()
    def forward(self, x, t, labels):
        angle = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
        c = self.t_embedder.mlp(torch.cat([angle.cos(), angle.sin()], 1).to(x)) + self.y_embedder.embedding_table(
            labels
        )
        tokens = self.x_embedder.proj(x).flatten(2).mT + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens, c)
        side = self.side // self.patch
        pixels = self.final_layer(tokens, c).view(len(x), side, side, self.patch, self.patch, self.out)
        return pixels.permute(0, 5, 1, 3, 2, 4).reshape(len(x), self.out, self.side, self.side)
