"""EDM's preconditioning, training noise and sampler (arXiv 2206.00364) with MaskDiT's loss (arXiv 2306.09305)."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastmask.kernels import Mask, masked_loss, random_normal, random_uniform, sample_mask, unpatchify
from fastmask.masking import GROUP, RatioPerSample, check_ratio, kept_count
from fastmask.model import MaskDiT

# Streams of the counter-based generator; stream 0 is sample_mask's, 4 and 5 the data's, 7 masking's.
_SIGMA_STREAM, _NOISE_STREAM, _LABEL_STREAM, _LATENT_STREAM = 1, 2, 3, 6


class EDMPrecond(nn.Module):
    """The denoiser D(x; sigma, y) = c_skip * x + c_out * F(c_in * x; c_noise, y) (EDM, table 1).

    Args:
        model: the network F.
        sigma_data: standard deviation of the data.
    """

    def __init__(self, model: MaskDiT, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.model = model
        self.sigma_data = sigma_data

    def raw_tokens(self, x: Tensor, sigma: Tensor, labels: Tensor, mask: Mask | None = None) -> Tensor:
        """Return F's raw tokens, shape (B, L, P); arguments as in `forward`."""
        image_scale = self._image_scale(sigma, labels).to(x.dtype)
        tokens: Tensor = self.model(x, sigma.log() / 4, labels, mask, image_scale=image_scale)
        return tokens

    def mixed_raw_tokens(
        self, images: Sequence[Tensor], sigma: Tensor, labels: Tensor, masks: Sequence[Mask | None]
    ) -> list[Tensor]:
        """Return F's raw tokens for noised images of several sizes; arguments as in `EDMLoss.mixed`."""
        image_scale = self._image_scale(sigma, labels).to(images[0].dtype)
        return self.model.forward_mixed(images, sigma.log() / 4, labels, masks, image_scale)

    def _image_scale(self, sigma: Tensor, labels: Tensor) -> Tensor:
        """Return c_in, shape (B,), and look at the labels."""
        num_classes = self.model.num_classes
        # A look at values is free on the CPU alone: elsewhere it would make every step wait for the device, and fake
        # tensors (a subclass) have none.
        real = type(labels) is Tensor and labels.device.type == "cpu" and not torch.compiler.is_compiling()
        if real and num_classes:
            check_labels(labels, num_classes)
        return 1 / (sigma.square() + self.sigma_data**2).sqrt()

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor, mask: Mask | None = None) -> Tensor:
        """Return the denoised images.

        Args:
            x: noised images, shape (B, C, H, W).
            sigma: noise level of each sample, shape (B,).
            labels: int64, shape (B,); a label equal to ``num_classes`` means no label.
            mask: the positions that the encoder sees; None is all.

        Returns:
            Shape (B, C, H, W), dtype of ``x``.

        Raises:
            ValueError: shapes that do not fit the network, a mask for a network without a decoder, or (on the CPU) a
                label outside [0, num_classes].
        """
        raw = unpatchify(self.raw_tokens(x, sigma, labels, mask), self.model.patch_size, *x.shape[2:])
        variance = sigma.square()[:, None, None, None]
        total = variance + self.sigma_data**2
        c_out = (variance / total).sqrt() * self.sigma_data
        return (self.sigma_data**2 / total * x + c_out * raw).to(x.dtype)


class LossParts(NamedTuple):
    """The losses of each sample, all of shape (B,): total = denoising + mae_coef * reconstruction."""

    total: Tensor
    denoising: Tensor
    reconstruction: Tensor


