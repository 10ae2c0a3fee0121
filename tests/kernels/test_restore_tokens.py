import functools
import sys

import checks
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from fastmask.kernels import backends, gather_tokens, modulate_norm, restore_tokens
from fastmask.kernels.restore_tokens import (
    gather_tokens_bwd,
    gather_tokens_fwd,
    restore_tokens_bwd,
    restore_tokens_fwd,
    restore_tokens_reference,
)
from fastmask.testing import poisoned

IMPLS = ["reference", "fused"]
BF16 = torch.bfloat16
NATIVE = any(row[:3] == ("restore_tokens", "cpu", "native") for row in backends())
# Odd lengths, one token kept, all kept, one sample and several programs for it, a width that fits no block, a published
# one.
SHAPES = [(3, 7, 4, 8), (2, 5, 1, 56), (2, 5, 5, 64), (1, 33, 16, 8), (1, 3, 2, 1152)]
# Kept by each packed sample, of how many: unequal, one keeps none and one keeps all; a batch that keeps none.
PACKED = [([2, 0, 5, 1], 5), ([0, 0], 3)]


def unsorted_mask(batch, length, keep):
    order = torch.stack([torch.randperm(length) for _ in range(batch)])
    return order[:, :keep].int(), order.argsort(1).int()


def packed_mask(counts, length):
    """Return ids_keep (N,), ids_restore (B, L) and cu_seqlens."""
    order = torch.stack([torch.randperm(length) for _ in counts])
    ids_keep = torch.cat([row[:count] for row, count in zip(order, counts, strict=True)])
    return ids_keep.int(), order.argsort(1).int(), torch.tensor([0, *counts]).cumsum(0).int()


def restored_by_loops(x, mask_token, position, ids_restore, cu_seqlens=None):
    samples = x if cu_seqlens is None else x.tensor_split(cu_seqlens[1:-1].tolist())
    rows = [
        [sample[k] if k < len(sample) else mask_token for k in restore]
        for sample, restore in zip(samples, ids_restore.tolist(), strict=True)
    ]
    return torch.stack([torch.stack(row) for row in rows]) + position


def arguments(kept_shape, length, *, dtype=torch.float32, batch=None):
    """Return x, mask_token, position, shift and scale."""
    width = kept_shape[-1]
    modulation = (kept_shape[0] if batch is None else batch, width)
    shapes = kept_shape, (width,), (length, width), modulation, modulation
    return [torch.randn(shape).mul(2).to(dtype) for shape in shapes]


def check_normed(x, mask_token, position, shift, scale, ids_restore, **options):
    """Hold the fused form with a modulation, and every gradient, against the reference in float64."""

    def op(x, mask_token, shift, scale, **options):
        table = position.double() if x.dtype == torch.float64 else position
        return restore_tokens(x, mask_token, table, ids_restore, shift=shift, scale=scale, **options)

    checks.check_accuracy(op, [x, mask_token, shift, scale], **options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize(("batch", "length", "keep", "width"), SHAPES)
def test_tokens_are_copied_exactly(batch, length, keep, width, dtype, impl):
    ids_keep, ids_restore = unsorted_mask(batch, length, keep)
    x, mask_token, position, shift, scale = arguments((batch, keep, width), length, dtype=dtype)
    expected = restored_by_loops(x, mask_token, position, ids_restore)
    out = restore_tokens(x, mask_token, position, ids_restore, impl=impl)
    assert out.dtype == dtype
    assert torch.equal(out, expected)
    normed = restore_tokens(x, mask_token, position, ids_restore, shift=shift, scale=scale, impl=impl)
    assert torch.equal(normed[0], expected)
    # The norm is of the row as it was rounded, which is what backward sees.
    assert torch.equal(normed[1], modulate_norm(expected, shift, scale, impl=impl))
    whole = torch.randn(batch, length, width).to(dtype)
    gathered = torch.stack([whole[b, ids_keep[b]] for b in range(batch)])
    assert torch.equal(gather_tokens(whole, ids_keep, impl=impl), gathered)


@pytest.mark.parametrize(("impl", "width", "dtype"), [("reference", 5, torch.float64), ("fused", 8, torch.float16)])
def test_indices_of_64_bits_and_other_widths_and_dtypes(impl, width, dtype):
    ids_keep, ids_restore = (ids.long() for ids in unsorted_mask(2, 5, 3))
    x, mask_token, position, _, _ = arguments((2, 3, width), 5, dtype=dtype)
    out = restore_tokens(x, mask_token, position, ids_restore, impl=impl)
    assert out.dtype == dtype
    assert torch.equal(out, restored_by_loops(x, mask_token, position, ids_restore))
    whole = torch.randn(2, 5, width).to(dtype)
    assert torch.equal(gather_tokens(whole, ids_keep, impl=impl), whole[torch.arange(2)[:, None], ids_keep])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("batch", "length", "keep", "width"), SHAPES)
