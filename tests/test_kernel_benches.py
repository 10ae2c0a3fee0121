"""The kernel benches on interpreted kernels at the smallest preset: cases, gate, figures, and the session's report."""

import json
import os
import subprocess
import sys

import pytest
import torch
from fake_gpu import Cuda

from bench import rows
from bench.instruments import graph as _graph
from bench.instruments.cases import all_cases, case_of, cases, figures
from bench.instruments.graph import CaptureFailedError, Graphed
from bench.ops import OPS, Op, shapes_of
from fastmask.kernels.modulate_norm import modulate_norm_reference

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def everything():
    """Every case of the digits; the compiler is left out, which takes a minute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bench.instruments.cases.compiled", lambda function, _: function)
        patch.setattr("bench.ops._description.CPU_BATCH", 2)
        return list(all_cases(CPU, "digits"))


def op_of(fused, reference=modulate_norm_reference, **changed) -> Op:
    """Return modulate_norm with another function as ours."""
    generator = torch.Generator().manual_seed(0)
    inputs = {
        name: torch.randn(shape, generator=generator)
        for name, shape in (("x", (2, 3, 16)), ("shift", (2, 16)), ("scale", (2, 16)))
    }
    names = tuple(inputs)
    return Op("op", "tiny", inputs, names, ("x", "scale"), reference, fused, "", **changed)


def test_every_op_with_a_bench_is_known_and_the_other_way_round():
    described = {path.stem for path in (rows.ROOT / "bench" / "ops").glob("[!_]*.py")} - {"bench_ops"}
    assert described == set(OPS)
    kernels = {path.stem for path in (rows.ROOT / "fastmask" / "kernels").glob("[!_]*.py")}
    assert kernels - {"patches", "philox"} == set(OPS)


def test_ours_passes_the_gate_in_every_case(everything):
    for case in everything:
        assert {"reference", "ours"} <= set(case.variants), case
        if case.direction == "forward_backward" or case.op in ("sample_mask", "adamw_ema"):
            case.check()


def test_what_is_missing_has_a_reason(everything):
    assert {name for case in everything for name in case.missing} == {
        "compiled", "apex", "liger", "flash-attn", "xformers",
    }  # fmt: skip
    assert all(len(reason) > 10 for case in everything for reason in case.missing.values())


def test_without_interpreted_kernels_ours_is_missing_on_a_cpu(monkeypatch):
    monkeypatch.setattr("bench.instruments.cases.compiled", lambda function, _: function)
    monkeypatch.setattr("fastmask.kernels._dispatch._interpreting", lambda: False)
    for case in cases("masked_loss", "digits", CPU):
        assert "ours" not in case.variants
        assert "no native kernel" in case.missing["ours"]


@pytest.mark.parametrize(
    ("preset", "sizes"),
    [("digits", (8, 1, 16, 8)), ("xl2-in256", (32, 4, 256, 128)), ("xl2-in512", (64, 4, 1024, 512))],
)
def test_shapes_are_those_of_the_preset_s_latents(preset, sizes):
    shapes = shapes_of(preset, CPU)
    assert (shapes.side, shapes.channels, shapes.length, shapes.keep) == sizes


def test_least_bytes_and_operations_by_hand(everything):
    # Two images of 16 positions, 8 kept, width 96, fp32.
    tokens, modulation = 2 * 8 * 96 * 4, 2 * 96 * 4
    least = {(case.op, case.direction, case.shape): case.least_bytes for case in everything}
    shape = "B=2 K=8 D=96 layer"
    forward = 2 * tokens + 2 * modulation
    assert least["modulate_norm", "forward", shape] == forward
    parameters = 18 * 96**2 + 15 * 96  # of a block, its modulation included
    update = least["adamw_ema", "forward", f"N={parameters}, one block of D=96"]
    assert update == 36 * parameters + 12  # and the rate, the count and the average's rate
    # And grad_h, x, scale; grad_x, grad_shift, grad_scale.
    assert least["modulate_norm", "forward_backward", shape] == forward + 3 * tokens + 3 * modulation
    assert least["sample_mask", "forward", "B=2 L=16 K=8"] == 2 * (8 + 16) * 4 + 8
    gathered = least["gather_tokens", "forward", "B=2 L=16 K=8 D=96"]
    assert gathered == 2 * tokens + 2 * 8 * 4  # of x only what is kept
    flops = {(case.op, case.direction): case.flops for case in everything}
    assert flops["gelu_linear", "forward"] == 2 * 16 * 384 * 96
    assert flops["gelu_linear", "forward_backward"] == 3 * flops["gelu_linear", "forward"]
    assert flops["modulate_norm", "forward_backward"] == 0


def last_sample_unwritten(x, shift, scale):
    h = modulate_norm_reference(x, shift, scale)
    return torch.cat([h[:-1], torch.full_like(h[-1:], torch.nan)])


@pytest.mark.parametrize("variant", ["ours", "another"])
@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, shift, scale: modulate_norm_reference(x, shift, scale).roll(1, dims=1),
        lambda x, shift, scale: modulate_norm_reference(x, shift, scale) + 1e-4,
        lambda x, shift, scale: modulate_norm_reference(x, shift.detach(), scale) + 0 * shift.sum(),
        lambda x, shift, scale: modulate_norm_reference(x, shift, scale).double(),
        last_sample_unwritten,
    ],
    ids=["row", "bias", "gradient", "dtype", "unwritten"],
)
def test_the_gate_is_red_for_wrong_results(wrong, variant):
    right = modulate_norm_reference
    op = op_of(wrong) if variant == "ours" else op_of(right, others={"another": wrong})
    case = case_of(op, "forward_backward", shapes_of("digits", CPU))
    with pytest.raises(AssertionError, match=rf"op forward_backward, tiny: {variant}, (result 0|gradient of shift): "):
        case.check()


def test_the_gate_is_red_for_another_choice_of_integers():
    def chosen(x, shift, scale):
        return x.argmax(-1)

    case = case_of(op_of(lambda **inputs: chosen(**inputs) + 1, chosen), "forward", shapes_of("digits", CPU))
    with pytest.raises(AssertionError, match="ours, result 0: differs from the reference"):
        case.check()


def test_figures():
    case = case_of(op_of(modulate_norm_reference, flops=6_000_000), "forward", shapes_of("digits", CPU))
    found = figures(case, {"ours": rows.Timing(2.0, 1.0, 3.0, 5)}, bandwidth=1e6)["ours"]
    assert found["median_ms"] == 2.0
    assert found["least_bytes"] == 2 * 2 * 3 * 16 * 4 + 2 * 2 * 16 * 4
    assert found["gb_per_s"] == pytest.approx(found["least_bytes"] / 2e-3 / 1e9, abs=0.01)
    assert found["copy_percent"] == pytest.approx(100 * found["least_bytes"] / 2e-3 / 1e6, abs=0.1)
    assert found["tflop_per_s"] == 0.003
    assert found["timed"] == "calls"


def test_unfit_arguments_are_named():
    with pytest.raises(ValueError, match="preset dit-s2-in256 has no masks"):
        next(all_cases(CPU, "dit-s2-in256"))
    with pytest.raises(ValueError, match="unknown preset 'b2'"):
        next(all_cases(CPU, "b2"))
    with pytest.raises(ValueError, match="no kernel bench of 'softmax'"):
        next(cases("softmax", "digits", CPU))


def test_a_session_reports_what_it_ran_and_a_red_gate_gives_no_number(tmp_path):
    sabotage = tmp_path / "sabotage.py"
    sabotage.write_text(
        "from pathlib import Path\n"
        "from bench import rows\n"
        "from bench.instruments import cases\n"
        "rows.RESULTS = Path(__file__).parent / 'results'\n"
        "right = cases.fault\n"
        "cases.fault = lambda actual, *rest: 'sabotaged' if actual.is_floating_point() else right(actual, *rest)\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "sabotage", "--benchmark-only", "--rows", "-p", "no:cacheprovider"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": f"{tmp_path}{os.pathsep}{rows.ROOT}", "FASTMASK_NATIVE": str(tmp_path / "none.so")}
    done = subprocess.run(
        [*command, "bench/ops", "-k", "sample_mask or gather-forward", f"--benchmark-json={tmp_path / 'stored.json'}"],
        cwd=rows.ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "reference, result 0: sabotaged" in done.stdout
    report = done.stdout[done.stdout.index("kernels: median") :]
    measured, not_run = report.split("not run")
    assert "sample_mask forward" in measured
    assert "gather_tokens" not in measured
    if not torch.cuda.is_available():
        assert "ours: no native kernel" in not_run
    (file,) = (tmp_path / "results").iterdir()
    stored = list(rows.read(file))
    assert {row["case"]["op"] for row in stored} == {"sample_mask"}
    assert {"bench", "case", "variant", "median_ms", "least_bytes", "commit", "triton", "run"} <= set(stored[0])
    entries = json.loads((tmp_path / "stored.json").read_text())["benchmarks"]
    assert {entry["name"]: entry["stats"]["median"] * 1e3 for entry in entries} == {
        f"bench_op[sample_mask-equal-forward-{row['variant']}]": pytest.approx(row["median_ms"]) for row in stored
    }


@pytest.mark.gpu
def test_a_replayed_call_gives_what_it_gives_when_launched():
    x = torch.randn(64, 64, device="cuda", requires_grad=True)

    def call():
        y = (x @ x).relu()
        return y.detach(), *torch.autograd.grad(y, [x], torch.ones_like(y))

    graphed = Graphed(call)
    for actual, expected in zip(graphed(), call(), strict=True):
        torch.testing.assert_close(actual, expected)
    assert graphed.timed == "graph replay"


@pytest.mark.gpu
def test_a_call_that_waits_for_the_gpu_is_refused_or_launched():
    """In a process of its own: before torch 2.12 the failed capture would stay with the tests after this one."""
    program = """
