"""Masked training of diffusion transformers (MaskDiT, arXiv 2306.09305)."""

import importlib
from typing import TYPE_CHECKING, Any

from fastmask.diffusion import EDM, VP, Denoiser, EDMPrecond, RectifiedFlow
from fastmask.kernels import Mask
from fastmask.models.maskdit import MaskDiT

if TYPE_CHECKING:
    from fastmask.diffusion.weights import load_maskdit
    from fastmask.generation.model import load
    from fastmask.grid import to_pil

__version__ = "0.1.0"
__all__ = ["EDM", "VP", "Denoiser", "EDMPrecond", "Mask", "MaskDiT", "RectifiedFlow", "load", "load_maskdit", "to_pil"]

# Imported when they are first used: they need more than torch, which is all that the network needs.
_LATE = {
    "load": "fastmask.generation.model",
    "load_maskdit": "fastmask.diffusion.weights",
    "to_pil": "fastmask.grid",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(_LATE[name]), name)
    globals()[name] = found
    return found
