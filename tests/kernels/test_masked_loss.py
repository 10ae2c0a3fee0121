import importlib
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmask.kernels import Mask, backends, masked_loss, sample_mask
from fastmask.kernels.masked_loss import masked_loss_bwd, masked_loss_fwd, masked_loss_reference
from fastmask.testing import assert_accurate, assert_near, poisoned, relative_error

# The package has the function under the module's name.
contract = importlib.import_module("fastmask.kernels.masked_loss")

IMPLS = ["reference", "fused"]
COEFFICIENTS = ["c_skip", "c_out", "weight"]
TENSORS = ["raw", "images", "noised", *COEFFICIENTS]
NATIVE = any(row.op == "masked_loss" and row.device == "cpu" and row.kernel == "native" for row in backends())

# (B, C, h, w, p, K): odd and not square, one patch kept, one dropped.
SHAPES = [(3, 3, 3, 2, 2, 4), (2, 1, 2, 2, 3, 1), (2, 4, 3, 3, 2, 8)]
# 255 patches of 16 values, 15 of 8 and of 64, two tiles of patches of 768 values with all kept and of 1024, one patch.
KERNEL_SHAPES = [
    (4, 4, 15, 17, 2, 100),
    (8, 2, 5, 3, 2, 1),
    (8, 4, 3, 5, 4, 14),
    (4, 3, 2, 3, 16, 6),
    (4, 4, 3, 2, 16, 3),
    (8, 2, 1, 1, 2, 1),
]
# The denoised image, its difference from the image (or from the patch's norm), the square, its mean over a patch, and
# the weighted mean over patches.
STEPS = 5
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def edm(sigma, sigma_data=0.5):
    """EDM's c_skip, c_out and weight, rounded once from float64."""
    variance, data = sigma.double().square(), sigma_data**2
    total = variance + data
    exact = data / total, (variance * data / total).sqrt(), total / (variance * data)
    return tuple(c.to(sigma.dtype) for c in exact)


def flow(t):
    """Rectified flow's, for which the network gives noise less image."""
    return torch.ones_like(t), -t, (1 / t.double().square()).to(t.dtype)


def random_images(batch, channels, h, w, p, dtype=FP32):
    """Raw tokens, images and unit noise."""
    images, noise = torch.randn(2, batch, channels, h * p, w * p, dtype=dtype)
    return torch.randn(batch, h * w, p * p * channels, dtype=dtype), images * 0.5, noise


def random_tensors(batch, channels, h, w, p, sigma=None, sigma_data=0.5):
    raw, images, noise = random_images(batch, channels, h, w, p)
    sigma = (torch.randn(batch) * 1.2 - 1.2).exp() if sigma is None else torch.tensor(sigma)
    return raw, images, images + sigma[:, None, None, None] * noise, *edm(sigma, sigma_data)


def random_flow_tensors(batch, channels, h, w, p):
    raw, images, noise = random_images(batch, channels, h, w, p)
    t = torch.rand(batch) * 0.96 + 0.02
    return raw, images, torch.lerp(images, noise, t[:, None, None, None]), *flow(t)


DRAWS = [random_tensors, partial(random_tensors, sigma_data=1.3), random_flow_tensors]


def arguments(batch, channels, h, w, p, keep, dtype=FP32, draw=random_tensors):
    tensors = draw(batch, channels, h, w, p)
    return *(t.to(dtype) for t in tensors), sample_mask(batch, h * w, keep, seed=0, device="cpu")


def named_arguments(*leaves):
    """Tensors and a mask by name; the leaves require grad."""
    named = dict(zip((*TENSORS, "mask"), arguments(2, 3, 3, 2, 2, 4), strict=True))
    for name in leaves:
        named[name].requires_grad_()
    return named


