"""SwiGLU beside its formula in float64, and what it keeps for backward."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from fastmask.models.swiglu import swiglu_linear, swiglu_width
from fastmask.testing import assert_accurate, assert_near

HIDDEN, WIDTH = 24, 16


def made(dtype=torch.float32, shape=(3, 5)):
    tensors = torch.randn(*shape, 2 * HIDDEN), torch.randn(WIDTH, HIDDEN) * HIDDEN**-0.5, torch.randn(WIDTH)
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def plain(x, weight, bias):
    gate, value = x.split(HIDDEN, dim=-1)
    return (gate / (1 + torch.exp(-gate)) * value) @ weight.T + bias


def run(function, tensors, probe):
    y = function(*tensors)
    return [y.detach(), *torch.autograd.grad(y, tensors, probe.to(y.dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 40), (64,)])
def test_results_and_gradients(dtype, shape):
    tensors, probe = made(dtype, shape), torch.randn(*shape, WIDTH).to(dtype)
    exact = run(plain, [t.detach().double().requires_grad_() for t in tensors], probe.double())
    got, naive = run(swiglu_linear, tensors, probe), run(plain, tensors, probe)
    for name, ours, theirs, expected in zip(("y", "x", "weight", "bias"), got, naive, exact, strict=True):
        assert ours.dtype == dtype
        assert_accurate(ours, expected, theirs, name=name)


def test_gradients_by_differences():
    assert torch.autograd.gradcheck(swiglu_linear, made(torch.float64))


def test_autocast():
    tensors = made(shape=(4, 32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = swiglu_linear(*tensors)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors)
    exact = plain(*(t.detach().double() for t in tensors))
    assert_near(y, exact, 6, dtype=torch.bfloat16)


def test_only_the_input_is_kept():
    tensors, kept = made(), {}
    with saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage()._cdata, t), lambda t: t):
        swiglu_linear(*tensors)
    assert {*kept} == {t.untyped_storage()._cdata for t in tensors[:2]}


def test_the_saved_input_is_left_as_it_is():
    tensors = made()
    before = [t.detach().clone() for t in tensors]
    first = run(swiglu_linear, tensors, probe := torch.randn(3, 5, WIDTH))
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(run(swiglu_linear, tensors, probe), first, strict=True))


def test_one_graph():
    torch._dynamo.reset()
    counter, tensors, probe = CompileCounterWithBackend("aot_eager"), made(), torch.randn(3, 5, WIDTH)
    compiled = run(torch.compile(swiglu_linear, backend=counter, fullgraph=True), tensors, probe)
    assert counter.frame_count == 1
    for ours, eager in zip(compiled, run(swiglu_linear, tensors, probe), strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize(
    ("width", "hidden"), [(1152, 3072), (768, 2048), (384, 1024), (1024, 2736), (96, 256), (4, 16)]
)
def test_its_width_gives_the_weights_of_four_widths(width, hidden):
    assert swiglu_width(width) == hidden
    assert hidden % 8 == 0
    assert 0 <= 3 * hidden - 8 * width < 3 * 8


@pytest.mark.parametrize("asked", [(x, w, b) for x in (0, 1) for w in (0, 1) for b in (0, 1) if x or w or b])
def test_only_gradients_that_are_asked_for(asked):
    tensors, probe = made(), torch.randn(3, 5, WIDTH)
    _, *every = run(swiglu_linear, tensors, probe)
    chosen = [t.detach().requires_grad_(bool(on)) for t, on in zip(tensors, asked, strict=True)]
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = swiglu_linear(*chosen)
    assert len(kept) == (asked[0] or asked[1]) + asked[0]  # x, and the weight for its gradient
    y.backward(probe, retain_graph=True)
    for tensor, on, expected in zip(chosen, asked, every, strict=True):
        assert torch.equal(tensor.grad, expected) if on else tensor.grad is None
    with FlopCounterMode(display=False) as counted:
        y.backward(probe)
    assert counted.get_total_flops() == 2 * 15 * HIDDEN * WIDTH * (asked[0] + asked[1])


def test_a_module_that_is_more_than_a_linear_is_called():
    x, weight, bias = made()
    linear = torch.nn.Linear(HIDDEN, WIDTH)
    linear.weight.data, linear.bias.data = weight.data, bias.data
    assert torch.equal(swiglu_linear(x, linear), swiglu_linear(x, weight, bias))
    linear.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert_near(swiglu_linear(x, linear), 2 * swiglu_linear(x, weight, bias), 2)
