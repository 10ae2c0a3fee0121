"""adamw_ema against torch's AdamW in float64, what it leaves alone, and what it refuses."""

import importlib
import os
import re

import pytest
import torch
from torch.library import opcheck

from fastmask.kernels import adamw_ema
from fastmask.kernels.adamw_ema import _adamw_ema
from fastmask.testing import assert_accurate

SHAPES = [(1,), (7,), (1023,), (3, 1025), (64, 160), (0,), ()]
RATES = [0.1, 0.01]
HYPER = {"betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.1}  # 1 - beta2 in fp32 would be off by 1e-5
IMPLS = pytest.mark.parametrize("impl", ["fused", "reference"])


def tensors(shapes=SHAPES, dtype=torch.float32, averages=2):
    """Return parameters, gradients, moments, steps and averages, with no value at rest."""
    made = [[torch.randn(shape, dtype=dtype) for shape in shapes] for _ in range(3 + averages)]
    squares = [torch.rand(shape, dtype=dtype) for shape in shapes]
    steps = [torch.tensor(3.0 + i) for i in range(len(shapes))]
    return [*made[:3], squares, steps], made[3:]


def cloned(nested):
    return [[t.clone() for t in inner] for inner in nested]


def scalar(value):
    return torch.tensor(value)


def concatenated(lists):
    return [torch.cat([t.flatten() for t in inner]) for inner in lists]


FEW = [(1,), (7,), (), (64,), (1023,)]  # a hundred interpreted steps take their time


def trained(dtype, impl, num_steps=100):
    """Return parameters, moments and averages after steps of a noisy quadratic."""
    generator = torch.Generator().manual_seed(1)
    p, m, v = ([torch.zeros(shape, dtype=dtype) for shape in FEW] for _ in range(3))
    averages = [[torch.zeros_like(t) for t in p] for _ in RATES]
    for step in range(1, num_steps + 1):
        noise = [torch.randn(shape, generator=generator) for shape in FEW]
        grads = [t - 1 + n.to(dtype) for t, n in zip(p, noise, strict=True)]
        steps = [scalar(float(step))] * len(p)
        options = {**HYPER, "averages": averages, "rates": RATES, "impl": impl}
        adamw_ema(p, grads, m, v, steps, lr=scalar(0.01), **options)
    return concatenated([p, m, v, *averages])


@pytest.fixture(scope="module")
def by_torch():
    """The same by torch's AdamW, in float64 and in float32."""

    def run(dtype):
        generator = torch.Generator().manual_seed(1)
        p = [torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in FEW]
        averages = [[torch.zeros_like(t) for t in p] for _ in RATES]
        # As fp32 holds it, which is how the op gets it.
        optimizer = torch.optim.AdamW(p, lr=float(scalar(0.01)), **HYPER)
        for _ in range(100):
            for t in p:
                t.grad = t.detach() - 1 + torch.randn(t.shape, generator=generator).to(dtype)
            optimizer.step()
            for average, rate in zip(averages, RATES, strict=True):
                for a, t in zip(average, p, strict=True):
                    a.lerp_(t.detach(), rate)
        moments = ([optimizer.state[t][name] for t in p] for name in ("exp_avg", "exp_avg_sq"))
        return concatenated([[t.detach() for t in p], *moments, *averages])

    return run(torch.float64), run(torch.float32)


@IMPLS
def test_a_hundred_steps_are_those_of_torch(impl, by_torch):
    for actual, exact, eager in zip(trained(torch.float32, impl), *by_torch, strict=True):
        assert_accurate(actual, exact, eager)


def test_the_reference_in_float64_is_torch(by_torch):
    for actual, exact in zip(trained(torch.float64, "reference"), by_torch[0], strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("averages", [0, 1, 2])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
def test_one_step_with_all_options(averages, dtype):
    """Steps that differ between tensors, a factor, 16-bit copies, and any number of averages."""
    state, others = tensors(averages=averages)

    def run(to, impl):
        lists, means = [[[t.to(to) for t in inner] for inner in cloned(nested)] for nested in (state, others)]
        copies = [torch.zeros(t.shape, dtype=dtype) for t in lists[0]] if dtype else []
        steps = [t.float() for t in lists.pop()]
        options = {**HYPER, "averages": means, "rates": RATES[:averages], "copies": copies, "impl": impl}
        adamw_ema(*lists, steps, lr=scalar(0.25), factor=scalar(0.5), found_inf=scalar(0.0), **options)
        return concatenated([lists[0], *lists[2:], *means]), copies, lists[0]

    fused, copies, params = run(torch.float32, "fused")
    for actual, exact, eager in zip(
        fused, run(torch.float64, "reference")[0], run(torch.float32, "reference")[0], strict=True
    ):
        assert_accurate(actual, exact, eager)
    for copy, p in zip(copies, params, strict=False):
        assert torch.equal(copy, p.to(dtype))


@IMPLS
def test_a_step_that_found_inf_changes_nothing(impl):
    state, averages = tensors()
    state[1][3][0, 0] = torch.inf
    copies = [torch.full(shape, 7.0, dtype=torch.bfloat16) for shape in SHAPES]
    before = cloned([*state, *averages, copies])
    options = {**HYPER, "averages": averages, "rates": RATES, "copies": copies, "impl": impl}
    adamw_ema(*state, lr=scalar(0.25), found_inf=scalar(1.0), **options)
    for inner, same in zip([*state, *averages, copies], before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(inner, same, strict=True))


@IMPLS
def test_rates_on_the_device(impl):
    """Give what numbers do, and are read anew at each call."""
    state, averages = tensors()
    expected, means = cloned(state), cloned(averages)
    on_device = torch.zeros(4)[::2]
    for rates in (RATES, [0.5, 1e-4]):
        on_device.copy_(torch.tensor(rates))
        adamw_ema(*state, lr=scalar(0.25), averages=averages, rates=on_device, impl=impl)
        adamw_ema(*expected, lr=scalar(0.25), averages=means, rates=rates, impl=impl)
    for inner, same in zip([*state, *averages], [*expected, *means], strict=True):
        for a, b in zip(inner, same, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@IMPLS
def test_a_slow_average_keeps_its_digits(impl):
    """1 - 0.9999 in fp32 would be off by 5e-4."""
    state, _ = tensors([(64, 16)], averages=0)
    average = torch.zeros(64, 16)
    adamw_ema(*state, lr=scalar(0.25), averages=[[average]], rates=torch.tensor([1 - 0.9999]), impl=impl)
    torch.testing.assert_close(average.double(), (1 - 0.9999) * state[0][0].double(), rtol=1e-6, atol=0)


def test_views_that_start_between_vectors():
    """Of a flat buffer, whose parts lie at any multiple of four bytes."""
    state, averages = tensors([(5,), (8,), (1024,)])
    lists = [*state[:4], *averages]
    buffers = [torch.cat([torch.zeros(1), *inner]) for inner in lists]
    views = [list(buffer[1:].split([5, 8, 1024])) for buffer in buffers]
    for moved, means in ((lists[:4], lists[4:]), (views[:4], views[4:])):
        adamw_ema(*moved, state[4], lr=scalar(0.25), **HYPER, averages=means, rates=RATES, impl="fused")
    for buffer, inner in zip(buffers, lists, strict=True):
        assert buffer[0] == 0
        torch.testing.assert_close(buffer[1:], torch.cat(inner))


def test_many_tensors():
    state, _ = tensors([(n % 9 + 1,) for n in range(70)], averages=0)
    expected = cloned(state)
    adamw_ema(*state, lr=scalar(0.25), impl="fused")
    adamw_ema(*expected, lr=scalar(0.25), impl="reference")
    torch.testing.assert_close(concatenated(state), concatenated(expected))


def test_repeats_bit_for_bit():
    first, second = (trained(torch.float32, "fused", num_steps=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@IMPLS
def test_autograd_sees_the_change(impl):
    """A graph that keeps an updated parameter must refuse to go backward through it."""
    state, _ = tensors([(4,)], averages=0)
    parameter = state[0][0].requires_grad_()
    loss = parameter.square().sum()
    adamw_ema(*state, lr=scalar(0.25), impl=impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(dynamic):
    torch._dynamo.reset()
    state, averages = tensors([(5,), (3, 8)])
    expected, means = cloned(state), cloned(averages)

    def step(lists, averages, lr):
        adamw_ema(*lists, lr=lr, averages=averages, rates=RATES, impl="fused")

    torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")(state, averages, scalar(0.25))
    step(expected, means, scalar(0.25))
    for actual, same in zip([*state, *averages], [*expected, *means], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(actual, same, strict=True))


@pytest.mark.parametrize("options", [False, True])
def test_opcheck(options):
    state, averages = tensors([(5,), (3, 8)])
    flat = [t for average in averages for t in average] if options else []
    copies = [torch.empty(t.shape, dtype=torch.bfloat16) for t in state[0]] if options else []
    given = (scalar(0.5), scalar(0.0)) if options else (None, None)
    arguments = (*state[:4], flat, copies, state[4], scalar(0.25), torch.tensor(RATES if options else []))
    opcheck(_adamw_ema, (*arguments, *given, 0.9, 0.99, 1e-8, 0.1))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="of the Triton kernel, interpreted")
def test_a_capture_takes_the_table_of_an_earlier_call(monkeypatch):
    """It must hold no copy from pinned memory, which is given to others once the capture has ended."""
    kernels = importlib.import_module("fastmask.kernels._triton.adamw_ema")
    state, averages = tensors()
    options = {"lr": scalar(0.25), "averages": averages, "rates": torch.tensor(RATES), "impl": "fused"}
    expected, means = cloned(state), cloned(averages)
    with monkeypatch.context() as capture:
        capture.setattr(kernels, "_captures", lambda device: True)
        with pytest.raises(RuntimeError, match="must be called once with the same tensors before a CUDA graph"):
            adamw_ema(*state, **options)
    adamw_ema(*state, **options)
    with monkeypatch.context() as capture:
        capture.setattr(kernels, "_captures", lambda device: True)
        capture.setattr(kernels, "_on_device", lambda *_: pytest.fail("a table was copied during a capture"))
        adamw_ema(*state, **options)
    held = [group.table.data_ptr() for groups in kernels._captured.values() for group in groups]
    others = [tensors([(n + 1, 3)]) for n in range(2 * kernels._KEPT)]
    for other, theirs in others:
        adamw_ema(*other, **{**options, "averages": theirs})
    assert len(kernels._recent) == kernels._KEPT
    assert held == [group.table.data_ptr() for groups in kernels._captured.values() for group in groups]
    for _ in range(2):
        adamw_ema(*expected, **{**options, "averages": means, "impl": "reference"})
    for inner, same in zip([*state, *averages], [*expected, *means], strict=True):
        torch.testing.assert_close(concatenated([inner])[0], concatenated([same])[0])


def test_nothing_to_update():
    adamw_ema([], [], [], [], [], lr=scalar(0.25), impl="fused")


@pytest.mark.parametrize("name", ["params", "grads", "exp_avgs", "exp_avg_sqs", "averages[0]", "copies"])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda t: t.t().contiguous().t(), "of shape (4, 3) must be contiguous"),
        (lambda t: t[:3], "must have shape (4, 3), not (3, 3)"),
    ],
    ids=["strided", "short"],
)
@IMPLS
def test_tensors_that_do_not_fit(name, changed, message, impl):
    state, averages = tensors([(2,), (4, 3)], averages=1)
    lists = dict(zip(("params", "grads", "exp_avgs", "exp_avg_sqs", "steps"), state, strict=True))
    lists |= {"averages[0]": averages[0], "copies": [t.bfloat16() for t in state[0]]}
    before = cloned(lists.values())
    lists[name][1] = changed(lists[name][1])
    if name == "params" and "shape (4, 3), not" in message:
        name, message = "grads", "must have shape (3, 3), not (4, 3)"
    options = {"averages": [lists.pop("averages[0]")], "rates": [0.1], "lr": scalar(0.25), "impl": impl}
    with pytest.raises(ValueError, match=f"^{re.escape(f'{name}[1] {message}')}$"):
        adamw_ema(**lists, **options)
    assert all(torch.equal(a, b) for a, b in zip(lists["exp_avgs"][:1], before[2][:1], strict=True))


@IMPLS
def test_counts_that_do_not_fit(impl):
    state, averages = tensors([(2,), (3,)])
    lr = scalar(0.25)
    with pytest.raises(ValueError, match="grads must have one tensor per parameter, 2, not 1"):
        adamw_ema(state[0], state[1][:1], *state[2:], lr=lr, impl=impl)
    with pytest.raises(ValueError, match="steps must have one tensor per parameter, 2, not 1"):
        adamw_ema(*state[:4], state[4][:1], lr=lr, impl=impl)
    with pytest.raises(ValueError, match="rates must have one value per average, 2, not 1"):
        adamw_ema(*state, lr=lr, averages=averages, rates=[0.1], impl=impl)
    with pytest.raises(ValueError, match=r"rates must have one dimension, not shape \(\)"):
        adamw_ema(*state, lr=lr, averages=averages, rates=scalar(0.1), impl=impl)
    with pytest.raises(ValueError, match="lr must hold one value, not 2"):
        adamw_ema(*state, lr=torch.zeros(2), impl=impl)


def test_what_has_no_kernel():
    state, _ = tensors([(2,)], averages=0)
    with pytest.raises(ValueError, match=r'take float32, not torch.float64: impl="reference" takes any'):
        adamw_ema([t.double() for t in state[0]], *state[1:], lr=scalar(0.25), impl="fused")
    with pytest.raises(ValueError, match=r"copies must all be bfloat16, or all float16, not torch.float32"):
        adamw_ema(*state, lr=scalar(0.25), copies=[torch.zeros(2)], impl="fused")
    with pytest.raises(ValueError, match="everything must be on cpu, like lr, not on meta"):
        adamw_ema(*[[t.to("meta") for t in inner] for inner in state], lr=scalar(0.25), impl="fused")
