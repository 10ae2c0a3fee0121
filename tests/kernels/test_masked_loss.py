import pytest
import torch
from util import relative_error

from fastmask.kernels import Mask, masked_loss, sample_mask

# (B, C, h, w, p, K): odd and not square, one patch kept, one dropped.
SHAPES = [(3, 3, 3, 2, 2, 4), (2, 1, 2, 2, 3, 1), (2, 4, 3, 3, 2, 8)]


def arguments(batch, channels, h, w, p, keep, dtype=torch.float32, sigma=(0.3, 1.0, 4.0)):
    images = torch.randn(batch, channels, h * p, w * p) * 0.5
    sigma = torch.tensor(sigma[:batch])
    noised = images + torch.randn_like(images) * sigma[:, None, None, None]
    raw = torch.randn(batch, h * w, p * p * channels)
    mask = sample_mask(batch, h * w, keep, seed=0, device="cpu")
    return *(t.to(dtype) for t in (raw, images, noised, sigma)), mask


def losses_of_whole_images(raw, images, noised, sigma, mask, p, sigma_data):
    """The two losses from whole denoised images, patch by patch, in float64."""
    raw, images, noised, sigma = (t.double() for t in (raw, images, noised, sigma))
    batch, channels, height, width = images.shape
    output = torch.empty_like(images)
    boxes = [(..., slice(i, i + p), slice(j, j + p)) for i in range(0, height, p) for j in range(0, width, p)]
    for l, box in enumerate(boxes):
        output[box] = raw[:, l].view(batch, p, p, channels).permute(0, 3, 1, 2)
    denoising, reconstruction = [], []
    for b in range(batch):
        s, sd = sigma[b], sigma_data
        denoised = sd**2 / (s**2 + sd**2) * noised[b] + s * sd / torch.sqrt(s**2 + sd**2) * output[b]
        weight = (s**2 + sd**2) / (s * sd) ** 2
        kept = range(len(boxes)) if mask is None else mask.ids_keep[b].tolist()
        of_kept, of_dropped = [], []
        for l, box in enumerate(boxes):
            if l in kept:
                of_kept.append(weight * (denoised[box] - images[b][box]).pow(2).mean())
                continue
            patch = noised[b][box]
            normed = (patch - patch.mean()) / torch.sqrt(patch.var(correction=1) + 1e-6)
            of_dropped.append((denoised[box] - normed).pow(2).mean())
        denoising.append(torch.stack(of_kept).mean())
        reconstruction.append(torch.stack(of_dropped).mean() if of_dropped else torch.zeros(()).double())
    return torch.stack(denoising), torch.stack(reconstruction)


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
@pytest.mark.parametrize("shape", SHAPES)
def test_masked(shape, sigma_data):
    raw, images, noised, sigma, mask = arguments(*shape)
    p = shape[4]
    exact = losses_of_whole_images(raw, images, noised, sigma, mask, p, sigma_data)
    doubles = [t.double() for t in (raw, images, noised, sigma)]
    for inputs, dtype, bound in [((raw, images, noised, sigma), torch.float32, 1e-6), (doubles, torch.float64, 1e-14)]:
        parts = masked_loss(*inputs, mask, patch_size=p, sigma_data=sigma_data)
        for name, part, expected in zip(("denoising", "reconstruction"), parts, exact, strict=True):
            assert part.dtype == dtype
            assert relative_error(part, expected) < bound, name


@pytest.mark.parametrize("shape", SHAPES)
def test_unmasked_is_the_mean_over_all_values(shape):
    raw, images, noised, sigma, _ = arguments(*shape)
    exact, _ = losses_of_whole_images(raw, images, noised, sigma, None, shape[4], 0.5)
    denoising, reconstruction = masked_loss(raw, images, noised, sigma, None, patch_size=shape[4], sigma_data=0.5)
    assert relative_error(denoising, exact) < 1e-6
    assert torch.equal(reconstruction, torch.zeros(shape[0]))


def test_a_mask_that_keeps_all_is_no_mask():
    raw, images, noised, sigma, mask = arguments(3, 3, 3, 2, 2, 6)
    dense = masked_loss(raw, images, noised, sigma, None, patch_size=2, sigma_data=0.5)
    masked = masked_loss(raw, images, noised, sigma, mask, patch_size=2, sigma_data=0.5)
    assert all(torch.equal(a, b) for a, b in zip(masked, dense, strict=True))