def test_gradients_go_where_the_values_came_from(batch, length, keep, width, impl):
    ids_keep, ids_restore = unsorted_mask(batch, length, keep)
    x, mask_token, position, _, _ = arguments((batch, keep, width), length)
    x.requires_grad_()
    mask_token.requires_grad_()
    # Whole numbers: the sums of gradients are exact in any order.
    grad = torch.randint(-9, 10, (batch, length, width)).float()
    restore_tokens(x, mask_token, position, ids_restore, impl=impl).backward(grad)
    assert torch.equal(x.grad, torch.stack([grad[b, ids_keep[b]] for b in range(batch)]))
    dropped = ids_restore >= keep
    assert torch.equal(mask_token.grad, grad[dropped].sum(0))

    whole = torch.randn(batch, length, width, requires_grad=True)
    gather_tokens(whole, ids_keep, impl=impl).backward(x.grad)
    assert torch.equal(whole.grad, grad * ~dropped[..., None])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("counts", "length"), PACKED)
def test_packed_samples_of_unequal_length(counts, length, impl):
    ids_keep, ids_restore, cu_seqlens = packed_mask(counts, length)
    x, mask_token, position, _, _ = arguments((sum(counts), 8), length, batch=len(counts))
    x.requires_grad_()
    mask_token.requires_grad_()
    out = restore_tokens(x, mask_token, position, ids_restore, cu_seqlens=cu_seqlens, impl=impl)
    assert torch.equal(out, restored_by_loops(x, mask_token, position, ids_restore, cu_seqlens))
    grad = torch.randint(-9, 10, out.shape).float()
    out.backward(grad)
    sample = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    assert torch.equal(x.grad, grad[sample, ids_keep])
    dropped = ids_restore >= torch.tensor(counts)[:, None]
    assert torch.equal(mask_token.grad, grad[dropped].sum(0))

    whole = torch.randn(len(counts), length, 8, requires_grad=True)
    kept = gather_tokens(whole, ids_keep, cu_seqlens=cu_seqlens.long(), impl=impl)
    assert torch.equal(kept, whole[sample, ids_keep])
    kept.backward(x.grad)
    assert torch.equal(whole.grad, grad * ~dropped[..., None])


@pytest.mark.parametrize(("norm", "dtype"), [("layer", torch.float32), ("layer", BF16), ("rms", torch.float32)])
@pytest.mark.parametrize(("batch", "length", "keep", "width"), [(2, 5, 3, 56), (1, 34, 1, 64), (1, 2, 1, 1152)])
def test_modulated_norm_and_its_gradients(batch, length, keep, width, dtype, norm):
    _, ids_restore = unsorted_mask(batch, length, keep)
    check_normed(*arguments((batch, keep, width), length, dtype=dtype), ids_restore, norm=norm)


def test_modulated_norm_of_packed_samples():
    _, ids_restore, cu_seqlens = packed_mask([2, 0, 3, 1], 3)
    check_normed(*arguments((6, 16), 3, batch=4), ids_restore, cu_seqlens=cu_seqlens)
    # As many rows as samples, where a modulation per sample has the shape of x.
    _, ids_restore, cu_seqlens = packed_mask([2, 0], 3)
    check_normed(*arguments((2, 16), 3, batch=2), ids_restore, cu_seqlens=cu_seqlens)


def test_eps_is_added_to_the_variance():
    _, ids_restore = unsorted_mask(1, 3, 2)
    tensors = [t * 1e-2 for t in arguments((1, 2, 8), 3)]
    for eps in (1e-6, 1e-2):
        check_normed(*tensors, ids_restore, eps=eps)


