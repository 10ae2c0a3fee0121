"""Baseline DiT and masked DiT with their training step: modules, SDPA, fused AdamW, foreach EMA, autocast.

Written from the papers (DiT, arXiv 2212.09748; MAE, 2111.06377; MaskDiT, 2306.09305; EDM, 2206.00364) in the usual way:
all patches are embedded and the kept ones gathered, each block is a module, and the loss is computed on whole images.
Parameters have the published names, so the same weights load here and in fastmask.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def modulation(width: int, chunks: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(width, chunks * out))


class PatchEmbed(nn.Module):
    def __init__(self, channels: int, width: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    def __init__(self, width: int, features: int = 256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))
        self.features = features

    def forward(self, t: Tensor) -> Tensor:
        half = self.features // 2
        angle = t[:, None].float() * 10000.0 ** -(torch.arange(half, device=t.device) / half)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1))


class LabelEmbedder(nn.Module):
    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Linear(num_classes, width, bias=False)

    def forward(self, labels: Tensor) -> Tensor:
        one_hot = F.one_hot(labels, self.num_classes + 1)[:, : self.num_classes]  # the last class is "no label": zeros
        return self.embedding_table(one_hot.to(self.embedding_table.weight.dtype))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width))


class Mlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, condition_width: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width)
        self.adaLN_modulation = modulation(condition_width, 6, width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class ModulatedLinear(nn.Module):
    def __init__(self, width: int, out: int, condition_width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = modulation(condition_width, 2, width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm(x), shift, scale))


class PlainDiT(nn.Module):
    """A DiT, or a masked DiT if it has a decoder; sizes as in `fastmask.MaskDiT`."""

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
    ):
        super().__init__()
        self.patch_size, self.in_channels, self.side = patch_size, in_channels, input_size // patch_size
        length = self.side**2
        self.x_embedder = PatchEmbed(in_channels, width, patch_size)
        self.register_buffer("pos_embed", torch.zeros(1, length, width))
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(num_classes, width)
        self.blocks = nn.ModuleList([Block(width, num_heads, width) for _ in range(depth)])
        head_width = width
        if decoder_depth:
            head_width = decoder_width
            self.decoder_layer = ModulatedLinear(width, decoder_width, width)
            self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
            self.register_buffer("decoder_pos_embed", torch.zeros(1, length, decoder_width))
            self.decoder_blocks = nn.ModuleList(
                [Block(decoder_width, decoder_num_heads, width) for _ in range(decoder_depth)]
            )
        self.has_decoder = decoder_depth > 0
        self.final_layer = ModulatedLinear(head_width, patch_size**2 * in_channels, width)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor, ids_keep: Tensor | None, ids_restore: Tensor | None):
        c = self.t_embedder(t) + self.y_embedder(labels)
        x = self.x_embedder(x) + self.pos_embed
        if ids_keep is not None:
            x = torch.gather(x, 1, ids_keep.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        for block in self.blocks:
            x = block(x, c)
        if self.has_decoder:
            x = self.decoder_layer(x, c)
            if ids_restore is not None:
                dropped = ids_restore.shape[1] - x.shape[1]
                x = torch.cat([x, self.mask_token.to(x.dtype).expand(x.shape[0], dropped, -1)], dim=1)
                x = torch.gather(x, 1, ids_restore.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
            x = x + self.decoder_pos_embed
            for block in self.decoder_blocks:
                x = block(x, c)
        x = self.final_layer(x, c)
        p, channels = self.patch_size, self.in_channels
        x = x.reshape(-1, self.side, self.side, p, p, channels).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(-1, channels, self.side * p, self.side * p)


def random_mask(batch: int, length: int, keep: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """MAE's masking: argsort noise, keep the first tokens, argsort again for the inverse."""
    shuffle = torch.rand(batch, length, device=device).argsort(dim=1)
    return shuffle[:, :keep], shuffle.argsort(dim=1)


class PlainLoss(nn.Module):
    """EDM preconditioning and MaskDiT's loss on whole images; returns the loss per sample, (B,)."""

    def __init__(self, model: PlainDiT, mae_coef: float = 0.1, sigma_data: float = 0.5):
        super().__init__()
        self.model, self.mae_coef, self.sigma_data = model, mae_coef, sigma_data

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        sigma: Tensor,
        noise: Tensor,
        ids_keep: Tensor | None = None,
        ids_restore: Tensor | None = None,
    ) -> Tensor:
        sigma = sigma.view(-1, 1, 1, 1)
        total = sigma**2 + self.sigma_data**2
        noised = images + noise
        raw = self.model(noised / total.sqrt(), sigma.flatten().log() / 4, labels, ids_keep, ids_restore)
        denoised = self.sigma_data**2 / total * noised + sigma * self.sigma_data / total.sqrt() * raw.float()
        squared = total / (sigma * self.sigma_data) ** 2 * (denoised - images) ** 2
        if ids_keep is None:
            return squared.mean(dim=(1, 2, 3))
        p = self.model.patch_size
        dropped = (ids_restore >= ids_keep.shape[1]).float()
        per_patch = F.avg_pool2d(squared.mean(dim=1), p).flatten(1)
        denoising = (per_patch * (1 - dropped)).sum(1) / (1 - dropped).sum(1)
        target, shown = patches(noised, p), patches(denoised, p)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        reconstruction = (((shown - target) ** 2).mean(-1) * dropped).sum(1) / dropped.sum(1)
        return denoising + self.mae_coef * reconstruction


def patches(images: Tensor, p: int) -> Tensor:
    batch, channels, height, width = images.shape
    images = images.reshape(batch, channels, height // p, p, width // p, p)
    return images.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, p * p * channels)


class PlainTrainer:
    """A training loop body: autocast, fused AdamW, foreach EMA."""

    def __init__(self, loss: PlainLoss, lr: float = 1e-4, ema_decay: float = 0.9999, autocast: bool = False):
        self.loss, self.ema_decay, self.autocast = loss, ema_decay, autocast
        self.run = loss
        self.ema = copy.deepcopy(loss.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(loss.parameters(), lr=lr, weight_decay=0.0, fused=True)

    def compiled(self) -> "PlainTrainer":
        """Return a compiled trainer that shares the weights."""
        other = copy.copy(self)
        other.run = torch.compile(self.loss)
        return other

    def gradients(self, images: Tensor, labels: Tensor, keep: int | None) -> Tensor:
        device = images.device
        sigma = (torch.randn(len(images), device=device) * 1.2 - 1.2).exp()
        noise = torch.randn_like(images) * sigma.view(-1, 1, 1, 1)
        mask = (None, None)
        if keep is not None:
            mask = random_mask(len(images), self.loss.model.side**2, keep, device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.autocast):
            total = self.run(images, labels, sigma, noise, *mask).mean()
        total.backward()
        return total.detach()

    def update(self) -> None:
        self.optimizer.step()
        with torch.no_grad():
            parameters = list(self.loss.model.parameters())
            torch._foreach_lerp_(list(self.ema.parameters()), parameters, 1 - self.ema_decay)
        self.loss.zero_grad(set_to_none=True)

    def step(self, images: Tensor, labels: Tensor, keep: int | None) -> Tensor:
        loss = self.gradients(images, labels, keep)
        self.update()
        return loss
