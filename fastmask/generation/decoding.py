"""Pictures of samples: pixels as they are, latents decoded by a VAE."""

import importlib
from typing import Any

import torch
from torch import Tensor

from fastmask.console import say
from fastmask.diffusion import Denoiser, LatentSpace
from fastmask.grid import preview

_AT_ONCE = 32  # latents decoded at a time: the decoder's activations are of the images' size


class Decoder:
    """Turns samples of a network into images; the VAE is loaded when it is first needed.

    Args:
        net: the denoiser, whose origin says what its samples are.
        what: where it comes from, for messages.
        vae: folder or name of a VAE in place of the recorded one; its scale and shift serve only if none are recorded.

    Attributes:
        from_latents: whether samples are latents. Of a network without a record, one or three channels are pixels,
            unless a VAE is given.

    Raises:
        ValueError: a VAE for a network of pixels.
    """

    def __init__(self, net: Denoiser, what: str, vae: str = "") -> None:
        origin, self._channels = net.origin, net.model.in_channels
        self._space = origin.latents if origin else None
        self._what, self._given = what, vae
        self._vae: Any = None
        self.from_latents = bool(vae) or self._channels not in (1, 3) if origin is None else self._space is not None
        if vae and not self.from_latents:
            raise ValueError(f"{what} was trained on pixels, which need no VAE: leave --vae out")

    @property
    def digest(self) -> str:
        """SHA-256 of the weights of the VAE that was loaded; "" without one."""
        return self._vae.sha256 if self._vae else ""

    def load(self, device: torch.device) -> None:
        """Load the VAE to a device, if samples are latents.

        Raises:
            ValueError: no VAE is recorded or given, it cannot be loaded, or it does not fit the network.
        """
        if not self.from_latents or self._vae is not None:
            return
        recorded = self._space or LatentSpace()
        advice = "give --vae with the name or folder of one (or --latents and --out X.npz for the latents themselves)"
        if not self._given and not recorded.vae:
            raise ValueError(f"{self._what} draws latents, and does not record their VAE: {advice}")
        # Late, since it imports all of fastmask.data, which pixels do not need.
        module: Any = importlib.import_module("fastmask.data.vae")
        latents: Any = importlib.import_module("fastmask.data.latents")
        try:
            vae = module.Autoencoder(self._given or recorded.vae, device)
        except ValueError as error:
            if self._given:
                raise
            raise ValueError(f"{self._what} draws latents of a VAE, and {error}; {advice}") from error
        if vae.channels != self._channels:
            name = self._given or recorded.vae
            raise ValueError(
                f"--vae {name} decodes latents of {vae.channels} channels, and {self._what} draws {self._channels}: "
                f"{advice}"
            )
        for values in (recorded.scale, recorded.shift):
            if isinstance(values, list) and len(values) not in (1, self._channels):
                raise ValueError(f"{self._what} records {len(values)} scales for {self._channels} channels of latents")
        if not self._given and recorded.sha256 not in ("", vae.sha256):
            say(f"{recorded.vae} has other weights than the VAE that {self._what} was trained on: colours can differ")
        self._scaling = latents.Scaling(recorded.scale, recorded.shift) if self._space else vae.scaling
        self._vae = vae

    def __call__(self, samples: Tensor) -> Tensor:
        """Return the images (N, 3 or 1, H, W) of samples (N, C, h, w), in [-1, 1], float32 on the same device."""
        self.load(samples.device)
        if self._vae is None:
            return samples.clamp(-1, 1)
        starts = range(0, len(samples), _AT_ONCE)
        parts = [self._vae.decode(self._scaling.undo(samples[i : i + _AT_ONCE].float())) for i in starts]
        return torch.cat(parts)


class Pictures:
    """The grids of a training run: decoded if the VAE loads, else previews of the latents.

    Args:
        net: the denoiser.
        run_dir: the run folder, for messages.
    """

    def __init__(self, net: Denoiser, run_dir: str) -> None:
        self._net, self._run_dir, self._told = net, run_dir, False

    def __call__(self, samples: Tensor, device: torch.device) -> tuple[Tensor, str]:
        """Return images of samples, and what to add to the name of their file: "-latents" for previews.

        The VAE is loaded for this call only, since training needs the memory.
        """
        try:
            return Decoder(self._net, self._run_dir)(samples.to(device)).cpu(), ""
        except ValueError as error:
            if not self._told:
                say(f"grids show the first three channels of latents, undecoded: {error}")
                self._told = True
            return preview(samples), "-latents"
