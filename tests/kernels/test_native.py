"""What the native kernels are held to beside the tests of each op: threads, addresses and sizes."""

import pytest
import torch
from calls import CALLS
from torch.utils._python_dispatch import TorchDispatchMode

import fastmask.kernels
from fastmask.kernels import (
    Mask,
    backends,
    embed_kept_patches,
    gather_tokens,
    masked_loss,
    restore_tokens,
    sample_mask,
)
from fastmask.kernels.add_gated_norm import add_gated_norm_bwd, add_gated_norm_fwd
from fastmask.kernels.gelu_linear import gelu_bwd, gelu_fwd
from fastmask.kernels.modulate_norm import modulate_norm_bwd, modulate_norm_fwd
from fastmask.testing import assert_accurate

pytestmark = pytest.mark.skipif(
    not any(row.op == "gelu_linear" and row.kernel == "native" for row in backends()),
    reason="no native kernels here: not built, or TRITON_INTERPRET=1",
)


def everything(place, dtype=torch.float32, batch=3, tokens=35, width=88):
    """Return the results of every op, of tensors that ``place`` has put somewhere."""
    torch.manual_seed(0)
    x, branch, grad, grad_new = (place(torch.randn(batch * tokens, width).to(dtype)) for _ in range(4))
    gate, shift, scale = (place(torch.randn(batch, width).to(dtype)) for _ in range(3))
    h, stats = modulate_norm_fwd(x, shift, scale, None, False, 1e-6, dtype)
    found = [h, stats, *modulate_norm_bwd(grad, x, stats, shift, scale, None, False, True)]
    x_new, h, stats = add_gated_norm_fwd(x, branch, gate, shift, scale, None, True, 1e-6, dtype)
    found += [x_new, h, stats]
    found += add_gated_norm_bwd(grad_new, grad, x_new, stats, branch, gate, shift, scale, None, True, True)
    return [*found, gelu_fwd(x), *gelu_bwd(grad, x)]


def everything_masked(place, batch=3, side=6, channels=4, width=24):
    """Return the results of the ops that know masks: of 3 x 3 patches some samples keep more than others."""
    torch.manual_seed(0)
    length, values = (side // 2) ** 2, 4 * channels
    keep = torch.arange(batch) % 4 + 2
    mask = sample_mask(batch, length, keep, total=int(keep.sum()), seed=3, device="cpu", impl="fused")
    mask = Mask(*(place(t) for t in mask))
    images, noised = (place(torch.randn(batch, channels, side, side)) for _ in range(2))
    weight, bias = place(torch.randn(width, channels, 2, 2)), place(torch.randn(width))
    position, token = place(torch.randn(length, width)), place(torch.randn(width))
    raw, *factors = place(torch.randn(batch, length, values)), *(place(torch.rand(batch) + 0.5) for _ in range(3))
    leaves = [t.requires_grad_() for t in (weight, bias, token, raw)]
    tokens = embed_kept_patches(
        images, weight, bias, position, mask.ids_keep, cu_seqlens=mask.cu_seqlens, patch_size=2, impl="fused"
    )
    restored = restore_tokens(tokens, token, position, mask.ids_restore, cu_seqlens=mask.cu_seqlens, impl="fused")
    gathered = gather_tokens(restored, mask.ids_keep, cu_seqlens=mask.cu_seqlens, impl="fused")
    losses = masked_loss(raw, images, noised, *factors, mask, patch_size=2, impl="fused")
    total = gathered.square().sum() + restored.sin().sum() + losses[0].sum() + losses[1].sum()
    return [*mask, tokens, restored, gathered, *losses, *torch.autograd.grad(total, leaves)]


def assert_same(a, b):
    assert len(a) == len(b)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 3, 70])
def test_the_number_of_threads_changes_no_bit(dtype, batch):
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append([*everything(lambda t: t, dtype, batch), *everything_masked(lambda t: t, batch)])
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


def unaligned(t):
    """Return a copy of a tensor that begins one value behind a vector's address."""
    moved = torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape)
    assert moved.data_ptr() % 16
    assert moved.is_contiguous()
    return moved.copy_(t)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_addresses_need_no_alignment(dtype):
    assert_same(everything(unaligned, dtype), everything(lambda t: t, dtype))
    assert_same(everything_masked(unaligned), everything_masked(lambda t: t))