def packed_mask(counts, length, dtype=torch.int32):
    """A mask that keeps a number of positions of its own in each sample, none included."""
    order = [torch.randperm(length) for _ in counts]
    ids_keep = torch.cat([ids[:count] for ids, count in zip(order, counts, strict=True)])
    ids_restore = torch.stack([ids.argsort() for ids in order])
    cu_seqlens = torch.tensor([0, *counts]).cumsum(0)
    return Mask(ids_keep.to(dtype), ids_restore.to(dtype), cu_seqlens.to(dtype))


def ids(*shape):
    return torch.zeros(shape, dtype=torch.int32)


def kept_positions(mask, b):
    if mask.cu_seqlens is None:
        return mask.ids_keep[b].tolist()
    return mask.ids_keep[mask.cu_seqlens[b] : mask.cu_seqlens[b + 1]].tolist()


def boxes(shape, p):
    """Where each patch lies in images of a shape."""
    return [(..., slice(i, i + p), slice(j, j + p)) for i in range(0, shape[2], p) for j in range(0, shape[3], p)]


def images_of(raw, shape, p):
    """The images of a shape whose patches are the tokens of raw."""
    output = raw.new_empty(shape)
    for l, box in enumerate(boxes(shape, p)):
        output[box] = raw[:, l].view(shape[0], p, p, shape[1]).permute(0, 3, 1, 2)
    return output


def losses_of_whole_images(raw, images, noised, c_skip, c_out, weight, mask, p):
    """The two losses from whole denoised images, patch by patch, in float64."""
    raw, images, noised, c_skip, c_out, weight = (t.double() for t in (raw, images, noised, c_skip, c_out, weight))
    output = images_of(raw, images.shape, p)
    denoising, reconstruction = [], []
    for b in range(len(images)):
        denoised = c_skip[b] * noised[b] + c_out[b] * output[b]
        kept = range(raw.shape[1]) if mask is None else kept_positions(mask, b)
        of_kept, of_dropped = [], []
        for l, box in enumerate(boxes(images.shape, p)):
            if l in kept:
                of_kept.append(weight[b] * (denoised[box] - images[b][box]).pow(2).mean())
                continue
            patch = noised[b][box]
            normed = (patch - patch.mean()) / torch.sqrt(patch.var(correction=1) + 1e-6)
            of_dropped.append((denoised[box] - normed).pow(2).mean())
        for losses, parts in ((denoising, of_kept), (reconstruction, of_dropped)):
            losses.append(torch.stack(parts).mean() if parts else torch.zeros(()).double())
    return torch.stack(denoising), torch.stack(reconstruction)


def losses_and_gradient(function, raw, *args, weights, **kwargs):
    """Both losses and the gradient of their weighted sum with respect to raw."""
    raw = raw.detach().requires_grad_()
    parts = function(raw, *args, **kwargs)
    total = sum((part * w.to(part.dtype)).sum() for part, w in zip(parts, weights, strict=True))
    (grad,) = torch.autograd.grad(total, raw)
    return *(part.detach() for part in parts), grad


