"""Conversion between images and patch tokens."""

from torch import Tensor

from fastmask.kernels._dispatch import ANY_DEVICE, public_op


@public_op(otherwise=ANY_DEVICE)
def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Split images into patch tokens; the inverse of `unpatchify`.

    Equivalent PyTorch: ``(B, C, h, p, w, p) -> (B, h, w, p, p, C)``; positions row-major, channels fastest.

    Args:
        images: shape (B, C, h * p, w * p).
        patch_size: p.

    Returns:
        Shape (B, L, P) with L = h * w and P = p * p * C, in the dtype of ``images``.
    """
    b, c, height, width = images.shape
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(f"images of {height}x{width} do not divide into patches of {patch_size}x{patch_size}")
    h, w = height // patch_size, width // patch_size
    tokens = images.reshape(b, c, h, patch_size, w, patch_size).permute(0, 2, 4, 3, 5, 1)
    return tokens.reshape(b, h * w, patch_size * patch_size * c)


@public_op(otherwise=ANY_DEVICE)
def unpatchify(tokens: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """Assemble images from patch tokens; the inverse of `patchify`.

    Args:
        tokens: shape (B, L, P), laid out (p, p, C) with channels fastest.
        patch_size: p.
        height: image height, h * p.
        width: image width, w * p.

    Returns:
        Shape (B, C, height, width), in the dtype of ``tokens``.
    """
    b, length, values = tokens.shape
    h, w = height // patch_size, width // patch_size
    channels = values // (patch_size * patch_size)
    if h * w != length or h * patch_size != height or w * patch_size != width:
        raise ValueError(f"{length} tokens do not make an image of {height}x{width} with patches of {patch_size}")
    images = tokens.reshape(b, h, w, patch_size, patch_size, channels).permute(0, 5, 1, 3, 2, 4)
    return images.reshape(b, channels, height, width)
