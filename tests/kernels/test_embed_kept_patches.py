import itertools
import re

import checks
import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from fastmask.kernels import embed_kept_patches, modulate_norm
from fastmask.kernels._triton import embed_kept_patches as launchers
from fastmask.kernels._triton.embed_kept_patches import settings
from fastmask.kernels.embed_kept_patches import (
    embed_kept_patches_bwd,
    embed_kept_patches_bwd_images,
    embed_kept_patches_fwd,
)
from fastmask.testing import assert_accurate, assert_near, poisoned, relative_error, weights_like

# (B, C, h, w, p, D, K): odd and not square, one patch kept, all kept in another order, a published patch size.
SHAPES = [(3, 3, 3, 2, 2, 7, 4), (8, 1, 2, 2, 3, 5, 1), (2, 4, 2, 3, 1, 6, 6), (1, 4, 4, 4, 4, 60, 7)]


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
    assert_near(out, exact)
    doubles = (t.double() for t in (images, weight, bias, position))
    assert_near(embed(*doubles, ids_keep, image_scale.double()), exact)
    if masked:
        assert torch.equal(embed(images, weight, bias, position, ids_keep.int(), image_scale), out)


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16(shape):
    inputs = arguments(*shape, torch.bfloat16)
    out = embed(*inputs)
    assert out.dtype == torch.bfloat16
    assert_near(out, embedded_by_convolution(*inputs), steps=3)  # the scaled images, the product, the sum


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


@pytest.mark.parametrize("shape", [(5, 7), (6, 6), (2, 6, 7), (1, 5, 7), (1, 1, 6, 7)])
def test_a_position_table_of_another_shape(shape):
    images, weight, bias, _, ids_keep, image_scale = arguments(*SHAPES[0])
    message = rf"position must have shape \(6, 7\) or \(1, 6, 7\) for images .*, not {re.escape(str(shape))}"
    with pytest.raises(ValueError, match=message):
        embed(images, weight, bias, torch.zeros(shape), ids_keep, image_scale)


def test_images_that_do_not_divide():
    images, *rest = arguments(*SHAPES[0])
    with pytest.raises(ValueError, match="images of 6x3 do not divide into patches of 2x2"):
        embed(images[..., :3], *rest)


def test_indices_of_another_batch():
    images, weight, bias, position, ids_keep, image_scale = arguments(*SHAPES[0])
    with pytest.raises(ValueError, match=r"ids_keep must have shape \(3, K\), not \(2, 4\)"):
        embed(images, weight, bias, position, ids_keep[:2], image_scale)


# The kernels

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32

# As above, in widths that the kernels take. The last two have several blocks of columns, and of columns and values.
KERNEL_SHAPES = [
    (3, 3, 5, 3, 2, 8, 2),
    (2, 1, 2, 2, 3, 56, 1),
    (1, 4, 2, 3, 1, 64, 6),
    (1, 4, 1, 3, 2, 1152, 2),
    (2, 3, 1, 1, 4, 136, 1),
]
# Several tiles of tokens, of which the last is not full, and several shares of them in the weight's gradient.
MANY_TOKENS = (1, 1, 17, 17, 1, 8, 263)


def embed_and_norm(images, weight, bias, shift, scale, **options):
    return embed_kept_patches(
        images, weight, bias, ids_keep=options.pop("ids_keep", None), shift=shift, scale=scale,
        patch_size=weight.shape[-1], **options,
    )  # fmt: skip


def embed_only(images, weight, bias, **options):
    return embed_and_norm(images, weight, bias, None, None, **options)


def kernel_arguments(*shape, masked=True):
    """Return the tensors that have gradients, and the others by name."""
    images, weight, bias, position, ids_keep, image_scale = arguments(*shape)
    modulation = torch.randn(2, shape[0], 6 * shape[5]).chunk(6, dim=-1)[2]
    others = {"position": position, "ids_keep": ids_keep if masked else None, "image_scale": image_scale}
    return [images, weight * weight[0].numel() ** -0.5, bias, *modulation], others


