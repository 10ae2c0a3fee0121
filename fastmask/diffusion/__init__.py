"""Diffusion: processes, the denoiser, the training objective and its random draws, solvers and sampling."""

from fastmask.diffusion.denoiser import Denoiser
from fastmask.diffusion.draws import TrainingDraws, training_draws
from fastmask.diffusion.edm import EDM, EDMPrecond
from fastmask.diffusion.flow import RectifiedFlow
from fastmask.diffusion.objective import MaskedDenoising, Objective
from fastmask.diffusion.process import Process
from fastmask.diffusion.sampling import draw_samples, sample
from fastmask.diffusion.solvers import SOLVERS

__all__ = [
    "EDM",
    "SOLVERS",
    "Denoiser",
    "EDMPrecond",
    "MaskedDenoising",
    "Objective",
    "Process",
    "RectifiedFlow",
    "TrainingDraws",
    "draw_samples",
    "sample",
    "training_draws",
]
