"""Exact counts of a network: parameters, multiply-accumulates (MAC) and bytes, from its sizes alone.

One MAC is two floating-point operations. Matmuls, attention's two included, are counted; elementwise work is
not, and the label embedding is a look-up. Training is three forward passes.
"""

from fastmask.models.layers import TimeEmbedding
from fastmask.models.maskdit import MaskDiT


def forward_macs(model: MaskDiT, keep: int | None = None) -> int:
    """Return the MACs of one image's forward pass.

    Args:
        model: the network; its tensors may be on the meta device.
        keep: K, the positions that the encoder sees; None is all.
    """
    length = model.length
    keep = length if keep is None else keep
    width = model.pos_embed.shape[2]
    values = model.patch_size**2 * model.in_channels
    total = TimeEmbedding.FEATURES * width + width * width  # time MLP
    total += model.stacks[0].tokens_of(length, keep) * values * width  # patch embedding
    for stack in model.stacks:
        tokens = stack.tokens_of(length, keep)
        total += len(stack.blocks) * _block_macs(tokens, stack.width, width)
        total += width * 2 * stack.width + tokens * stack.width * stack.exit.linear.out_features
    return total


def num_parameters(model: MaskDiT) -> int:
    """Return the number of trained values."""
    return sum(parameter.numel() for parameter in model.parameters())


def _block_macs(tokens: int, width: int, condition_width: int) -> int:
    projections = 4 * width * width + 8 * width * width  # qkv and proj; fc1 and fc2
    return tokens * (projections + 2 * tokens * width) + condition_width * 6 * width
