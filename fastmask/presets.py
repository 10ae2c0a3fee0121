"""Presets: one row per training run, with the differences from the defaults of `TrainConfig`.

Sources: [M] MaskDiT, arXiv 2306.09305, section 4 and its released recipe; [D] DiT, arXiv 2212.09748, tables 1 and 4;
[F] rectified flow, arXiv 2403.03206; [S] SiT, arXiv 2401.08740, table 1 and section 3; [T] TREAD, arXiv 2501.04765;
[P] SPRINT, arXiv 2510.21986; [U] deferred masking, arXiv 2407.15811, and the configurations of its authors'
micro_diffusion.
With the published 512 x 8 decoder, masking half the patches saves operations only in wide networks, so the S and B rows
use a proportional decoder, about half the encoder's width and a quarter of its depth. The published decoder is
`--decoder-width 512 --decoder-depth 8 --decoder-num-heads 16`.
"""

from typing import Any

from fastmask.diffusion import EDM, VP, RectifiedFlow
from fastmask.models.deferred import DeferredConfig
from fastmask.models.maskdit import MaskDiTConfig
from fastmask.models.sprint import SprintConfig
from fastmask.models.tread import TreadConfig

# Encoders [D, table 1; H: M].
_S: dict[str, Any] = {"width": 384, "depth": 12, "num_heads": 6}
_B: dict[str, Any] = {"width": 768, "depth": 12, "num_heads": 12}
_L: dict[str, Any] = {"width": 1024, "depth": 24, "num_heads": 16}
_XL: dict[str, Any] = {"width": 1152, "depth": 28, "num_heads": 16}
_H: dict[str, Any] = {"width": 1280, "depth": 32, "num_heads": 16}

# Decoders: the published one [M], and two in proportion (ours).
_DEC: dict[str, Any] = {"decoder_width": 512, "decoder_depth": 8, "decoder_num_heads": 16}
_DEC_S: dict[str, Any] = {"decoder_width": 192, "decoder_depth": 3, "decoder_num_heads": 6}
_DEC_B: dict[str, Any] = {"decoder_width": 384, "decoder_depth": 3, "decoder_num_heads": 12}


def _masked(encoder: dict[str, Any], decoder: dict[str, Any]) -> dict[str, Any]:
    return {"network": MaskDiTConfig(**encoder, **decoder)}


def _dense(encoder: dict[str, Any]) -> dict[str, Any]:
    return {"network": MaskDiTConfig(**encoder, decoder_depth=0)}


def _routed(encoder: dict[str, Any], end: int) -> dict[str, Any]:
    return {"network": TreadConfig(**encoder, route_start=2, route_end=end)}  # [T], from block 2 to the fourth last


def _sparse(encoder: dict[str, Any]) -> dict[str, Any]:
    """Two blocks before the middle and two after it, with SwiGLU, rotary positions and QK-RMSNorm [P]."""
    blocks: dict[str, Any] = {"qk_norm": True, "mlp": "swiglu", "rope": True}
    return {"network": SprintConfig(**encoder, **blocks, route_start=2, route_end=encoder["depth"] - 2)}


# Patch mixers: the published one [U], and two thirds of the width and a fourth of the depth of B (ours).
_MIX: dict[str, Any] = {"mixer_width": 768, "mixer_depth": 6, "mixer_num_heads": 12}
_MIX_B: dict[str, Any] = {"mixer_width": 512, "mixer_depth": 3, "mixer_num_heads": 8}


def _deferred(encoder: dict[str, Any], mixer: dict[str, Any]) -> dict[str, Any]:
    """Of DiT's blocks: without the experts and the widths by layer of [U], whose backbone is 1024 wide."""
    return {"network": DeferredConfig(**encoder, **mixer)}


# Datasets: stores of ImageNet latents at two resolutions, created by fastmask.prepare.
_IN256: dict[str, Any] = {"data": "data/in256", "image_size": 256, "num_classes": 1000, "micro_batch_size": 128}
_IN512: dict[str, Any] = {"data": "data/in512", "image_size": 512, "num_classes": 1000, "micro_batch_size": 32}

