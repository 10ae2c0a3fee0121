"""The campaign in miniature: what it measures, what it refuses, and how it resumes where it stopped."""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import rows
from bench.campaign import gate
from bench.campaign.__main__ import PARTS, Part, main, run_parts
from bench.campaign.clock import TimeUp, share, time_box
from bench.campaign.state import Campaign, DeviceLostError

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


@pytest.fixture
def campaign(tmp_path):
    return Campaign(CPU, tmp_path / "rows.jsonl")


@pytest.fixture(autouse=True)
def started_now(monkeypatch):
    """The campaign's minutes count from the start of its process, which may be long ago in a process of many tests."""
    monkeypatch.setattr("bench.campaign.__main__.STARTED", time.monotonic())


def part(run, seconds=1.0):
    return Part(seconds, "a stand-in", lambda campaign: [], run)


# On a bare machine


@pytest.fixture
def bare_machine(tmp_path):
    """Return an environment in which Python finds torch, triton, numpy, pytest and what they ask for, and no more."""
    (tmp_path / "sitecustomize.py").write_text("import bare\n")  # in the processes of a process too
    path = os.pathsep.join(map(str, (tmp_path, ROOT / "tests", ROOT)))
    return {**os.environ, "PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


@pytest.mark.once
def test_the_miniature_does_every_part_there(tmp_path, bare_machine):
    """In a fresh process without what a GPU machine may lack; safetensors is asked for late."""
    program = "import runpy, sys\ntry:\n    runpy.run_module('bench.campaign', run_name='__main__', alter_sys=True)\n"
    program += "except SystemExit as stop:\n    code = stop.code\nimport fastmask\n"
    program += "assert not hasattr(fastmask, 'load_maskdits')\ntry:\n    fastmask.load_maskdit\n"
    program += "except ImportError as error:\n    assert 'safetensors' in str(error)\n    sys.exit(code)\nsys.exit(3)"
    command = [sys.executable, "-c", program, "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env=bare_machine, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not measured" not in done.stdout
    assert ", 0 failures: " in done.stdout
    (file,) = (tmp_path / "out").glob("*.jsonl")
    stored = list(rows.read(file))
    assert {row["bench"] for row in stored} == {"device", "step", "check", "kernel", "absent", "tune", "digits"}
    assert {row["variant"] for row in stored if row["bench"] == "step"} == {"ours", "plain eager", "products"}
    assert {row["case"]["of"] for row in stored if row["bench"] == "check"} == {"network", "ops", "pytest"}
    assert all(row["miniature"] and row["code"] and row["run"] for row in stored)
    assert "A miniature on a CPU" in file.with_suffix(".md").read_text()


@pytest.mark.once
def test_every_test_for_a_gpu_is_found_there(bare_machine):
    """Each file that has such tests imports. DALI's makes its images with Pillow, so without that it is skipped."""
    files = gate.gpu_tests()
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, env=bare_machine, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {line.split("::")[0] for line in done.stdout.splitlines() if "::" in line}
    missing = {str(Path(file).relative_to(ROOT)) for file in files} - found
    quoting = "tests/test_campaign_parts.py"  # has one as text
    assert missing == {"tests/data/images/test_dali.py", quoting}, done.stdout


def test_load_maskdit_is_still_exported():
    package = importlib.import_module("fastmask")
    assert package.load_maskdit is importlib.import_module("fastmask.diffusion.weights").load_maskdit
    assert all(hasattr(package, name) for name in package.__all__)


# Time


def test_a_time_box_ends_what_a_compiler_would_swallow():
    def swallow():
        while time.monotonic() < start + 5:
            with contextlib.suppress(Exception):
                time.sleep(0.01)

    start = time.monotonic()
    with pytest.raises(TimeUp), time_box(0.05):
        swallow()
    assert time.monotonic() < start + 2
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_what_a_part_spares_goes_to_the_later_ones(campaign):
    assert share(60, [1, 2, 3]) == 10
    boxes = []
    campaign.recover = lambda what: None  # which takes a moment
    parts = {name: part(lambda c: boxes.append(c.left())) for name in ("a", "b", "c")}
    run_parts(campaign, parts, time.monotonic() + 60)
    assert boxes == pytest.approx([20, 30, 60], abs=0.5)


def test_a_part_that_takes_too_long_keeps_its_rows_and_the_next_one_runs(campaign, capsys):
    def slow(c):
        c.store("x", {"n": 1}, "ours", {})
        time.sleep(5)

    ran = []
    run_parts(campaign, {"slow": part(slow), "next": part(ran.append)}, time.monotonic() + 0.4)
    assert ran
    assert len(list(rows.read(campaign.path))) == 1
    assert "are over" in capsys.readouterr().out


# Rows


@pytest.fixture
def programs(monkeypatch):
    """Return the list of programs that rows start, whose answers are made up; nothing is remembered of before."""
    started = []

    def run(command, **options):
        started.append(command[0])
        return subprocess.CompletedProcess(command, 0, "590.1, 1980 MHz, 3201 MHz, 700.00 W\n", "")

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(subprocess, "run", run)
    for asked in (rows.commit, rows._driver):
        asked.cache_clear()
    yield started
    for asked in (rows.commit, rows._driver):
        asked.cache_clear()


def test_the_driver_and_git_are_asked_once_per_process(programs, tmp_path):
    """Each takes a tenth of a second and more, and a campaign stores hundreds of rows."""
    for _ in range(3):
        row = rows.append({"bench": "x"}, torch.device("cuda"), tmp_path / "rows.jsonl")
    assert sorted(programs) == ["git", "git", "nvidia-smi"]
    assert {"driver_version": "590.1", "clocks.sm": "1980 MHz", "device": "NVIDIA H200"}.items() <= row.items()
    assert len(list(rows.read(tmp_path / "rows.jsonl"))) == 3
    rows.machine(torch.device("cuda"))["driver_version"] = "changed"  # by a caller
    assert rows.machine(torch.device("cuda"))["driver_version"] == "590.1"


def test_a_container_without_nvidia_smi_still_stores_rows(programs, monkeypatch, tmp_path):
    def run(command, **options):
        raise FileNotFoundError(command[0])

    monkeypatch.setattr(subprocess, "run", run)
    row = rows.append({"bench": "x"}, torch.device("cuda"), tmp_path / "rows.jsonl")
    assert row["driver_version"] == row["commit"] == "unknown"


# What goes wrong


def test_an_error_is_stored_and_not_tried_again_in_this_call(campaign):
    with campaign.attempt("step", "ours", preset="a"):
        raise RuntimeError("no such luck\nmore")
    (row,) = rows.read(campaign.path)
    assert row["case"] == {"bench_of": "step", "preset": "a"}
    assert "RuntimeError: no such luck" in row["error"]
    assert campaign.is_done("step", "ours", preset="a")
    assert not campaign.is_done("step", "ours", preset="b")
    assert not campaign.is_done("step", "ours compiled", preset="a")
    assert not Campaign(CPU, campaign.path).is_done("step", "ours", preset="a")


def test_a_lost_gpu_ends_the_process_and_a_new_one_takes_over(tmp_path, monkeypatch):
    def lose(c):
        c.store("x", {"n": 1}, "ours", {})
        raise DeviceLostError("illegal access")

    def take_over(program, command):
        commands.append(command)
        raise SystemExit(0)

    commands = []
    monkeypatch.setitem(PARTS, "device", part(lose))
    monkeypatch.setattr("os.execv", take_over)
    with pytest.raises(SystemExit):
        main(["--parts", "device", "--out", str(tmp_path)])
    (command,) = commands
    assert command[1:6] == ["-m", "bench.campaign", "--parts", "device", "--out"]
    (file,) = tmp_path.glob("*.jsonl")
    assert command[command.index("--run") + 1] == next(rows.read(file))["run"]
    assert float(command[command.index("--until") + 1]) > time.monotonic()
    assert command[command.index("--from-part") + 1] == "device"


def test_the_parts_before_the_one_that_was_lost_do_not_get_their_time_again(tmp_path, monkeypatch):
    ran = []
    for name in ("device", "tests", "digits"):
        monkeypatch.setitem(PARTS, name, part(lambda c, name=name: ran.append(name)))
    assert main(["--parts", "device,tests,digits", "--out", str(tmp_path), "--from-part", "tests"]) == 0
    assert ran == ["tests", "digits"]


@pytest.fixture
def on_a_gpu(campaign, monkeypatch):
    """Return a campaign on a GPU that is made up: what it says of streams, and whether it answers, can be set."""
    gpu = SimpleNamespace(stream="default", answers=True)

    def synchronize(device=None):
        if not gpu.answers:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    campaign.device, campaign.gpu = torch.device("cuda"), gpu
    monkeypatch.setattr(rows, "machine", lambda device: campaign.machine)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", synchronize)  # waits for the GPU as well
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: gpu.stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: "default")
    return campaign


def fail(campaign, variant="ours", **changed):
    """Attempt a case in vain, after which the GPU has changed."""
    with campaign.attempt("step", variant, preset="a"):
        vars(campaign.gpu).update(changed)
        raise RuntimeError("no such luck")


def test_an_error_of_one_case_does_not_end_the_process(on_a_gpu):
    fail(on_a_gpu)
    assert len(on_a_gpu.find("failure")) == 1


def test_a_gpu_that_answers_no_more_is_lost_whatever_asks_it_first(on_a_gpu):
    """To give memory back waits for the GPU too, and raises the error first."""
    with pytest.raises(DeviceLostError, match="RuntimeError: no such luck"):
        fail(on_a_gpu, answers=False)
    assert on_a_gpu.is_done("step", "ours", preset="a")  # so the next process continues after it


def test_a_failed_capture_ends_the_process(on_a_gpu):
    """Its stream stays the current one; what is measured after it in this process would not be right."""
    with pytest.raises(DeviceLostError, match="a capture failed: RuntimeError: no such luck"):
        fail(on_a_gpu, "ours graphs", stream="of the capture")
    assert on_a_gpu.is_done("step", "ours graphs", preset="a")


@pytest.mark.parametrize(("names", "lost"), [(("slow", "next"), True), (("slow",), False)])
def test_a_capture_that_the_clock_ends_goes_on_with_the_next_part_in_a_new_process(on_a_gpu, names, lost):
    def slow(c):
        c.gpu.stream = "of the capture"
        time.sleep(5)

    ran = []
    parts = {name: {"slow": part(slow), "next": part(ran.append)}[name] for name in names}
    if lost:
        with pytest.raises(DeviceLostError, match="a capture failed: at the end of slow") as error:
            run_parts(on_a_gpu, parts, time.monotonic() + 0.4)
        assert error.value.part == "next"
    else:
        run_parts(on_a_gpu, parts, time.monotonic() + 0.2)
    assert not ran


def test_a_part_that_loses_the_gpu_outside_its_cases_is_left_in_the_next_process(on_a_gpu):
    def lose(c):
        tried.append(c)
        c.gpu.answers = False
        raise RuntimeError("illegal")

    tried = []
    with pytest.raises(DeviceLostError) as error:
        run_parts(on_a_gpu, {"bad": part(lose), "next": part(tried.append)}, time.monotonic() + 10)
    assert error.value.part == "bad"
    on_a_gpu.gpu.answers = True
    run_parts(on_a_gpu, {"bad": part(lose), "next": part(tried.append)}, time.monotonic() + 10)
    assert len(tried) == 2


def test_an_interrupt_keeps_the_rows(tmp_path, monkeypatch, capsys):
    def interrupted(c):
        c.store("x", {"n": 1}, "ours", {})
        raise KeyboardInterrupt

    monkeypatch.setitem(PARTS, "device", part(interrupted))
    assert main(["--parts", "device", "--out", str(tmp_path)]) == 130
    (file,) = tmp_path.glob("*.jsonl")
    assert len(list(rows.read(file))) == 1
    assert f"interrupted: the 1 rows of this call are in {file}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--parts", "tune,kernel"], "--parts: there is no 'kernel'; there are device, steps"),
        (["--minutes", "0"], "--minutes must be above 0, not 0.0"),
        (["--minutes", "nine"], "argument --minutes: invalid float value: 'nine'"),
        (["--out", __file__], "is a file: name a folder"),
    ],
)
def test_wrong_arguments_get_a_line(argv, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


# Going on


def test_rows_of_other_code_or_another_device_do_not_count(campaign):
    campaign.store("digits", {"preset": "digits"}, "ours", {})
    row = campaign.rows[-1]
    assert Campaign(CPU, campaign.path).is_done("digits")
    for other in ({"code": "0"}, {"device": "another"}):
        campaign.path.write_text(json.dumps(row | other) + "\n")
        assert not Campaign(CPU, campaign.path).is_done("digits")


def test_a_plan_says_what_is_left_and_writes_nothing(tmp_path, capsys):
    assert main(["--plan", "--out", str(tmp_path), "--minutes", "4", "--parts", "device,steps,digits"]) == 0
    out = capsys.readouterr().out
    seconds = [int(line.split()[1]) for line in out.splitlines() if " s  " in line]
    assert sum(seconds) == pytest.approx(4 * 60 - 10, abs=2)
    assert "s2 32 masked-0.5" in out
    assert not list(tmp_path.iterdir())
