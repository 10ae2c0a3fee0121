"""Encodes images to latent moments, and decodes latents, with diffusers' `AutoencoderKL`."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmask.data.fingerprint import of_weights
from fastmask.data.latents import Scaling
from fastmask.diffusion.origin import LatentSpace


class Autoencoder:
    """A VAE.

    Args:
        name: a folder in diffusers' format (a VAE, or a pipeline with one in `vae`), or a model name.
        device: compute device; bfloat16 on a GPU, float32 on a CPU.

    Attributes:
        channels: latent channels C.
        downsampling: side of an image over the side of its latent.
        scale: scale for training, (latent - shift) * scale; one number for all channels or one for each.
        shift: see scale.
        scaling: applies scale and shift.
        space: its latents, as they are recorded with weights.
        precision: "bfloat16 on cuda" or "float32 on cpu".
        sha256: SHA-256 of the weights: their names in sorted order, each followed by its values in float32.

    Raises:
        ValueError: diffusers is not installed, or the VAE cannot be loaded.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        try:
            diffusers = importlib.import_module("diffusers")
        except ModuleNotFoundError as error:
            raise ValueError(
                "a VAE needs diffusers: pip install diffusers (--space pixel prepares without, --latents samples "
                "without)"
            ) from error
        # Model names are NAME or OWNER/NAME; anything else is not looked up on the hub.
        if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1 or " " in name):
            raise ValueError(f"--vae {name} cannot be loaded: there is no such folder")
        folder = "vae" if (Path(name) / "vae" / "config.json").exists() else None
        try:
            # diffusers raises ValueError or RuntimeError for another class of model, or for weights that do not fit.
            self._vae: Any = diffusers.AutoencoderKL.from_pretrained(name, subfolder=folder, low_cpu_mem_usage=False)
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"--vae {name} cannot be loaded: {_reason(error)}") from error
        self.sha256 = of_weights(self._vae)
        self._device = device
        self._vae.to(device).eval().requires_grad_(False)
        if device.type == "cuda":
            self._vae.to(torch.bfloat16)
        self.precision = f"{str(self._vae.dtype).removeprefix('torch.')} on {device.type}"
        settings = self._vae.config
        self.channels = int(settings.latent_channels)
        self.downsampling = int(2 ** (len(settings.block_out_channels) - 1))
        self.scale: float | list[float] = float(settings.scaling_factor)
        self.shift: float | list[float] = float(getattr(settings, "shift_factor", None) or 0.0)
        means, deviations = (getattr(settings, name, None) for name in ("latents_mean", "latents_std"))
        if means and deviations:  # shift and divisor, as in diffusers' pipelines
            if not len(means) == len(deviations) == self.channels or 0 in deviations:
                raise ValueError(f"--vae {name}: latents_mean and latents_std of its configuration do not fit it")
            self.scale, self.shift = [settings.scaling_factor / std for std in deviations], list(means)
        self.scaling = Scaling(self.scale, self.shift)
        self.space = LatentSpace(vae=name, sha256=self.sha256, scale=self.scale, shift=self.shift)

    def side(self, image_size: int) -> int:
        """Return the latent side for an image side; a ValueError if it is not an integer."""
        side, rest = divmod(image_size, self.downsampling)
        if rest:
            raise ValueError(f"image_size must be a multiple of {self.downsampling} for this VAE, not {image_size}")
        return side

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, 3 or 1, H, W) in [-1, 1] to moments (B, 2C, h, w), means before log-variances."""
        images = images.expand(-1, 3, -1, -1).to(self._vae.dtype)
        moments: Tensor = self._vae.encode(images).latent_dist.parameters
        return moments

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode unscaled latents (B, C, h, w) to images, float32 (B, 3, H, W) in [-1, 1]."""
        images: Tensor = self._vae.decode(latents.to(self._device, self._vae.dtype)).sample
        return images.float().clamp(-1, 1)

    def moments(self, pixels: Tensor | NDArray[np.uint8], flip: bool) -> NDArray[np.float16]:
        """Encode images and, as a second copy, horizontally flipped images.

        Args:
            pixels: uint8 (n, 3 or 1, H, W).
            flip: encode flipped images too.

        Returns:
            float16 (n, 1 or 2, 2C, h, w), means before log-variances.

        Raises:
            ValueError: a moment is not finite in float16.
        """
        images = torch.as_tensor(pixels).to(self._device).float().div(127.5).sub(1)
        copies = [images, images.flip(3)] if flip else [images]
        moments = torch.stack([self.encode(copy) for copy in copies], 1).to(torch.float16)
        if not moments.isfinite().all():
            raise ValueError("the VAE gives moments that are not finite in float16: is it meant for these images?")
        result: NDArray[np.float16] = moments.cpu().numpy()
        return result


def _reason(error: BaseException) -> str:
    """Return the cause of a loading error in one line; diffusers reports a missing file if the hub is unreachable."""
    cause: BaseException | None = error
    while cause:
        kinds = [kind.__name__ for kind in type(cause).__mro__]
        if any(word in kind for kind in kinds for word in ("Connect", "LocalEntryNotFound", "OfflineMode", "Timeout")):
            return "it was not fetched before, and the hub does not answer: give the folder of a copy"
        cause = cause.__cause__ or cause.__context__
    return str(error).strip().splitlines()[0]
