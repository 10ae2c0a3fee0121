"""The parts of the campaign: what each refuses to time, and what it stores."""

import contextlib
import functools
import itertools
import re
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import rows
from bench.campaign import digits, gate, steps, table, tune
from bench.campaign.state import Campaign
from bench.instruments.cases import case_of
from bench.ops import attention, describe, shapes_of
from fastmask.kernels import backends, modulate_norm
from fastmask.kernels._attention_backends import refusal

CPU = torch.device("cpu")


@pytest.fixture
def campaign(tmp_path):
    return Campaign(CPU, tmp_path / "rows.jsonl")


@pytest.fixture
def norm_op():
    shapes = shapes_of("digits", CPU)._replace(batch=2, keep=3, width=16)
    return describe("modulate_norm").forms["layer"](shapes)


def test_the_gate_passes_what_is_right_and_catches_what_is_not(norm_op):
    right = functools.partial(modulate_norm, impl="fused")
    assert gate.judge(norm_op, right) <= 1

    def biased(x, shift, scale, **options):
        return right(x, shift * 1.0001, scale, **options)

    def wrong_gradient(x, shift, scale, **options):
        return right(x, shift, scale, **options) + 1e-3 * (scale - scale.detach())[:, None]

    def unwritten(x, shift, scale, **options):
        out = right(x, shift, scale, **options)
        return torch.cat([out[:, :-1], torch.empty_like(out[:, -1:]) + 0 * out[:, -1:]], dim=1)

    for wrong in (biased, wrong_gradient, unwritten):
        assert gate.judge(norm_op, wrong) > 1, wrong.__name__


def test_the_gate_judges_what_changes_its_inputs():
    """Each call gets inputs of its own: the reference's must not be those that the kernel has changed."""
    op = describe("adamw_ema").forms["block"](shapes_of("digits", CPU)._replace(width=16))
    before = {name: t.clone() for name, t in op.inputs.items()}
    assert gate.judge(op, op.fused) <= 1
    assert all(torch.equal(t, before[name]) for name, t in op.inputs.items())

    changed = ("params", "exp_avgs", "exp_avg_sqs", "averages0")

    def still(**inputs):
        return [t for name in changed for key, t in inputs.items() if key.startswith(f"{name}.")]

    def filled(**inputs):
        return [t.fill_(1e6) for t in still(**inputs)]

    for wrong in (filled, still):
        assert gate.judge(op, wrong) > 1e3, wrong.__name__


def refused_as_on_a_gpu(name, q, packed):
    with FakeTensorMode():
        return refusal(name, torch.empty(q.shape, dtype=q.dtype, device="cuda"), packed)


def test_a_form_that_the_op_refuses_is_left_out(campaign, monkeypatch, capsys):
    """Attention of packed fp32 tokens has no kernel on a GPU, by design."""
    monkeypatch.setattr(gate, "OPS", ("attention",))
    monkeypatch.setattr(attention, "refusal", refused_as_on_a_gpu)
    case, shapes = next(gate.sets(campaign))
    assert shapes.dtype == torch.float32
    gate.check_ops(campaign, case, shapes)
    (row,) = campaign.rows
    assert set(row["errors_over_allowed"]) == {"attention dense"}
    assert "attention packed is not checked: torch takes float16, bfloat16 for packed" in capsys.readouterr().out
    packed = case_of(attention.packed(shapes), "forward", shapes)
    assert "ours" not in packed.variants
    assert packed.missing["ours"].startswith("torch takes float16, bfloat16 for packed tokens")
    half = attention.packed(shapes._replace(dtype=torch.bfloat16))
    assert callable(half.fused)


