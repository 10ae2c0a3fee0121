"""Cost of a training step by formula: FLOP, memory traffic, launches and memory.

The counts are for an eager step with the fused kernels; tests compare them with the operators of a real step. GB are
10^9 bytes.
"""

import math
from typing import NamedTuple

from fastmask.diffusion.masking import kept_count
from fastmask.models.block_config import BlockConfig
from fastmask.models.counts import forward_macs, num_parameters
from fastmask.models.maskdit import MaskDiT
from fastmask.training.muon import ITERATIONS, block_matrices

_TABLE_LAUNCHES = 13  # of a stack's `rotary_table`
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
    mlp: tuple[int, int]  # values after the first Linear of an MLP, and before its second
    options: BlockConfig
    gathers: bool  # whether the rotations of the tokens, if there are any, are gathered for each sample


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
    blocks = sum(stack.depth for stack in stacks)
    parameters = num_parameters(model)
    matrices = [tuple(matrix.shape) for matrix in block_matrices(model.stacks)] if muon else []
    in_matrices = sum(map(math.prod, matrices))
    again = int(checkpoint_blocks)  # additional forward passes of the blocks
    # Matmuls, in token widths: qkv 1 + 3, proj 1 + 1, fc1 1, fc2 1 and the MLP's; forward and two in backward.
    products = sum(s.depth * s.tokens * (8 * s.width + sum(s.mlp)) for s in stacks)
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
    others += sum(_TABLE_LAUNCHES + stack.gathers for stack in stacks if stack.options.rope)
    per_block = launches[0] + again * launches[1] + _option_launches(stacks[0].options, low, again)
    return Work(
        flops=6 * forward_macs(model, kept_count(model.length, ratio)) + 2 * again * sum(map(_matmul_macs, stacks)),
        matmul_bytes=(3 + again) * low * products + 3 * 2 * low * joined,
        other_bytes=sum(s.depth * s.tokens * _token_bytes(s, low, again) for s in stacks)
        + ends
        + (80 + 3 * low) * settled,
        matmul_weight_bytes=(3 + again) * low * parameters,
        cast_bytes=(12 + 6 * again) * parameters if low == 2 else 0,  # 4 + 2 each way
        accumulate_bytes=12 * parameters,
        # AdamW: p, g, m, v and the average read; all but g written, in one pass. Muon, besides its matmuls: momentum
        # 20, direction 12, casts 8, weights 36, average 12; six passes in the dtype of the matmuls.
        update_bytes=(20 + 16) * (parameters - in_matrices) + (88 + 6 * low) * in_matrices,
        launches=per_block * blocks + others,
        update_flops=sum(orthogonal_flops(*matrix) for matrix in matrices),
    )


def _token_bytes(stack: _Stack, low: int, again: int) -> int:
    """Return the traffic of all ops of a block but its matmuls, per token."""
    width, (into, out_of), options = stack.width, stack.mlp, stack.options
    forward, wider = 1 + again, low == 2  # whether fp32 copies are made of 16-bit values
    # fp32 residuals: two norms read and write them; backward reads them and their gradient and writes a gradient.
    total = width * (forward * 2 * 2 * 4 + 2 * 3 * 4)
    # Norms 2 (2), attention 4; back 2 (4) and 8, gradient of qkv 6, bias sums 5 and those of fc1.
    total += low * (width * (forward * (4 + 4) + 8 + 8 + 6 + 5) + into)
    if options.mlp == "gelu":
        total += low * into * (forward * 2 + 4)
    else:  # in fp32
        total += out_of * (forward * (20 + 18 * wider) + 72 + 28 * wider)
    if options.qk_norm:
        total += low * width * (forward * 4 + 6)
    if options.rope:  # of queries and keys, in fp32; cosines and sines are read by every multiplication
        total += 2 * width * (forward * (36 + 12 * wider) + 40 + 12 * wider)
        total += (forward + 1) * 16 * width // stack.heads if stack.gathers else 0
    return total


def _option_launches(options: BlockConfig, low: int, again: int) -> int:
    """Return what options add to the launches of a block, forward and backward, and again in recomputation."""
    narrow = low == 2
    added = {
        "swiglu": (13, 3) if narrow else (6, 1),
        "rope": (38, 18) if narrow else (30, 14),
        "qk_norm": (8, 4) if narrow else (4, 2),  # a norm is one op on a GPU, and several on a CPU
    }
    found = {"swiglu": options.mlp == "swiglu", "rope": options.rope, "qk_norm": options.qk_norm}
    return sum(once + again * more for name, (once, more) in added.items() if found[name])


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
    for tokens, width, heads, depth, linears, settles, mlp, options, gathers in stacks:
        # qkv and result of attention, two branches; two fp32 residuals; the MLP's values before its activation.
        per_token = width * (6 * low + 2 * 4) + low * mlp[0] + 4 * heads + 16  # plus statistics of softmax and norms
        if options.qk_norm or options.rope:
            per_token += 2 * low * width  # queries and keys as attention takes them
        per_token += 8 * heads if options.qk_norm else 0  # statistics of their norms
        block = tokens * per_token + (6 * width + model.condition_width) * low  # plus its modulation
        if checkpoint_blocks:
            recomputed = max(recomputed, block)
            # The incoming branch, the modulation with its gate, and the fp32 residual.
            block = tokens * width * (low + 4) + 6 * width * low
            copied -= depth * width * (3 * width + sum(mlp))  # qkv, fc1 and fc2 are cast inside their ops
        # Plus the residual at the start or end of the stack, unless it is kept as the next one's, and Linears' inputs.
        kept += depth * block + (0 if settles else 4 * tokens * width) + linears * low * tokens * width
        kept += 4 * tokens * width // heads if options.rope and gathers else 0  # rotations, shared by the blocks
    # Backward of the MLP: hidden values, their gradient, the gradient of the input, and gradients from the norms; of
    # SwiGLU fp32 values of gate, input and their gradients.
    working = max(s.tokens * (16 * low * s.width if s.options.mlp == "gelu" else 26 * s.mlp[1]) for s in stacks)
    copy = 2 * copied if low == 2 else 0
    moments = 8 * parameters - (4 * sum(p.numel() for p in block_matrices(model.stacks)) if muon else 0)
    fixed = (4 * parameters, 4 * parameters, moments, 4 * averages * parameters)
    return Memory(*fixed, copy, kept, working, recomputed)


def _bytes_of(precision: str) -> int:
    return 2 if precision in ("bf16", "fp16") else 4


def _matmul_macs(stack: _Stack) -> int:
    """Return the MACs of the blocks of a stack, without modulations."""
    return stack.depth * stack.tokens * stack.width * (4 * stack.width + sum(stack.mlp) + 2 * stack.tokens)


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
            stack.mlp_widths,
            stack.options,
            stack.tokens == "kept" and keep < model.length,
        )
        for stack in model.stacks
    ]
