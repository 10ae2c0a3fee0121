"""A run that goes wrong on the way, and what it says of itself."""

import json
import re
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from PIL import Image
from test_train import assert_same_run, run, stats, weights

from fastmask.cli import fail
from fastmask.data import sample_ids
from fastmask.data.order import following
from fastmask.diffusion import training_draws
from fastmask.prepare import main as prepare
from fastmask.train import main, resolve_machine
from fastmask.training.checkpoint import checkpoints
from fastmask.training.config import TrainConfig
from fastmask.training.run import gpu_of, memory_used


def test_non_finite_loss_stops_the_run(tmp_path):
    flags = ["--lr", "1e30", "--checkpoint-every", "1", "--report-every", "50"]
    with pytest.raises(ValueError, match=r"batch from sample \d+ on is not finite \(its log-SNR: .* to .*\); "):
        run(tmp_path, *flags, steps=40, unmask=0)
    for tensor in weights(tmp_path).values():
        assert tensor.isfinite().all()


def test_a_loss_spike_stops_the_run_and_the_advice_can_be_followed(tmp_path, capsys):
    flags = ["--report-every", "1", "--checkpoint-every", "1", "--divergence-factor", "1.5", "--loss-limit", "0"]
    with pytest.raises(ValueError, match=r"the loss rose to .*, more than 1.5 times the .* before; ") as stop:
        run(tmp_path, *flags, "--lr", "3", steps=40, unmask=0)
    last = checkpoints(tmp_path)[-1]
    assert "the same command with a lower --lr, --grad-clip 1 or --precision fp32, or" in str(stop.value)
    assert f"rollback resumes from {last} and records the change" in str(stop.value)
    rest = ["--divergence-factor", "0", "--lr", "1e-4", "--grad-clip", "1", "--on-divergence", "rollback"]
    run(tmp_path, *flags, *rest, steps=40, unmask=0)
    assert f"resuming from {last}" in capsys.readouterr().out


def test_a_blow_up_before_the_first_report_stops_the_run(tmp_path):
    """Nothing came before that it could be compared with."""
    flags = ["--lr", "0.3", "--report-every", "12", "--checkpoint-every", "100"]
    with pytest.raises(ValueError, match=r"the loss is .*, above --loss-limit 100; there is no checkpoint yet: start"):
        run(tmp_path, *flags, steps=40, unmask=0)


def test_rolling_back_goes_on_with_other_samples(tmp_path, capsys, monkeypatch):
    """One batch is bad: the run goes back to the checkpoint before it, and past it."""
    real, bad_sample = training_draws, 5 * 16

    def draws(*arguments, offset, **settings):
        drawn = real(*arguments, offset=offset, **settings)
        return drawn._replace(noise=torch.where(offset == bad_sample, torch.nan, drawn.noise))

    monkeypatch.setattr("fastmask.training.step.training_draws", draws)
    flags = ["--on-divergence", "rollback", "--checkpoint-every", "2", "--report-every", "1"]
    run(tmp_path, *flags, steps=8, unmask=0)
    out = capsys.readouterr().out
    assert f"going back from step 6 to {tmp_path / 'checkpoints' / 'step-00000004'}" in out
    assert [line["step"] for line in stats(tmp_path)] == list(range(1, 9))
    state = json.loads((checkpoints(tmp_path)[-1] / "state.json").read_text())
    assert state["samples"] == (8 + 2) * 16
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())


def test_rolling_back_again_and_again_stops(tmp_path, monkeypatch):
    real = training_draws

    def draws(*arguments, offset, **settings):
        drawn = real(*arguments, offset=offset, **settings)
        return drawn._replace(noise=torch.where(offset >= 5 * 16, torch.nan, drawn.noise))

    monkeypatch.setattr("fastmask.training.step.training_draws", draws)
    flags = ["--on-divergence", "rollback", "--checkpoint-every", "2", "--report-every", "1"]
    with pytest.raises(ValueError, match=r"is not finite .*--precision fp32 resumes from .*step-00000004"):
        run(tmp_path, *flags, steps=8, unmask=0)


class FaultyError(Exception):
    """What nobody expects."""


