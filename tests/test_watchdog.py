"""Whatever of a run is killed or lost, all of it ends soon, with one line, and with a checkpoint where it can."""

import multiprocessing
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from forked import FORKED
from test_train import SMALL, stats

from fastmask.prepare import main as prepare
from fastmask.training.checkpoint import checkpoints

SOON = 30.0  # seconds
FOREVER = ["--max-steps", "1000000", "--unmask-steps", "0", "--checkpoint-every", "1000000", "--report-every", "1"]


def train(arguments: list[str], out: str, errors: str, largest_file: int | None) -> None:
    """Do what `python -m fastmask.train` does, in a process and a session of its own."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # of the workers, which else come of a server too
    for name, stream in ((out, sys.stdout), (errors, sys.stderr)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), stream.fileno())
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.argv[1:] = arguments
    runpy.run_module("fastmask.train", run_name="__main__", alter_sys=True)


class Watched:
    """A run that has begun to train, and all of its processes.

    Args:
        folder: for the run and for what it prints.
        flags: of the trainer.
        ranks: more than one are started by torchrun.
        largest_file: bytes at which a file is said to be too large.
    """

    def __init__(self, folder: Path, *flags: str, ranks: int = 1, largest_file: int | None = None):
        self.run_dir = folder / "run"
        self.ranks_count = ranks
        self._out, self._errors = folder / "out", folder / "errors"
        arguments = ["--run-dir", str(self.run_dir), *SMALL, *FOREVER, *flags]
        if ranks == 1:
            self.process = FORKED.Process(
                target=train, args=(arguments, str(self._out), str(self._errors), largest_file)
            )
            self.process.start()
            return
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += ["-m", "fastmask.train", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
        with self._out.open("w") as out, self._errors.open("w") as errors:
            self.process = subprocess.Popen(command, stdout=out, stderr=errors, env=environment, start_new_session=True)

    @property
    def exit_code(self) -> int | None:
        return self.process.poll() if isinstance(self.process, subprocess.Popen) else self.process.exitcode

    def until_it_trains(self, steps: int = 3) -> "Watched":
        while steps > (len(stats(self.run_dir)) if (self.run_dir / "stats.jsonl").exists() else 0):
            assert self.exit_code is None, self.errors
            time.sleep(0.02)
        return self

    @property
    def out(self) -> str:
        return self._out.read_text() if self._out.exists() else ""

    @property
    def errors(self) -> str:
        return self._errors.read_text()

    def processes(self) -> list[int]:
        """Return the processes of the run that have not ended, whoever is their parent by now."""
        found = []
        for folder in Path("/proc").iterdir():
            try:
                state = (folder / "stat").read_text().rpartition(")")[2].split() if folder.name.isdigit() else "Z"
                command = (folder / "cmdline").read_bytes() if folder.name.isdigit() else b""
            except OSError:  # it has just ended
                continue
            # Of the session of a run without torchrun, which gives its ranks sessions of their own.
            ours = state[0] != "Z" and int(state[3]) == self.process.pid
            if ours or os.fsencode(self.run_dir) in command.split(b"\0"):
                found.append(int(folder.name))
        return found

    def kill(self) -> None:
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)

    def ranks(self) -> list[int]:
        """Return the processes that torchrun has started, by rank."""
        ranks = children(self.process.pid)
        assert len(ranks) == 2
        environments = {pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in ranks}
        return sorted(ranks, key=lambda pid: b"RANK=1" in environments[pid])

    def ends(self) -> int:
        """Return the exit code once all processes have ended, which they must do soon, and without a traceback."""
        until = time.monotonic() + SOON
        while self.exit_code is None or self.processes():
            left = self.processes()
            if time.monotonic() > until:
                pytest.fail(f"{len(left)} processes did not end: {self.out[-2000:]} {self.errors[-2000:]}")
            time.sleep(0.05)
        # torchrun prints one of its own where a rank fails.
        assert self.errors.count("Traceback (most") <= (self.ranks_count > 1), self.errors
        return self.exit_code

    def said(self) -> list[str]:
        """Return the lines in which the trainer's processes say what ended them."""
        return [line for line in self.errors.splitlines() if line.startswith("fastmask.train: error: ")]

    def last_reported(self) -> int:
        return max(int(step) for step in re.findall(r"^step +(\d+)/", self.out, re.MULTILINE))

    def assert_stored(self) -> None:
        """The last checkpoint is of the last step that was done: the one that was reported, or that was under way."""
        assert checkpoints(self.run_dir), self.out + self.errors
        step = int(checkpoints(self.run_dir)[-1].name.removeprefix("step-"))
        assert step - self.last_reported() in (0, 1)
        assert not list(self.run_dir.rglob(".partial*"))


