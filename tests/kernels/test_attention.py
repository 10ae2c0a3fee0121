import math
from itertools import pairwise

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmask.kernels import _attention_backends, attention
from fastmask.kernels.attention import attention_reference, packed_attention_bwd, packed_attention_fwd
from fastmask.testing import assert_accurate, assert_near

STEPS = 3  # the scores, their softmax, and the product with v
# One token, odd sizes, a head of 72 as in XL.
SHAPES = [(2, 1, 2, 4), (3, 7, 3, 5), (1, 33, 2, 72)]
# One sample, one token each, empty ones in the middle and at both ends, unequal odd ones.
LENGTHS = [[5], [1, 1, 1], [3, 0, 5], [0, 4, 0, 0], [15, 1, 7, 17]]


def attention_by_loops(q, k, v):
    q, k, v = q.double(), k.double(), v.double()
    out = torch.empty_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            scores = (q[b, :, h] @ k[b, :, h].T / math.sqrt(q.shape[3])).exp()
            out[b, :, h] = scores / scores.sum(1, keepdim=True) @ v[b, :, h]
    return out


def packed_by_loops(q, k, v, cu_seqlens):
    parts = [attention_by_loops(*(t[None, i:j] for t in (q, k, v)))[0] for i, j in pairwise(cu_seqlens.tolist())]
    return torch.cat(parts)


def packed_inputs(lengths, heads=2, width=8, dtype=torch.float32, device="cpu"):
    """Return q, k and v, views of one tensor that needs its gradient, and cu_seqlens."""
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    qkv = torch.randn(sum(lengths), 3, heads, width, device=device).to(dtype).requires_grad_()
    return qkv, *qkv.unbind(1), cu_seqlens


def value_and_grads(function, q, k, v, grad):
    inputs = [t.detach().requires_grad_() for t in (q, k, v)]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))]


@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_and_fp64(shape):
    q, k, v = (torch.randn(shape) for _ in range(3))
    exact = attention_by_loops(q, k, v)
    out = attention(q, k, v)
    assert out.dtype == torch.float32
    assert_near(out, exact, STEPS)
    assert_near(attention(q.double(), k.double(), v.double()), exact, STEPS)


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16(shape):
    q, k, v = (torch.randn(shape).bfloat16() for _ in range(3))
    out = attention(q, k, v)
    assert out.dtype == torch.bfloat16
    # The weights are rounded before the second product, and the result after it.
    assert_near(out, attention_by_loops(q, k, v), steps=2)


def test_strided_input():
    # The model passes slices of one (B, K, 3, H, D/H) tensor.
    q, k, v = torch.randn(2, 7, 3, 2, 4).unbind(2)
    assert not q.is_contiguous()
    assert_near(attention(q, k, v), attention_by_loops(q, k, v), STEPS)


def test_large_scores_do_not_overflow():
    q = torch.full((1, 3, 1, 4), 100.0)
    k = torch.tensor([1.0, 0.0, -1.0]).view(1, 3, 1, 1) * q
    v = torch.randn(1, 3, 1, 4)
    assert torch.equal(attention(q, k, v), v[:, :1].expand_as(v))
    grads = value_and_grads(
        lambda *t: attention(*t, cu_seqlens=torch.tensor([0, 3])), q[0], k[0], v[0], torch.ones(3, 1, 4)
    )
    assert torch.equal(grads[0], v[0, :1].expand(3, 1, 4))
    assert all(grad.isfinite().all() for grad in grads)