class EDMLoss:
    """MaskDiT's training loss (arXiv 2306.09305, equation 5).

    Sigma, noise and mask that a call does not bring are drawn by the counter-based generator, as `training_draws` draws
    them. With ``seed`` and ``offset`` sample b's draws are a function of the seed and of ``offset + b``: the same on
    every device, in a batch of any size and in any order of batches. Without them every call takes a new seed from the
    device's torch generator: no two calls share noise, and the same calls after the same ``torch.manual_seed`` repeat
    it, in every process that sets it.

    Args:
        sigma_data: standard deviation of the data.
        mae_coef: weight of the reconstruction loss.
        mask_ratio: share of the patches to drop when a call brings no mask.
        p_mean: mean of ln(sigma) when a call brings no sigma.
        p_std: its standard deviation.
    """

    def __init__(
        self,
        sigma_data: float = 0.5,
        mae_coef: float = 0.1,
        mask_ratio: float = 0.0,
        p_mean: float = -1.2,
        p_std: float = 1.2,
    ) -> None:
        check_ratio("mask_ratio", mask_ratio)
        self.sigma_data, self.mae_coef, self.mask_ratio = sigma_data, mae_coef, mask_ratio
        self.p_mean, self.p_std = p_mean, p_std

    def __call__(
        self,
        net: EDMPrecond,
        images: Tensor,
        labels: Tensor,
        *,
        mask: Mask | None = None,
        sigma: Tensor | None = None,
        noise: Tensor | None = None,
        seed: int | Tensor | None = None,
        offset: int | Tensor | None = None,
    ) -> LossParts:
        """Return the losses of a batch.

        Args:
            net: the denoiser.
            images: clean images, shape (B, C, H, W).
            labels: int64, shape (B,); ``num_classes`` means no label.
            mask: which patches the encoder sees; drawn at ``mask_ratio`` when absent, none dropped at ratio 0.
            sigma: noise levels, B values in any shape; drawn when absent.
            noise: noise already times sigma, shape (B, C, H, W); drawn when absent.
            seed: of the draws: an int, or int64 of shape () on the device of the images. A new one when absent.
            offset: global index of the batch's first sample, like ``seed`` and given with it. Calls of the same seed
                whose samples' indices overlap share draws: a training loop adds B from one call to the next.

        Returns:
            The total, denoising and reconstruction losses, each (B,).

        Raises:
            ValueError: a seed without an offset, or the other way round; shapes that do not fit the network.
        """
        if (seed is None) != (offset is None):
            given, missing = ("offset", "seed") if seed is None else ("seed", "offset")
            raise ValueError(f"{given} is given and {missing} is missing: samples are drawn by both, or give neither")
        batch = images.shape[0]
        masked = mask is None and self.mask_ratio > 0
        if masked or sigma is None or noise is None:
            if seed is None or offset is None:
                # A tensor: the host would have to wait for a number.
                seed, offset = torch.randint(2**63 - 1, (), device=images.device), 0
            sample = torch.arange(batch, dtype=torch.int64, device=images.device) + offset
            if sigma is None:
                sigma = _draw_sigma(seed, sample, self.p_mean, self.p_std)
            if noise is None:
                unit = _draw_unit_noise(seed, sample, images)
                noise = (unit * sigma.reshape(batch, 1, 1, 1)).to(images.dtype)
            if masked:
                length = net.model.length
                keep = kept_count(length, self.mask_ratio)
                mask = sample_mask(batch, length, keep, seed=seed, offset=offset, device=images.device)
        sigma = sigma.reshape(batch)
        noised = images + noise
        return self._parts(net, net.raw_tokens(noised, sigma, labels, mask), images, noised, sigma, mask)

    def mixed(
        self,
        net: EDMPrecond,
        images: Sequence[Tensor],
        labels: Tensor,
        *,
        masks: Sequence[Mask | None],
        sigma: Tensor,
        noise: Sequence[Tensor],
    ) -> LossParts:
        """Return the losses of images of several sizes, which go through the network together.

        Args:
            net: the denoiser.
            images: clean images, each tensor of one size: (B1, C, H1, W1), (B2, C, H2, W2), ..
            labels: int64, of all images, one tensor after the other, shape (B1 + B2 + ..,).
            masks: a mask, or None, for each tensor of ``images``.
            sigma: noise levels, of the shape of ``labels``.
            noise: noise already times sigma, of the shapes of ``images``.

        Returns:
            The total, denoising and reconstruction losses, each of the shape of ``labels``.

        Raises:
            ValueError: lists that are empty or of different lengths, or shapes that do not fit the network.
        """
        if not images or not len(images) == len(noise) == len(masks):
            raise ValueError(
                f"a list of images needs lists of as much noise and as many masks, not {len(images)}, {len(noise)} and "
                f"{len(masks)}"
            )
        noised = [image + added for image, added in zip(images, noise, strict=True)]
        raw = net.mixed_raw_tokens(noised, sigma, labels, masks)
        sigmas = torch.split(sigma, [len(image) for image in images])
        sizes = [self._parts(net, *size) for size in zip(raw, images, noised, sigmas, masks, strict=True)]
        return LossParts(*(torch.cat(parts) for parts in zip(*sizes, strict=True)))

    def _parts(
        self, net: EDMPrecond, raw: Tensor, images: Tensor, noised: Tensor, sigma: Tensor, mask: Mask | None
    ) -> LossParts:
        denoising, reconstruction = masked_loss(
            raw,
            images,
            noised,
            sigma,
            mask,
            patch_size=net.model.patch_size,
            sigma_data=self.sigma_data,
            impl=net.model.impl,
        )
        return LossParts(denoising + self.mae_coef * reconstruction, denoising, reconstruction)


