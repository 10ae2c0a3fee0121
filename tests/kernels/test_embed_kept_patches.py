import pytest
import torch
import torch.nn.functional as F
from util import BF16_ROUNDING, relative_error

from fastmask.kernels import embed_kept_patches

# (B, C, h, w, p, D, K): odd and not square, one patch kept, all kept in another order, a published patch size.
SHAPES = [(3, 3, 3, 2, 2, 7, 4), (2, 1, 2, 2, 3, 5, 1), (2, 4, 2, 3, 1, 6, 6), (1, 4, 4, 4, 4, 60, 7)]


def arguments(batch, channels, h, w, p, width, keep, dtype=torch.float32):
    ids_keep = torch.stack([torch.randperm(h * w)[:keep] for _ in range(batch)])
    tensors = (
        torch.randn(batch, channels, h * p, w * p),
        torch.randn(width, channels, p, p),
        torch.randn(width),
        torch.randn(h * w, width),
        torch.rand(batch) + 0.5,
    )
    images, weight, bias, position, image_scale = (t.to(dtype) for t in tensors)
    return images, weight, bias, position, ids_keep, image_scale


def embedded_by_convolution(images, weight, bias, position, ids_keep, image_scale):
    images, weight, bias, position, image_scale = (t.double() for t in (images, weight, bias, position, image_scale))
    p = weight.shape[-1]
    every = F.conv2d(images * image_scale.view(-1, 1, 1, 1), weight, bias, stride=p).flatten(2).mT + position
    return every if ids_keep is None else torch.stack([row[ids] for row, ids in zip(every, ids_keep, strict=True)])


def embed(images, weight, bias, position, ids_keep, image_scale):
    p = weight.shape[-1]
    return embed_kept_patches(images, weight, bias, position, ids_keep, patch_size=p, image_scale=image_scale)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_and_fp64(shape, masked):
    images, weight, bias, position, ids_keep, image_scale = arguments(*shape)
    ids_keep = ids_keep if masked else None
    exact = embedded_by_convolution(images, weight, bias, position, ids_keep, image_scale)
    out = embed(images, weight, bias, position, ids_keep, image_scale)
    assert out.dtype == torch.float32
    assert relative_error(out, exact) < 5e-7
    doubles = (t.double() for t in (images, weight, bias, position))
    assert relative_error(embed(*doubles, ids_keep, image_scale.double()), exact) < 1e-14
    if masked:
        assert torch.equal(embed(images, weight, bias, position, ids_keep.int(), image_scale), out)


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16(shape):
    inputs = arguments(*shape, torch.bfloat16)
    out = embed(*inputs)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, embedded_by_convolution(*inputs)) < BF16_ROUNDING


def test_no_scale_is_a_scale_of_one():
    images, weight, bias, position, ids_keep, image_scale = arguments(*SHAPES[0])
    ones = torch.ones_like(image_scale)
    assert torch.equal(
        embed(images, weight, bias, position, ids_keep, None), embed(images, weight, bias, position, ids_keep, ones)
    )


def test_dropped_patches_are_not_read():
    images, weight, bias, position, ids_keep, image_scale = arguments(1, 2, 2, 2, 2, 5, 2)
    ids_keep = torch.tensor([[0, 3]])
    poisoned = images.clone()
    poisoned[:, :, :2, 2:] = torch.nan
    poisoned[:, :, 2:, :2] = torch.nan
    assert torch.equal(
        embed(poisoned, weight, bias, position, ids_keep, image_scale),
        embed(images, weight, bias, position, ids_keep, image_scale),
    )


def test_non_contiguous_images():
    images, *rest = arguments(*SHAPES[0])
    channels_last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(embed(channels_last, *rest), embed(images, *rest))


@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(masked):
    *tensors, ids_keep, image_scale = arguments(2, 2, 3, 1, 2, 3, 2, torch.float64)
    inputs = [t.requires_grad_() for t in (*tensors, image_scale)]
    ids_keep = ids_keep if masked else None
    assert torch.autograd.gradcheck(lambda *t: embed(*t[:4], ids_keep, t[4]), inputs)


@pytest.mark.parametrize("shape", [(5, 7), (6, 6), (1, 6, 7)])
def test_a_position_table_of_another_shape(shape):
    images, weight, bias, _, ids_keep, image_scale = arguments(*SHAPES[0])
    with pytest.raises(ValueError, match=r"position must have shape \(6, 7\) for images of shape \(3, 3, 6, 4\)"):
        embed(images, weight, bias, torch.zeros(shape), ids_keep, image_scale)


def test_images_that_do_not_divide():
    images, *rest = arguments(*SHAPES[0])
    with pytest.raises(ValueError, match="images of 6x3 do not divide into patches of 2x2"):
        embed(images[..., :3], *rest)


def test_indices_of_another_batch():
    images, weight, bias, position, ids_keep, image_scale = arguments(*SHAPES[0])
    with pytest.raises(ValueError, match=r"ids_keep must have shape \(3, K\), not \(2, 4\)"):
        embed(images, weight, bias, position, ids_keep[:2], image_scale)
