"""What is settled before the first step: stages, memory, tools, the name of the run folder, and who may write to it."""

import os
import signal
import subprocess
import sys
import time

import forked
import pytest
from test_train import SMALL, run, stats

from fastmask.presets import PRESETS
from fastmask.ranks import Ranks
from fastmask.train import StopSignals, check_memory, check_tools, main, resolve_machine
from fastmask.training.checkpoint import checkpoints
from fastmask.training.config import TrainConfig, preset_config


def start(run_dir, *flags):
    command = [sys.executable, "-m", "fastmask.train", "--run-dir", str(run_dir), *SMALL, *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until_it_trains(process, run_dir):
    while not (run_dir / "stats.jsonl").exists() or not stats(run_dir):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def test_a_run_folder_is_one_run_s_at_a_time(tmp_path):
    """The lock is held by the training process itself, so it outlives whoever started that, and ends with it."""
    endless = ["--max-steps", "1000000", "--unmask-steps", "0", "--report-every", "1"]
    process = forked.start(["--run-dir", str(tmp_path), *SMALL, *endless], tmp_path / "log")
    while not (tmp_path / "stats.jsonl").exists() or not stats(tmp_path):
        assert process.is_alive(), (tmp_path / "log").read_text()
        time.sleep(0.05)
    with pytest.raises(ValueError, match=rf"{tmp_path} is in use by process {process.pid} on .*: wait for it, or name"):
        run(tmp_path)
    process.kill()
    process.join()
    written = len(stats(tmp_path))
    assert written > 0
    run(tmp_path / "other")


def test_the_stages_of_a_short_run(tmp_path, capsys):
    flags = [*SMALL[:-2], "--preset", "digits", "--max-steps", "12", "--run-dir", str(tmp_path)]
    main(flags)
    assert "max_steps 12 of the preset's 1550: unmask_steps 3, warmup_steps 0" in capsys.readouterr().out
    assert stats(tmp_path)[-1]["step"] == 12


@pytest.mark.parametrize(
    ("preset", "data", "name"),
    [
        ("digits", "digits", "digits"),
        ("digits", "my/photos", "digits-photos"),
        ("digits", "s3://bucket/a store/", "digits-a-store"),
        ("digits", "../..", "digits"),
        ("xl2-in256", "synthetic", "xl2-in256-synthetic"),
    ],
)
def test_a_run_folder_has_the_name_of_preset_and_data(preset, data, name):
    config = TrainConfig.of(preset=preset, data=data, device="cpu", optimizer="torch")
    assert resolve_machine(config).run_dir == f"runs/{name}"


XL = {"image_size": 256, "network": preset_config("xl2-in256", PRESETS).network}


def test_too_little_memory_says_what_fits(monkeypatch):
    config = TrainConfig.of(**XL, batch_size=128, device="cpu", precision="fp32")
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 24 * 2**30 // 4096}[name])
    with pytest.raises(ValueError, match=r"a step takes \d+.\d GiB with 128 images at a time, cpu has 24.0 GiB: give "):
        check_memory(config, 4, 32, Ranks())
    with pytest.raises(ValueError, match=r"--micro-batch-size \d+, which trains the same") as said:
        check_memory(config, 4, 32, Ranks())
    micro = int(str(said.value).split("--micro-batch-size ")[1].split(",")[0])
    check_memory(
        TrainConfig.of(**XL, batch_size=128, micro_batch_size=micro, device="cpu", precision="fp32"), 4, 32, Ranks()
    )
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 8 * 2**30 // 4096}[name])
    with pytest.raises(ValueError, match=r"AdamW's moments and averages take .* GiB, cpu has 8.0 GiB: choose a"):
        check_memory(config, 4, 32, Ranks())
    check_memory(TrainConfig.of(device="cpu", precision="fp32"), 1, 8, Ranks())


@pytest.mark.parametrize(("device", "language"), [("cpu", r"C\+\+"), ("cuda:0", "C")])
def test_no_compiler_is_one_line(monkeypatch, tmp_path, device, language):
    monkeypatch.setenv("PATH", str(tmp_path))
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    config = TrainConfig.of(device=device, compile="block", sample_every=0)
    with pytest.raises(ValueError, match=rf"--compile block needs a {language} compiler, .* give --compile none"):
        check_tools(config)
    check_tools(TrainConfig.of(device=device, compile="none", sample_every=0))


def test_what_draws_samples_is_looked_for_before_the_first_step(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"drawing samples needs pillow: .*--sample-every 0"):
        check_tools(TrainConfig.of(sample_every=10, compile="none"))


def test_a_signal_before_the_first_step_is_said(capsys):
    for number, code in ((signal.SIGTERM, 0), (signal.SIGUSR1, 0), (signal.SIGINT, 130)):
        with pytest.raises(SystemExit) as stop:
            StopSignals().note(number, None)
        assert stop.value.code == code
        assert f"{signal.Signals(number).name}: stopped before the first step" in capsys.readouterr().out


def test_a_second_signal_does_not_wait():
    """Unless it is the end of torchrun, which several signals may tell."""
    signals = StopSignals()
    signals.at_once = False
    signals.note(signal.SIGINT, None)
    signals.note(signal.SIGUSR2, None)
    assert signals.received == signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        signals.note(signal.SIGINT, None)


WITH_A_FAULTY_IMAGE = """
import sys
from fastmask.cli import run_command
from fastmask.data.in_memory import Digits
from fastmask.train import main

read = Digits.read

def faulty(self, ids):
    if 7 in ids:
        raise ValueError("image 7 cannot be read")
    return read(self, ids)

Digits.read = faulty
run_command("fastmask.train", main)
"""


def test_a_run_with_workers_ends_after_an_error(tmp_path):
    """Workers do not listen to the signal that Python ends them with at its exit, and it would wait for them."""
    flags = ["--num-workers", "2", "--max-steps", "1000", "--unmask-steps", "0", "--checkpoint-every", "1000"]
    command = [sys.executable, "-c", WITH_A_FAULTY_IMAGE, "--run-dir", str(tmp_path), *SMALL, *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "fastmask.train: error: image 7 cannot be read"
    assert checkpoints(tmp_path)