@pytest.mark.parametrize("shape", KERNEL_SHAPES)
def test_kernel_accuracy(shape):
    tensors, others = kernel_arguments(*shape)
    checks.check_accuracy(embed_and_norm, tensors, **others, eps=1e-5)


def test_kernel_accuracy_of_all_positions():
    tensors, others = kernel_arguments(2, 3, 2, 3, 2, 8, 1, masked=False)
    checks.check_accuracy(embed_and_norm, tensors, **others, norm="rms")


@pytest.mark.parametrize("masked", [False, True])
def test_kernel_accuracy_of_many_tokens(masked):
    tensors, others = kernel_arguments(*MANY_TOKENS, masked=masked)
    checks.check_accuracy(embed_only, tensors[:3], **others)


def test_kernel_accuracy_of_1024_values():
    tensors, others = kernel_arguments(2, 16, 1, 2, 8, 8, 1)
    checks.check_accuracy(embed_only, [t.to(F16) for t in tensors[:3]], **others)


@pytest.mark.parametrize(
    ("images", "weight", "bias", "position", "modulation"),
    [
        (BF16, BF16, BF16, BF16, BF16),
        (F32, BF16, F32, F32, F32),
        (BF16, F32, BF16, BF16, BF16),
        (F16, F16, F16, F32, F32),
    ],
)
def test_kernel_accuracy_of_mixed_dtypes(images, weight, bias, position, modulation):
    tensors, others = kernel_arguments(2, 3, 2, 2, 2, 64, 2)
    dtypes = images, weight, bias, modulation, modulation
    others["position"] = others["position"].to(position)
    tensors = [t.to(dtype) for t, dtype in zip(tensors, dtypes, strict=True)]
    checks.check_accuracy(embed_and_norm, tensors, **others)
    tokens, h = embed_and_norm(*tensors, **others)
    assert tokens.dtype == h.dtype == torch.promote_types(weight, position)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_the_norm_of_tokens_far_from_zero(norm):
    """Squares summed as they are would cancel, and so would blocks of columns merged without their distance."""
    tensors, others = kernel_arguments(1, 4, 1, 3, 2, 136, 2)
    others["position"] += torch.where(torch.arange(136) < 100, 300.0, 310.0)
    tokens, h = embed_and_norm(*tensors, **others, norm=norm, impl="fused")
    assert_accurate(
        h,
        modulate_norm(tokens.double(), *(t.double() for t in tensors[3:]), norm=norm),
        modulate_norm(tokens, *tensors[3:], norm=norm, impl="reference"),
    )


@pytest.mark.parametrize("shape", KERNEL_SHAPES[1:3])
def test_tokens_alone_are_those_beside_the_norm(shape):
    tensors, others = kernel_arguments(*shape)
    others["image_scale"] = None
    checks.check_accuracy(embed_only, tensors[:3], **others)
    tokens, _ = embed_and_norm(*tensors, **others, impl="fused")
    assert torch.equal(embed_only(*tensors[:3], **others, impl="fused"), tokens)


def test_packed_samples():
    cu_seqlens = torch.tensor([0, 3, 3, 36, 37])
    tensors, others = kernel_arguments(4, 3, 8, 5, 2, 8, 40)
    ids = [row[:count] for row, count in zip(others["ids_keep"], cu_seqlens.diff(), strict=True)]
    packed = {**others, "ids_keep": torch.cat(ids), "cu_seqlens": cu_seqlens}
    checks.check_accuracy(embed_only, tensors[:3], **packed)
    for impl in ("fused", "reference"):
        outs = embed_and_norm(*tensors, **packed, impl=impl)
        for b, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
            alone = {**others, "ids_keep": ids[b][None], "image_scale": others["image_scale"][b, None]}
            of_sample = [tensors[0][b, None], *tensors[1:3], *(t[b, None] for t in tensors[3:])]
            exact = embed_and_norm(*(t.double() for t in of_sample), **alone) if end > start else ()
            for whole, one in zip(outs, exact, strict=False):
                assert_near(whole[start:end], one[0], steps=2)
        packed |= {"cu_seqlens": cu_seqlens.int(), "ids_keep": torch.cat(ids).int()}
        assert all(map(torch.equal, outs, embed_and_norm(*tensors, **packed, impl=impl)))


