"""The CUDA C++ candidates against float64, where FASTMASK_NATIVE_CUDA names a library of them.

That of `make cuda` runs on a GPU, that of `make emulated` on a CPU, where the threads of a block take turns.
"""

import checks
import pytest
import torch

from bench.kernels import _cuda
from fastmask.kernels import add_gated_norm
from fastmask.kernels.adamw_ema import adamw_ema_reference
from fastmask.kernels.add_gated_norm import add_gated_norm_fwd
from fastmask.testing import assert_accurate

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
HYPER = {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
RATES = [0.1, 0.01, 1e-4, 0.5]

MISSING = _cuda.load()
EMULATED = not MISSING and torch._C._dispatch_has_kernel_for_dispatch_key("fastmask_cuda::adamw_ema", "CPU")

pytestmark = [pytest.mark.skipif(bool(MISSING), reason=MISSING), pytest.mark.usefixtures("_on_the_device")]
if not EMULATED:
    pytestmark.append(pytest.mark.gpu)


@pytest.fixture
def _on_the_device():
    with torch.device("cpu" if EMULATED else "cuda"):
        yield


SHAPES = [(1,), (7,), (1023,), (3, 1025), (64, 160), (0,), (), (16 * 1024,), (5, 8191)]


def tensors(shapes, averages):
    """Return parameters, gradients, first and second moments, and averages."""
    made = [[torch.randn(shape) for shape in shapes] for _ in range(4 + averages)]
    made[3] = [t.square() for t in made[3]]
    return made[:4], made[4:]


def updated(function, lists, averages, dtype=F32, copies=(), **options):
    """Return what a step makes of copies in a dtype, all of it in one vector for each list."""
    lists, averages = ([[t.to(dtype, copy=True) for t in inner] for inner in nested] for nested in (lists, averages))
    steps = [torch.tensor(3.0 + i % 5) for i in range(len(lists[0]))]
    options = {"lr": torch.tensor(0.25), "rates": torch.tensor(RATES[: len(averages)]), **HYPER, **options}
    function(*lists, steps, averages=averages, copies=copies, **options)
    return [torch.cat([t.flatten() for t in inner]) for inner in (lists[0], *lists[2:], *averages)]


def assert_update_is_accurate(lists, averages, **options):
    found = updated(_cuda.adamw_ema, lists, averages, **options)
    exact = updated(adamw_ema_reference, lists, averages, torch.float64, **options)
    eager = updated(adamw_ema_reference, lists, averages, **options)
    for actual, true, by_eager in zip(found, exact, eager, strict=True):
        assert_accurate(actual, true, by_eager)
    return found


@pytest.mark.parametrize("averages", range(5))
def test_adamw_ema(averages):
    options = {"factor": torch.tensor(0.5), "found_inf": torch.tensor(0.0)}
    assert_update_is_accurate(*tensors(SHAPES, averages), **options)


@pytest.mark.parametrize("averages", [0, 2])
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_adamw_ema_with_copies(dtype, averages):
    lists, means = tensors(SHAPES, averages)
    copies = [torch.zeros(shape, dtype=dtype) for shape in SHAPES]
    found = updated(_cuda.adamw_ema, lists, means, copies=copies)
    assert torch.equal(torch.cat([t.flatten() for t in copies]), found[0].to(dtype))


def test_adamw_ema_of_more_tensors_than_a_launch_takes():
    assert_update_is_accurate(*tensors([(n % 9,) for n in range(200)], 1))


def test_adamw_ema_of_views_between_vectors():
    lists, means = tensors([(5,), (8,), (4100,)], 1)
    expected = updated(_cuda.adamw_ema, lists, means)
    buffers = [torch.cat([torch.zeros(1), *inner]) for inner in (*lists, *means)]
    views = [list(buffer[1:].split([5, 8, 4100])) for buffer in buffers]
    steps, options = [torch.tensor(3.0 + i) for i in range(3)], {"lr": torch.tensor(0.25), **HYPER}
    _cuda.adamw_ema(*views[:4], steps, averages=views[4:], rates=torch.tensor(RATES[:1]), **options)
    for buffer, flat in zip((buffers[i] for i in (0, 2, 3, 4)), expected, strict=True):
        assert buffer[0] == 0
        assert torch.equal(buffer[1:], flat)


def test_adamw_ema_that_found_inf_changes_nothing():
    lists, means = tensors(SHAPES, 1)
    before = [torch.cat([t.flatten() for t in inner]) for inner in (lists[0], *lists[2:], *means)]
    found = updated(_cuda.adamw_ema, lists, means, found_inf=torch.tensor(1.0))
    assert all(torch.equal(a, b) for a, b in zip(found, before, strict=True))


def test_adamw_ema_of_too_many_averages():
    with pytest.raises(RuntimeError, match="up to 4 averages, not 5"):
        updated(_cuda.adamw_ema, *tensors([(3,)], 5), rates=torch.tensor([*RATES, 0.1]))


def arguments(groups, rows, width, wide, low):
    """Return tokens (rows, D) of a residual and a branch, and three modulations (groups, D), chunks of one tensor."""
    modulations = torch.randn(groups, 6 * width).to(low).chunk(6, dim=1)[1:4]
    return [(torch.randn(rows, width) * 3 + 1).to(wide), torch.randn(rows, width).to(low), *modulations]


def assert_gradients_are_accurate(inputs, low, **options):
    found = checks.results(_cuda.add_gated_norm, inputs, out_dtype=low, **options)
    exact = checks.results(add_gated_norm, inputs, dtype=F64, impl="reference", **options)
    eager = checks.results(add_gated_norm, inputs, impl="reference", out_dtype=low, **options)
    for actual, true, by_eager in zip(found, exact, eager, strict=True):
        assert_accurate(actual, true.double(), by_eager)
    return found


DTYPES = pytest.mark.parametrize(("wide", "low"), [(F32, F32), (F32, BF16), (BF16, BF16)], ids=str)


@DTYPES
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("width", [8, 56, 256, 264, 768, 1024, 1152, 1280])
def test_add_gated_norm(width, norm, wide, low):
    x, branch, *modulations = arguments(2, 6, width, wide, low)
    inputs = [x.view(2, 3, width), branch.view(2, 3, width), *modulations]
    assert_gradients_are_accurate(inputs, low, norm=norm)


@DTYPES
@pytest.mark.parametrize(("groups", "tokens"), [(1, 1), (3, 35), (1, 130)])
def test_add_gated_norm_where_several_blocks_share_a_sample(groups, tokens, wide, low):
    x, branch, *modulations = arguments(groups, groups * tokens, 64, wide, low)
    assert_gradients_are_accurate([t.view(groups, tokens, 64) for t in (x, branch)] + modulations, low)


@DTYPES
def test_add_gated_norm_of_packed_samples(wide, low):
    ends = torch.tensor([0, 7, 7, 8, 150], dtype=torch.int32)
    found = assert_gradients_are_accurate(arguments(4, 150, 264, wide, low), low, cu_seqlens=ends)
    assert all(not grad[1].any() for grad in found[-3:])


def backward(inputs, grads, recompute=False):
    """Return the candidate's results of one sample, for gradients of the residual (or None) and of its norm."""
    x_new, h, stats = add_gated_norm_fwd(*inputs, None, False, 1e-6, inputs[1].dtype)
    op = torch.ops.fastmask_cuda.add_gated_norm_bwd
    return h, op(*grads, x_new, stats, *inputs[1:], None, False, recompute)


@DTYPES
def test_add_gated_norm_computes_its_result_again(wide, low):
    inputs = arguments(1, 40, 264, wide, low)
    h, results = backward(inputs, (None, torch.randn(40, 264).to(low)), recompute=True)
    torch.testing.assert_close(results[5], h)


@DTYPES
def test_add_gated_norm_repeats_bit_for_bit(wide, low):
    """And takes no gradient of the residual for a zero one."""
    inputs, grad_h = arguments(1, 70, 264, wide, low), torch.randn(70, 264).to(low)
    zero = torch.zeros(70, 264, dtype=wide)
    runs = [backward(inputs, (grad_new, grad_h))[1] for grad_new in (None, None, zero)]
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize(("groups", "tokens"), [(0, 3), (2, 0)])
def test_add_gated_norm_of_no_tokens(groups, tokens):
    inputs = [torch.randn(groups, tokens, 16) for _ in range(2)] + [torch.randn(groups, 16) for _ in range(3)]
    assert not any(t.any() for t in checks.results(_cuda.add_gated_norm, inputs))


@pytest.mark.parametrize(
    ("width", "wide", "low", "message"),
    [
        (1288, F32, F32, "a multiple of 8 up to 1280, not 1288"),
        (64, BF16, F32, "a residual that is no narrower than the branch"),
        (64, F32, torch.float16, "float32 and bfloat16"),
    ],
    ids=str,
)
def test_add_gated_norm_refuses(width, wide, low, message):
    with pytest.raises(RuntimeError, match=message):
        backward(arguments(1, 2, width, wide, low), (None, torch.randn(2, width).to(low)))