def test_gradcheck():
    inputs = [torch.randn(1, 3, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(attention, inputs)
    _, q, k, v, cu_seqlens = packed_inputs([2, 0, 1], heads=1, width=3, dtype=torch.float64)
    inputs = [t.detach().requires_grad_() for t in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *t: attention(*t, cu_seqlens=cu_seqlens), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_packed(lengths, dtype):
    _, q, k, v, cu_seqlens = packed_inputs(lengths, width=9 if len(lengths) == 1 else 72, dtype=dtype)
    grad = torch.randn(q.shape)
    actual = value_and_grads(lambda *t: attention(*t, cu_seqlens=cu_seqlens), q, k, v, grad)
    exact = value_and_grads(
        lambda *t: packed_by_loops(*t, cu_seqlens), q.double(), k.double(), v.double(), grad.to(dtype)
    )
    eager = value_and_grads(lambda *t: attention_reference(*t, cu_seqlens=cu_seqlens), q, k, v, grad)
    for one, truth, plain in zip(actual, exact, eager, strict=True):
        assert_accurate(one, truth, plain)


def test_packed_samples_do_not_mix():
    _, q, k, v, cu_seqlens = packed_inputs([4, 3, 6])
    grad = torch.randn(q.shape)
    function = lambda *t: attention(*t, cu_seqlens=cu_seqlens)  # noqa: E731
    before = value_and_grads(function, q, k, v, grad)
    q, k, v, grad = (t.detach().clone() for t in (q, k, v, grad))
    for t in (q, k, v, grad):
        t[:4] = float("nan")
        t[7:] = float("nan")
    after = value_and_grads(function, q, k, v, grad)
    for one, two in zip(before, after, strict=True):
        assert torch.equal(one[4:7], two[4:7])
        assert two[:4].isnan().all()


def test_packed_samples_of_equal_length_are_dense():
    _, q, k, v, _ = packed_inputs([6, 6, 6])
    dense = attention(*(t.unflatten(0, (3, 6)) for t in (q, k, v))).flatten(0, 1)
    cu_seqlens = torch.tensor([0, 6, 12, 18])
    for backend in (None, "torch", "reference"):
        assert torch.equal(attention(q, k, v, cu_seqlens=cu_seqlens, max_seqlen=6, backend=backend), dense)


def test_two_runs_give_the_same_bits():
    _, q, k, v, cu_seqlens = packed_inputs([15, 1, 7])
    grad = torch.randn(q.shape)
    one, two = (value_and_grads(lambda *t: attention(*t, cu_seqlens=cu_seqlens), q, k, v, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_packed_keeps_its_dtype_under_autocast():
    _, q, k, v, cu_seqlens = packed_inputs([3, 4])
    grad = torch.randn(q.shape)
    plain = value_and_grads(lambda *t: attention(*t, cu_seqlens=cu_seqlens), q, k, v, grad)
    with torch.autocast("cpu"):
        cast = value_and_grads(lambda *t: attention(*t, cu_seqlens=cu_seqlens), q, k, v, grad)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


@pytest.mark.parametrize("shapes", [[(2, 3, 4)] * 3, [(2, 3, 2, 4), (2, 5, 2, 4), (2, 5, 2, 4)]])
def test_shapes_that_differ_or_have_another_rank(shapes):
    with pytest.raises(ValueError, match=r"q, k and v must share one shape \(B, K, H, D/H\), not \(2, 3,"):
        attention(*(torch.zeros(shape) for shape in shapes))
    with pytest.raises(
        ValueError, match=r"q, k and v must share one shape \(N, H, D/H\) with cu_seqlens, not \(2, 3, 2,"
    ):
        attention(*[torch.zeros(2, 3, 2, 4)] * 3, cu_seqlens=torch.tensor([0, 2]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 3, 5])}, "cu_seqlens must rise from 0 to the 6 rows of q, not from 0 to 5"),
        ({"cu_seqlens": torch.tensor([1, 3, 6])}, "cu_seqlens must rise from 0"),
        ({"cu_seqlens": torch.tensor([0, 4, 3, 6])}, "cu_seqlens must rise from 0 .* falls from 4 to 3 at sample 1"),
        ({"cu_seqlens": torch.tensor([0.0, 6.0])}, "cu_seqlens must be int32 or int64"),
        (
            {"cu_seqlens": torch.tensor([0, 6], device="meta")},
            "cu_seqlens must be on cpu, like the rest, not on meta",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 1, 6]), "max_seqlen": 4},
            "max_seqlen must be at least the longest .* 5 tokens",
        ),
        ({"cu_seqlens": torch.tensor([0, 6]), "backend": "fast"}, "backend must be None or one of .*not 'fast'"),
        (
            {"cu_seqlens": torch.tensor([0, 6]), "backend": "flash-attn"},
            "flash-attn runs on a GPU, not on cpu: .*torch",
        ),
        ({"cu_seqlens": torch.tensor([0, 6]), "backend": "xformers"}, "xformers runs on a GPU, not on cpu"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        attention(*[torch.zeros(6, 2, 4)] * 3, **arguments)


def test_dtypes_that_differ():
    q = torch.zeros(1, 2, 2, 4)
    with pytest.raises(ValueError, match=r"must share one dtype, not torch\.float32, torch\.float16, torch\.float32"):
        attention(q, q.half(), q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    _, q, k, v, cu_seqlens = packed_inputs([3, 0, 4], dtype=dtype)
    q, k, v = (t.detach() for t in (q, k, v))
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(packed_attention_fwd, (q, k, v, cu_seqlens, 4), test_utils=checks)
    torch.library.opcheck(
        packed_attention_bwd, (torch.randn_like(q), q, k, v, cu_seqlens, [True] * 3), test_utils=checks
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_compiles_into_one_graph(packed, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, dynamic=dynamic, backend="aot_eager")

    def check(lengths):
        _, q, k, v, cu_seqlens = packed_inputs(lengths)
        options = {"cu_seqlens": cu_seqlens} if packed else {}
        if not packed:
            q, k, v = (t[None] for t in (q, k, v))
        grad = torch.randn(q.shape)
        expected = value_and_grads(lambda *t: attention(*t, **options), q, k, v, grad)
        actual = value_and_grads(lambda *t: compiled(*t, **options), q, k, v, grad)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))

    check([4, 0, 3])
    if dynamic:
        with torch.compiler.set_stance("fail_on_recompile"):
            check([2, 9, 4, 5])


def test_gradients_inside_a_compiled_graph():
    """The backward op is then run where autograd is switched off below it."""
    torch._dynamo.reset()
    _, q, k, v, cu_seqlens = packed_inputs([4, 3])
    grad = torch.randn(q.shape)
    q, k, v = (t.detach() for t in (q, k, v))
    expected = packed_attention_bwd(grad, q, k, v, cu_seqlens, [True] * 3)
    compiled = torch.compile(
        lambda *t: packed_attention_bwd(*t, cu_seqlens, [True] * 3), fullgraph=True, backend="aot_eager"
    )
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(compiled(grad, q, k, v), expected, strict=True))


