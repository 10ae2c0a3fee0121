"""Diffusion: processes, the denoiser, the training objective and its random draws, solvers and sampling."""

from fastmask.diffusion.denoiser import Denoiser
from fastmask.diffusion.draws import TrainingDraws, training_draws
from fastmask.diffusion.edm import EDM, EDMPrecond
from fastmask.diffusion.flow import RectifiedFlow
from fastmask.diffusion.masking import Masking
from fastmask.diffusion.objective import (
    Denoising,
    KeptDenoising,
    MaskedDenoising,
    Objective,
    ObjectiveConfig,
    Pass,
    Term,
)
from fastmask.diffusion.origin import LatentSpace, Origin
from fastmask.diffusion.process import Coefficients, Process
from fastmask.diffusion.sampling import Sampling, draw_batch, draw_samples, sample
from fastmask.diffusion.solvers import SOLVERS
from fastmask.diffusion.vp import VP

__all__ = [
    "EDM",
    "SOLVERS",
    "VP",
    "Coefficients",
    "Denoiser",
    "Denoising",
    "EDMPrecond",
    "KeptDenoising",
    "LatentSpace",
    "MaskedDenoising",
    "Masking",
    "Objective",
    "ObjectiveConfig",
    "Origin",
    "Pass",
    "Process",
    "RectifiedFlow",
    "Sampling",
    "Term",
    "TrainingDraws",
    "draw_batch",
    "draw_samples",
    "sample",
    "training_draws",
]