def test_gradients_of_packed_samples():
    tensors, others = kernel_arguments(3, 3, 2, 2, 2, 8, 2)
    others |= {"ids_keep": torch.tensor([3, 1, 0, 2]), "cu_seqlens": torch.tensor([0, 1, 1, 4])}
    checks.check_accuracy(embed_and_norm, tensors, **others)
    grads = checks.results(embed_and_norm, tensors, **others, impl="fused")[2:]
    assert all(not grads[i][1].any() for i in (0, 3, 4))


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_autocast_rounds_the_product_only(dtype):
    tensors, others = kernel_arguments(3, 3, 5, 3, 2, 64, 1)
    exact = checks.results(embed_and_norm, tensors, dtype=torch.float64, **others, impl="reference")
    with torch.autocast("cpu", dtype):
        eager = checks.results(embed_and_norm, tensors, **others, impl="reference")
        fused = checks.results(embed_and_norm, tensors, **others, impl="fused")
        narrow = {**others, "position": others["position"].to(dtype)}
        for impl in ("fused", "reference"):
            assert embed_only(*tensors[:3], **narrow, impl=impl).dtype == dtype
    assert all(t.dtype == F32 for t in (*eager, *fused))
    for actual, true, by_eager in zip(fused, exact, eager, strict=True):
        assert_accurate(actual, true, by_eager)


@pytest.mark.parametrize("rounded", [0, 1])
def test_autocast_rounds_images_and_weight(rounded):
    """With one of the two rounded beforehand, the error is that of the other."""
    tensors, others = kernel_arguments(3, 3, 5, 3, 2, 64, 1)
    tensors[rounded] = tensors[rounded].to(F16).float()
    others |= {"image_scale": None, "position": torch.zeros_like(others["position"])}
    exact = embed_only(*(t.double() for t in tensors[:3]), **others)
    with torch.autocast("cpu", F16):
        error = relative_error(embed_only(*tensors[:3], **others, impl="fused"), exact)
    assert torch.finfo(F16).eps / 20 < error < torch.finfo(F16).eps


def test_scaled_patches_are_rounded_once():
    """The scale is multiplied in fp32, whatever its dtype and the images'."""
    (images, weight, bias, *_), others = kernel_arguments(3, 3, 5, 3, 2, 64, 1)
    others["image_scale"] = others["image_scale"].bfloat16()
    exact = embed_only(*(t.double() for t in (images.bfloat16(), weight, bias)), **others)
    for impl in ("fused", "reference"):
        assert_near(embed_only(images.bfloat16(), weight, bias, **others, impl=impl), exact)


@pytest.mark.parametrize("rms", [False, True])
def test_statistics_are_those_of_the_stored_tokens(rms):
    (images, weight, bias, shift, scale), others = kernel_arguments(3, 3, 5, 3, 2, 64, 1)
    inputs = images, weight, bias, *others.values(), None, F32, BF16, shift, scale, rms, 1e-6
    tokens, _, stats = embed_kept_patches_fwd(*inputs)
    assert tokens.dtype == BF16
    mean = torch.zeros(3) if rms else tokens.double().mean(1)
    deviation = (tokens.double() - mean[:, None]).square().mean(1).add(1e-6).sqrt()
    assert_near(stats, torch.stack([mean, 1 / deviation]))


