"""Random draws of training, each a function of the seed and the global index of the sample only."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastmask.diffusion.masking import GROUP, RatioPerSample, structured_mask
from fastmask.diffusion.process import Process
from fastmask.kernels import Mask, random_normal, random_uniform, sample_mask
from fastmask.models.condition import Condition

# Streams of the counter-based generator; stream 0 is sample_mask's, 4 and 5 the data's, 6 sampling's, 7 and 9
# masking's. The noise that sampling adds in step i has stream 8 + 256 i.
_TIME_STREAM, _NOISE_STREAM, _DROP_STREAM, _PATH_STREAM = 1, 2, 3, 10


class TrainingDraws(NamedTuple):
    """Random draws of a batch: the arguments of `Objective` after the images, in order."""

    condition: Condition
    mask: Mask | None
    t: Tensor
    noise: Tensor


def training_draws(
    process: Process,
    images: Tensor,
    condition: Condition,
    *,
    length: int,
    keep: int,
    drop: Callable[[Condition, Tensor], Condition],
    label_drop: float = 0.0,
    drop_path: Callable[[Condition, Tensor], Condition] | None = None,
    path_drop: float = 0.0,
    structured: bool = False,
    per_sample: RatioPerSample | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
) -> TrainingDraws:
    """Draw times, noise, masks and dropout of the condition for a batch, without a host sync.

    With ``seed`` and ``offset`` the draws are the same on every device, for any batch size and order of batches.
    Without them every call takes a new seed from the device's torch generator, reproducible with ``torch.manual_seed``.
    If both are tensors, a captured CUDA graph makes new draws at each replay after they are changed in place.

    Args:
        process: the process, which maps normal draws to times.
        images: shape (B, C, H, W).
        condition: the condition, on the device of the images.
        length: L.
        keep: K; equal to L means no mask.
        drop: drops the condition of chosen samples: `drop` of the network.
        label_drop: probability of dropping the condition of a sample.
        drop_path: drops the middle path of the network for chosen samples: `drop_path` of the network.
        path_drop: probability of dropping the path of a sample; requires ``drop_path``.
        structured: whether the mask keeps one position of each group of 2 x 2 of a square grid; K must be L / 4.
        per_sample: distribution of K per sample; ignored if ``keep`` is L. The batch size and the offset must then be
            multiples of `fastmask.diffusion.masking.GROUP` (not checked for a tensor offset).
        seed: the run's seed, an int, or int64 of shape () on the device of the images.
        offset: global index of the batch's first sample in the run, of a type like ``seed``; requires ``seed``. Calls
            with overlapping sample indices share draws, so a training loop increases the offset by B per call.

    Returns:
        The condition with that of some samples dropped, the mask (None when nothing is dropped), times (B,) and unit
        noise of the shape of the images, both float32.

    Raises:
        ValueError: a seed without an offset or vice versa; a ratio per sample for a batch that does not consist of
            whole groups; a structured mask for another K, or for a grid without groups of 2 x 2.
    """
    if (seed is None) != (offset is None):
        given, missing = ("offset", "seed") if seed is None else ("seed", "offset")
        raise ValueError(f"{given} is given and {missing} is missing: samples are drawn by both, or give neither")
    batch, device = images.shape[0], images.device
    if seed is None or offset is None:
        # A tensor, since reading a number would be a host sync.
        seed, offset = torch.randint(2**63 - 1, (), device=device), 0
    sample = torch.arange(batch, dtype=torch.int64, device=device) + offset
    t = process.draw(random_normal(seed, sample, 1, _TIME_STREAM)[:, 0])
    noise = random_normal(seed, sample, images.shape[1:].numel(), _NOISE_STREAM).view(images.shape)
    chosen = random_uniform(seed, sample, 1, _DROP_STREAM)[:, 0] < label_drop
    condition = drop(condition, chosen)
    if path_drop and drop_path is not None:
        condition = drop_path(condition, random_uniform(seed, sample, 1, _PATH_STREAM)[:, 0] < path_drop)
    kept: int | Tensor = keep
    mask, total = None, None
    if keep < length and structured:
        if 4 * keep != length or math.isqrt(length) ** 2 != length:
            raise ValueError(f"a structured mask keeps a fourth of a square grid, not {keep} of {length} positions")
        mask = structured_mask(batch, math.isqrt(length), seed=seed, offset=offset, device=device)
    elif keep < length:
        if per_sample is not None:
            if isinstance(offset, int) and offset % GROUP:
                raise ValueError(f"offset must be a multiple of {GROUP} for a mask ratio per sample, not {offset}")
            kept = per_sample.keep(seed, sample, process.log_snr(t), length)
            total = per_sample.total(batch, length)
        mask = sample_mask(batch, length, kept, seed=seed, offset=offset, device=device, total=total)
    return TrainingDraws(condition, mask, t, noise)