@pytest.mark.parametrize("tokens", [0, 1, 16, 17])
def test_few_rows(tokens):
    results = everything(lambda t: t, tokens=tokens)
    assert all(t.isfinite().all() for t in results)


def gelu_and_gradient(x, grad):
    x = x.clone().requires_grad_()
    y = torch.nn.functional.gelu(x, approximate="tanh")
    return y.detach(), *torch.autograd.grad(y, x, grad.to(x.dtype))


@pytest.mark.parametrize("size", [0, 1, 7, 1023, 1024, 1025, 9000])
def test_sizes_that_no_vector_divides(size):
    x, grad = torch.randn(2, size) * 2
    exact, eager = (gelu_and_gradient(t, grad) for t in (x.double(), x))
    grad_x, again = gelu_bwd(grad, x)
    assert_accurate(gelu_fwd(x), exact[0], eager[0])
    assert_accurate(grad_x, exact[1], eager[1])
    assert torch.equal(again, gelu_fwd(x))


def test_the_slope_of_gelu_keeps_its_digits():
    """Eight roundings of 1 at any place; 1 - gate would lose 33 where the gate is almost 1."""
    x = torch.linspace(-8, 8, 16001)
    slope, _ = gelu_bwd(torch.ones_like(x), x)
    _, exact = gelu_and_gradient(x.double(), torch.ones_like(x))
    assert (slope.double() - exact).abs().max() < 8 * 2.0**-24


def test_nan_and_infinity_pass_through():
    x = torch.tensor([torch.nan, torch.inf, -torch.inf] + [1.0] * 13)
    y = gelu_fwd(x)
    assert y[0].isnan()
    assert y[1] == torch.inf
    assert y[2].abs() < 1e-30
    assert gelu_bwd(torch.ones(16), x)[0][0].isnan()
    h, _ = modulate_norm_fwd(x[None], torch.zeros(1, 16), torch.zeros(1, 16), None, False, 1e-6, torch.float32)
    assert h.isnan().all()


NATIVE = [row.op for row in backends() if row.kernel == "native"]


class Called(TorchDispatchMode):
    """Records whether an op of this library was called."""

    def __init__(self):
        super().__init__()
        self.fused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.fused |= func.namespace == "fastmask"
        return func(*args, **(kwargs or {}))


def wide(given):
    return {
        name: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for name, t in given.items()
    }


def with_gradient(*names):
    return lambda given: {name: t.requires_grad_() if name in names else t for name, t in given.items()}


def odd_width(given):
    return {name: t[..., :5] if name in ("x", "branch", "gate", "shift", "scale") else t for name, t in given.items()}


REFERENCE = [
    *((op, wide) for op in NATIVE if op not in ("adamw_ema", "sample_mask")),
    *((op, odd_width) for op in ("add_gated_norm", "gather_tokens", "modulate_norm")),
    ("silu_linear", lambda given: given | {"x": given["x"].repeat(6, 1)}),  # 18 rows
    ("silu_linear", lambda given: {name: t.bfloat16() for name, t in given.items()}),
    ("masked_loss", lambda given: given | {"c_out": given["c_out"].bfloat16()}),
    ("adamw_ema", lambda given: given | {name: [t.double() for t in given[name]] for name in ("params", "grads")}),
    ("sample_mask", lambda given: given | {"length": 16385}),
    *(("embed_kept_patches", with_gradient(name)) for name in ("position", "image_scale")),
    *(("masked_loss", with_gradient(name)) for name in ("images", "noised", "c_skip", "c_out", "weight")),
    ("restore_tokens", with_gradient("position")),
]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("op", NATIVE)
def test_a_native_kernel_is_the_default_where_it_takes_the_call(op, packed):
    with Called() as called:
        getattr(fastmask.kernels, op)(**CALLS[op](packed))
    assert called.fused


@pytest.mark.parametrize(("op", "change"), REFERENCE)
def test_elsewhere_the_reference_is(op, change):
    given = change(CALLS[op](False))
    with Called() as called:
        getattr(fastmask.kernels, op)(**given)
    assert not called.fused
    if any(isinstance(t, torch.Tensor) and t.requires_grad for t in given.values()):
        with torch.no_grad(), Called() as called:
            getattr(fastmask.kernels, op)(**given)
        assert called.fused
