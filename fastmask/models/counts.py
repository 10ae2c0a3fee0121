"""Number of parameters and exact multiply-accumulates (MAC) of a network, from its sizes.

One MAC is two floating-point operations. The counts include all matmuls and the two of attention, but not elementwise
operations; the label embedding is a look-up. A training step costs three forward passes.
"""

from fastmask.models.layers import TimeEmbedding
from fastmask.models.maskdit import MaskDiT
from fastmask.models.stack import Stack


def forward_macs(model: MaskDiT, keep: int | None = None) -> int:
    """Return the MACs of the forward pass of one image.

    Args:
        model: the network; its tensors can be on the meta device.
        keep: K, the number of kept positions; None is all.
    """
    length = model.length
    keep = length if keep is None else keep
    width = model.condition_width
    values = model.patch_size**2 * model.in_channels
    total = TimeEmbedding.FEATURES * width + width * width  # time MLP
    total += model.stacks[0].tokens_of(length, keep) * values * model.stacks[0].width  # patch embedding
    for stack in model.stacks:
        tokens = stack.tokens_of(length, keep)
        total += len(stack.blocks) * _block_macs(stack, tokens, width)
        total += tokens * stack.linear_macs
        if stack.exit is not None:
            total += width * 2 * stack.width + tokens * stack.width * stack.exit.linear.out_features
    return total


def num_parameters(model: MaskDiT) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def _block_macs(stack: Stack, tokens: int, condition_width: int) -> int:
    width = stack.width
    projections = 4 * width * width + sum(stack.mlp_widths) * width  # qkv and proj; fc1 and fc2
    return tokens * (projections + 2 * tokens * width) + condition_width * 6 * width
