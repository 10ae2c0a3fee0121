import pytest
import torch

from fastmask.kernels import patchify, unpatchify

# (B, C, h, w, p): not square, one channel, patches of one value, one patch, the largest published patch.
SHAPES = [(2, 3, 2, 3, 2), (1, 1, 3, 1, 3), (2, 4, 3, 5, 1), (3, 2, 1, 1, 4), (1, 4, 2, 2, 8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize(("batch", "channels", "h", "w", "p"), SHAPES)
def test_layout_and_inverse(batch, channels, h, w, p, dtype):
    images = torch.arange(batch * channels * h * w * p * p).view(batch, channels, h * p, w * p).to(dtype)
    tokens = patchify(images, p)
    assert tokens.dtype == dtype
    expected = [
        [[images[b, :, i * p + r, j * p + s] for r in range(p) for s in range(p)] for i in range(h) for j in range(w)]
        for b in range(batch)
    ]
    expected = torch.stack([torch.stack([torch.cat(patch) for patch in image]) for image in expected])
    assert torch.equal(tokens, expected)
    assert torch.equal(unpatchify(tokens, p, h * p, w * p), images)


def test_non_contiguous_images():
    images = torch.randn(2, 6, 4, 3).permute(0, 3, 2, 1)
    assert torch.equal(patchify(images, 2), patchify(images.contiguous(), 2))
    tokens = torch.randn(2, 12, 6).mT
    assert torch.equal(unpatchify(tokens, 2, 4, 6), unpatchify(tokens.contiguous(), 2, 4, 6))


def test_gradient_is_the_inverse_layout():
    images = torch.randn(2, 3, 4, 6, requires_grad=True)
    grad = torch.randn(2, 6, 12)
    patchify(images, 2).backward(grad)
    assert torch.equal(images.grad, unpatchify(grad, 2, 4, 6))


@pytest.mark.parametrize(("height", "width"), [(4, 5), (5, 4)])
def test_images_that_do_not_divide(height, width):
    with pytest.raises(ValueError, match=f"images of {height}x{width} do not divide into patches of 2x2"):
        patchify(torch.zeros(1, 1, height, width), 2)


def test_patches_without_pixels():
    with pytest.raises(ValueError, match="images of 4x4 do not divide into patches of 0x0"):
        patchify(torch.zeros(1, 1, 4, 4), 0)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (4, 7), (5, 6), (6, 6)])
def test_tokens_that_do_not_fill_the_image(height, width):
    with pytest.raises(ValueError, match=f"6 tokens do not make an image of {height}x{width} with patches of 2"):
        unpatchify(torch.zeros(1, 6, 4), 2, height, width)
