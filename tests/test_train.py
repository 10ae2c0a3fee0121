"""The trainer as its users run it: learning, stopping and going on, and the line that each mistake gets."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from fake_cuda import FakeCuda
from safetensors.torch import load_file

from fastmask.cli import run_command
from fastmask.train import main, resolve_machine
from fastmask.training.checkpoint import checkpoints
from fastmask.training.config import TrainConfig

SMALL = ["--width", "16", "--depth", "1", "--num-heads", "2", "--decoder-width", "16", "--decoder-depth", "1"]
SMALL += [
    "--decoder-num-heads",
    "2",
    "--batch-size",
    "16",
    "--sample-every",
    "0",
    "--device",
    "cpu",
    "--warmup-steps",
    "0",
]


SPEED = ("images_per_s", "train_s", "data_wait", "memory_gb")


def run(run_dir: Path, *flags: str, steps: int = 6, unmask: int = 2) -> None:
    stage = ["--max-steps", str(steps), "--unmask-steps", str(unmask)]
    main(["--run-dir", str(run_dir), *SMALL, *stage, *flags])


def weights(run_dir: Path, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(checkpoints(run_dir)[-1] / f"{name}.safetensors")


def stats(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]


def learned(line: dict[str, float]) -> dict[str, float]:
    """Return what a run's figures say of learning, without how fast it was."""
    return {name: value for name, value in line.items() if name not in SPEED}


def assert_same_run(a: Path, b: Path) -> None:
    for name in ("model", "ema", "optimizer"):
        ours, theirs = weights(a, name), weights(b, name)
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            assert torch.equal(tensor, theirs[key]), f"{name}: {key}"
    assert [learned(line) for line in stats(a)] == [learned(line) for line in stats(b)]


def test_learning(tmp_path):
    """A small network must bring the loss well below 1, where looking at each noised patch alone leaves it."""
    flags = ["--lr", "5e-3", "--report-every", "20", "--width", "48", "--depth", "2", "--batch-size", "64"]
    run(tmp_path, *flags, steps=240, unmask=40)
    losses = [line["denoising"] for line in stats(tmp_path)]
    assert losses[0] > 1.0
    assert losses[9] < 0.88  # the last masked report
    assert losses[-1] < 0.82  # unmasked, with all patches to see


def test_the_run_folder(tmp_path):
    run(tmp_path, "--sample-every", "3", "--sample-steps", "2", "--checkpoint-every", "2", "--report-every", "2")
    assert [line["step"] for line in stats(tmp_path)] == [2, 4, 6]
    assert [line["mask_ratio"] for line in stats(tmp_path)] == [0.5, 0.5, 0.0]
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000004", "step-00000006"]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["step-00000003.png", "step-00000006.png"]
    said = json.loads((tmp_path / "run.json").read_text())
    assert said["config"]["width"] == 16
    assert said["versions"]["torch"] == torch.__version__
    assert list((tmp_path / "tensorboard").glob("events*"))
    assert not list(tmp_path.rglob(".partial*"))


@pytest.mark.parametrize("step", [3, 7], ids=["masked", "unmasked"])
def test_going_on_from_any_checkpoint_equals_the_run_through(tmp_path, step):
    whole, part = tmp_path / "whole", tmp_path / "part"
    flags = ["--checkpoint-every", "1", "--report-every", "1", "--keep-checkpoints", "9"]
    flags += ["--grad-clip", "1", "--micro-batch-size", "8"]
    run(whole, *flags, steps=8, unmask=3)
    shutil.copytree(whole, part)
    for later in checkpoints(part)[step:]:
        shutil.rmtree(later)
    run(part, *flags, steps=8, unmask=3)
    assert_same_run(whole, part)


