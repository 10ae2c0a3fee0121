"""The Python API of trained networks: `fastmask.load`, `Model.sample`, `Model.denoise`."""

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fastmask.cli import pick_device
from fastmask.diffusion import Denoiser, Sampling, draw_batch
from fastmask.diffusion.sampling import Callback
from fastmask.diffusion.weights import Kind, load_maskdit
from fastmask.generation.classes import class_ids
from fastmask.generation.decoding import Decoder
from fastmask.grid import to_uint8
from fastmask.models.stack import all_blocks

Precision = Literal["auto", "fp32", "bf16"]
Compile = Literal["auto", "none", "block"]

_COMPILES = 64
_HASHED = 256  # values of each tensor in the digest of a network


@dataclasses.dataclass(frozen=True)
class Batches:
    """Batches of equal size for samples 0 .. total - 1; the last one is filled up with samples beyond them."""

    total: int
    size: int

    @classmethod
    def of(cls, total: int, most: int) -> "Batches":
        """Return the fewest batches of at most ``most`` samples, as small as that number of them allows."""
        count = -(-total // most)
        return cls(total, -(-total // count))

    @property
    def count(self) -> int:
        """Number of batches."""
        return -(-self.total // self.size)

    def kept(self, batch: int) -> int:
        """Return how many samples of a batch are not there to fill it up."""
        return min(self.size, self.total - batch * self.size)


class Model:
    """A trained network that draws images.

    Args:
        net: the denoiser, on its device.
        what: where it comes from, for messages.
        vae: as in `load`.
        precision: as in `load`.
        compile: as in `load`.

    Attributes:
        net: the denoiser.
        decoder: turns samples into images.
        class_names: one name per class; empty if they have none.
        num_classes: number of classes; 0: it was trained without labels.
        device: its device.

    Raises:
        ValueError: bf16 on a GPU without it, or a VAE for a network of pixels.
    """

    def __init__(
        self, net: Denoiser, what: str, *, vae: str = "", precision: Precision = "auto", compile: Compile = "auto"
    ) -> None:
        self.net, self.what = net.eval(), what
        self.device = net.model.pos_embed.device
        self.decoder = Decoder(net, what, vae)
        self.num_classes = net.model.num_classes
        self.class_names = list(net.origin.class_names) if net.origin else []
        on_gpu = self.device.type == "cuda"
        has_bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        if precision == "bf16" and on_gpu and not has_bf16:
            raise ValueError(f"--precision bf16: {torch.cuda.get_device_name(self.device)} has no bf16: give fp32")
        self._autocast = precision == "bf16" or (precision == "auto" and has_bf16)
        if compile == "block" or (compile == "auto" and on_gpu):
            # Dynamo raises beyond this limit of shapes: each stack's, with and without guidance, and those of a guide.
            torch._dynamo.config.recompile_limit = max(_COMPILES, torch._dynamo.config.recompile_limit)
            for block in all_blocks(net.model.stacks):
                block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)

    def sample(
        self,
        classes: Sequence[int | str] | None = None,
        *,
        num_samples: int | None = None,
        seed: int = 0,
        batch_size: int = 256,
        guide: "Model | None" = None,
        **settings: Any,
    ) -> Tensor:
        """Draw images.

        Args:
            classes: numbers or names of classes, used cyclically; None draws without labels and without guidance by
                them.
            num_samples: number of images; None is one for each of ``classes``, or one.
            seed: seed of the noise; image i is a function of the seed and i, but for the rounding of matmuls in batches
                of another size.
            batch_size: largest number of images computed at a time.
            guide: a weaker model that guides (arXiv 2406.02507), in place of the network without a label.
            settings: fields of `fastmask.diffusion.Sampling`: solver, sample_steps, cfg_scale, guidance_interval,
                churn.

        Returns:
            uint8, shape (N, H, W, C), on the CPU.

        Raises:
            ValueError: an unknown class or setting, or latents whose VAE is not known or cannot be loaded.
        """
        unknown = sorted(settings.keys() - {field.name for field in dataclasses.fields(Sampling)})
        if unknown:
            raise ValueError(f"{unknown[0]} is no setting of sampling: see fastmask.diffusion.Sampling")
        ids = [self.num_classes]
        if classes is not None:
            ids = class_ids(classes, self.class_names, self.num_classes, self.what)
        total = (len(classes) if classes is not None else 1) if num_samples is None else num_samples
        if total < 1 or batch_size < 1 or not ids:
            raise ValueError("num_samples and batch_size must be at least 1, and classes must name one")
        sampling = fit_guidance(Sampling(**settings), classes is not None, guide is not None, "cfg_scale" in settings)
        self.decoder.load(self.device)
        batches = Batches.of(total, batch_size)
        images = []
        for batch in range(batches.count):
            drawn = self.draw(ids, batch * batches.size, batches.size, sampling, seed=seed, guide=guide)
            images.append(to_uint8(self.decoder(drawn)[: batches.kept(batch)]))
        return torch.cat(images)

    def draw(
        self,
        ids: Sequence[int],
        first: int,
        count: int,
        sampling: Sampling,
        *,
        seed: int,
        guide: "Model | None" = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Return samples ``first``, .., in one batch, before decoding, float32 (count, C, h, w) on the device.

        Sample i has the class ``ids[i % len(ids)]``; otherwise as `fastmask.diffusion.draw_batch`.
        """
        labels = torch.tensor([ids[i % len(ids)] for i in range(first, first + count)])
        with self._precision():
            other = guide.net if guide else None
            return draw_batch(self.net, labels, sampling, seed=seed, first=first, guide=other, callback=callback)

    @torch.no_grad()
    def denoise(self, x: Tensor, sigma: float | Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the images, or latents, that the network expects behind noised ones.

        Args:
            x: images plus noise of deviation sigma, image + sigma * noise, shape (B, C, h, w), whatever the process.
            sigma: noise level, one number or shape (B,), above 0.
            labels: int64, shape (B,), on any device; None is no label.

        Returns:
            Shape and dtype of ``x``, on the model's device.
        """
        process, dtype = self.net.process, self.net.model.pos_embed.dtype
        level = torch.as_tensor(sigma, dtype=torch.float64).cpu().expand(len(x))
        if not ((level > 0) & level.isfinite()).all():
            raise ValueError(f"sigma must be above 0 and finite, not {level.tolist()}")
        t = process.time_at(level)
        a, _ = process.mix(t)
        if labels is None:
            labels = torch.full((len(x),), self.num_classes)
        state = a[:, None, None, None].to(self.device) * x.to(self.device, torch.float64)
        with self._precision():
            return self.net(state.to(dtype), t.to(self.device, dtype), labels.to(self.device)).to(x.dtype)  # type: ignore[no-any-return]

    def digest(self) -> str:
        """Return a hash of the network's first values of every tensor, which tells checkpoints of a run apart."""
        found = hashlib.sha256()
        for name, tensor in self.net.state_dict().items():
            found.update(f"{name} {tuple(tensor.shape)}".encode())
            found.update(tensor.flatten()[:_HASHED].float().cpu().numpy().data)
        return found.hexdigest()

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        # Autocast keeps the weights that it has cast until the end of the block.
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._autocast)


def load(
    source: str | os.PathLike[str],
    *,
    weights: Kind = "ema",
    device: str | torch.device = "auto",
    vae: str = "",
    precision: Precision = "auto",
    compile: Compile = "none",
    num_heads: int | None = None,
) -> Model:
    """Load a trained network for sampling.

    Args:
        source: a run folder (its newest intact checkpoint), one of its checkpoints, or a file of weights with the
            published parameter names.
        weights: the averaged weights (ema) or the trained ones (raw).
        device: "auto" is the GPU if there is one.
        vae: folder or name of a diffusers `AutoencoderKL` that decodes latents, in place of the one recorded.
        precision: "fp32" or "bf16" (autocast); "auto" is bf16 on GPUs that have it.
        compile: "block" compiles the blocks; "auto" does on a GPU.
        num_heads: number of encoder heads, for a file that does not record it and is of no published width.

    Raises:
        ValueError: no such file, weights that are not a MaskDiT's, or no such device.
    """
    place = device if isinstance(device, torch.device) else pick_device(device)
    net = load_maskdit(source, num_heads, weights=weights).to(place)
    return Model(net, os.fspath(source), vae=vae, precision=precision, compile=compile)


def fit_guidance(sampling: Sampling, labelled: bool, guide: bool, given: bool) -> Sampling:
    """Return the settings for samples with or without labels.

    Args:
        sampling: the settings.
        labelled: whether the samples have labels, without which there is nothing to guide by.
        guide: whether another model guides.
        given: whether the user chose the scale, rather than the default.

    Raises:
        ValueError: chosen guidance by labels of samples without labels.
    """
    sampling.check()
    if guide and sampling.cfg_scale == 1:
        raise ValueError("a guide needs guidance: give a --cfg-scale other than 1, or leave --guide out")
    if labelled or guide or sampling.cfg_scale == 1:
        return sampling
    if given or sampling.guidance_interval:
        raise ValueError(
            "guidance goes by labels, and these samples have none: leave --cfg-scale and --guidance-interval out, or "
            "guide by another model"
        )
    return sampling.unguided()