def test_each_result_and_gradient_has_its_own_dtype():
    _, ids_restore = unsorted_mask(2, 5, 3)
    x, mask_token, position, shift, scale = arguments((2, 3, 16), 5)
    mask_token = mask_token.to(BF16).float()  # so that float64 sees the token that is used
    check_normed(x.to(BF16), mask_token, position, shift.to(BF16), scale.half(), ids_restore)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_mask_token_is_rounded_to_the_tokens_dtype(impl):
    _, ids_restore = unsorted_mask(2, 6, 3)
    x, mask_token, position, _, _ = arguments((2, 3, 8), 6)
    out = restore_tokens(x.to(BF16), mask_token, position, ids_restore, impl=impl)
    assert out.dtype == torch.float32
    rounded = mask_token.to(BF16).float()
    assert torch.equal(out, restored_by_loops(x.to(BF16).float(), rounded, position, ids_restore))


@pytest.mark.parametrize("impl", IMPLS)
def test_non_contiguous_input(impl):
    ids_keep, ids_restore = unsorted_mask(2, 4, 3)
    x, position, mask_token = torch.randn(2, 8, 3).mT, torch.randn(8, 4).mT, torch.randn(16)[::2]
    chunks, columns = torch.randn(2, 24).chunk(3, 1)[1:], (torch.randn(8, 2).mT, torch.randn(2, 16)[:, ::2])
    for shift, scale in (chunks, columns):

        def results(strided, shift=shift, scale=scale):
            tensors = [t if strided else t.contiguous() for t in (x, mask_token, shift, scale)]
            table, ids = (position, ids_restore.mT.contiguous().mT) if strided else (position.contiguous(), ids_restore)
            leaves = [t.detach().requires_grad_() for t in tensors]
            out = restore_tokens(*leaves[:2], table, ids, shift=leaves[2], scale=leaves[3], impl=impl)
            grads = [values.expand(2, 4, 8) for values in (torch.arange(8.0), torch.arange(8.0).sin())]
            return *out, *torch.autograd.grad(out, leaves, grads)

        for strided, plain in zip(results(True), results(False), strict=True):
            torch.testing.assert_close(strided, plain)
    whole = torch.randn(2, 8, 4).mT
    gathered = gather_tokens(whole, ids_keep.mT.contiguous().mT, impl=impl)
    assert torch.equal(gathered, whole[torch.arange(2)[:, None], ids_keep])


def test_gradcheck_of_the_reference():
    ids_keep, ids_restore = unsorted_mask(2, 3, 2)
    inputs = [t.double().requires_grad_() for t in arguments((2, 2, 3), 3)]
    assert torch.autograd.gradcheck(
        lambda *t: restore_tokens(*t[:3], ids_restore, shift=t[3], scale=t[4], impl="reference"), inputs
    )
    _, ids_restore, cu_seqlens = packed_mask([0, 2], 3)
    inputs = [t.double().requires_grad_() for t in arguments((2, 3), 3, batch=2)[:3]]
    assert torch.autograd.gradcheck(
        lambda *t: restore_tokens(*t, ids_restore, cu_seqlens=cu_seqlens, impl="reference"), inputs
    )
    whole = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: gather_tokens(t, ids_keep, impl="reference"), (whole,))


def case(batch, length, keep, *, packed, dtype=torch.float32):
    """Return what to differentiate for, the mask, and gradients of the results, as `run` takes them."""
    if packed:
        counts = [keep, 0, length][:batch]
        ids_keep, ids_restore, cu_seqlens = packed_mask(counts, length)
        kept_shape = (sum(counts), 8)
    else:
        (ids_keep, ids_restore), cu_seqlens, kept_shape = unsorted_mask(batch, length, keep), None, (batch, keep, 8)
    x, mask_token, position, shift, scale = arguments(kept_shape, length, dtype=dtype, batch=batch)
    whole = torch.randn(batch, length, 8).to(dtype)
    leaves = [t.requires_grad_() for t in (whole, x, mask_token, shift, scale)]
    grads = [torch.randn(shape).to(dtype) for shape in (kept_shape, *[whole.shape] * 3)]
    return leaves, (position, ids_keep, ids_restore, cu_seqlens), grads


