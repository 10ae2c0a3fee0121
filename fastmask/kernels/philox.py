"""Random numbers that are a function of (seed, sample, stream, position), with no hidden state.

A training run draws its masks, noise and labels to drop from here, keyed by the global index of the sample. The draws
are therefore the same whatever the batch size, the number of ranks or the step at which a run was resumed.

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), written in int64
arithmetic that holds unsigned 32-bit words, so that every device gives the same bits:

    key     = (seed low, seed high)
    counter = (position // 4, sample low, sample high, stream);  word i of the result belongs to position 4 * q + i
"""

import math

import torch
from torch import Tensor

from fastmask.kernels._dispatch import ANY_DEVICE, public_op

_MASK = 0xFFFFFFFF
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


def philox_words(seed: int | Tensor, sample: Tensor, count: int, stream: int) -> Tensor:
    """Return random 32-bit words.

    Args:
        seed: the run's seed, an int or an int64 tensor of shape () on the device of ``sample``.
        sample: int64, shape (B,), the global index of each sample.
        count: how many words each sample gets.
        stream: what the words are for; different streams are independent.

    Returns:
        int64, shape (B, count), values in [0, 2**32).
    """
    num_blocks = -(-count // 4)
    block = torch.arange(num_blocks, dtype=torch.int64, device=sample.device)
    zero = torch.zeros_like(sample[:, None] + block)
    c0, c1, c2, c3 = (
        block + zero,
        (sample[:, None] & _MASK) + zero,
        (sample[:, None] >> 32 & _MASK) + zero,
        stream + zero,
    )
    k0, k1 = seed & _MASK, seed >> 32 & _MASK
    for _ in range(_ROUNDS):
        # The int64 product wraps at 2**64; its two 32-bit halves are right all the same once masked.
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            (product_1 >> 32 & _MASK) ^ c1 ^ k0,
            product_1 & _MASK,
            (product_0 >> 32 & _MASK) ^ c3 ^ k1,
            product_0 & _MASK,
        )
        k0, k1 = k0 + _WEYL_0 & _MASK, k1 + _WEYL_1 & _MASK
    return torch.stack([c0, c1, c2, c3], dim=-1).flatten(1)[:, :count]  # (B, ceil(count / 4), 4) -> (B, count)


@public_op(otherwise=ANY_DEVICE)
def random_uniform(seed: int | Tensor, sample: Tensor, count: int, stream: int) -> Tensor:
    """Return numbers uniform in (0, 1), float32, shape (B, count); arguments as in `philox_words`."""
    # 23 bits and a half step: every value is exact in float32, and neither 0 nor 1 occurs.
    return (philox_words(seed, sample, count, stream) >> 9).float().add_(0.5).mul_(2.0**-23)


@public_op(otherwise=ANY_DEVICE)
def random_normal(seed: int | Tensor, sample: Tensor, count: int, stream: int) -> Tensor:
    """Return standard normal numbers, float32, shape (B, count); arguments as in `philox_words`.

    Box and Muller's transform of consecutive pairs of `random_uniform`: magnitudes end at 5.8.
    """
    u, v = random_uniform(seed, sample, 2 * count, stream).view(-1, count, 2).unbind(-1)
    return torch.sqrt(-2.0 * torch.log(u)) * torch.cos(2.0 * math.pi * v)
