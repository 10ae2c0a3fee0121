"""Counter-based random numbers: a function of (seed, sample, stream, position), without hidden state.

Training draws masks, noise and label dropout from here, keyed by the global index of the sample, so the draws do not
depend on the batch size, the world size or the step at which a run was resumed.

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), with unsigned
32-bit words held in int64, so that all devices give the same bits:

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
        seed: the seed, an int or an int64 tensor of shape () on the device of ``sample``.
        sample: int64, shape (B,), global sample indices.
        count: number of words per sample.
        stream: stream number; streams are independent of each other.

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
        # The int64 product wraps at 2**64, but both 32-bit halves are correct once masked.
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
    # 23 bits plus half a step: every value is exact in float32, and 0 and 1 are excluded.
    return (philox_words(seed, sample, count, stream) >> 9).float().add_(0.5).mul_(2.0**-23)


@public_op(otherwise=ANY_DEVICE)
def random_normal(seed: int | Tensor, sample: Tensor, count: int, stream: int) -> Tensor:
    """Return standard normal numbers, float32, shape (B, count); arguments as in `philox_words`.

    Box-Muller transform of consecutive pairs of `random_uniform`; magnitudes are at most 5.8.
    """
    u, v = random_uniform(seed, sample, 2 * count, stream).view(-1, count, 2).unbind(-1)
    return torch.sqrt(-2.0 * torch.log(u)) * torch.cos(2.0 * math.pi * v)