def both_ops(leaves, mask, impl="fused"):
    """Return what gathering, and restoring without and with a norm, give."""
    whole, x, mask_token, shift, scale = leaves
    position, ids_keep, ids_restore, cu_seqlens = mask
    options = {"cu_seqlens": cu_seqlens, "impl": impl}
    kept = gather_tokens(whole, ids_keep, **options)
    restored = restore_tokens(x, mask_token, position, ids_restore, **options)
    normed = restore_tokens(kept + x, mask_token, position, ids_restore, shift=shift, scale=scale, **options)
    return kept, restored, *normed


def run(leaves, mask, grads, op=both_ops):
    """Return every result and every gradient."""
    out = op(leaves, mask)
    return [*out, *torch.autograd.grad(out, leaves, grads)]


@pytest.mark.parametrize(("batch", "length", "packed"), [(1, 33, False), (2, 5, True)])
def test_two_runs_give_the_same_bits_whatever_lay_in_memory(batch, length, packed):
    inputs = case(batch, length, 4, packed=packed)
    expected = run(*inputs)

    with poisoned():
        actual = run(*inputs)
    assert all(map(torch.equal, actual, expected))  # never so for NaN


@pytest.mark.parametrize(("dynamic", "packed"), [(False, True), (True, False)])
def test_compiles_into_one_graph(dynamic, packed):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(both_ops, fullgraph=True, dynamic=dynamic, backend=counter)
    graphs = []
    for batch, length, keep in [(2, 5, 4), (3, 3, 2)][: 1 + dynamic]:
        inputs = case(batch, length, keep, packed=packed, dtype=BF16)
        for actual, right in zip(run(*inputs, op=compiled), run(*inputs), strict=True):
            assert torch.equal(actual, right)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1]  # other sizes, the same graph


@pytest.mark.parametrize(("normed", "packed"), [(True, False), (False, True)])
def test_opcheck(normed, packed):
    leaves, (position, ids_keep, ids_restore, cu_seqlens), grads = case(2, 3, 2, packed=packed, dtype=BF16)
    whole, x, mask_token, shift, scale = (t.detach() for t in leaves)
    x, position, mask_token = x.flatten(0, -2), position.float(), mask_token.float()
    modulation, grad_norm = ((shift, scale), grads[1]) if normed else ((None, None), None)
    opcheck(restore_tokens_fwd, (x, mask_token, position, ids_restore, cu_seqlens, *modulation, False, 1e-6))
    grad_restored, grad_norm = grads[2].flatten(0, 1), None if grad_norm is None else grad_norm.flatten(0, 1)
    grad_arguments = (grad_restored, grad_norm, mask_token, ids_restore, cu_seqlens, x.shape[0], torch.float16)
    opcheck(restore_tokens_bwd, grad_arguments)
    opcheck(gather_tokens_fwd, (whole, ids_keep, cu_seqlens))
    opcheck(gather_tokens_bwd, (grads[0], ids_keep, cu_seqlens, 2, 3))