# Recipes.
_MASKED: dict[str, Any] = {"mask_ratio": 0.5, "batch_size": 1024, "lr": 1e-4}  # [M]
_UNMASK: dict[str, Any] = {"mask_ratio": 0.0, "batch_size": 512, "lr": 5e-5, "precision": "tf32"}  # [M]
_DIT: dict[str, Any] = {"mask_ratio": 0.0, "batch_size": 256, "lr": 1e-4}  # [D, section 4], with EDM's loss
_SIT: dict[str, Any] = {**_DIT, "process": RectifiedFlow(t_uniform=True)}  # [S], a linear path and its velocity
_FLOW: dict[str, Any] = {**_MASKED, "process": RectifiedFlow()}  # [M], with the process and times of [F]
_TREAD: dict[str, Any] = {**_DIT, "mask_ratio": 0.5}  # [T]
_SPRINT: dict[str, Any] = {**_DIT, "process": RectifiedFlow(), "mask_ratio": 0.75, "mask_pattern": "structured"}  # [P]
_SPRINT |= {"grad_clip": 1.0}
_SPRINT_UNMASK: dict[str, Any] = {"process": RectifiedFlow(), "mask_ratio": 0.0, "batch_size": 1024, "lr": 2e-4}  # [P]
_SPRINT_UNMASK |= {"warmup_steps": 5000, "grad_clip": 1.0, "init": "runs/sprint-xl2-in256"}
# [U] decays the learning rate of the masked stage to 0.33 of it by a cosine; here it is constant after the warm-up.
_MICRO: dict[str, Any] = {"process": EDM(sigma_data=0.9, p_mean=-0.6, p_std=1.2), "batch_size": 2048}  # [U]
_MICRO |= {"weight_decay": 0.1, "grad_clip": 0.25}
_DEFERRED: dict[str, Any] = {**_MICRO, "mask_ratio": 0.75, "lr": 2.4e-4, "warmup_steps": 2500}  # [U]
_DEFERRED_UNMASK: dict[str, Any] = {**_MICRO, "mask_ratio": 0.0, "lr": 8e-5}  # [U]
_DEFERRED_UNMASK |= {"init": "runs/deferred-xl2-in256"}
_FROM_256: dict[str, Any] = {"init": "runs/xl2-in256"}
_FROM_512: dict[str, Any] = {"init": "runs/xl2-in512"}
_LONG: dict[str, Any] = {"checkpoint_every": 10_000, "sample_every": 50_000}

# The built-in digits: the network of `TrainConfig`, sized for three minutes on two CPU cores (ours).
_DIGITS: dict[str, Any] = {"max_steps": 1550, "unmask_steps": 500, "batch_size": 64, "lr": 3e-3, "unmask_lr": 1e-3}
_DIGITS |= {"warmup_steps": 100, "betas": (0.9, 0.99), "ema_decay": 0.995, "sample_every": 775}

