import sys
import types
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmask.kernels import _attention_backends, attention
from fastmask.kernels._attention_backends import attention_backends
from fastmask.kernels._dispatch import BackendUnavailableError


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
