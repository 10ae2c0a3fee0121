"""Masked training of diffusion transformers (MaskDiT, arXiv 2306.09305)."""

from fastmask.checkpoint import load_maskdit
from fastmask.diffusion import EDMPrecond
from fastmask.kernels import Mask
from fastmask.model import MaskDiT

__version__ = "0.1.0"
__all__ = ["EDMPrecond", "Mask", "MaskDiT", "load_maskdit"]