def fitting(**change):
    tensors = {"x": torch.zeros(2, 3, 8), "mask_token": torch.zeros(8), "position": torch.zeros(5, 8)}
    return {**tensors, "ids_restore": torch.arange(5).expand(2, 5), **change}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids_restore": torch.zeros(2, 4).int()}, r"ids_restore must have shape \(2, 5\), not \(2, 4\)"),
        ({"ids_restore": torch.zeros(1, 5).int()}, r"ids_restore must have shape \(2, 5\), not \(1, 5\)"),
        ({"ids_restore": torch.zeros(2, 5)}, r"ids_restore must be int32 or int64, not torch.float32 of shape \(2, 5"),
        ({"mask_token": torch.zeros(1, 8)}, r"mask_token and position must have shapes \(8,\).*not \(1, 8\)"),
        ({"mask_token": torch.zeros(3)}, r"mask_token and position must have shapes \(8,\).*not \(3,\)"),
        ({"position": torch.zeros(5, 3)}, r"mask_token and position .* \(L, 8\).*and \(5, 3\)"),
        ({"position": torch.zeros(1, 5, 3)}, r"mask_token and position .* or \(1, L, 8\).*and \(1, 5, 3\)"),
        ({"position": torch.zeros(2, 5, 8)}, r"mask_token and position .* \(L, 8\).*and \(2, 5, 8\)"),
        ({"position": torch.zeros(5)}, r"mask_token and position .* \(L, 8\).*and \(5,\)"),
        ({"position": torch.zeros(6, 8)}, r"ids_restore must have shape \(2, 6\), not \(2, 5\)"),
        ({"x": torch.zeros(6, 8)}, r"x must have shape \(B, K, D\), or \(N, D\) with cu_seqlens, not \(6, 8\)"),
        ({"cu_seqlens": torch.tensor([0, 3, 6])}, r"x must have shape \(N, D\) with cu_seqlens, not \(2, 3, 8\)"),
        ({"x": torch.zeros(6, 8), "cu_seqlens": torch.tensor([0, 6])}, r"ids_restore must have shape \(1, 5\)"),
        ({"shift": torch.zeros(2, 8)}, "shift and scale belong together, and scale is missing"),
        ({"scale": torch.zeros(2, 8)}, "shift and scale belong together, and shift is missing"),
        ({"shift": torch.zeros(2, 3, 8), "scale": torch.zeros(2, 8)}, r"shift must have shape \(2, 8\), not \(2, 3"),
        ({"shift": torch.zeros(2, 8), "scale": torch.zeros(1, 8)}, r"scale must have shape \(2, 8\), not \(1, 8\)"),
        ({"position": torch.zeros(5, 8, device="meta")}, "position must be on cpu, like the rest, not on meta"),
        ({"norm": "batch"}, 'norm must be "layer" or "rms"'),
        ({"impl": "triton"}, 'impl must be "fused", "reference" or None'),
    ],
)
def test_what_does_not_fit_restore(change, message, impl):
    with pytest.raises(ValueError, match=message):
        restore_tokens(**fitting(**{"impl": impl, **change}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position": torch.zeros(5, 8, requires_grad=True)}, r"position of shape \(5, 8\) must not require a grad"),
        ({"x": torch.zeros(2, 3, 8).double()}, "x is torch.float64"),
        ({"mask_token": torch.zeros(8).double()}, "mask_token is torch.float64"),
        ({"position": torch.zeros(5, 8).double()}, "position is torch.float64"),
        ({"shift": torch.zeros(2, 8).double(), "scale": torch.zeros(2, 8)}, "shift is torch.float64"),
        ({"scale": torch.zeros(2, 8).double(), "shift": torch.zeros(2, 8)}, "scale is torch.float64"),
        (
            {"x": torch.zeros(2, 3, 12), "mask_token": torch.zeros(12), "position": torch.zeros(5, 12)},
            "a multiple of 8 up to 8192, not 12",
        ),
    ],
)
def test_what_only_the_reference_takes(change, message):
    assert isinstance(restore_tokens_reference(**fitting(**change)), torch.Tensor | tuple)
    with pytest.raises(ValueError, match=message):
        restore_tokens(**fitting(**change), impl="fused")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(5, 8)}, r"x must have shape \(B, L, D\), not \(5, 8\)"),
        ({"ids_keep": torch.zeros(3)}, r"ids_keep must be int32 or int64, not torch.float32 of shape \(3,\)"),
        ({"ids_keep": torch.zeros(2, 3).int()}, r"ids_keep must have shape \(N,\) with cu_seqlens, not \(2, 3\)"),
        ({"cu_seqlens": torch.tensor([0, 1, 2, 3])}, r"cu_seqlens must have shape \(3,\), not \(4,\)"),
        ({"cu_seqlens": torch.tensor([0.0, 1.0, 3.0])}, "cu_seqlens must be int32 or int64"),
        ({"ids_keep": torch.zeros(3, device="meta").int()}, "ids_keep must be on cpu, like the rest, not on meta"),
        ({"cu_seqlens": None}, r"ids_keep must have shape \(2, K\), not \(3,\)"),
        ({"cu_seqlens": None, "ids_keep": torch.zeros(3, 2).int()}, r"ids_keep must have shape \(2, K\), not \(3, 2\)"),
    ],
)
def test_what_does_not_fit_gather(change, message, impl):
    given = {"x": torch.zeros(2, 5, 8), "ids_keep": torch.arange(3), "cu_seqlens": torch.tensor([0, 1, 3])}
    assert gather_tokens(**given, impl=impl).shape == (3, 8)
    with pytest.raises(ValueError, match=message):
        gather_tokens(**{**given, **change}, impl=impl)