def test_a_red_check_is_a_failure_and_is_not_tuned(campaign, monkeypatch, capsys):
    case, shapes = next(gate.sets(campaign))
    monkeypatch.setattr(gate, "OPS", ("modulate_norm", "masked_loss"))
    monkeypatch.setattr(gate, "judge", lambda op, function: 3.0 if op.name == "modulate_norm" else 0.5)
    gate.check_ops(campaign, case, shapes)
    assert not campaign.find("check")
    assert {row["case"]["op"] for row in campaign.find("failure")} == {"modulate_norm"}
    # A process that takes over checks the rest, and does not take the set for right.
    monkeypatch.setattr(gate, "judge", lambda op, function: checked.append(op.name) or 0.5)
    checked = []
    gate.check_ops(campaign, *next(gate.sets(campaign)))
    assert checked == ["masked_loss"]
    assert not campaign.find("check")
    monkeypatch.setattr(tune, "triton_runs", lambda device: True)
    monkeypatch.setattr(tune, "tune", lambda *_: pytest.fail("timed what is wrong"))
    tune.run(campaign)
    assert "not tuned, as modulate_norm failed the check" in capsys.readouterr().out


def test_checks_that_are_passed_are_one_row_and_done(campaign, monkeypatch):
    case, shapes = next(gate.sets(campaign))
    monkeypatch.setattr(gate, "OPS", ("gelu_linear", "sample_mask"))
    gate.check_ops(campaign, case, shapes)
    (row,) = campaign.rows
    assert set(row["errors_over_allowed"]) == {"gelu_linear mlp", "sample_mask equal"}
    assert not list(gate.sets(campaign))
    assert "| 2 | " in table.render(campaign.rows)


def test_no_step_is_timed_of_a_wrong_network(campaign, monkeypatch, capsys):
    monkeypatch.setattr(gate, "network_error", lambda device: 2.0)
    monkeypatch.setattr(steps, "measure", lambda *_: pytest.fail("timed what is wrong"))
    steps.run(campaign)
    assert "no step is timed" in capsys.readouterr().out
    assert [row["bench"] for row in campaign.rows] == ["failure"]


def test_the_network_check_sees_a_wrong_loss(monkeypatch):
    monkeypatch.setattr(gate, "fused_runs", lambda device: False)
    assert gate.network_error(CPU) <= 1
    plain, precisions = gate.PlainLoss, []

    def wrong(model):
        precisions.append(torch.backends.cudnn.allow_tf32)
        return plain(model, mae_coef=0.101)

    monkeypatch.setattr(gate, "PlainLoss", wrong)
    assert gate.network_error(CPU) > 1
    assert precisions == [False]  # the convolution of the plain network would take TF32 on a GPU


def test_pytest_in_a_process_of_its_own(campaign, tmp_path, monkeypatch, capsys):
    path, broken = tmp_path / "test_it.py", tmp_path / "test_broken.py"
    marked = "@pytest.mark.gpu\ndef test_{}(): {}\n"
    tests = [marked.format("a", "pass"), marked.format("b", "assert 0"), "def test_c(): pass\n"]
    path.write_text("import pytest\n" + "".join(tests))
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: x\n")
    assert gate.pytest_counts(gate.pytest_output([str(path)])) == {"failed": 1, "passed": 1, "deselected": 1}
    assert "tests/kernels/test_sample_mask.py" in " ".join(gate.gpu_tests())
    # A file that does not import is an error, and takes no test of another with it.
    broken.write_text("import no_such_module\n")
    monkeypatch.setattr(gate, "gpu_tests", lambda: [str(broken), str(path)])
    gate.run_tests(campaign)
    (row,) = campaign.rows
    assert row["bench"] == "failure"
    assert "{'failed': 1, 'passed': 1, 'deselected': 1, 'errors': 1}" in row["error"]
    said = capsys.readouterr().out
    assert re.search(r"^  FAILED .*test_it.py::test_b", said, re.MULTILINE)
    assert re.search(r"^  ERROR .*test_broken.py", said, re.MULTILINE)


def test_the_best_settings_share_their_warps():
    present = tune.row_settings(1152)
    times = {
        (4, 8): {("a", "forward"): 5.0, ("a", "backward"): 1.0},
        (4, 16): {("a", "forward"): 2.0, ("a", "backward"): 4.0},
        (8, 8): {("a", "forward"): 1.0, ("a", "backward"): 4.0},
        (8, 16): {("a", "forward"): 9.0, ("a", "backward"): 3.0},
    }
    best = tune.winner(present, times)
    assert (best.num_warps, best.rows_forward, best.rows_backward, best.block) == (4, 16, 8, present.block)