def assert_kernel_accurate(tensors, mask, p):
    settings = {"weights": torch.rand(2, len(tensors[0]), dtype=torch.float64) + 0.5, "patch_size": p}
    exact = losses_and_gradient(masked_loss_reference, *(t.double() for t in tensors), mask, **settings)
    eager = losses_and_gradient(masked_loss_reference, *tensors, mask, **settings)
    fused = losses_and_gradient(partial(masked_loss, impl="fused"), *tensors, mask, **settings)
    assert [t.dtype for t in fused] == [FP32, FP32, tensors[0].dtype]
    # Both losses as one vector: the rounding of a few numbers is a matter of luck.
    assert_accurate(torch.cat(fused[:2]), torch.cat(exact[:2]), torch.cat(eager[:2]))
    assert_accurate(fused[2], exact[2], eager[2])


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_masked(impl, shape, draw):
    *tensors, mask = arguments(*shape, draw=draw)
    exact = losses_of_whole_images(*tensors, mask, shape[4])
    for dtype in (FP32,) if impl == "fused" else (FP32, torch.float64):
        parts = masked_loss(*(t.to(dtype) for t in tensors), mask, patch_size=shape[4], impl=impl)
        for name, part, expected in zip(("denoising", "reconstruction"), parts, exact, strict=True):
            assert part.dtype == dtype
            assert_near(part, expected, STEPS, name=name)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_unmasked_is_the_mean_over_all_values(impl, shape):
    *tensors, _ = arguments(*shape)
    exact, _ = losses_of_whole_images(*tensors, None, shape[4])
    denoising, reconstruction = masked_loss(*tensors, None, patch_size=shape[4], impl=impl)
    assert_near(denoising, exact, STEPS)
    assert torch.equal(reconstruction, torch.zeros(shape[0]))


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_edm_in_closed_form(sigma_data):
    raw, images, noise = random_images(4, 3, 3, 2, 2, torch.float64)
    sigma = (torch.randn(4).double() * 1.2 - 1.2).exp()
    s, sd = sigma[:, None, None, None], sigma_data
    noised = images + s * noise
    # Table 1 of the paper.
    denoised = sd**2 / (s**2 + sd**2) * noised + s * sd / torch.sqrt(s**2 + sd**2) * images_of(raw, images.shape, 2)
    expected = ((s**2 + sd**2) / (s * sd) ** 2 * (denoised - images) ** 2).mean((1, 2, 3))
    denoising, _ = masked_loss_reference(raw, images, noised, *edm(sigma, sd), None, patch_size=2)
    torch.testing.assert_close(denoising, expected, rtol=1e-12, atol=0)