class TrainingObjective(nn.Module):
    """The one module that training compiles, wraps and calls: a denoiser whose forward returns its losses."""

    def __init__(self, net: EDMPrecond, loss: EDMLoss) -> None:
        super().__init__()
        self.net = net
        self.loss = loss

    def forward(self, images: Tensor, labels: Tensor, mask: Mask | None, sigma: Tensor, noise: Tensor) -> LossParts:
        """Return the losses of a batch; arguments as in `EDMLoss`."""
        return self.loss(self.net, images, labels, mask=mask, sigma=sigma, noise=noise)


class TrainingDraws(NamedTuple):
    """What chance adds to a batch; sample b's part depends only on the seed and on its global index."""

    labels: Tensor
    mask: Mask | None
    sigma: Tensor
    noise: Tensor


def training_draws(
    images: Tensor,
    labels: Tensor,
    *,
    seed: int | Tensor,
    offset: int | Tensor,
    num_classes: int,
    label_drop: float,
    length: int,
    keep: int,
    p_mean: float,
    p_std: float,
    per_sample: RatioPerSample | None = None,
) -> TrainingDraws:
    """Draw mask, noise and labels to drop for a batch, without waiting for the device.

    A CUDA graph that was captured with tensors for ``seed`` and ``offset`` draws anew at each replay once these are
    changed in place.

    Args:
        images: shape (B, C, H, W).
        labels: int64, shape (B,).
        seed: the run's seed, an int, or int64 of shape () on the device of the images.
        offset: global index of the batch's first sample in the run, like ``seed``.
        num_classes: the label that means none.
        label_drop: probability of replacing a label by none.
        length: L.
        keep: K; equal to L means no mask.
        p_mean: mean of ln(sigma).
        p_std: standard deviation of ln(sigma).
        per_sample: how each sample draws its own K, unless ``keep`` is L. The batch must then be made of whole groups,
            so the offset, too, is a multiple of `fastmask.masking.GROUP` (a tensor's value is not checked).

    Returns:
        Labels (B,) with some dropped, the mask (None when nothing is dropped), sigma (B,) and noise (B, C, H, W)
        already times sigma.

    Raises:
        ValueError: a ratio per sample for a batch that is not made of whole groups.
    """
    batch, device = images.shape[0], images.device
    sample = torch.arange(batch, dtype=torch.int64, device=device) + offset
    sigma = _draw_sigma(seed, sample, p_mean, p_std)
    noise = _draw_unit_noise(seed, sample, images)
    drop = random_uniform(seed, sample, 1, _LABEL_STREAM)[:, 0] < label_drop
    labels = labels.masked_fill(drop, num_classes)
    kept: int | Tensor = keep
    mask, total = None, None
    if keep < length:
        if per_sample is not None:
            if isinstance(offset, int) and offset % GROUP:
                raise ValueError(f"offset must be a multiple of {GROUP} for a mask ratio per sample, not {offset}")
            kept, total = per_sample.keep(seed, sample, sigma, length), per_sample.total(batch, length)
        mask = sample_mask(batch, length, kept, seed=seed, offset=offset, device=device, total=total)
    return TrainingDraws(labels, mask, sigma, noise * sigma[:, None, None, None])


def _draw_sigma(seed: int | Tensor, sample: Tensor, p_mean: float, p_std: float) -> Tensor:
    return (random_normal(seed, sample, 1, _SIGMA_STREAM)[:, 0] * p_std + p_mean).exp()


