"""Masked training of diffusion transformers (MaskDiT, arXiv 2306.09305)."""

import importlib
from typing import TYPE_CHECKING, Any

from fastmask.diffusion import EDM, VP, Denoiser, EDMPrecond, RectifiedFlow
from fastmask.kernels import Mask
from fastmask.models.maskdit import MaskDiT

if TYPE_CHECKING:
    from fastmask.diffusion.weights import load_maskdit

__version__ = "0.1.0"
__all__ = ["EDM", "VP", "Denoiser", "EDMPrecond", "Mask", "MaskDiT", "RectifiedFlow", "load_maskdit"]


def __getattr__(name: str) -> Any:
    """Import `load_maskdit` lazily: it needs safetensors, while the network needs only torch."""
    if name != "load_maskdit":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = importlib.import_module("fastmask.diffusion.weights").load_maskdit
    globals()[name] = found
    return found