def test_rectified_flow_in_closed_form():
    raw, images, noise = random_images(4, 3, 3, 2, 2, torch.float64)
    t = torch.linspace(0.02, 0.98, 4, dtype=torch.float64)
    noised = torch.lerp(images, noise, t[:, None, None, None])
    # The squared error of the velocity, whatever the time.
    expected = (images_of(raw, images.shape, 2) - (noise - images)).square().mean((1, 2, 3))
    denoising, _ = masked_loss_reference(raw, images, noised, *flow(t), None, patch_size=2)
    torch.testing.assert_close(denoising, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_each_packed_sample_counts_its_own_patches(impl):
    tensors, mask = random_tensors(4, 3, 3, 2, 2), packed_mask([2, 0, 6, 5], 6)
    exact = losses_of_whole_images(*tensors, mask, 2)
    parts = masked_loss(*tensors, mask, patch_size=2, impl=impl)
    for name, part, expected in zip(("denoising", "reconstruction"), parts, exact, strict=True):
        assert_near(part, expected, STEPS, name=name)
    assert parts[0][1] == 0
    assert parts[1][2] == 0


@pytest.mark.parametrize("draw", [random_tensors, random_flow_tensors])
@pytest.mark.parametrize("shape", KERNEL_SHAPES)
def test_kernel(shape, draw):
    *tensors, mask = arguments(*shape, draw=draw)
    assert_kernel_accurate(tensors, mask, shape[4])


@pytest.mark.parametrize("draw", DRAWS)
def test_kernel_without_a_mask(draw):
    assert_kernel_accurate(draw(8, 3, 3, 2, 2), None, 2)


@pytest.mark.parametrize("draw", [random_tensors, random_flow_tensors])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_kernel(dtype, draw):
    assert_kernel_accurate(draw(8, 4, 2, 3, 2), packed_mask([0, 6, 1, 4] * 2, 6, dtype), 2)


@pytest.mark.parametrize("dtypes", [(BF16, FP32, FP32), (FP16, FP32, FP32), (BF16, BF16, BF16), (FP32, BF16, FP16)])
def test_kernel_of_narrow_dtypes(dtypes):
    *tensors, mask = arguments(8, 4, 5, 3, 2, 7)
    tensors[:3] = (t.to(dtype) for t, dtype in zip(tensors, dtypes, strict=False))
    assert_kernel_accurate(tensors, mask, 2)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_mask_that_keeps_all_is_no_mask(impl):
    *tensors, mask = arguments(3, 3, 3, 2, 2, 6)
    dense, masked = (masked_loss(*tensors, m, patch_size=2, impl=impl) for m in (None, mask))
    assert all(torch.equal(a, b) for a, b in zip(masked, dense, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_order_of_rows_does_not_matter(impl):
    *tensors, _ = arguments(2, 1, 2, 2, 2, 2)
    rows = Mask(torch.tensor([[0, 3], [2, 1]]), torch.tensor([[0, 2, 3, 1], [2, 1, 0, 3]]))
    turned = Mask(torch.tensor([[3, 0], [1, 2]]), torch.tensor([[1, 3, 2, 0], [3, 0, 1, 2]]))
    parts, expected = (masked_loss(*tensors, mask, patch_size=2, impl=impl) for mask in (turned, rows))
    assert all(torch.equal(a, b) for a, b in zip(parts, expected, strict=True))


@pytest.mark.parametrize("sigma", [0.002, 80.0])
@pytest.mark.parametrize("impl", IMPLS)
def test_ends_of_the_noise_range(impl, sigma):
    *tensors, mask = arguments(1, 4, 3, 3, 2, 5, draw=partial(random_tensors, sigma=(sigma,)))
    # Exact coefficients, so that their rounding counts too.
    exact = losses_of_whole_images(*tensors[:3], *edm(torch.tensor([sigma]).double()), mask, 2)
    parts = masked_loss(*tensors, mask, patch_size=2, impl=impl)
    # At sigma 0.002 the difference to the image cancels all but the last digits of fp32.
    for name, part, expected in zip(("denoising", "reconstruction"), parts, exact, strict=True):
        assert relative_error(part, expected) < 2e-5, name


@pytest.mark.parametrize("impl", IMPLS)
def test_constant_patches_have_finite_losses(impl):
    # An unnoised patch of one colour has no variance: the eps keeps its target finite, at 0.
    raw, noised = torch.zeros(1, 4, 4), torch.ones(1, 1, 4, 4)
    mask = sample_mask(1, 4, 2, seed=0, device="cpu")
    _, reconstruction = masked_loss(raw, noised, noised, *edm(torch.tensor([0.5])), mask, patch_size=2, impl=impl)
    assert reconstruction.item() == 0.25


@pytest.mark.parametrize("impl", IMPLS)
def test_statistics_of_a_patch_far_from_zero(impl):
    # One pass over the squares would lose all of a variance of 1 beside a mean of 10000.
    raw, noised = torch.zeros(1, 4, 64), torch.randn(1, 1, 16, 16) + 1e4
    tensors = (raw, noised, noised, *edm(torch.tensor([1e4])), packed_mask([0], 4))
    _, exact = losses_of_whole_images(*tensors, 8)
    _, reconstruction = masked_loss(*tensors, patch_size=8, impl=impl)
    assert relative_error(reconstruction, exact) < 1e-3


@pytest.mark.parametrize("impl", IMPLS)
def test_bf16_output_is_only_read_in_bf16(impl):
    raw, *rest = arguments(3, 3, 3, 2, 2, 4)
    parts = masked_loss(raw.bfloat16(), *rest, patch_size=2, impl=impl)
    expected = masked_loss(raw.bfloat16().float(), *rest, patch_size=2, impl=impl)
    assert [part.dtype for part in parts] == [FP32, FP32]
    assert all(torch.equal(a, b) for a, b in zip(parts, expected, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_non_contiguous_input(impl):
    raw, images, noised, *coefficients, mask = arguments(2, 3, 3, 2, 2, 4)
    apart = (
        raw.mT.contiguous().mT,
        images.to(memory_format=torch.channels_last),
        noised.mT.contiguous().mT,
        *(c.repeat_interleave(2)[::2] for c in coefficients),
        Mask(mask.ids_keep, mask.ids_restore.mT.contiguous().mT),
    )
    assert not any(t.is_contiguous() for t in (*apart[:-1], apart[-1].ids_restore))
    settings = {"weights": torch.tensor([[0.3, 1.0], [2.0, 0.7]]), "patch_size": 2, "impl": impl}
    expected = losses_and_gradient(masked_loss, raw, images, noised, *coefficients, mask, **settings)
    results = losses_and_gradient(masked_loss, *apart, **settings)
    for result, same in zip(results, expected, strict=True):
        torch.testing.assert_close(result, same, rtol=0 if impl == "fused" else 1e-6, atol=0)


@pytest.mark.parametrize("case", ["none", "masked", "packed"])
def test_gradcheck(case):
    *tensors, mask = arguments(2, 1, 3, 1, 2, 2, torch.float64)
    mask = {"none": None, "masked": mask, "packed": packed_mask([0, 2], 3)}[case]
    function = partial(masked_loss, mask=mask, patch_size=2, impl="reference")
    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in tensors])


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_of_kept_and_dropped_patches_are_separate(impl):
    raw, *rest, mask = arguments(3, 3, 3, 2, 2, 4)
    parts = masked_loss(raw.requires_grad_(), *rest, mask, patch_size=2, impl=impl)
    for part, outside in zip(parts, (mask.dropped, ~mask.dropped), strict=True):
        (grad,) = torch.autograd.grad(part.sum(), raw, retain_graph=True)
        assert torch.equal(grad.ne(0).any(-1), ~outside)


def test_two_runs_give_the_same_bits():
    # Several tiles of a sample, whose sums are added up.
    *tensors, mask = arguments(2, 4, 3, 3, 16, 4)
    settings = {"weights": torch.rand(2, 2), "patch_size": 16, "impl": "fused"}
    first, second = (losses_and_gradient(masked_loss, *tensors, mask, **settings) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_only_inputs_are_kept_for_backward():
    *tensors, mask = arguments(2, 3, 3, 2, 2, 4)
    tensors[0].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()), lambda _: None):
        masked_loss(*tensors, mask, patch_size=2, impl="fused")
    assert sorted(kept) == sorted(t.data_ptr() for t in (*tensors, mask.ids_restore))


def test_every_value_is_written():
    # A sample of one tile, and one of two, the second of which is not full.
    cases = [(*arguments(2, 3, 5, 3, 2, 7), 2), (*random_tensors(2, 4, 3, 2, 16), packed_mask([0, 4], 6), 16)]
    settings = {"weights": torch.rand(2, 2), "impl": "fused"}
    expected = [losses_and_gradient(masked_loss, *case, patch_size=p, **settings) for *case, p in cases]
    for (*case, p), same in zip(cases, expected, strict=True):
        with poisoned():
            results = losses_and_gradient(masked_loss, *case, patch_size=p, **settings)
        assert all(torch.equal(a, b) for a, b in zip(results, same, strict=True))


@pytest.mark.parametrize(("case", "dtype"), [("none", BF16), ("masked", FP32), ("packed", BF16)])
def test_opcheck(case, dtype):
    raw, *rest, mask = arguments(2, 3, 3, 2, 2, 4)
    _, *packed = packed_mask([0, 4], 6)
    indices = {"none": (None, None, 6), "masked": (mask.ids_restore, None, 4), "packed": (*packed, 6)}
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    args = (raw.to(dtype), *rest, *indices[case], 2)
    torch.library.opcheck(masked_loss_fwd, args, test_utils=utils)
    torch.library.opcheck(masked_loss_bwd, (torch.rand(2), torch.rand(2), *args), test_utils=utils)


@pytest.mark.parametrize(("case", "dynamic"), [("none", None), ("masked", False), ("masked", True), ("packed", True)])
def test_compile(case, dynamic):
    function = partial(masked_loss, patch_size=2, impl="fused")
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    # No two sizes agree, of which the first compilation would make a condition.
    shapes = [((2, 5, 7, 4, 2, 11), [0, 11])]
    if dynamic:
        shapes.append(((4, 3, 6, 5, 2, 13), [30, 3, 0, 8]))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape, counts in shapes:
            *tensors, mask = arguments(*shape)
            mask = {"none": None, "masked": mask, "packed": packed_mask(counts, shape[2] * shape[3])}[case]
            weights = torch.rand(2, shape[0])
            expected = losses_and_gradient(function, *tensors, mask, weights=weights)
            results = losses_and_gradient(compiled, *tensors, mask, weights=weights)
            assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("case", ["none", "masked", "packed"])
def test_no_value_is_read_on_the_host(case):
    *tensors, mask = arguments(2, 3, 3, 2, 2, 4)
    mask = {"none": None, "masked": mask, "packed": packed_mask([0, 4], 6)}[case]
    # Fake tensors have no values: reading one raises.
    with FakeTensorMode() as mode:
        tensors = [mode.from_tensor(t) for t in tensors]
        mask = mask and Mask(*(None if t is None else mode.from_tensor(t) for t in mask))
        settings = {"weights": torch.ones(2, 2), "patch_size": 2, "impl": "fused"}
        results = losses_and_gradient(masked_loss, *tensors, mask, **settings)
    assert [t.shape for t in results] == [(2,), (2,), (2, 6, 12)]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("raw", torch.zeros(2, 3, 12), r"raw must have shape \(2, 6, 12\) for these images, not \(2, 3, 12\)"),
        ("raw", torch.zeros(2, 6, 4), r"raw must have shape \(2, 6, 12\) for these images, not \(2, 6, 4\)"),
        ("raw", torch.zeros(1, 6, 12), r"raw must have shape \(2, 6, 12\) for these images, not \(1, 6, 12\)"),
        ("images", torch.zeros(2, 3, 6, 5), "images of 6x5 do not divide into patches of 2x2"),
        ("images", torch.zeros(3, 6, 4), r"images must have shape \(B, C, h \* p, w \* p\), not \(3, 6, 4\)"),
        ("noised", torch.ones(2, 3, 4, 6), r"noised must have the shape of images, \(2, 3, 6, 4\), not \(2, 3, 4, 6\)"),
        *((c, torch.zeros(2, 1), rf"{c} must have shape \(2,\), not \(2, 1\)") for c in COEFFICIENTS),
        ("mask", Mask(ids(2, 3), ids(2, 5)), r"mask.ids_restore must have shape \(2, 6\), not \(2, 5\)"),
        ("mask", Mask(ids(3), ids(2, 6)), r"mask.ids_keep must have shape \(2, K\), not \(3,\)"),
        ("mask", Mask(ids(3), ids(2, 6), ids(2)), r"mask.cu_seqlens must have shape \(3,\), not \(2,\)"),
        ("mask", Mask(ids(3), ids(2, 6), torch.zeros(3)), "cu_seqlens must be int32 or int64 .* not torch.float32"),
        ("mask", Mask(ids(2, 3), torch.zeros(2, 6)), "mask.ids_restore must be int32 or int64, not torch.float32"),
        ("mask", Mask(ids(2, 3), ids(2, 6).to("meta")), "ids_restore must be on cpu, like the rest, not on meta"),
        *((c, torch.ones(2).to("meta"), f"{c} must be on cpu, like the rest, not on meta") for c in COEFFICIENTS),
        ("patch_size", 0, "images of 6x4 do not divide into patches of 0x0"),
        ("impl", "eager", 'impl must be "fused", "reference" or None'),
    ],
)
@pytest.mark.parametrize("impl", IMPLS)
def test_what_fits_neither_form(impl, name, value, message):
    named = {**named_arguments(), "patch_size": 2, "impl": impl}
    with pytest.raises(ValueError, match=message):
        masked_loss(**{**named, name: value})