def test_the_optimizer_may_change_when_a_run_goes_on(tmp_path):
    """Each form of AdamW resumes from the other's checkpoint, and all learn the same but for rounding."""
    folders = {name: tmp_path / name for name in ("torch", "adamw_ema", "both")}
    flags = ["--lr", "1e-2", "--grad-clip", "1", "--keep-checkpoints", "9", "--checkpoint-every", "3"]
    for name in ("torch", "adamw_ema"):
        run(folders[name], *flags, "--optimizer", name)
    shutil.copytree(folders["torch"], folders["both"])
    shutil.rmtree(checkpoints(folders["both"])[-1])
    run(folders["both"], *flags, "--optimizer", "adamw_ema")
    for name in ("model", "ema", "optimizer"):
        for key, tensor in weights(folders["torch"], name).items():
            for other in ("adamw_ema", "both"):
                torch.testing.assert_close(weights(folders[other], name)[key], tensor, rtol=1e-3, atol=1e-4)


def test_a_run_of_a_version_without_the_field_goes_on(tmp_path):
    run(tmp_path, steps=2, unmask=0)
    state = checkpoints(tmp_path)[-1] / "state.json"
    stored = json.loads(state.read_text())
    del stored["config"]["optimizer"], stored["format"]
    state.write_text(json.dumps(stored))
    (state.parent / "SHA256SUMS").unlink()  # which it had not either
    run(tmp_path, steps=3, unmask=0)
    assert stats(tmp_path)[-1]["step"] == 3


def test_killed_run_goes_on_as_if_nothing_had_happened(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = ["--checkpoint-every", "5", "--report-every", "5"]
    run(whole, *flags, steps=300)
    arguments = ["--run-dir", str(killed), *SMALL, *flags, "--max-steps", "300", "--unmask-steps", "2"]
    process = forked.start(arguments, tmp_path / "log")
    while len(checkpoints(killed)) < 2:
        assert process.is_alive(), "the run ended before it could be killed"
        time.sleep(0.02)
    process.kill()
    process.join()
    assert int(checkpoints(killed)[-1].name.removeprefix("step-")) < 300
    run(killed, *flags, steps=300)
    assert_same_run(whole, killed)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGHUP, 0), (signal.SIGINT, 130)])
def test_a_stop_signal_leaves_a_checkpoint(tmp_path, number, code):
    arguments = ["--run-dir", str(tmp_path), *SMALL, "--max-steps", "100000", "--report-every", "1"]
    process = forked.start(arguments, tmp_path / "log")
    while not (tmp_path / "stats.jsonl").exists() or not stats(tmp_path):
        assert process.is_alive(), (tmp_path / "log").read_text()
        time.sleep(0.05)
    os.kill(process.pid, number)
    process.join(timeout=60)
    out = (tmp_path / "log").read_text()
    assert process.exitcode == code, out
    step = int(checkpoints(tmp_path)[-1].name.removeprefix("step-"))
    assert f"stopped after step {step}: the same command resumes from there" in out
    assert stats(tmp_path)[-1]["step"] == step


def test_accumulated_gradients_equal_the_whole_batch(tmp_path):
    run(tmp_path / "whole", steps=3)
    run(tmp_path / "parts", "--micro-batch-size", "4", steps=3)
    for name, tensor in weights(tmp_path / "whole").items():
        torch.testing.assert_close(weights(tmp_path / "parts")[name], tensor, rtol=1e-4, atol=1e-5)


def emulates_bf16(monkeypatch, emulates: bool) -> None:
    """Give the machine a GPU; one that emulates bf16 says that it supports it unless emulation is left out."""
    FakeCuda().install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    supported = lambda including_emulation=True: including_emulation or not emulates  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)