@pytest.mark.parametrize("kind", [ValueError, OSError, RuntimeError, FaultyError])
def test_an_error_leaves_a_checkpoint_of_the_last_whole_step(tmp_path, monkeypatch, capsys, kind):
    real, seen = training_draws, []

    def draws(*arguments, **settings):
        seen.append(1)
        if len(seen) == 6:
            raise kind("a fault")
        return real(*arguments, **settings)

    monkeypatch.setattr("fastmask.training.step.training_draws", draws)
    flags = ["--report-every", "1", "--checkpoint-every", "100"]
    with pytest.raises(kind, match="a fault"):
        run(tmp_path / "faulty", *flags, steps=8, unmask=0)
    assert [folder.name for folder in checkpoints(tmp_path / "faulty")] == ["step-00000005"]
    assert "after an error a checkpoint of step 5 was written" in capsys.readouterr().out
    monkeypatch.undo()
    for name in ("faulty", "whole"):
        run(tmp_path / name, *flags, steps=8, unmask=0)
    assert_same_run(tmp_path / "faulty", tmp_path / "whole")


def images(folder, damaged):
    """Write forty images, of which some are damaged, and return the flags that train on them."""
    folder.mkdir()
    for i in range(40):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(
            folder / f"{i:02}.png"
        )
    for i in damaged:
        file = folder / f"{i:02}.png"
        file.write_bytes(file.read_bytes()[:90])
    return ["--data", str(folder), "--report-every", "1", "--checkpoint-every", "100", "--decoder", "pil"]


def times_bad(damaged, count):
    """Return how often an image cannot be read in the first so many samples of a run over forty."""
    times = 0
    for item in sample_ids(0, 0, count, 40).tolist():
        while item in damaged:
            item, times = following(0, item, 40), times + 1
    return times


def test_a_damaged_image_stops_with_a_checkpoint_from_which_skip_goes_on(tmp_path):
    damaged = sample_ids(0, 0, 40, 40)[[33]].tolist()  # of the third step
    flags = images(tmp_path / "images", damaged)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=rf"{damaged[0]:02}\.png cannot be read .* \(fastmask.train --on-bad skip takes another"
        ):
            run(tmp_path / "run", *flags, steps=5, unmask=0)
        assert [folder.name for folder in checkpoints(tmp_path / "run")] == ["step-00000002"]
    for name in ("run", "whole"):
        run(tmp_path / name, *flags, "--on-bad", "skip", steps=5, unmask=0)
    for key, tensor in weights(tmp_path / "run").items():
        assert torch.equal(tensor, weights(tmp_path / "whole")[key])
    assert stats(tmp_path / "run")[-1]["bad_images"] == times_bad(damaged, 80) == 2


def test_a_run_that_skips_is_resumed_bit_for_bit(tmp_path, monkeypatch, capsys):
    """After an error in a step whose images were read already, and with workers."""
    damaged, real, seen = (3, 17, 30), training_draws, []
    flags = [*images(tmp_path / "images", damaged), "--on-bad", "skip"]

    def draws(*arguments, **settings):
        seen.append(1)
        if len(seen) == 4:
            raise FaultyError("a fault")
        return real(*arguments, **settings)

    monkeypatch.setattr("fastmask.training.step.training_draws", draws)
    with pytest.raises(FaultyError):
        run(tmp_path / "faulty", *flags, steps=5, unmask=0)
    monkeypatch.undo()
    run(tmp_path / "faulty", *flags, "--num-workers", "2", steps=5, unmask=0)
    capsys.readouterr()
    run(tmp_path / "whole", *flags, steps=5, unmask=0)
    assert_same_run(tmp_path / "faulty", tmp_path / "whole")
    counts = [times_bad(damaged, 16 * step) for step in range(1, 6)]
    assert counts[2] < counts[3], "the step that failed had a damaged image"
    assert [line["bad_images"] for line in stats(tmp_path / "whole")] == counts
    out = capsys.readouterr().out
    assert f"--on-bad skip: {counts[-1]} times an image could not be read, and another took its place" in out
    assert re.search(rf"step +5/5 .*  {counts[-1]} bad images", out)


def test_damaged_images_are_counted_on_all_ranks(tmp_path, monkeypatch):
    monkeypatch.setattr("fastmask.training.run.all_sum", lambda tensor, ranks: 2 * tensor)  # as if another had as many
    run(tmp_path, *images(tmp_path / "images", [3, 17, 30]), "--on-bad", "skip", steps=4, unmask=0)
    assert stats(tmp_path)[-1]["bad_images"] == 2 * times_bad([3, 17, 30], 64) > 0


