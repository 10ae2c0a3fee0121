"""What a training step costs by formula: operations, bytes, launches and memory.

The counts describe a step with the fused kernels, eager; tests hold them to what the operators of a step really do.
GB are 10^9 bytes.
"""

from typing import NamedTuple

from fastmask.diffusion.masking import kept_count
from fastmask.models.counts import forward_macs, num_parameters
from fastmask.models.maskdit import MaskDiT

RESERVE = 0.1  # share of a GPU's memory left to context, workspaces and fragmentation; assumed as well


class Work(NamedTuple):
    """What a training step does.

    Attributes:
        flops: of matmuls and attention, per image, those of blocks recomputed included.
        matmul_bytes: that the matmuls read and write, per image.
        other_bytes: that attention and all else reads and writes, per image.
        matmul_weight_bytes: that products read and write of weights and their gradients, per micro-batch.
        cast_bytes: moved to cast weights and gradients between fp32 and 16 bits, per micro-batch.
        accumulate_bytes: moved to add gradients up, per micro-batch after a step's first.
        update_bytes: moved by `adamw_ema` with one average, per step.
        launches: operations per micro-batch, each taken as one launch; kernels can be more.
    """

    flops: float
    matmul_bytes: float
    other_bytes: float
    matmul_weight_bytes: float
    cast_bytes: float
    accumulate_bytes: float
    update_bytes: float
    launches: int