def saved_storages(function, qkv, *others):
    """Return the storages that a function saves for backward, those of known tensors by name."""
    saved = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.add(t.untyped_storage()._cdata), lambda t: t):
        out = function(*qkv.unflatten(-1, (3, 16, -1)).unbind(-3))
    known = [qkv, out, *others]
    return saved - {t.untyped_storage()._cdata for t in known}, [t.untyped_storage()._cdata in saved for t in known]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keeps_no_copies_for_backward(dtype):
    with FakeTensorMode():
        qkv = torch.empty(8, 128, 3 * 1152, dtype=dtype, requires_grad=True) * 1
        others, (keeps_qkv, keeps_out) = saved_storages(attention, qkv)
        assert keeps_qkv
        assert keeps_out
        # The log-sum-exp.
        assert len(others) == 1
        cu_seqlens = torch.empty(9, dtype=torch.int32)
        packed = lambda q, k, v: attention(q, k, v, cu_seqlens=cu_seqlens)  # noqa: E731
        others, keeps = saved_storages(packed, qkv.flatten(0, 1), cu_seqlens)
        assert not others
        assert keeps == [True, False, True]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("backend", [None, "torch", "flash-attn", "xformers", "reference"])
def test_on_a_gpu(backend, packed, dtype):
    lengths = [65, 0, 1, 128] if packed else [128]
    _, q, k, v, cu_seqlens = packed_inputs(lengths, width=72, dtype=dtype, device="cuda")
    if not packed:
        q, k, v = (t[None] for t in (q, k, v))
    reason = "" if backend is None else _attention_backends.refusal(backend, q, packed)
    if reason:
        pytest.skip(reason)
    if backend is None and packed and dtype == torch.float32:
        pytest.skip("refused, as a test above checks")
    options = {"cu_seqlens": cu_seqlens} if packed else {}
    grad = torch.randn(q.shape, device="cuda")
    actual = value_and_grads(lambda *t: attention(*t, backend=backend, **options), q, k, v, grad)
    exact = value_and_grads(
        lambda *t: attention_reference(*t, **options), q.double(), k.double(), v.double(), grad.to(dtype)
    )
    eager = value_and_grads(lambda *t: attention_reference(*t, **options), q, k, v, grad)
    for one, truth, plain in zip(actual, exact, eager, strict=True):
        assert_accurate(one, truth, plain)


@pytest.mark.gpu
@pytest.mark.parametrize("dynamic", [False, True])
def test_packed_compiles_on_a_gpu(dynamic):
    torch._dynamo.reset()
    _, q, k, v, cu_seqlens = packed_inputs([65, 0, 1, 128], width=72, dtype=torch.bfloat16, device="cuda")
    grad = torch.randn(q.shape, device="cuda")
    compiled = torch.compile(attention, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    actual = value_and_grads(lambda *t: compiled(*t, cu_seqlens=cu_seqlens), q, k, v, grad)
    expected = value_and_grads(lambda *t: attention(*t, cu_seqlens=cu_seqlens), q, k, v, grad)
    assert torch.equal(actual[0], expected[0])
    for one, two in zip(actual[1:], expected[1:], strict=True):
        assert_near(one, two)