@pytest.mark.parametrize(("emulates", "precision"), [(True, "fp16"), (False, "bf16")])
def test_auto_takes_bf16_only_of_a_gpu_that_has_it(monkeypatch, capsys, emulates, precision):
    emulates_bf16(monkeypatch, emulates)
    assert resolve_machine(TrainConfig.of(optimizer="torch")).machine.precision == precision
    assert ("precision fp16, since Tesla T4 has no bf16" in capsys.readouterr().out) == emulates


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_a_precision_that_the_gpu_lacks_is_refused(monkeypatch, precision):
    emulates_bf16(monkeypatch, emulates=True)
    message = f"--precision {precision} needs a GPU of compute capability 8.0 or more, which Tesla T4 has not"
    with pytest.raises(ValueError, match=message):
        resolve_machine(TrainConfig.of(precision=precision, optimizer="torch"))


@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
def test_precisions_train_alike(tmp_path, precision):
    run(tmp_path / "fp32", "--report-every", "20", steps=20)
    run(tmp_path / "low", "--report-every", "20", "--precision", precision, steps=20)
    full, low = (stats(tmp_path / name)[-1]["loss"] for name in ("fp32", "low"))
    assert low == pytest.approx(full, rel=0.03)
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path / "low").values())


def test_another_seed_is_another_run(tmp_path):
    run(tmp_path / "a", steps=1, unmask=0)
    run(tmp_path / "b", "--seed", "1", steps=1, unmask=0)
    assert stats(tmp_path / "a")[0]["loss"] != stats(tmp_path / "b")[0]["loss"]


def test_unmasked_stage_starts_from_a_masked_run(tmp_path):
    run(tmp_path / "masked", "--lr", "1e-2", unmask=0)
    still = ["--mask-ratio", "0", "--lr", "0", "--ema-decay", "1"]
    run(tmp_path / "unmasked", "--init", str(tmp_path / "masked"), *still, steps=1, unmask=0)
    for name in ("model", "ema"):
        before, after = weights(tmp_path / "masked", name), weights(tmp_path / "unmasked", name)
        for key, tensor in before.items():
            assert torch.equal(after[key], tensor), f"{name}: {key}"
    differ = [
        not torch.equal(a, b) for a, b in zip(before.values(), weights(tmp_path / "masked").values(), strict=True)
    ]
    assert any(differ), "the average must not be the weights themselves for this test to tell them apart"


def test_own_images(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "own.npz", images=images, labels=np.arange(20) % 3)
    run(tmp_path / "run", "--data", str(tmp_path / "own.npz"), "--image-size", "16", "--flip", steps=2, unmask=0)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["num_classes"] == 3
    assert weights(tmp_path / "run")["model.x_embedder.proj.weight"].shape == (16, 3, 2, 2)


@pytest.mark.parametrize(("flags", "side"), [([], 12), (["--image-size", "8"], 8), (["--image-size=16"], 16)])
def test_own_arrays_keep_their_side_unless_another_is_asked_for(tmp_path, capsys, flags, side):
    """Whatever the preset's is, which here is 8."""
    images = np.random.default_rng(0).integers(0, 256, (20, 12, 12), dtype=np.uint8)
    np.savez(tmp_path / "own.npz", images=images)
    idx = b"\0\0\x08\x03" + np.array(images.shape, ">u4").tobytes() + images.tobytes()
    (tmp_path / "own-idx").write_bytes(idx)
    for name in ("own.npz", "own-idx"):
        run(tmp_path / name[4:], "--data", str(tmp_path / name), *flags, steps=1, unmask=0)
        assert json.loads((tmp_path / name[4:] / "run.json").read_text())["config"]["image_size"] == side
    said = capsys.readouterr().out
    assert (f"resized and cropped from 12 x 12 to {side} x {side}" in said) == (side != 12)
    assert (f"images are resized from a side of 12 to {side}" in said) == (side != 12)


