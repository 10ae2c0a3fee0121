"""The patch embedding of the kept patches only.

token[b, k] = weight . (image_scale[b] * patch[b, ids_keep[b, k]]) + bias + position[ids_keep[b, k]]

Published code embeds all L positions and drops some afterwards; here a dropped patch is never read.
"""

import torch.nn.functional as F
from torch import Tensor

from fastmask.kernels.patches import patchify
from fastmask.kernels.restore_tokens import gather_tokens


def embed_kept_patches(
    images: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    ids_keep: Tensor | None,
    *,
    patch_size: int,
    image_scale: Tensor | None = None,
) -> Tensor:
    """Return the embedded tokens of the kept positions, position table added.

    Equivalent PyTorch: ``gather(conv2d(image_scale * images, weight, bias, stride=p) + position, ids_keep)``.

    Args:
        images: shape (B, C, h * p, w * p).
        weight: of the patch convolution, shape (D, C, p, p).
        bias: shape (D,).
        position: shape (L, D), L = h * w, row-major.
        ids_keep: integer, shape (B, K), the kept positions of each sample; None keeps all in order.
        patch_size: p.
        image_scale: shape (B,), multiplies each image (EDM's c_in); None is 1.

    Returns:
        Shape (B, K, D).

    Raises:
        ValueError: images that do not divide into patches, or a position table of another length.
    """
    patches = patchify(images, patch_size)  # (B, L, P)
    if position.shape != (patches.shape[1], weight.shape[0]):
        raise ValueError(
            f"position must have shape {(patches.shape[1], weight.shape[0])} for images of shape {tuple(images.shape)} "
            f"and weight of shape {tuple(weight.shape)}, not {tuple(position.shape)}"
        )
    if ids_keep is not None:
        patches = gather_tokens(patches, ids_keep)  # (B, K, P)
        position = position[ids_keep.long()]  # (B, K, D)
    if image_scale is not None:
        patches = patches * image_scale[:, None, None]
    return F.linear(patches, weight.permute(0, 2, 3, 1).flatten(1), bias) + position