@pytest.mark.parametrize("impl", IMPLS)
def test_a_patch_of_one_value(impl):
    tensors = random_tensors(2, 1, 2, 2, 1)
    exact, _ = losses_of_whole_images(*tensors, None, 1)
    denoising, _ = masked_loss(*tensors, None, patch_size=1, impl=impl)
    assert_near(denoising, exact, STEPS)
    for mask in (sample_mask(2, 4, 2, seed=0, device="cpu"), packed_mask([1, 3], 4)):
        with pytest.raises(ValueError, match=r"raw has shape \(2, 4, 1\): a patch of one value has no variance"):
            masked_loss(*tensors, mask, patch_size=1, impl=impl)


@pytest.mark.parametrize("name", ["images", "noised", *COEFFICIENTS])
def test_the_fused_form_has_the_gradient_of_raw_alone(name):
    named = named_arguments("raw", name)
    function = partial(masked_loss, **named, patch_size=2)
    (grad,) = torch.autograd.grad(function(impl="reference")[0].sum(), named[name])
    assert grad.ne(0).any()
    with pytest.raises(ValueError, match=f"{name} of shape .* requires grad, and the fused form is differentiable in"):
        function(impl="fused")
    with torch.no_grad():
        assert function(impl="fused")[0].isfinite().all()


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float64) for name in TENSORS), *((name, BF16) for name in COEFFICIENTS)]
)
def test_other_dtypes_are_for_the_reference(name, dtype):
    named = named_arguments()
    function = partial(masked_loss, **{**named, name: named[name].to(dtype)}, patch_size=2)
    assert function(impl="reference")[0].isfinite().all()
    message = f"the fused kernels take a float32 {name}, not" if name in COEFFICIENTS else f"{name}.*"
    with pytest.raises(ValueError, match=rf'{message} {dtype}: impl="reference" takes any'):
        function(impl="fused")