class Memory(NamedTuple):
    """Bytes by part: the first five whatever the batch, the others per image of a micro-batch.

    Gradients are counted whole beside all activations: so they lie while a step has further micro-batches, in DDP's
    buckets and in a CUDA graph. A lone micro-batch without those takes less, its gradients coming while its activations
    go; more than two take no more than two. No form of AdamW takes more than its state: each is one fused pass.

    Attributes:
        weights: fp32.
        gradients: fp32.
        moments: AdamW's two, fp32.
        ema: all averages of the weights, fp32.
        copy: the weights in 16 bits, which autocast makes and backward reads; where blocks are recomputed, those
            that autocast holds until forward ends.
        activations: kept for backward.
        working: held for a moment in backward, at the widest place.
        recomputed: what the largest block keeps while backward runs through it, where blocks are recomputed.
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
        """Bytes that are there before the first image."""
        return sum(self[:5])

    @property
    def per_image(self) -> int:
        """Bytes of each image of a micro-batch."""
        return self.activations + self.working + self.recomputed

    def high_water(self, images: int) -> int:
        """Return the most bytes that a step takes at once, with micro-batches of some images."""
        return self.fixed + images * self.per_image

    def largest_batch(self, size: float) -> int:
        """Return how many images fit at a time into a memory of ``size`` bytes; 0 is none."""
        return max(0, int((size * (1 - RESERVE) - self.fixed) // self.per_image))


class _Stack(NamedTuple):
    """Blocks of one width, and the tokens that pass through them."""

    tokens: int
    width: int
    heads: int
    depth: int


def work_of(model: MaskDiT, ratio: float, precision: str, *, checkpoint_blocks: bool = False) -> Work:
    """Return what a training step does at a mask ratio.

    Args:
        model: the network; its tensors may be on the meta device.
        ratio: the mask ratio.
        precision: "bf16", "fp16", "tf32" or "fp32".
        checkpoint_blocks: whether backward recomputes the blocks, as `MaskDiT.checkpoint_blocks` says.
    """
    low = _bytes_of(precision)
    stacks = _stacks(model, ratio)
    wide = sum(stack.depth * stack.tokens * stack.width for stack in stacks)  # values of a token-wide tensor per block
    blocks = sum(stack.depth for stack in stacks)
    parameters = num_parameters(model)
    again = int(checkpoint_blocks)  # forward passes of the blocks beside the first
    # Per block, in token widths. Products: qkv 1 + 3, proj 1 + 1, fc1 1 + 4, fc2 4 + 1; forward and two in backward.
    products = (3 + again) * 16 * low
    # fp32 residuals: two norms read and write them; backward reads them and their gradient and writes a gradient.
    residuals = (1 + again) * 2 * 2 * 4 + 2 * 3 * 4
    # Norms 2 (2), GELU 8, attention 4; back 2 (4), 16 and 8, gradient of qkv 6, bias sums 9.
    rest = ((1 + again) * (4 + 8 + 4) + 8 + 16 + 8 + 6 + 9) * low
    ends = sum(stack.tokens * stack.width for stack in stacks) * (20 + 3 * low)  # a stack's input and its first norm
    # Per block, for one that is recomputed, around them, and around a decoder.
    launches = (55, 21, 86, 29) if low == 2 else (33, 10, 66, 19)
    return Work(
        flops=6 * forward_macs(model, stacks[0].tokens) + 2 * again * sum(map(_matmul_macs, stacks)),
        matmul_bytes=products * wide,
        other_bytes=(residuals + rest) * wide + ends,
        matmul_weight_bytes=(3 + again) * low * parameters,
        cast_bytes=(12 + 6 * again) * parameters if low == 2 else 0,  # 4 + 2 each way
        accumulate_bytes=12 * parameters,
        update_bytes=(20 + 16) * parameters,  # p, g, m, v and the average read; all but g written, in one pass
        launches=(launches[0] + again * launches[1]) * blocks + launches[2] + (launches[3] if len(stacks) > 1 else 0),
    )


def memory_of(
    model: MaskDiT, ratio: float, precision: str, *, averages: int = 1, checkpoint_blocks: bool = False
) -> Memory:
    """Return the bytes that training takes at a mask ratio.

    Args:
        model: the network; its tensors may be on the meta device.
        ratio: the mask ratio; the lowest of a run takes most.
        precision: "bf16", "fp16", "tf32" or "fp32".
        averages: how many averages of the weights are kept.
        checkpoint_blocks: whether backward recomputes the blocks, as `MaskDiT.checkpoint_blocks` says.
    """
    low, parameters = _bytes_of(precision), num_parameters(model)
    stacks = _stacks(model, ratio)
    kept, copied, recomputed = 0, parameters, 0
    for tokens, width, heads, depth in stacks:
        # Attention's qkv and result, two branches and the MLP's hidden values; two fp32 residuals.
        per_token = width * (10 * low + 2 * 4) + 4 * heads + 16  # and softmax's and the norms' statistics
        block = tokens * per_token + (6 * width + stacks[0].width) * low  # and its modulation
        if checkpoint_blocks:
            recomputed = max(recomputed, block)
            # The branch that enters, and the modulation that its gate is a part of; the residual, fp32.
            block = tokens * width * (low + 4) + 6 * width * low
            copied -= depth * 11 * width**2  # qkv, fc1 and fc2 are cast by the ops that multiply with them
        kept += depth * block + 4 * tokens * width  # and the residual that enters the first, or leaves the last
    # In the MLP's backward: its hidden values, their gradient and that of its input, and what the norms hand over.
    working = max(16 * low * tokens * width for tokens, width, _, _ in stacks)
    copy = 2 * copied if low == 2 else 0
    fixed = (4 * parameters, 4 * parameters, 8 * parameters, 4 * averages * parameters)
    return Memory(*fixed, copy, kept, working, recomputed)


def _bytes_of(precision: str) -> int:
    return 2 if precision in ("bf16", "fp16") else 4


def _matmul_macs(stack: _Stack) -> int:
    """Return the MACs of a stack's blocks, without those of their modulations."""
    return stack.depth * stack.tokens * stack.width * (12 * stack.width + 2 * stack.tokens)


def _stacks(model: MaskDiT, ratio: float) -> list[_Stack]:
    keep = kept_count(model.length, ratio)
    return [
        _Stack(stack.tokens_of(model.length, keep), stack.width, stack.num_heads, len(stack.blocks))
        for stack in model.stacks
    ]