# fmt: off
PRESETS: dict[str, dict[str, Any]] = {
    "digits":           {**_DIGITS},
    "digits-flow":      {**_DIGITS, "process": RectifiedFlow()},  # logit-normal times [F, section 3.1]
    "digits-tread":     {**_DIGITS, "network": TreadConfig()},  # [T] at the size of the digits' encoder
    "digits-sprint":    {**_DIGITS, "network": SprintConfig(), "process": RectifiedFlow(),
                         "mask_ratio": 0.75, "mask_pattern": "structured"},  # [P] at this size, of DiT's blocks
    "digits-deferred":  {**_DIGITS, "network": DeferredConfig(), "mask_ratio": 0.75},  # [U] at this size
    # name              network                 data       recipe      steps
    "s2-in256":         {**_masked(_S, _DEC_S),  **_IN256, **_MASKED, "max_steps": 2_000_000, **_LONG},  # decoder: ours
    "b2-in256":         {**_masked(_B, _DEC_B),  **_IN256, **_MASKED, "max_steps": 2_000_000, **_LONG},  # decoder: ours
    "l2-in256":         {**_masked(_L, _DEC),    **_IN256, **_MASKED, "max_steps": 2_000_000, **_LONG},  # [M]
    "xl2-in256":        {**_masked(_XL, _DEC),   **_IN256, **_MASKED, "max_steps": 2_000_000, **_LONG},  # [M]
    "h2-in256":         {**_masked(_H, _DEC),    **_IN256, **_MASKED, "max_steps": 2_000_000, **_LONG},  # [M]
    "xl2-in256-unmask": {**_masked(_XL, _DEC),   **_IN256, **_UNMASK, "max_steps":   100_000, **_LONG, **_FROM_256},
    "xl2-in512":        {**_masked(_XL, _DEC),   **_IN512, **_MASKED, "max_steps": 1_000_000, **_LONG},  # [M]
    "xl2-in512-unmask": {**_masked(_XL, _DEC),   **_IN512, **_UNMASK, "max_steps":    50_000, **_LONG, **_FROM_512},
    "dit-s2-in256":     {**_dense(_S),           **_IN256, **_DIT,    "max_steps":   400_000, **_LONG},  # [D, table 4]
    "dit-b2-in256":     {**_dense(_B),           **_IN256, **_DIT,    "max_steps":   400_000, **_LONG},  # [D, table 4]
    "dit-l2-in256":     {**_dense(_L),           **_IN256, **_DIT,    "max_steps":   400_000, **_LONG},  # [D, table 4]
    "dit-xl2-in256":    {**_dense(_XL),          **_IN256, **_DIT,    "max_steps": 7_000_000, **_LONG},  # [D, table 2]
    "dit-xl2-in256-vp": {**_dense(_XL),          **_IN256, **_DIT,    "max_steps": 7_000_000, **_LONG, "process": VP()},
    "dit-xl2-in512":    {**_dense(_XL),          **_IN512, **_DIT,    "max_steps": 3_000_000, **_LONG},  # [D, table 3]
    "sit-b2-in256":     {**_dense(_B),           **_IN256, **_SIT,    "max_steps":   400_000, **_LONG},  # [S]
    "sit-xl2-in256":    {**_dense(_XL),          **_IN256, **_SIT,    "max_steps": 7_000_000, **_LONG},  # [S]
    "flow-b2-in256":    {**_masked(_B, _DEC_B),  **_IN256, **_FLOW,   "max_steps": 2_000_000, **_LONG},  # decoder: ours
    "flow-xl2-in256":   {**_masked(_XL, _DEC),   **_IN256, **_FLOW,   "max_steps": 2_000_000, **_LONG},  # [M; F]
    "tread-b2-in256":   {**_routed(_B, 8),       **_IN256, **_TREAD,  "max_steps":   400_000, **_LONG},  # [T], with EDM
    "tread-xl2-in256":  {**_routed(_XL, 24),     **_IN256, **_TREAD,  "max_steps":   400_000, **_LONG},  # [T], with EDM
    "sprint-s2-in256":  {**_sparse(_S),          **_IN256, **_SPRINT, "max_steps": 2_000_000, **_LONG},  # [P] at S
    "sprint-b2-in256":  {**_sparse(_B),          **_IN256, **_SPRINT, "max_steps": 2_000_000, **_LONG},  # [P] at B
    "sprint-xl2-in256": {**_sparse(_XL),         **_IN256, **_SPRINT, "max_steps": 2_000_000, **_LONG},  # [P]
    "sprint-xl2-in256-unmask": {**_sparse(_XL),  **_IN256, **_SPRINT_UNMASK, "max_steps": 200_000, **_LONG},  # [P]
    "deferred-b2-in256": {**_deferred(_B, _MIX_B), **_IN256, **_DEFERRED, "max_steps": 250_000, **_LONG},  # mixer: ours
    "deferred-xl2-in256": {**_deferred(_XL, _MIX), **_IN256, **_DEFERRED, "max_steps": 250_000, **_LONG},  # [U]
    "deferred-xl2-in256-unmask": {**_deferred(_XL, _MIX), **_IN256, **_DEFERRED_UNMASK, "max_steps": 30_000, **_LONG},
}
# fmt: on