def test_patches_too_large_for_the_kernel():
    function = partial(masked_loss, *random_tensors(1, 5, 1, 1, 16), None, patch_size=16)
    assert function(impl="reference")[0].isfinite().all()
    with pytest.raises(ValueError, match=r"patches of up to 1024 values, and raw has shape \(1, 1, 1280\)"):
        function(impl="fused")


@pytest.mark.skipif(not NATIVE, reason="no native kernel here")
def test_a_native_kernel_is_the_default_for_the_gradient_of_raw(monkeypatch):
    raw, *rest = arguments(2, 3, 3, 2, 2, 4)
    function = partial(masked_loss, raw.requires_grad_(), *rest, patch_size=2)
    monkeypatch.setattr(contract, "masked_loss_reference", None)
    parts, expected = function(), function(impl="fused")
    assert all(torch.equal(a, b) for a, b in zip(parts, expected, strict=True))


@pytest.mark.parametrize("name", ["images", "noised", *COEFFICIENTS])
def test_the_default_on_a_cpu_has_every_gradient_and_takes_float64(name):
    named = named_arguments("raw", name)
    function = partial(masked_loss, patch_size=2)
    losses = [function(**named, impl=impl)[0].sum() for impl in (None, "reference")]
    grad, expected = (torch.autograd.grad(loss, named[name])[0] for loss in losses)
    assert torch.equal(grad, expected)
    double = {**named, name: named[name].detach().double()}
    parts, exact = (function(**double, impl=impl) for impl in (None, "reference"))
    assert all(torch.equal(a, b) for a, b in zip(parts, exact, strict=True))


def test_the_number_of_threads_changes_no_bit():
    *tensors, mask = arguments(3, 4, 16, 16, 2, 128)
    settings = {"weights": torch.rand(2, 3), "patch_size": 2, "impl": "fused"}
    expected = losses_and_gradient(masked_loss, *tensors, mask, **settings)
    torch.set_num_threads(2)  # which a fixture takes back
    results = losses_and_gradient(masked_loss, *tensors, mask, **settings)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
