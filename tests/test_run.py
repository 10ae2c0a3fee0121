"""A run that goes wrong on the way, and what it says of itself."""

import json

import pytest
import torch
from test_train import run, stats, weights

from fastmask.checkpoint import checkpoints
from fastmask.config import TrainConfig
from fastmask.diffusion import training_draws
from fastmask.run import gpu_of, memory_used
from fastmask.train import main


def test_non_finite_loss_stops_the_run(tmp_path):
    flags = ["--lr", "1e30", "--checkpoint-every", "1", "--report-every", "50"]
    with pytest.raises(
        ValueError, match=r"batch from sample \d+ on is not finite \(its sigma: .* to .*\); last good checkpoint"
    ):
        run(tmp_path, *flags, steps=40, unmask=0)
    for tensor in weights(tmp_path).values():
        assert tensor.isfinite().all()


def test_a_leap_of_the_loss_stops_the_run(tmp_path):
    flags = ["--lr", "3", "--report-every", "1", "--checkpoint-every", "1", "--divergence-factor", "1.5"]
    with pytest.raises(
        ValueError, match=r"the loss rose to .*, more than 1.5 times the .* before; last good checkpoint"
    ):
        run(tmp_path, *flags, steps=40, unmask=0)


def test_rolling_back_goes_on_with_other_samples(tmp_path, capsys, monkeypatch):
    """One batch is bad: the run goes back to the checkpoint before it, and past it."""
    real, bad_sample = training_draws, 5 * 16

    def draws(images, labels, *, offset, **settings):
        drawn = real(images, labels, offset=offset, **settings)
        return drawn._replace(noise=torch.where(offset == bad_sample, torch.nan, drawn.noise))

    monkeypatch.setattr("fastmask.step.training_draws", draws)
    flags = ["--on-divergence", "rollback", "--checkpoint-every", "2", "--report-every", "1"]
    run(tmp_path, *flags, steps=8, unmask=0)
    out = capsys.readouterr().out
    assert f"going back from step 6 to {tmp_path / 'checkpoints' / 'step-00000004'}" in out
    assert [line["step"] for line in stats(tmp_path)] == list(range(1, 9))
    state = json.loads((checkpoints(tmp_path)[-1] / "state.json").read_text())
    assert state["skipped"] == 2 * 16
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())


def test_rolling_back_again_and_again_stops(tmp_path, monkeypatch):
    real = training_draws

    def draws(images, labels, *, offset, **settings):
        drawn = real(images, labels, offset=offset, **settings)
        return drawn._replace(noise=torch.where(offset >= 5 * 16, torch.nan, drawn.noise))

    monkeypatch.setattr("fastmask.step.training_draws", draws)
    flags = ["--on-divergence", "rollback", "--checkpoint-every", "2", "--report-every", "1"]
    with pytest.raises(ValueError, match=r"is not finite .*; last good checkpoint"):
        run(tmp_path, *flags, steps=8, unmask=0)


def test_what_a_run_reports(tmp_path):
    run(tmp_path, "--report-every", "3", steps=3, unmask=0)
    line = stats(tmp_path)[0]
    assert line["grad_norm"] > 0
    assert 0 < line["update_ratio"] < 1
    assert 0 <= line["data_wait"] < 1
    assert line["memory_gb"] > 0.05
    levels = [value for name, value in line.items() if name.startswith("loss_at_ln_sigma/")]
    assert len(levels) >= 3
    assert min(levels) <= line["loss"] <= max(levels)
    assert "mfu" not in line, "the peak of a CPU is not known"


def test_stages_are_logged_and_end_where_the_schedule_says(tmp_path, capsys):
    flags = ["--mask-schedule", "linear", "--mask-ratio", "0.75", "--mask-levels", "3", "--report-every", "1"]
    run(tmp_path, *flags, steps=12, unmask=3)
    out = capsys.readouterr().out
    kept = [16 * (1 - line["mask_ratio"]) for line in stats(tmp_path)]
    assert len(set(kept[:9])) == 3
    assert kept == sorted(kept)
    assert kept[9:] == [16] * 3
    for i, keep in enumerate(kept):
        if i == 0 or keep != kept[i - 1]:
            assert f"from step {i + 1} on {keep:.0f} of 16 patches are kept" in out


def test_profiling_leaves_the_run_folder_to_training(tmp_path, capsys):
    run(tmp_path, "--profile", "2")
    assert (tmp_path / "profile" / "trace.json.gz").exists()
    assert not checkpoints(tmp_path)
    assert "matrix products" in capsys.readouterr().out
    run(tmp_path, steps=2, unmask=0)
    assert [line["step"] for line in stats(tmp_path)] == [2]


def test_a_negative_profile_is_refused():
    with pytest.raises(ValueError, match="profile must be at least 0, not -1"):
        main(["--profile", "-1"])


def test_memory_is_that_of_this_process():
    kept = torch.ones(50_000_000)
    assert memory_used(torch.device("cpu")) > kept.nbytes


def test_a_cpu_has_no_known_peak():
    assert gpu_of(TrainConfig(device="cpu")) is None
