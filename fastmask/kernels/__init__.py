"""Ops for adaLN diffusion transformers, one file per op.

This package imports only torch. Every op takes ``impl="reference"``, plain PyTorch, or ``impl="fused"``, its kernel for
the tensors' device; `python -m fastmask.kernels` lists the kernels available on this machine. Layouts and random
numbers (`patchify`, `unpatchify`, `random_normal`, `random_uniform`) are plain PyTorch on every device.

Shape letters, here and in every docstring of the project:

    B  batch            L  positions (patches) of an image     D  width of a token
    C  channels         K  kept positions, K <= L              E  width of a decoder token
    H  attention heads  P  values of a patch (p * p * C)       p  side of a patch
    N  rows of packed samples, or of all samples together      G  groups of rows that share a modulation
"""

from fastmask.kernels._attention_backends import attention_backends
from fastmask.kernels._dispatch import BackendUnavailableError, Impl, backends, default_impl, implementation, require
from fastmask.kernels._layout import debug_indices
from fastmask.kernels.adamw_ema import adamw_ema
from fastmask.kernels.add_gated_norm import add_gated_norm
from fastmask.kernels.attention import attention
from fastmask.kernels.embed_kept_patches import embed_kept_patches
from fastmask.kernels.gelu_linear import gelu_linear
from fastmask.kernels.masked_loss import masked_loss
from fastmask.kernels.modulate_norm import modulate_norm
from fastmask.kernels.norm_linear import add_gated_linear, modulated_linear
from fastmask.kernels.patches import patchify, unpatchify
from fastmask.kernels.philox import random_normal, random_uniform
from fastmask.kernels.restore_tokens import gather_tokens, restore_tokens
from fastmask.kernels.sample_mask import Mask, sample_mask
from fastmask.kernels.silu_linear import silu_linear

__all__ = [
    "BackendUnavailableError",
    "Impl",
    "Mask",
    "adamw_ema",
    "add_gated_linear",
    "add_gated_norm",
    "attention",
    "attention_backends",
    "backends",
    "debug_indices",
    "default_impl",
    "embed_kept_patches",
    "gather_tokens",
    "gelu_linear",
    "implementation",
    "masked_loss",
    "modulate_norm",
    "modulated_linear",
    "patchify",
    "random_normal",
    "random_uniform",
    "require",
    "restore_tokens",
    "sample_mask",
    "silu_linear",
    "unpatchify",
]