def _draw_unit_noise(seed: int | Tensor, sample: Tensor, images: Tensor) -> Tensor:
    return random_normal(seed, sample, images.shape[1:].numel(), _NOISE_STREAM).view(images.shape)


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Raise a ValueError unless every label is in [0, num_classes]; num_classes means no label."""
    bad = labels[(labels < 0) | (labels > num_classes)]
    if bad.numel():
        raise ValueError(f"label {int(bad[0])} is outside 0 .. {num_classes - 1} (or {num_classes} for no label)")


@torch.no_grad()
def edm_sample(
    net: Callable[[Tensor, Tensor, Tensor], Tensor],
    latents: Tensor,
    labels: Tensor,
    num_steps: int = 40,
    cfg_scale: float | None = None,
    *,
    num_classes: int | None = None,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
) -> Tensor:
    """Return samples of EDM's deterministic second-order sampler (arXiv 2206.00364, algorithm 1).

    Args:
        net: the denoiser, an `EDMPrecond` or a callable like it.
        latents: unit noise, shape (B, C, H, W); scaled by ``sigma_max`` inside.
        labels: int64, shape (B,).
        num_steps: noise levels above 0, at least 2; the network is evaluated 2 * num_steps - 1 times.
        cfg_scale: classifier-free guidance D_none + scale * (D_label - D_none); None or 1 evaluates D_label alone.
        num_classes: the label that means none; read from an `EDMPrecond`, needed for guidance with another callable.
        sigma_min: lowest noise level above 0.
        sigma_max: highest noise level.
        rho: how the levels crowd toward ``sigma_min`` (equation 5).

    Returns:
        Shape (B, C, H, W), float64: the state is kept in float64, the network runs in its own precision.

    Raises:
        ValueError: fewer than two steps, labels that do not fit, or guidance for a network without classes.
    """
    if num_steps < 2:
        raise ValueError(f"num_steps must be at least 2, not {num_steps}")
    if labels.shape != latents.shape[:1]:
        raise ValueError(f"labels must have shape ({latents.shape[0]},) for these latents, not {tuple(labels.shape)}")
    dtype = torch.float32
    if isinstance(net, EDMPrecond):
        num_classes = net.model.num_classes
        dtype = net.model.pos_embed.dtype
    scale = 1.0 if cfg_scale is None else cfg_scale
    if scale != 1 and not num_classes:
        raise ValueError("guidance needs a network with classes (num_classes above 0): leave cfg_scale out")
    if num_classes:
        check_labels(labels, num_classes)
    none = torch.full_like(labels, num_classes or 0)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        inputs, levels = x.to(dtype), sigma.to(dtype).expand(x.shape[0])
        if scale == 1:
            return net(inputs, levels, labels).double()
        both = net(inputs.repeat(2, 1, 1, 1), levels.repeat(2), torch.cat([labels, none])).double()
        labelled, unlabelled = both.chunk(2)
        return unlabelled + scale * (labelled - unlabelled)

    ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64, device=latents.device)
    levels = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    levels = torch.cat([levels, levels.new_zeros(1)])

    x = latents.double() * levels[0]
    for i in range(num_steps):
        step = levels[i + 1] - levels[i]
        slope = (x - denoise(x, levels[i])) / levels[i]
        x_next = x + step * slope  # Euler
        if i < num_steps - 1:
            slope_next = (x_next - denoise(x_next, levels[i + 1])) / levels[i + 1]
            x_next = x + step * (slope + slope_next) / 2  # Heun
        x = x_next
    return x


def draw_samples(
    net: EDMPrecond, labels: Tensor, *, seed: int, num_steps: int = 40, cfg_scale: float | None = None, batch: int = 256
) -> Tensor:
    """Return a sample for each label, drawn by `edm_sample` in parts.

    Args:
        net: the denoiser.
        labels: int64, shape (N,).
        seed: the starting noise of sample i is a function of it and i, whatever the parts.
        num_steps: noise levels of the sampler.
        cfg_scale: guidance; None or 1 is none.
        batch: samples drawn at a time.

    Returns:
        float32 on the CPU, shape (N, C, H, W).
    """
    model = net.model
    device = model.pos_embed.device
    shape = (model.in_channels, model.input_size, model.input_size)
    drawn = []
    for start in range(0, len(labels), batch):
        part = labels[start : start + batch].to(device)
        index = torch.arange(start, start + len(part), device=device)
        latents = random_normal(seed, index, math.prod(shape), _LATENT_STREAM).view(-1, *shape)
        drawn.append(edm_sample(net, latents, part, num_steps, cfg_scale).float().cpu())
    return torch.cat(drawn)