def test_too_many_damaged_images_stop_with_a_checkpoint(tmp_path):
    damaged = range(0, 40, 5)
    flags = [*images(tmp_path / "images", damaged), "--on-bad", "skip"]
    step = next(step for step in range(8) if 16 * step + times_bad(damaged, 16 * step) >= 100)
    with pytest.raises(ValueError, match=r"of the 1\d\d images that were read are damaged, which is more than 10%"):
        run(tmp_path, *flags, steps=40, unmask=0)
    assert [folder.name for folder in checkpoints(tmp_path)] == [f"step-{step - 1:08}"]


def test_rolling_back_counts_on(tmp_path, monkeypatch):
    """Three steps that are stored, one that is reported, one that diverges, and two more."""
    damaged, real = sample_ids(0, 0, 80, 40)[[50, 66]].tolist(), training_draws  # of the fourth batch and the fifth

    def draws(*arguments, offset, **settings):
        drawn = real(*arguments, offset=offset, **settings)
        return drawn._replace(noise=torch.where(offset == 4 * 16, torch.nan, drawn.noise))

    monkeypatch.setattr("fastmask.training.step.training_draws", draws)
    flags = [*images(tmp_path / "images", damaged), "--on-bad", "skip", "--on-divergence", "rollback"]
    run(tmp_path, *flags, "--checkpoint-every", "3", steps=5, unmask=0)
    counts = [times_bad(damaged, 16 * count) for count in (3, 4, 5, 7)]
    assert stats(tmp_path)[-1]["bad_images"] == counts[3]
    assert counts[0] < counts[1] < counts[2]


def test_an_error_while_the_weights_are_moved_leaves_none(tmp_path, monkeypatch):
    """Some are of the step before, some are not."""

    def step(self, closure=None):
        raise RuntimeError("half way")

    monkeypatch.setattr("fastmask.training.optim.AdamWEMA.step", step)
    with pytest.raises(RuntimeError, match="half way"):
        run(tmp_path, "--checkpoint-every", "100", "--optimizer", "adamw_ema", steps=8, unmask=0)
    assert not checkpoints(tmp_path)


def test_a_grid_of_samples_never_ends_a_run(tmp_path, monkeypatch, capsys):
    def draw(*arguments):
        raise RuntimeError("no room for it")

    monkeypatch.setattr("fastmask.training.run.sample_grid", draw)
    run(tmp_path, "--sample-every", "2", steps=4, unmask=0)
    assert "no samples of step 2 were drawn: no room for it" in capsys.readouterr().out
    assert checkpoints(tmp_path)


def test_the_start_says_what_is_trained(tmp_path, capsys):
    run(tmp_path, "--report-every", "20", steps=12, unmask=0)
    out = capsys.readouterr().out
    assert "data digits: 1,438 images of 1 x 8 x 8, 10 classes (0, 1, 2, 3, ...)" in out
    assert f"k parameters, precision fp32, on 1 x cpu: {tmp_path}" in out
    assert f"tensorboard --logdir {tmp_path / 'tensorboard'}" in out
    for step in (1, 10):
        assert re.search(rf"^step +{step}/12  loss \d", out, re.MULTILINE)


def test_what_a_run_reports(tmp_path):
    run(tmp_path, "--report-every", "3", steps=3, unmask=0)
    line = stats(tmp_path)[0]
    assert line["grad_norm"] > 0
    assert 0 < line["update_ratio"] < 1
    assert 0 <= line["data_wait"] < 1
    assert line["memory_gb"] > 0.05
    levels = [value for name, value in line.items() if name.startswith("loss_at_log_snr/")]
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
    assert "matmuls" in capsys.readouterr().out
    run(tmp_path, steps=2, unmask=0)
    assert [line["step"] for line in stats(tmp_path)] == [2]


def test_a_negative_profile_is_refused():
    with pytest.raises(ValueError, match="profile must be at least 0, not -1"):
        main(["--profile", "-1"])


def test_memory_is_that_of_this_process():
    kept = torch.ones(50_000_000)
    assert memory_used(torch.device("cpu")) > kept.nbytes


def test_a_cpu_has_no_known_peak():
    assert gpu_of("cpu") is None


def class_images(folder, count=6, classes="ab"):
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(np.full((8, 8, 3), 20 * i, np.uint8)).save(folder / name / f"{i}.png")
    return str(folder)


def store_of(images, store):
    prepare([images, str(store), "--space", "pixel", "--image-size", "8"])


