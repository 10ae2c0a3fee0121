"""A run that is killed twenty times ends as one that is left in peace, bit for bit."""

import json
import multiprocessing
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import forked
import torch
from safetensors.torch import load_file

from fastmask.rundir import checkpoints, snapshots

STEPS = 132
# When the process is killed: while it starts, a while after its first step, or while a checkpoint is being written.
MOMENTS = ["starting"] * 5 + ["stepping"] * 10 + ["writing"] * 5
FLAGS = {
    "preset": "digits",
    "width": 32,
    "depth": 1,
    "num-heads": 2,
    "decoder-width": 16,
    "decoder-depth": 1,
    "decoder-num-heads": 2,
    "batch-size": 16,
    "max-steps": STEPS,
    "unmask-steps": 30,
    "warmup-steps": 0,
    "report-every": 1,
    "checkpoint-every": 3,
    "keep-checkpoints": 2,
    "sample-every": 0,
    "device": "cpu",
}


def arguments(run_dir: Path) -> list[str]:
    flags = [word for name, value in FLAGS.items() for word in (f"--{name}", str(value))]
    return ["--run-dir", str(run_dir), *flags, "--ema-widths", "0.05", "0.1"]


def command(run_dir: Path) -> None:
    done = [sys.executable, "-m", "fastmask.train", *arguments(run_dir)]
    subprocess.run(done, check=True, stdout=subprocess.DEVNULL)


def steps_said(log: Path) -> list[int]:
    """Return the steps that a process has reported so far."""
    return [int(step) for step in re.findall(r"^step +(\d+)/", log.read_text(), re.MULTILINE)] if log.exists() else []


def until(condition, process: multiprocessing.Process, log: Path) -> None:
    """Return as soon as a condition holds, for a process that keeps running."""
    while not condition():
        assert process.is_alive(), f"it ended by itself: {log.read_text()[-2000:]}"
        time.sleep(0.001)


def kill_at(moment: str, process: multiprocessing.Process, run_dir: Path, log: Path, wait_s: float, last_step: int):
    """Kill a process a while after what the moment names, but no later than when it has done ``last_step``."""
    if moment != "starting":
        until(lambda: steps_said(log), process, log)
    if moment == "writing":
        until(lambda: any((run_dir / "checkpoints").glob(".partial-*")), process, log)
    killed_at = time.monotonic() + wait_s
    until(lambda: time.monotonic() > killed_at or max(steps_said(log), default=0) >= last_step, process, log)
    process.kill()
    process.join()


def learned(run_dir: Path) -> list[dict[str, float]]:
    """Return what a run's figures say of learning, without how fast it was."""
    lines = [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in ("step", "loss", "denoising", "reconstruction", "lr")} for line in lines]


def assert_same_file(ours: Path, theirs: Path) -> None:
    ours, theirs = load_file(ours), load_file(theirs)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def test_twenty_kills_change_nothing(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    # It also tells how long a start and a step take on this machine, now.
    process, log = forked.start(arguments(whole), tmp_path / "whole.log"), tmp_path / "whole.log"
    until(log.exists, process, log)
    started = time.monotonic()
    until(lambda: steps_said(log), process, log)
    stepping = time.monotonic()
    process.join()
    assert process.exitcode == 0, log.read_text()
    start_s, step_s = stepping - started, (time.monotonic() - stepping) / STEPS

    chance, halves_left, log = random.Random(6), 0, tmp_path / "killed.log"
    longest_s = {"starting": start_s, "stepping": 9 * step_s, "writing": step_s}
    for k, moment in enumerate(chance.sample(MOMENTS, len(MOMENTS))):
        log.unlink(missing_ok=True)
        process = forked.start(arguments(killed), log)
        # However slow the machine is by now, no life does so many steps that the run ends before the last kill.
        last_step = (k + 1) * STEPS // (len(MOMENTS) + 2)
        kill_at(moment, process, killed, log, chance.uniform(0, longest_s[moment]), last_step)
        halves_left += any((killed / "checkpoints").glob(".partial-*"))
    assert halves_left > 0
    assert checkpoints(killed)
    command(killed)

    assert not list(killed.rglob(".partial-*"))
    assert [folder.name for folder in checkpoints(killed)] == [folder.name for folder in checkpoints(whole)]
    for name in ("model", "ema", "optimizer", "profiles"):
        assert_same_file(*(checkpoints(run_dir)[-1] / f"{name}.safetensors" for run_dir in (killed, whole)))
    assert [path.name for *_, path in snapshots(killed)] == [path.name for *_, path in snapshots(whole)]
    for ours, theirs in zip(snapshots(killed), snapshots(whole), strict=True):
        assert_same_file(ours.path, theirs.path)
    assert [line["step"] for line in learned(whole)] == list(range(1, STEPS + 1))
    assert learned(killed) == learned(whole)