def test_kernel_dropped_patches_are_not_read():
    tensors, others = kernel_arguments(2, 2, 2, 2, 2, 8, 2)
    others["ids_keep"] = torch.tensor([[0, 3], [2, 1]])
    whole = checks.results(embed_and_norm, tensors, **others, impl="fused")
    dropped = torch.zeros(2, 2, 4, 4, dtype=torch.bool)
    dropped[0, :, :2, 2:] = dropped[0, :, 2:, :2] = dropped[1, :, :2, :2] = dropped[1, :, 2:, 2:] = True
    tensors[0] = tensors[0].masked_fill(dropped, torch.nan)
    poisoned = checks.results(embed_and_norm, tensors, **others, impl="fused")
    assert all(torch.equal(a, b) for a, b in zip(whole, poisoned, strict=True))
    assert torch.equal(poisoned[2] == 0, dropped)


def test_kernel_of_non_contiguous_inputs():
    tensors, others = kernel_arguments(3, 3, 5, 3, 2, 8, 4)
    plain = checks.results(embed_and_norm, tensors, **others, impl="fused")
    strided = [tensors[0].mT.contiguous().mT, *(t.mT.contiguous().mT for t in tensors[1:2]), *map(spread, tensors[2:])]
    others = {name: spread(t) for name, t in others.items()}
    assert not any(t.is_contiguous() for t in (*strided, *others.values()))
    # Neither conversion copies, so the op sees the strides.
    for a, b in zip(checks.results(embed_and_norm, strided, **others, impl="fused"), plain, strict=True):
        assert torch.equal(a, b)


def spread(t):
    """Return the same numbers, with others between them in memory."""
    return torch.stack([t, t + 1], dim=-1)[..., 0]


@pytest.mark.parametrize("packed", [False, True])
def test_no_tokens_at_all(packed):
    """An empty batch of rows has results of no rows, and gradients of zero."""
    tensors, others = kernel_arguments(2, 3, 2, 1, 2, 8, 1)
    empty = torch.zeros(0 if packed else (2, 0), dtype=torch.int32)
    others |= {"ids_keep": empty, "cu_seqlens": torch.zeros(3).int() if packed else None}
    for impl in ("fused", "reference"):
        tokens, h, *grads = checks.results(embed_and_norm, tensors, **others, impl=impl)
        assert tokens.shape == h.shape == (*empty.shape, 8)
        assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("masked", [False, True])
def test_no_images_at_all(masked):
    tensors, others = kernel_arguments(2, 3, 2, 1, 2, 8, 1)
    tensors[0], tensors[3], tensors[4] = (tensors[i][:0] for i in (0, 3, 4))
    others |= {"image_scale": torch.ones(0), "ids_keep": torch.zeros(0, 1, dtype=torch.int32) if masked else None}
    tokens, h, *grads = checks.results(embed_and_norm, tensors, **others, impl="fused")
    assert tokens.shape == h.shape == (0, 1 if masked else 2, 8)
    assert not any(grad.any() for grad in grads)