class HostWithSecret(LocalFileSystem):
    """What lies on this machine, under a URL that bears a password and a signature."""

    protocol = "withsecret"

    @classmethod
    def _strip_protocol(cls, path):
        path = str(path).split("?")[0]
        return "/" + path.split("@host/")[-1] if "@host/" in path else path


def test_secrets_of_a_url_are_neither_printed_nor_stored(tmp_path, monkeypatch, capsys):
    fsspec.register_implementation("withsecret", HostWithSecret, clobber=True)
    store_of(class_images(tmp_path / "folder"), tmp_path / "store")
    url = f"withsecret://user:hunter2@host{tmp_path}/store?X-Amz-Signature=hunter2&sig=hunter2"
    flags = ["--data", url, "--run-dir", str(tmp_path / "run")]
    monkeypatch.setattr("sys.argv", ["fastmask.train", *flags])
    run(tmp_path / "run", *flags, "--dry-run")
    for lr in ("1e-4", "1e-3"):
        run(tmp_path / "run", "--data", url, "--lr", lr, "--checkpoint-every", "1", steps=2 + (lr == "1e-3"), unmask=0)
    stored = [path.read_text() for path in (tmp_path / "run").rglob("*.json")]
    assert len(stored) == 3
    assert "hunter2" not in capsys.readouterr().out + "".join(stored)
    said = json.loads((tmp_path / "run" / "run.json").read_text())
    assert said["config"]["data"] == f"withsecret://user:***@host{tmp_path}/store?X-Amz-Signature=***&sig=***"
    assert [change["field"] for change in said["changes"]] == ["max_steps", "lr"], "the same data are no change"
    assert "hunter2" not in resolve_machine(TrainConfig.of(data=url, device="cpu", optimizer="torch")).run_dir
    with pytest.raises(SystemExit):
        fail("fastmask.train", f"{url} cannot be read")
    assert "hunter2" not in capsys.readouterr().err


def test_the_number_of_images_is_said_once(tmp_path, capsys):
    np.savez(tmp_path / "own.npz", images=np.zeros((12, 8, 8, 3), np.uint8))
    folder = class_images(tmp_path / "folder")
    store_of(folder, tmp_path / "store")
    capsys.readouterr()
    for data in (folder, str(tmp_path / "own.npz"), str(tmp_path / "store"), "digits"):
        run(tmp_path / "run", "--run-dir", str(tmp_path / Path(data).stem), "--data", data, steps=1, unmask=0)
        out = capsys.readouterr().out
        counts = re.findall(r"\b(?:12|1,438) \w+", out)
        assert len(counts) == 1, out


def test_a_number_of_classes_that_is_given_is_taken(tmp_path):
    """Also where it is the preset's, which of itself is replaced by that of the data."""
    data = class_images(tmp_path / "folder")
    for flags, classes in (([], 2), (["--num-classes", "10"], 10), (["--num_classes=10"], 10)):
        run_dir = tmp_path / f"run{len(flags)}{classes}"
        run(run_dir, "--data", data, *flags, steps=1, unmask=0)
        assert json.loads((run_dir / "run.json").read_text())["config"]["num_classes"] == classes


def test_steps_that_are_given_are_not_fitted(tmp_path):
    preset = ["--preset", "digits", "--max-steps", "12", "--device", "cpu", "--dry-run"]
    main(preset)
    with pytest.raises(ValueError, match="unmask_steps 500 is more than max_steps 12"):
        main([*preset, "--unmask-steps", "500"])


def test_the_average_of_a_label_table_that_is_drawn_anew_warms_up(tmp_path):
    """Also after the run is resumed; one of loaded weights alone does not."""
    np.savez(tmp_path / "new.npz", images=np.zeros((12, 8, 8), np.uint8), labels=np.arange(12) % 2)
    flags, table = ["--lr", "1e-2", "--ema-decay", "0.9999"], "model.y_embedder.embedding_table.weight"
    run(tmp_path / "first", *flags, steps=5, unmask=0)
    for data, warms_up in ((str(tmp_path / "new.npz"), True), ("digits", False)):
        run_dir = tmp_path / Path(data).stem
        for steps in (20, 60):
            run(run_dir, "--init", str(tmp_path / "first"), "--data", data, *flags, steps=steps, unmask=0)
        now, average = (weights(run_dir, part)[table] for part in ("model", "ema"))
        # Without a warm-up the average would still hold 99.4 % of what it began with.
        assert (float((now - average).norm() / now.norm()) < 0.3) == warms_up
