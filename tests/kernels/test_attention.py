import math
import sys
import types
from importlib.metadata import PackageNotFoundError
from itertools import pairwise

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from util import BF16_ROUNDING, assert_accurate, relative_error

from fastmask.kernels import _attention_backends, attention
from fastmask.kernels._attention_backends import attention_backends
from fastmask.kernels._dispatch import BackendUnavailableError
from fastmask.kernels.attention import attention_reference, packed_attention_bwd, packed_attention_fwd

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
    assert relative_error(out, exact) < 1e-6
    assert relative_error(attention(q.double(), k.double(), v.double()), exact) < 1e-14


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16(shape):
    q, k, v = (torch.randn(shape).bfloat16() for _ in range(3))
    out = attention(q, k, v)
    assert out.dtype == torch.bfloat16
    # The weights are rounded before the second product, and the result after it.
    assert relative_error(out, attention_by_loops(q, k, v)) < BF16_ROUNDING


def test_strided_input():
    # The model passes slices of one (B, K, 3, H, D/H) tensor.
    q, k, v = torch.randn(2, 7, 3, 2, 4).unbind(2)
    assert not q.is_contiguous()
    assert relative_error(attention(q, k, v), attention_by_loops(q, k, v)) < 1e-6


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
        ({"cu_seqlens": torch.tensor([0, 3, 5])}, r"cu_seqlens must rise from 0 to the 6 rows of q, not \[0, 3, 5\]"),
        ({"cu_seqlens": torch.tensor([1, 3, 6])}, "cu_seqlens must rise from 0"),
        ({"cu_seqlens": torch.tensor([0, 4, 3, 6])}, "cu_seqlens must rise from 0"),
        ({"cu_seqlens": torch.tensor([0.0, 6.0])}, "cu_seqlens must be int32 or int64"),
        (
            {"cu_seqlens": torch.tensor([0, 6], device="meta")},
            "cu_seqlens must be on the device of q, cpu, not on meta",
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
    torch.library.opcheck(packed_attention_bwd, (torch.randn_like(q), q, k, v, cu_seqlens), test_utils=checks)


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
    expected = packed_attention_bwd(grad, q, k, v, cu_seqlens)
    compiled = torch.compile(lambda *t: packed_attention_bwd(*t, cu_seqlens), fullgraph=True, backend="aot_eager")
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


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("packed", [False, True])
def test_fake_tensors(packed, device):
    """On a machine without a GPU too, a CUDA tensor without data takes the way of a real one."""
    with FakeTensorMode(), torch.no_grad():
        # Not by an index: those ask for the device.
        q = torch.empty(10, 3, 2, 8, device=device, dtype=torch.bfloat16).select(1, 0)
        cu_seqlens = torch.empty(3, dtype=torch.int32, device=device)
        if not packed:
            q = q.unsqueeze(0)
        out = attention(q, q, q, cu_seqlens=cu_seqlens if packed else None)
        assert out.shape == q.shape
        assert out.dtype == q.dtype
        assert out.device == q.device


class Recorder(types.ModuleType):
    """A library that keeps the arguments of its calls and returns q."""

    def __init__(self, *functions, with_lse=False):
        super().__init__("recorder")
        self.calls = []
        for function in functions:
            setattr(
                self, function, lambda *args, _name=function, **options: self.record(_name, args, options, with_lse)
            )

    def record(self, name, args, options, with_lse):
        self.calls.append((name, args, options))
        return (args[0], None) if with_lse else args[0]


FLASH = ("flash_attn_func", "flash_attn_varlen_func")
DISTRIBUTION = {"flash_attn.cute": "flash-attn-4", "flash_attn_interface": "flash-attn-3", "flash_attn": "flash-attn"}


@pytest.fixture
def libraries(monkeypatch):
    """Return a function by which exactly these libraries are installed, on a GPU of a compute capability."""
    installed = {}

    def version(name):
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    def install(arch, **modules):
        monkeypatch.setattr(_attention_backends, "_arch", lambda device: arch)
        for name, module in modules.items():
            name = name.replace("__", ".")
            monkeypatch.setitem(sys.modules, name, module)
            installed[DISTRIBUTION.get(name, "xformers")] = "1.2"

    monkeypatch.setattr(_attention_backends.importlib.metadata, "version", version)
    monkeypatch.setattr(_attention_backends, "_found", {})
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    _attention_backends._look_for.cache_clear()
    yield install
    _attention_backends._look_for.cache_clear()


@pytest.fixture
def gpu_tensors():
    """Return q, k, v (N, H, D/H) in bfloat16 on a GPU, without data, and cu_seqlens in int64."""
    with FakeTensorMode(), torch.no_grad():
        q, k, v = torch.empty(3, 10, 2, 64, dtype=torch.bfloat16, device="cuda").unbind()
        yield q, k, v, torch.empty(4, dtype=torch.int64, device="cuda")


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_calls_flash_attn(libraries, gpu_tensors, deterministic, with_lse):
    packed, cu_seqlens = gpu_tensors[:3], gpu_tensors[3]
    q, k, v = (t.unsqueeze(0) for t in packed)
    libraries(9, flash_attn=(library := Recorder(*FLASH, with_lse=with_lse)))
    torch.use_deterministic_algorithms(deterministic)
    try:
        assert attention(*packed, cu_seqlens=cu_seqlens, max_seqlen=7, backend="flash-attn") is packed[0]
        attention(*packed, cu_seqlens=cu_seqlens, backend="flash-attn")
        dense = attention(q, k, v, backend="flash-attn")
    finally:
        torch.use_deterministic_algorithms(False)
    assert dense is q
    (name, args, options), (_, _, without), (dense_name, dense_args, dense_options) = library.calls
    assert name == "flash_attn_varlen_func"
    assert all(one is two for one, two in zip(args, packed, strict=True))
    bounds = options.pop("cu_seqlens_q")
    assert bounds is options.pop("cu_seqlens_k")
    assert bounds.dtype == torch.int32
    assert options == {"max_seqlen_q": 7, "max_seqlen_k": 7, "deterministic": deterministic}
    assert without["max_seqlen_q"] == without["max_seqlen_k"] == 10
    assert dense_name == "flash_attn_func"
    assert all(one is two for one, two in zip(dense_args, (q, k, v), strict=True))
    assert dense_options == {"deterministic": deterministic}


@pytest.mark.parametrize(
    ("arch", "names", "used"),
    [
        (9, ("flash_attn", "flash_attn_interface", "flash_attn__cute"), "flash_attn__cute"),
        (9, ("flash_attn", "flash_attn_interface"), "flash_attn_interface"),
        (10, ("flash_attn", "flash_attn_interface"), "flash_attn"),
        (8, ("flash_attn", "flash_attn_interface", "flash_attn__cute"), "flash_attn"),
    ],
)
def test_takes_the_newest_flash_attn_for_the_gpu(libraries, gpu_tensors, arch, names, used):
    q, k, v, _ = gpu_tensors
    modules = {name: Recorder(*FLASH) for name in names}
    libraries(arch, **modules)
    attention(*(t.unsqueeze(0) for t in (q, k, v)), backend="flash-attn")
    assert [name for name in names if modules[name].calls] == [used]


def test_a_flash_attn_that_cannot_be_imported(libraries, gpu_tensors):
    q, k, v, cu_seqlens = gpu_tensors
    libraries(9, flash_attn__cute=None)
    with pytest.raises(BackendUnavailableError, match=r"^flash-attn-4 1.2 cannot be imported: .*flash_attn.cute"):
        attention(q, k, v, cu_seqlens=cu_seqlens, backend="flash-attn")


def test_calls_xformers(libraries, gpu_tensors, monkeypatch):
    q, k, v, cu_seqlens = gpu_tensors
    library, masks = Recorder("memory_efficient_attention"), Recorder("from_seqlens")
    library.fmha = types.SimpleNamespace(BlockDiagonalMask=masks)
    libraries(9, xformers__ops=library)
    # Values of a tensor without data cannot be read.
    monkeypatch.setattr(_attention_backends, "sample_lengths", lambda bounds, rows: [3, 0, 7])
    assert attention(q, k, v, cu_seqlens=cu_seqlens, backend="xformers").shape == q.shape
    attention(*(t.unsqueeze(0) for t in (q, k, v)), backend="xformers")
    assert masks.calls == [("from_seqlens", ([3, 0, 7],), {"device": q.device})]
    (_, packed, options), (_, dense, dense_options) = library.calls
    assert [t.shape for t in (*packed, *dense)] == [(1, 10, 2, 64)] * 6
    assert options == {"attn_bias": [3, 0, 7]}
    assert dense_options == {}


def test_calls_torch_first(libraries, gpu_tensors):
    q, k, v, cu_seqlens = gpu_tensors
    libraries(9, torch__nn__attention__varlen=(varlen := Recorder("varlen_attn")), flash_attn=Recorder(*FLASH))
    attention(q, k, v, cu_seqlens=cu_seqlens, max_seqlen=7)
    ((_, args, options),) = varlen.calls
    assert all(one is two for one, two in zip(args[:3], (q, k, v), strict=True))
    assert args[3] is args[4]
    assert args[3].dtype == torch.int32
    assert args[5:] == (7, 7)
    assert not options


def test_calls_flash_attn_where_torch_has_none(libraries, gpu_tensors, monkeypatch):
    q, k, v, cu_seqlens = gpu_tensors
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    libraries(9)
    with pytest.raises(BackendUnavailableError, match="torch built with flash attention"):
        attention(q, k, v, cu_seqlens=cu_seqlens)
    _attention_backends._look_for.cache_clear()
    libraries(9, flash_attn=(library := Recorder(*FLASH)))
    attention(q, k, v, cu_seqlens=cu_seqlens)
    assert [name for name, *_ in library.calls] == ["flash_attn_varlen_func"]


@pytest.mark.parametrize(
    ("backend", "dtype", "width", "message"),
    [
        (
            None,
            torch.float32,
            64,
            r'^torch takes float16, bfloat16 for packed .*, not torch\.float32; .*"reference" takes',
        ),
        ("torch", torch.bfloat16, 60, "^torch takes heads of a multiple of 8 values up to 256, not 60; "),
        ("torch", torch.bfloat16, 264, "^torch takes heads .* not 264"),
        ("flash-attn", torch.float64, 64, "^flash-attn takes float16, bfloat16 for packed tokens, not torch.float64"),
        ("flash-attn", torch.float16, 136, "^flash-attn takes heads of a multiple of 8 values up to 128, not 136"),
        ("xformers", torch.float16, 64, "^xformers is not installed: pip install xformers$"),
        ("xformers", torch.float64, 64, "^xformers takes float16, bfloat16, float32 for packed tokens, not"),
    ],
)
def test_calls_that_no_library_takes(libraries, backend, dtype, width, message):
    libraries(9, flash_attn__cute=Recorder(*FLASH))
    with FakeTensorMode(), torch.no_grad():
        q = torch.empty(10, 2, width, dtype=dtype, device="cuda")
        cu_seqlens = torch.empty(4, dtype=torch.int32, device="cuda")
        with pytest.raises(BackendUnavailableError, match=message):
            attention(q, q, q, cu_seqlens=cu_seqlens, backend=backend)
        assert attention(q, q, q, cu_seqlens=cu_seqlens, backend="reference").shape == q.shape


def test_values_of_a_head_are_made_to_lie_side_by_side(libraries):
    libraries(9, flash_attn=(library := Recorder(*FLASH)))
    assert not _attention_backends._missing("flash-attn", 9)
    q, k = torch.randn(2, 1, 3, 4, 2, 8).unbind()[0].unbind(1)[:2]
    v = torch.randn(1, 8, 2, 4).transpose(1, 3)
    _attention_backends.call("flash-attn", q, k, v, None, 4)
    ((_, args, _),) = library.calls
    assert args[0] is q
    assert args[1] is k
    assert torch.equal(args[2], v)
    assert args[2].is_contiguous()


def test_flash_attn_compiles_into_one_graph(libraries):
    """The choice of a library is a constant of the graph."""
    torch._dynamo.reset()
    libraries(9, flash_attn=types.SimpleNamespace(flash_attn_func=lambda q, k, v, deterministic: (q + k * v, None)))
    q = torch.randn(1, 4, 2, 8).bfloat16()

    def choose(q):
        assert not _attention_backends._missing("flash-attn", 9)
        return _attention_backends.call("flash-attn", q, q, q, None, 4)

    assert torch.equal(torch.compile(choose, fullgraph=True, backend="eager")(q), q + q * q)


def test_backends_of_the_cpu():
    rows = {row.name: row for row in attention_backends("cpu")}
    assert list(rows) == ["torch", "flash-attn", "xformers", "reference"]
    assert [row.usable for row in rows.values()] == [True, False, False, True]
    assert rows["torch"].note.startswith(torch.__version__)
    assert rows["xformers"].note == "runs on a GPU, not on cpu"


def test_backends_of_a_gpu(libraries, monkeypatch):
    if not torch.cuda.is_available():
        assert {(row.usable, row.note) for row in attention_backends("cuda")} == {(False, "no GPU in this machine")}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    libraries(9, flash_attn=Recorder(*FLASH))
    torch_row, flash, xformers, reference = attention_backends("cuda")
    assert torch_row == ("torch", True, f"{torch.__version__}; packed tokens: torch.nn.attention.varlen")
    assert flash == ("flash-attn", True, "flash-attn 1.2")
    assert xformers == ("xformers", False, "xformers is not installed: pip install xformers")
    assert reference.usable
    libraries(7)
    assert "compute capability 8" in attention_backends("cuda")[0].note
    assert "pip install flash-attn-4" in attention_backends("cuda")[1].note


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
        assert relative_error(one, two) < BF16_ROUNDING