def test_synthetic_latents_and_no_classes(tmp_path):
    flags = ["--data", "synthetic", "--image-size", "64", "--num-classes", "0", "--micro-batch-size", "4"]
    run(tmp_path, *flags, "--sample-every", "2", "--sample-steps", "2", steps=2, unmask=1)
    assert "model.y_embedder.embedding_table.weight" not in weights(tmp_path)
    (grid,) = (tmp_path / "samples").iterdir()
    assert grid.name == "step-00000002-latents.png"  # no VAE decodes random latents


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "xl2-in25"], "unknown preset 'xl2-in25': did you mean xl2-in256"),
        (["--max-stepz", "3"], "--max-stepz, 3: did you mean --max-steps"),
        (["--max-steps", "x"], "invalid literal for int"),
        (["--shift", "3"], "--shift is a flag of process flow, and preset digits trains process edm"),
        (["--preset", "digits-flow", "--p-mean=0"], "--p-mean is a flag of process edm, and preset digits-flow trains"),
        (["--preset", "digits-flow", "--shift", "0"], "shift must be between 0.01 and 100, not 0.0"),
        (["--sigma-data", "0"], "--sigma-data must be a number above 0, not 0.0"),
        (["--precision", "fp8"], "invalid choice 'fp8'"),
        (["--mask-ratio", "1"], "mask_ratio must be at least 0 and below 1"),
        (["--batch-size", "0"], "batch_size must be at least 1, not 0"),
        (["--micro-batch-size", "-1"], "micro_batch_size must be at least 0, not -1"),
        (["--max-steps", "0"], "max_steps must be at least 1, not 0"),
        (["--max-steps", "2", "--unmask-steps", "3"], "unmask_steps 3 is more than max_steps 2"),
        (["--patch-size", "3"], "an image side of 8 does not divide into patches of 3"),
        (["--data", "no/such/folder"], "no/such/folder does not exist"),
        (
            ["--preset", "xl2-in256"],
            "data/in256 does not exist: `python -m fastmask.prepare IMAGES data/in256 --image-size 256` makes such a",
        ),
        (["--device", "tpu"], "--device must be auto, cpu, cuda"),
        (["--init", "no/run"], "--init no/run"),
        (["--optimizer", "apex"], "--optimizer apex needs NVIDIA's apex: build github.com/NVIDIA/apex"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_get_one_line_and_code_2(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.setattr(sys, "argv", ["fastmask.train", "--run-dir", str(tmp_path / "run"), *flags])
    with pytest.raises(SystemExit) as stop:
        run_command("fastmask.train", main)
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert len(said.splitlines()) == 1
    assert said.startswith("fastmask.train: error: ")
    assert message in said


def test_a_mistake_on_the_command_line():
    command = [sys.executable, "-m", "fastmask.train", "--max-stepz", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "fastmask.train: error: Unrecognized options: --max-stepz, 3: did you mean --max-steps?"
    ]


def test_finished_run_is_left_alone(tmp_path, capsys):
    run(tmp_path)
    run(tmp_path)
    out = capsys.readouterr().out
    assert "all 6 steps are done" in out
    assert out.count("trained 6 steps") == 1


def test_init_of_another_shape_lists_names(tmp_path):
    run(tmp_path / "a")
    with pytest.raises(
        ValueError, match=r"another network: model.blocks.0.\S+ has shape \(96,\) instead of \(192,\), .* and \d+ more"
    ):
        run(tmp_path / "b", "--init", str(tmp_path / "a"), "--width", "32")


def test_unwritable_run_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        run(tmp_path / "file" / "run")


def test_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    run(tmp_path, "--checkpoint-every", "2", steps=2, unmask=0)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path, steps=4, unmask=0)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_dry_run_counts_without_allocating(tmp_path, capsys):
    started = time.perf_counter()
    main(["--preset", "xl2-in256", "--dry-run", "--device", "cpu"])
    assert time.perf_counter() - started < 20
    out = capsys.readouterr().out
    assert "730.1M" in out
    assert "65.45 GMAC" in out
    main(["--preset", "dit-xl2-in256", "--dry-run", "--device", "cpu"])
    out = capsys.readouterr().out
    assert "674.8M" in out
    assert "118.62 GMAC" in out