def test_a_learned_position_table_without_gradients():
    """Inference needs no gradient of it."""
    given = fitting(position=torch.randn(5, 8, requires_grad=True))
    with torch.no_grad():
        assert torch.equal(restore_tokens(**given, impl="fused"), restore_tokens(**given, impl="reference"))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("batch", "keep"), [(0, 3), (2, 0), (0, 0)])
def test_no_tokens_at_all(batch, keep, impl):
    leaves = [t.requires_grad_() for t in (torch.randn(batch, keep, 8), torch.randn(8), *torch.randn(2, batch, 8))]
    x, mask_token, shift, scale = leaves
    ids_restore, position = torch.arange(5).expand(batch, 5), torch.randn(5, 8)
    restored, h = restore_tokens(x, mask_token, position, ids_restore, shift=shift, scale=scale, impl=impl)
    if not keep:
        assert torch.equal(restored, (mask_token + position).expand(batch, 5, 8))
    grads = torch.autograd.grad((restored, h), leaves, (torch.ones_like(restored), torch.zeros_like(h)))
    dropped = 2 * 5 if batch and not keep else 0
    assert torch.equal(grads[1], torch.full((8,), float(dropped)))
    whole = torch.randn(batch, 5, 8, requires_grad=True)
    kept = gather_tokens(whole, torch.zeros(batch, keep, dtype=torch.int32), impl=impl)
    assert kept.shape == (batch, keep, 8)
    assert not torch.autograd.grad(kept.sum(), whole)[0].any()


def test_the_reference_checks_indices():
    x, cu_seqlens = torch.zeros(1, 5, 8), torch.tensor([0, 1])
    with pytest.raises(RuntimeError, match="index 5 is out of bounds"):
        gather_tokens(x, torch.tensor([[5]]), impl="reference")
    with pytest.raises(IndexError, match="index 5 is out of bounds"):
        gather_tokens(x, torch.tensor([5]), cu_seqlens=cu_seqlens, impl="reference")
    with pytest.raises(RuntimeError, match="index -1 is out of bounds"):
        restore_tokens(x[:, :1], x[0, 0], x[0, :1], torch.tensor([[-1]]), impl="reference")


@pytest.mark.skipif(not NATIVE, reason="no native kernel here")
def test_native_kernels_are_the_default(monkeypatch):
    leaves, mask, grads = case(2, 5, 4, packed=True)
    expected = run(leaves, mask, grads)
    for name in ("restore_tokens_reference", "gather_tokens_reference"):
        monkeypatch.setattr(sys.modules["fastmask.kernels.restore_tokens"], name, None)
    actual = run(leaves, mask, grads, op=functools.partial(both_ops, impl=None))
    assert all(map(torch.equal, actual, expected))


def test_the_default_on_a_cpu_has_every_gradient():
    position = torch.randn(5, 8, requires_grad=True)
    grad, expected = (
        torch.autograd.grad(restore_tokens(**fitting(position=position), impl=impl).sum(), position)[0]
        for impl in (None, "reference")
    )
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("packed", [False, True])
def test_the_number_of_threads_changes_no_bit(packed):
    inputs = case(3, 67, 40, packed=packed)
    expected = run(*inputs)
    torch.set_num_threads(2)
    try:
        actual = run(*inputs)
    finally:
        torch.set_num_threads(1)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.skipif(not NATIVE, reason="no native kernel here")
@pytest.mark.parametrize("index", [5, -1])
def test_native_kernels_check_indices(index):
    ids = torch.tensor([[0, 1, 2, 3, index]])
    with pytest.raises(RuntimeError, match=rf"ids_keep holds {index}, which is outside 0 .. 4"):
        gather_tokens(torch.zeros(1, 5, 8), ids, impl="fused")
    with pytest.raises(RuntimeError, match=rf"ids_restore holds {index}, which is outside 0 .. 4"):
        restore_tokens(**fitting(x=torch.zeros(1, 3, 8), ids_restore=ids), impl="fused")
    whole = torch.zeros(1, 5, 8, requires_grad=True)
    twice = gather_tokens(whole, torch.tensor([[4, 1, 4]]), impl="fused")
    with pytest.raises(RuntimeError, match="ids_keep holds 4 twice for sample 0"):
        twice.sum().backward()