@pytest.fixture
def start(tmp_path):
    """Start a run, of which nothing outlives the test."""
    runs = []

    def begin(*flags: str, **how: int) -> Watched:
        runs.append(Watched(tmp_path, *flags, **how))
        return runs[-1]

    yield begin
    for run in runs:
        run.kill()


def children(pid: int) -> list[int]:
    listed = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=True).stdout
    return [int(child) for child in listed.split()]


def test_the_first_rank_is_killed(tmp_path, start):
    """The other has all weights too, and takes over the lock of the run folder."""
    run = start(ranks=2).until_it_trains()
    os.kill(run.ranks()[0], signal.SIGKILL)
    assert run.ends() == 1
    assert [line.split(":")[2] for line in run.said()] == [" process 1 of 2 lost another one"]
    run.assert_stored()


def test_torchrun_is_killed(tmp_path, start):
    run = start("--num-workers", "1", ranks=2).until_it_trains()
    run.process.kill()
    assert run.ends() == -signal.SIGKILL
    assert run.out.count("torchrun is gone: stopping after this step, with a checkpoint") == 1
    assert "the same command resumes from there" in run.out
    assert not run.said()
    run.assert_stored()


def test_a_worker_is_killed(tmp_path, start):
    run = start("--num-workers", "2").until_it_trains()
    os.kill(children(run.process.pid)[0], signal.SIGKILL)
    assert run.ends() == 2
    (line,) = run.said()
    assert "a process that reads the data is gone" in line
    run.assert_stored()


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_shard_of_the_store_is_cut(tmp_path, start, workers):
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=images, labels=np.arange(40) % 2)
    prepare([str(tmp_path / "images.npz"), str(tmp_path / "store"), "--space", "pixel", "--image-size", "8"])
    run = start("--data", str(tmp_path / "store"), "--num-workers", workers).until_it_trains()
    os.truncate(tmp_path / "store" / "00000.npy", 3000)
    assert run.ends() == 2
    (line,) = run.said()
    assert "00000.npy was cut to 3,000 of" in line
    run.assert_stored()


def test_the_run_folder_is_removed(tmp_path, start):
    """What is left of the run is written to a new one."""
    run = start("--num-workers", "1").until_it_trains()
    shutil.rmtree(run.run_dir.rename(tmp_path / "dying"))
    assert run.ends() == 2
    (line,) = run.said()
    assert "No such file or directory" in line or "was removed, moved or replaced" in line
    run.assert_stored()


def test_the_run_folder_is_moved_between_two_reports(tmp_path, start):
    flags = ["--report-every", "1000000", "--num-workers", "1"]
    run = start(*flags)
    while "step      10/" not in run.out:
        assert run.exit_code is None, run.errors
        time.sleep(0.02)
    run.run_dir.rename(tmp_path / "moved")
    assert run.ends() == 2
    assert run.said() == [
        f"fastmask.train: error: {run.run_dir} was removed, moved or replaced while a run trained in it"
    ]
    assert f"was written to {run.run_dir}: the same command resumes from there" in run.out
    assert checkpoints(run.run_dir)


def test_the_disk_takes_no_more(tmp_path, start):
    """Files end at 200 KB, which first TensorBoard's reaches, in a thread of its own."""
    run = start("--num-workers", "1", "--checkpoint-every", "50", largest_file=200_000)
    assert run.ends() == 2
    (line,) = run.said()
    assert "File too large" in line
    assert str(run.run_dir / "tensorboard") in line
    run.assert_stored()
