"""Exact counts of a network: parameters, multiply-accumulates (MAC) and bytes, from its sizes alone.

One MAC is two floating-point operations. Matrix products, attention's two included, are counted; elementwise work is
not, and the label embedding is a look-up. Training is three forward passes.
"""

from fastmask.model import MaskDiT, TimeEmbedding


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
    total += keep * values * width  # patch embedding
    total += len(model.blocks) * _block_macs(keep, width, width)
    out_width = width
    if model.decoder_blocks:
        out_width = model.decoder_pos_embed.shape[2]
        total += width * 2 * width + keep * width * out_width  # bridge
        total += len(model.decoder_blocks) * _block_macs(length, out_width, width)
    return total + width * 2 * out_width + length * out_width * values  # head


def trainable_parameters(model: MaskDiT) -> int:
    """Return the number of trained values."""
    return sum(parameter.numel() for parameter in model.parameters())


def _block_macs(tokens: int, width: int, condition_width: int) -> int:
    projections = 4 * width * width + 8 * width * width  # qkv and proj; fc1 and fc2
    return tokens * (projections + 2 * tokens * width) + condition_width * 6 * width