def test_tuning_times_the_launchers_under_each_setting(campaign, monkeypatch):
    seen, inside = [], tune.settings_for_all

    @contextlib.contextmanager
    def noted(settings):
        with inside(settings):
            seen.append(launcher().row_settings(16))
            yield

    monkeypatch.setattr(tune, "settings_for_all", noted)
    monkeypatch.setattr(rows, "measure", measure_once)
    tune.tune(campaign, 16)
    kept = {(row["variant"], row["case"]["op"], row["case"]["direction"]) for row in campaign.rows}
    assert len(kept) == len(campaign.rows) == 8
    present = tune.row_settings(16)
    assert {(s.num_warps, s.rows_forward) for s in seen} >= {(1, 8), (1, 16), (2, 8), (2, 16)}
    assert launcher().row_settings(16) == present  # as it was


def test_native_kernels_are_not_tuned(campaign, monkeypatch, capsys):
    """They run on a CPU without an interpreter, and have no such settings."""
    native = [row._replace(kernel="native") for row in backends() if row.device == "cpu"]
    monkeypatch.setattr("fastmask.kernels.backends", lambda: native)
    assert gate.fused_runs(CPU)
    monkeypatch.setattr(tune, "tune", lambda *_: pytest.fail("tuned what does not run"))
    assert tune.todo(campaign) == []
    tune.run(campaign)
    assert "nothing to tune: no Triton kernel runs here" in capsys.readouterr().out


def launcher():
    return sys.modules["fastmask.kernels._triton.modulate_norm"]


def measure_once(variants, device, **options):
    for call in variants.values():
        call()
    return {name: rows.Timing(1.0 + i, 1.0, 2.0, 1) for i, name in enumerate(variants)}


# The digits


def test_the_scans_are_those_of_scikit_learn():
    published = pytest.importorskip("sklearn.datasets").load_digits()
    scans, labels = digits.load_scans()
    assert torch.equal((scans[:, 0] + 1) * 8, torch.from_numpy(published.images).float())
    assert torch.equal(labels, torch.from_numpy(published.target).long())
    assert digits.SCANS.stat().st_size < 120_000


def test_the_recorded_curve_is_of_this_configuration_and_falls():
    expected = digits.expected_means(digits.full_config())
    assert len(expected) == digits.full_config().max_steps / digits.WINDOW
    assert expected[0] > 1.3
    assert expected[-1] < 0.75
    # What learns nothing is outside the band, and so is what is half a window behind.
    assert digits.worst_deviation([expected[0]] * len(expected), expected) > digits.BAND
    behind = [expected[0], *((a + b) / 2 for a, b in itertools.pairwise(expected))]
    assert digits.worst_deviation(behind, expected) > digits.BAND


def test_a_curve_that_cannot_be_compared():
    assert digits.worst_deviation([1.0, float("nan")], [1.0, 1.0]) == float("inf")
    assert digits.worst_deviation([1.0], [1.0, 1.0]) == float("inf")
    assert digits.worst_deviation([1.0, 1.1], [1.0, 1.0]) == pytest.approx(0.1)


def test_a_record_of_another_configuration(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="is of another configuration: make it again with"):
        digits.expected_means(digits.tiny_config())
    monkeypatch.setattr(digits, "RECORD", tmp_path / "none.json")
    with pytest.raises(ValueError, match=r"none\.json is missing"):
        digits.expected_means(digits.full_config())


def test_training_outside_the_band_is_a_failure(campaign, monkeypatch):
    curves = iter([[1.0] * 6, [1.0] * 4 + [1.2] * 2])
    monkeypatch.setattr(digits, "train", lambda *_, **__: next(curves))
    digits.run(campaign)
    (row,) = campaign.rows
    assert row["bench"] == "failure"
    assert "20.0% off the CPU's, 3% are allowed" in row["error"]


def test_both_stages_are_trained():
    losses = digits.train(digits.tiny_config(), CPU, bf16=False)
    assert len(losses) == 6
    assert digits.means(losses, 2) == [round((a + b) / 2, 6) for a, b in zip(losses[::2], losses[1::2], strict=True)]
    ratios = [digits.full_config().masking.ratio_at(step, 400) for step in (0, 299, 300, 399)]
    assert ratios == [0.5, 0.5, 0.0, 0.0]