import torch
from bench.instruments.graph import RECOVERS, CaptureFailedError, Graphed
x = torch.ones(4, device="cuda")
graphed = Graphed(lambda: (x * x.sum().item(),))
try:
    assert torch.equal(graphed()[0], x * 4)
    assert RECOVERS and torch.cuda.current_stream() == torch.cuda.default_stream()
except CaptureFailedError:
    assert not RECOVERS
    raise SystemExit  # what the process is good for ends here
assert graphed.timed.startswith("launches")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=rows.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_failed_capture_is_launched_where_torch_recovers(monkeypatch):
    cuda = Cuda(monkeypatch)
    monkeypatch.setattr(_graph, "RECOVERS", True)
    graphed = Graphed(cuda.reads())
    assert torch.equal(graphed()[0], torch.ones(1))
    assert graphed.timed == f"launches, as no graph could be captured: {cuda.WHY}"
    assert cuda.current is cuda.default
    graphed()
    assert cuda.captures == 1


def test_a_failed_capture_ends_the_process_where_torch_does_not_recover(monkeypatch):
    cuda = Cuda(monkeypatch)
    monkeypatch.setattr(_graph, "RECOVERS", False)
    graphed = Graphed(cuda.reads())
    with pytest.raises(CaptureFailedError, match=f"^no graph could be captured: {cuda.WHY}; torch .* `host`$"):
        graphed()
    # The next process knows it, and captures nothing.
    cuda = Cuda(monkeypatch)
    known = Graphed(cuda.reads(), graphed.refused)
    assert torch.equal(known()[0], torch.ones(1))
    assert known.timed == graphed.timed == f"launches, as no graph could be captured: {graphed.refused}"
    assert cuda.captures == 0


def test_too_little_memory_is_not_a_call_that_cannot_be_captured(monkeypatch):
    cuda = Cuda(monkeypatch)

    def call():
        if cuda.captures:
            raise torch.OutOfMemoryError("too large")
        return (torch.ones(1),)

    graphed = Graphed(call)
    with pytest.raises(torch.OutOfMemoryError):
        graphed()
    assert not graphed.refused
