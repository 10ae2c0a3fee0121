"""What a bench says while it runs: what is timed, the round and the time left, past pytest's capture."""

import os
import pty
import subprocess
import sys

import pytest
import torch

from bench import rows
from bench.instruments.progress import Progress, duration

CPU = torch.device("cpu")
SESSION = """
import time
from bench.instruments.progress import Progress, PytestScreen

def bench_steps(request):
    screen = PytestScreen(request.config)
    screen.seconds = 0.0
    progress = Progress(screen)
    for what in ("s2", "b2"):
        print("captured")
        with progress.of(what, 1, long=True) as told:
            told.prepare("making the networks")
            told("ours compiled", 0, 2)
            for number in (1, 2):
                told("ours", number, 2)

def bench_after():
    pass
"""


class Screen:
    """Takes lines down, with the time of the clock, which stands unless moved."""

    def __init__(self, seconds):
        self.seconds, self.time, self.lines, self.last = seconds, 0.0, [], []

    def show(self, text):
        self.lines.append((self.time, text))

    def end(self, text):
        self.last.append(text)

    def now(self):
        return self.time


def measured(screen, *, long, warmups=2, seconds=4.0):
    """Measure two variants in three rounds, each call of so many seconds; the session begins before."""
    screen.time = -100.0
    progress = Progress(screen, screen.now)
    screen.time = 0.0
    with progress.of("s2", warmups, long=long) as told:
        for number in range(4):
            for variant in ("plain eager", "ours compiled"):
                told(variant, number, 3)
                screen.time += seconds


def test_each_warm_up_of_a_long_measurement_is_shown_and_rounds_now_and_then():
    screen = Screen(10.0)
    measured(screen, long=True)
    assert screen.lines == [
        (0.0, "s2: plain eager: warm-up, 1 of 2"),
        (4.0, "s2: ours compiled: warm-up and compile, 2 of 2"),
        (16.0, "s2: plain eager: round 2 of 3, about 16 s left"),
        (28.0, "s2: ours compiled: round 3 of 3, about 4 s left"),
    ]
    assert screen.last == ["s2: measured in 32 s"]


def test_the_time_left_does_not_count_the_warm_up():
    screen = Screen(0.0)
    progress = Progress(screen, screen.now)
    with progress.of("s2", 1) as told:
        told("ours", 0, 4)
        screen.time += 1000.0
        for number in range(1, 5):
            told("ours", number, 4)
            screen.time += 30.0
    assert [text for _, text in screen.lines][1:] == [
        "s2: ours: round 1 of 4",
        "s2: ours: round 2 of 4, about 1 min 30 s left",
        "s2: ours: round 3 of 4, about 1 min 00 s left",
        "s2: ours: round 4 of 4, about 30 s left",
    ]


def test_a_short_measurement_leaves_no_line():
    screen = Screen(10.0)
    measured(screen, long=False, seconds=1.0)
    assert (screen.lines, screen.last) == ([], [])


def test_a_failed_measurement_does_not_say_that_it_was_measured():
    screen = Screen(10.0)

    def interrupted():
        with Progress(screen, screen.now).of("s2", 1, long=True) as told:
            told("ours", 0, 1)
            screen.time = 65.0
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert screen.last == ["s2: stopped after 1 min 05 s"]


def test_durations():
    said = [duration(seconds) for seconds in (0.4, 59.4, 59.6, 3599.4, 3600, 7384)]
    assert said == ["0 s", "59 s", "1 min 00 s", "59 min 59 s", "1 h 00 min", "2 h 03 min"]


def test_progress_is_told_before_every_call():
    told = []
    variants = {name: lambda name=name: told.append(f"call {name}") for name in "ab"}
    progress = lambda *at: told.append(at)  # noqa: E731
    rows.take(variants, CPU, rounds=2, warmup=1, before=lambda: told.append("before"), progress=progress)
    assert told[::3] == [(name, number, 2) for number in range(3) for name in "ab"]
    assert told[1::3] == ["before"] * 6
    assert told[2::3] == ["call a", "call b"] * 3


@pytest.fixture
def command(tmp_path):
    (tmp_path / "bench_it.py").write_text(SESSION)
    (tmp_path / "pytest.ini").write_text("[pytest]\npython_files = bench_*.py\npython_functions = bench_*\n")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": str(rows.ROOT), "COLUMNS": "60", "NO_COLOR": "1", "TERM": "xterm"}
    options = {"cwd": tmp_path, "env": environment, "stdin": subprocess.DEVNULL}
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:benchmark"], options


def test_a_pipe_gets_plain_lines_with_capture_on(command):
    command, options = command
    done = subprocess.run(command, **options, capture_output=True, text=True, check=True)
    assert "captured" not in done.stdout
    start = done.stdout.index("bench_it.py")
    *lines, after = [line.strip() for line in done.stdout[start:].splitlines()[:12]]
    assert lines == [
        "bench_it.py",
        "s2: making the networks",
        "s2: ours compiled: warm-up and compile, 1 of 1",
        "s2: ours: round 1 of 2",
        "s2: ours: round 2 of 2, about 0 s left",
        "s2: measured in 0 s",
        "b2: making the networks",
        "b2: ours compiled: warm-up and compile, 1 of 1",
        "b2: ours: round 1 of 2",
        "b2: ours: round 2 of 2, about 0 s left",
        "b2: measured in 0 s .",
    ]
    assert after.startswith("bench_it.py .")
    done = subprocess.run([*command, "-q"], **options, capture_output=True, text=True, check=True)
    assert "s2" not in done.stdout  # who asks for less gets less


def test_a_terminal_has_one_line_that_is_updated(command):
    command, options = command
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, **options, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        raw = b""
        try:
            while part := os.read(ours, 4096):
                raw += part
        except OSError:  # how a terminal ends on Linux
            pass
        os.close(ours)
    assert process.returncode == 0
    text = raw.decode().replace("\r\n", "\n")
    seen = [line.rpartition("\r")[2].rstrip() for line in text[text.index("bench_it.py") :].split("\n")]
    assert seen[:4] == ["bench_it.py", "s2: measured in 0 s", "b2: measured in 0 s .", seen[3]]
    assert seen[3].startswith("bench_it.py .")
    updates = next(line for line in text.split("\n") if "b2: measured" in line).split("\r")
    assert [part for part in updates if part.strip()] == [
        "b2: making the networks",
        "b2: ours compiled: warm-up and compile, 1 of 1",
        "b2: ours: round 1 of 2",
        "b2: ours: round 2 of 2, about 0 s left",
        "b2: measured in 0 s .",
    ]
    assert max(map(len, updates)) < 60