def test_order_of_rows_does_not_matter():
    raw, images, noised, sigma, _ = arguments(2, 1, 2, 2, 2, 2)
    rows = Mask(torch.tensor([[0, 3], [2, 1]]), torch.tensor([[0, 2, 3, 1], [2, 1, 0, 3]]))
    turned = Mask(torch.tensor([[3, 0], [1, 2]]), torch.tensor([[1, 3, 2, 0], [3, 0, 1, 2]]))
    expected = masked_loss(raw, images, noised, sigma, rows, patch_size=2, sigma_data=0.5)
    parts = masked_loss(raw, images, noised, sigma, turned, patch_size=2, sigma_data=0.5)
    assert all(torch.equal(a, b) for a, b in zip(parts, expected, strict=True))


@pytest.mark.parametrize("sigma", [0.002, 80.0])
def test_ends_of_the_noise_range(sigma):
    raw, images, noised, sigma, mask = arguments(1, 4, 3, 3, 2, 5, sigma=(sigma,))
    exact = losses_of_whole_images(raw, images, noised, sigma, mask, 2, 0.5)
    parts = masked_loss(raw, images, noised, sigma, mask, patch_size=2, sigma_data=0.5)
    # At sigma 0.002 the difference to the image cancels all but the last digits of fp32.
    for name, part, expected in zip(("denoising", "reconstruction"), parts, exact, strict=True):
        assert relative_error(part, expected) < 2e-5, name


def test_constant_patches_have_finite_losses():
    # An unnoised patch of one colour has no variance: the eps keeps its target finite, at 0.
    raw, noised = torch.zeros(1, 4, 4), torch.ones(1, 1, 4, 4)
    mask = sample_mask(1, 4, 2, seed=0, device="cpu")
    _, reconstruction = masked_loss(raw, noised, noised, torch.tensor([0.5]), mask, patch_size=2, sigma_data=0.5)
    assert reconstruction.item() == 0.25


def test_bf16_output_is_only_read_in_bf16():
    raw, images, noised, sigma, mask = arguments(3, 3, 3, 2, 2, 4)
    parts = masked_loss(raw.bfloat16(), images, noised, sigma, mask, patch_size=2, sigma_data=0.5)
    expected = masked_loss(raw.bfloat16().float(), images, noised, sigma, mask, patch_size=2, sigma_data=0.5)
    for part, same in zip(parts, expected, strict=True):
        assert part.dtype == torch.float32
        assert torch.equal(part, same)


@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(masked):
    raw, images, noised, sigma, mask = arguments(2, 1, 3, 1, 2, 2, torch.float64)
    inputs = [t.requires_grad_() for t in (raw, images, noised, sigma)]
    mask = mask if masked else None
    assert torch.autograd.gradcheck(lambda *t: masked_loss(*t, mask, patch_size=2, sigma_data=0.5), inputs)


def test_gradients_of_kept_and_dropped_patches_are_separate():
    raw, images, noised, sigma, mask = arguments(3, 3, 3, 2, 2, 4)
    raw.requires_grad_()
    for part, outside in zip(
        masked_loss(raw, images, noised, sigma, mask, patch_size=2, sigma_data=0.5),
        (mask.dropped, ~mask.dropped),
        strict=True,
    ):
        (grad,) = torch.autograd.grad(part.sum(), raw, retain_graph=True)
        assert torch.equal(grad.ne(0).any(-1), ~outside)


@pytest.mark.parametrize("shape", [(2, 3, 12), (2, 6, 4), (1, 6, 12)])
def test_raw_tokens_of_another_shape(shape):
    images = torch.zeros(2, 3, 6, 4)
    with pytest.raises(ValueError, match=r"raw must have shape \(2, 6, 12\) for these images, not "):
        masked_loss(torch.zeros(shape), images, images, torch.ones(2), None, patch_size=2, sigma_data=0.5)


def test_images_that_do_not_divide():
    images = torch.zeros(1, 1, 4, 5)
    with pytest.raises(ValueError, match="images of 4x5 do not divide into patches of 2x2"):
        masked_loss(torch.zeros(1, 4, 4), images, images, torch.ones(1), None, patch_size=2, sigma_data=0.5)