def test_strided_cu_seqlens():
    tensors, others = kernel_arguments(2, 3, 2, 2, 2, 8, 2)
    bounds = torch.tensor([0, 1, 2, 3, 4, 4], dtype=torch.int32)[::2]
    others["ids_keep"] = others["ids_keep"].flatten()
    plain = checks.results(embed_and_norm, tensors, **others, cu_seqlens=bounds.contiguous(), impl="fused")
    assert all(
        map(torch.equal, checks.results(embed_and_norm, tensors, **others, cu_seqlens=bounds, impl="fused"), plain)
    )


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_the_setting_of_matrix_products_decides_the_precision(precision):
    """PyTorch has two ways of setting it, and refuses to tell by the older one what the newer one set."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        assert settings(torch.empty(8, 3, 2, 2), F32)["PRECISION"] == precision
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_only_what_is_needed_gets_a_gradient(monkeypatch):
    """Images that need none, as in training, get none; nothing but the inputs and the norm's two is kept."""
    tensors, others = kernel_arguments(2, 3, 1, 3, 2, 8, 2)
    every = checks.results(embed_and_norm, tensors, **others, impl="fused")
    leaves = [t.clone().requires_grad_(i > 0) for i, t in enumerate(tensors)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        tokens, h = embed_and_norm(*leaves, **others, impl="fused")
    kept = [leaves[0], leaves[1], others["ids_keep"], others["image_scale"], leaves[3], leaves[4], tokens]
    addresses = {t.data_ptr() for t in kept}
    extra = [t.shape for t in saved if t.numel() and t.data_ptr() not in addresses]
    assert extra == [(2, 4)]  # the statistics
    monkeypatch.delattr(launchers, "launch_bwd_images")
    sum((out.double() * weights_like(out)).sum() for out in (tokens, h)).backward()
    assert leaves[0].grad is None
    for leaf, grad in zip(leaves[1:], every[3:], strict=True):
        assert torch.equal(leaf.grad, grad)


@pytest.mark.parametrize(
    ("op", "layout", "dynamic"),
    [(embed_and_norm, "dense", False), (embed_and_norm, "packed", True), (embed_only, "all", True)],
)
def test_compiles_without_a_break(op, layout, dynamic):
    tensors, others = kernel_arguments(2, 3, 3, 1, 2, 8, 2, masked=layout != "all")
    if layout == "packed":
        others |= {"ids_keep": others["ids_keep"].flatten(), "cu_seqlens": torch.tensor([0, 1, 4])}
    checks.check_compiles(op, tensors[:3] if op is embed_only else tensors, dynamic=dynamic, **others)


def test_two_calls_in_one_dynamic_graph():
    tensors, others = kernel_arguments(2, 3, 3, 1, 2, 8, 2, masked=False)

    def twice(*inputs, **options):
        return embed_only(*inputs, **options) + embed_only(*inputs, **options)

    checks.check_compiles(twice, tensors[:3], dynamic=True, **others)


@pytest.mark.parametrize(("op", "shape"), [(embed_and_norm, KERNEL_SHAPES[0]), (embed_only, MANY_TOKENS)])
def test_runs_repeat_and_leave_nothing_unwritten(op, shape):
    tensors, others = kernel_arguments(*shape)
    tensors = tensors[:3] if op is embed_only else tensors
    plain, again = (checks.results(op, tensors, **others, impl="fused") for _ in range(2))
    assert all(map(torch.equal, plain, again))
    with poisoned():
        written = checks.results(op, tensors, **others, impl="fused")
    assert all(map(torch.equal, written, plain))


def test_raw_ops():
    (images, weight, bias, shift, scale), others = kernel_arguments(2, 3, 2, 1, 2, 8, 1)
    dense = others["ids_keep"], others["image_scale"], None
    packed = torch.tensor([0, 1]), None, torch.tensor([0, 1, 2]).int()
    grad = torch.randn(2, 8)
    opcheck(
        embed_kept_patches_fwd, (images, weight, bias, others["position"], *dense, F32, F32, None, None, False, 0.0)
    )
    opcheck(
        embed_kept_patches_fwd, (images, weight, bias, others["position"], *packed, F32, F32, shift, scale, True, 1e-6)
    )
    opcheck(embed_kept_patches_bwd, (grad, images, weight, *packed, F32, BF16))
    opcheck(embed_kept_patches_bwd_images, (grad, images, weight, *dense, F32))


@pytest.mark.parametrize("name", ["position", "image_scale"])
def test_gradients_that_only_the_reference_has(name):
    tensors, others = kernel_arguments(2, 3, 1, 2, 2, 8, 2)
    others[name].requires_grad_()
    with pytest.raises(ValueError, match=rf'{name} of shape .* must not require a gradient .* impl="reference"'):
        embed_and_norm(*tensors, **others, impl="fused")
    embed_and_norm(*tensors, **others, impl="reference")[1].sum().backward()
    assert others[name].grad.isfinite().all()
    with torch.no_grad():
        embed_and_norm(*tensors, **others, impl="fused")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(3, 6, 4)}, r"images must have shape \(B, C, h \* p, w \* p\), not \(3, 6, 4\)"),
        ({"weight": torch.zeros(8, 2, 2, 2)}, r"weight must have shape \(D, 3, 2, 2\).* not \(8, 2, 2, 2\)"),
        ({"weight": torch.zeros(8, 12)}, r"weight must have shape \(D, 3, 2, 2\).* not \(8, 12\)"),
        ({"bias": torch.zeros(7)}, r"bias must have shape \(8,\).* not \(7,\)"),
        ({"image_scale": torch.zeros(2)}, r"image_scale must have shape \(3,\).* not \(2,\)"),
        ({"shift": torch.zeros(3, 4, 8)}, r"shift must have shape \(3, 8\).* not \(3, 4, 8\)"),
        ({"scale": torch.zeros(8)}, r"scale must have shape \(3, 8\).* not \(8,\)"),
        ({"scale": None}, "shift and scale belong together, and scale is missing"),
        ({"shift": None}, "shift and scale belong together, and shift is missing"),
        ({"ids_keep": torch.zeros(12).int()}, r"ids_keep must have shape \(3, K\), not \(12,\)"),
        ({"ids_keep": torch.zeros(3, 4)}, r"ids_keep must be int32 or int64, not torch.float32 of shape \(3, 4\)"),
        ({"cu_seqlens": torch.tensor([0, 2, 4, 6])}, r"ids_keep must have shape \(N,\) with cu_seqlens, not \(3, 4\)"),
        ({"cu_seqlens": torch.tensor([0, 2, 4])}, r"cu_seqlens must have shape \(4,\).* not \(3,\)"),
        ({"cu_seqlens": torch.zeros(4)}, r"cu_seqlens must be int32 or int64 of shape \(B \+ 1,\)"),
        ({"ids_keep": None, "cu_seqlens": torch.tensor([0, 2, 4, 6])}, r"ids_keep must have shape \(N,\).* not None"),
        ({"position": torch.zeros(6, 8, device="meta")}, "position must be on cpu, like the rest, not on meta"),
        ({"norm": "batch"}, "norm must be .* not 'batch'"),
        ({"impl": "triton"}, "impl must be .* not 'triton'"),
    ],
)
def test_arguments_that_do_not_fit(change, message):
    (images, weight, bias, shift, scale), others = kernel_arguments(3, 3, 3, 2, 2, 8, 4)
    fitting = {"images": images, "weight": weight, "bias": bias, "shift": shift, "scale": scale, **others}
    assert embed_kept_patches(**fitting, patch_size=2)[0].shape == (3, 4, 8)
    with pytest.raises(ValueError, match=message):
        embed_kept_patches(**{**fitting, **change}, patch_size=2)


@pytest.mark.parametrize("index", [6, -1])
@pytest.mark.parametrize("packed", [False, True])
def test_the_reference_refuses_positions_that_are_none(index, packed):
    tensors, others = kernel_arguments(3, 3, 3, 2, 2, 8, 4)
    others["ids_keep"][1, 2] = index
    if packed:
        others |= {"ids_keep": others["ids_keep"].flatten(), "cu_seqlens": torch.tensor([0, 4, 8, 12])}
    with pytest.raises(IndexError):
        embed_and_norm(*tensors, **others, impl="reference")


@pytest.mark.parametrize("width", [7, 8200])
def test_widths_that_no_kernel_takes(width):
    tensors, others = kernel_arguments(1, 1, 1, 1, 1, width, 1)
    with pytest.raises(ValueError, match=rf"a multiple of 8 up to 8192, not {width}"):
        embed_and_norm(*tensors, **others, impl="fused")


def test_float64_has_no_kernel():
    tensors, others = kernel_arguments(1, 1, 1, 1, 1, 8, 1)
    tensors[1] = tensors[1].double()
    with pytest.raises(ValueError, match=r"weight is torch\.float64"):
        embed_and_norm(*tensors, **others, impl="fused")
