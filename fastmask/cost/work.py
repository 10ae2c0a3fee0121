"""Cost of a training step by formula: FLOP, memory traffic, launches and memory.

The counts are for an eager step with the fused kernels; tests compare them with the operators of a real step. GB are
10^9 bytes.
"""

import math
from typing import NamedTuple

from fastmask.diffusion.masking import kept_count
from fastmask.models.counts import forward_macs, num_parameters
from fastmask.models.maskdit import MaskDiT
from fastmask.training.muon import ITERATIONS, block_matrices

RESERVE = 0.1  # assumed fraction of GPU memory for context, workspaces and fragmentation


class Work(NamedTuple):
    """FLOP, memory traffic and launches of a training step.

    Attributes:
        flops: FLOP of matmuls and attention per image, including recomputed blocks.
        matmul_bytes: activation traffic of matmuls, per image.
        other_bytes: traffic of attention and all other ops, per image.
        matmul_weight_bytes: traffic of weights and their gradients in matmuls, per micro-batch.
        cast_bytes: traffic of casts of weights and gradients between fp32 and 16 bits, per micro-batch.
        accumulate_bytes: traffic of gradient accumulation, per micro-batch after the first of a step.
        update_bytes: traffic of the optimizer with one EMA, per step.
        launches: operations per micro-batch, counted as one launch each; there can be more kernels.
        update_flops: FLOP of Muon's matmuls, per step, of all processes together.
    """

    flops: float
    matmul_bytes: float
    other_bytes: float
    matmul_weight_bytes: float
    cast_bytes: float
    accumulate_bytes: float
    update_bytes: float
    launches: int
    update_flops: int = 0


class Memory(NamedTuple):
    """Bytes by part: the first five independent of the batch, the others per image of a micro-batch.

    All gradients are counted in addition to all activations, as with several micro-batches per step, DDP's buckets or a
    CUDA graph. A single micro-batch without these takes less, since activations are freed while gradients are created;
    more than two micro-batches take no more than two. AdamW takes no more than its state, in a single fused pass.
    Muon's workspace is that of one matrix per process, and fits where the activations were.

    Attributes:
        weights: weights, fp32.
        gradients: gradients, fp32.
        moments: AdamW's two moments, and Muon's one momentum of its matrices, fp32.
        ema: all EMAs of the weights, fp32.
        copy: 16-bit weights, made by autocast and read by backward; with recomputed blocks, the ones that autocast
            holds until forward ends.
        activations: activations kept for backward.
        working: peak workspace in backward.
        recomputed: recompute buffer (largest block), with recomputed blocks.
    """

    weights: int
    gradients: int
    moments: int
    ema: int
    copy: int
    activations: int
    working: int
    recomputed: int = 0

    @property
    def fixed(self) -> int:
        """Bytes independent of the batch."""
        return sum(self[:5])

    @property
    def per_image(self) -> int:
        """Bytes per image of a micro-batch."""
        return self.activations + self.working + self.recomputed

    def high_water(self, images: int) -> int:
        """Return the peak memory of a step, for micro-batches of ``images`` images."""
        return self.fixed + images * self.per_image

    def largest_batch(self, size: float) -> int:
        """Return the largest micro-batch that fits into ``size`` bytes; 0 if none does."""
        return max(0, int((size * (1 - RESERVE) - self.fixed) // self.per_image))


class _Stack(NamedTuple):
    """Sizes of a stack and its number of tokens per image."""

    tokens: int
    width: int
    heads: int
    depth: int
    linears: int  # Linears of this width after the blocks
    settles: bool  # whether the residual stream leaves it as it is


def work_of(
    model: MaskDiT, ratio: float, precision: str, *, checkpoint_blocks: bool = False, muon: bool = False
) -> Work:
    """Return the cost of a training step at a mask ratio.

    Args:
        model: the network; its tensors can be on the meta device.
        ratio: the mask ratio.
        precision: "bf16", "fp16", "tf32" or "fp32".
        checkpoint_blocks: whether backward recomputes the blocks, see `MaskDiT.checkpoint_blocks`.
        muon: whether Muon updates the matrices of the blocks.
    """
    low = _bytes_of(precision)
    stacks = _stacks(model, ratio)
    wide = sum(stack.depth * stack.tokens * stack.width for stack in stacks)  # values of a token-wide tensor
    blocks = sum(stack.depth for stack in stacks)
    parameters = num_parameters(model)
    matrices = [tuple(matrix.shape) for matrix in block_matrices(model.stacks)] if muon else []
    in_matrices = sum(map(math.prod, matrices))
    again = int(checkpoint_blocks)  # additional forward passes of the blocks
    # Per block, in token widths. Matmuls: qkv 1 + 3, proj 1 + 1, fc1 1 + 4, fc2 4 + 1; forward and two in backward.
    products = (3 + again) * 16 * low
    # fp32 residuals: two norms read and write them; backward reads them and their gradient and writes a gradient.
    residuals = (1 + again) * 2 * 2 * 4 + 2 * 3 * 4
    # Norms 2 (2), GELU 8, attention 4; back 2 (4), 16 and 8, gradient of qkv 6, bias sums 9.
    rest = ((1 + again) * (4 + 8 + 4) + 8 + 16 + 8 + 6 + 9) * low
    ends = sum(stack.tokens * stack.width for stack in stacks) * (20 + 3 * low)  # a stack's input and its first norm
    # Where kept tokens are taken from a residual stream or put back: the addition that a norm does elsewhere, the
    # gather or the restoration, and their gradients.
    settled = sum(stack.tokens * stack.width for stack in stacks if stack.settles)
    joined = sum(stack.linears * stack.tokens * stack.width for stack in stacks)
    # Launches per block, per recomputed block, outside of the blocks, for other stacks, without exit, with Linears, for
    # the cast of kept tokens that an exit returns.
    launches = (55, 21, 86, 29, 0, 21, 2) if low == 2 else (33, 10, 66, 19, 4, 6, 0)
    found = True, len(stacks) > 1, settled > 0, joined > 0, len(stacks) > 1 and model.stacks[-1].tokens == "kept"
    others = sum(count for count, is_there in zip(launches[2:], found, strict=True) if is_there)
    return Work(
        flops=6 * forward_macs(model, kept_count(model.length, ratio)) + 2 * again * sum(map(_matmul_macs, stacks)),
        matmul_bytes=products * wide + 3 * 2 * low * joined,
        other_bytes=(residuals + rest) * wide + ends + (80 + 3 * low) * settled,
        matmul_weight_bytes=(3 + again) * low * parameters,
        cast_bytes=(12 + 6 * again) * parameters if low == 2 else 0,  # 4 + 2 each way
        accumulate_bytes=12 * parameters,
        # AdamW: p, g, m, v and the average read; all but g written, in one pass. Muon, besides its matmuls: momentum
        # 20, direction 12, casts 8, weights 36, average 12; six passes in the dtype of the matmuls.
        update_bytes=(20 + 16) * (parameters - in_matrices) + (88 + 6 * low) * in_matrices,
        launches=(launches[0] + again * launches[1]) * blocks + others,
        update_flops=sum(orthogonal_flops(*matrix) for matrix in matrices),
    )


def orthogonal_flops(rows: int, columns: int) -> int:
    """Return the FLOP of `orthogonalized`: per iteration a Gram matrix, its square, and the multiplication by both."""
    short, long = sorted((rows, columns))
    return ITERATIONS * 2 * (short * short * long + short**3 + short * short * long)


def memory_of(
    model: MaskDiT,
    ratio: float,
    precision: str,
    *,
    averages: int = 1,
    checkpoint_blocks: bool = False,
    muon: bool = False,
) -> Memory:
    """Return the memory of training at a mask ratio.

    Args:
        model: the network; its tensors can be on the meta device.
        ratio: the mask ratio; the lowest ratio of a run takes the most memory.
        precision: "bf16", "fp16", "tf32" or "fp32".
        averages: number of EMAs of the weights.
        checkpoint_blocks: whether backward recomputes the blocks, see `MaskDiT.checkpoint_blocks`.
        muon: whether Muon updates the matrices of the blocks, of which it keeps one momentum.
    """
    low, parameters = _bytes_of(precision), num_parameters(model)
    stacks = _stacks(model, ratio)
    kept, copied, recomputed = 0, parameters, 0
    for tokens, width, heads, depth, linears, settles in stacks:
        # qkv and result of attention, two branches, hidden values of the MLP; two fp32 residuals.
        per_token = width * (10 * low + 2 * 4) + 4 * heads + 16  # plus statistics of softmax and norms
        block = tokens * per_token + (6 * width + model.condition_width) * low  # plus its modulation
        if checkpoint_blocks:
            recomputed = max(recomputed, block)
            # The incoming branch, the modulation with its gate, and the fp32 residual.
            block = tokens * width * (low + 4) + 6 * width * low
            copied -= depth * 11 * width**2  # qkv, fc1 and fc2 are cast inside their ops
        # Plus the residual at the start or end of the stack, unless it is kept as the next one's, and Linears' inputs.
        kept += depth * block + (0 if settles else 4 * tokens * width) + linears * low * tokens * width
    # Backward of the MLP: hidden values, their gradient, the gradient of the input, and gradients from the norms.
    working = max(16 * low * tokens * width for tokens, width, *_ in stacks)
    copy = 2 * copied if low == 2 else 0
    moments = 8 * parameters - (4 * sum(p.numel() for p in block_matrices(model.stacks)) if muon else 0)
    fixed = (4 * parameters, 4 * parameters, moments, 4 * averages * parameters)
    return Memory(*fixed, copy, kept, working, recomputed)


def _bytes_of(precision: str) -> int:
    return 2 if precision in ("bf16", "fp16") else 4


def _matmul_macs(stack: _Stack) -> int:
    """Return the MACs of the blocks of a stack, without modulations."""
    return stack.depth * stack.tokens * stack.width * (12 * stack.width + 2 * stack.tokens)


def _stacks(model: MaskDiT, ratio: float) -> list[_Stack]:
    keep = kept_count(model.length, ratio)
    return [
        _Stack(
            stack.tokens_of(model.length, keep),
            stack.width,
            stack.num_heads,
            len(stack.blocks),
            len(stack.linears),
            stack.exit is None,
        )
        for stack in model.stacks
    ]
