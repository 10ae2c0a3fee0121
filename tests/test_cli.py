"""What the commands share."""

import dataclasses
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
import tyro

from fastmask import train
from fastmask.cli import check_out, fail, parse, pick_device, run_command


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    source: tyro.conf.Positional[str]
    steps: int = 3
    """Number of samples."""
    rate: float = 0.5
    kind: Literal["a", "b"] = "a"
    labels: tuple[int, ...] = ()


def parsed(*argv, default=None):
    return parse(Flags, argv, prog="prog", description="Does it.", default=default)


def test_values_and_defaults():
    assert parsed("x") == Flags(source="x")
    flags = parsed("x", "--steps", "7", "--rate=1e-3", "--kind", "b", "--labels", "2", "0")
    assert flags == Flags(source="x", steps=7, rate=1e-3, kind="b", labels=(2, 0))
    assert parsed(default=Flags(source="y", steps=9)) == Flags(source="y", steps=9)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["x", "--stepz", "3"], "--stepz, 3: did you mean --steps?"),
        (["x", "--step", "3"], "--step, 3: did you mean --steps?"),
        (["x", "y"], "Unrecognized options: y"),
        (["x", "--mirror"], "--mirror is called --flip now"),
        (["x", "--no-mirror=1"], "--no-mirror is called --no-flip now"),
        (["x", "--num-steps", "9"], "--num-steps is called --sample-steps now"),
        (["x", "--steps", "2.5"], "--steps: invalid literal for int() with base 10: '2.5'"),
        (["x", "--steps"], "--steps"),
        (["x", "--rate", "fast"], "--rate: could not convert string to float: 'fast'"),
        (["x", "--kind", "c"], "invalid choice 'c'"),
        (["x", "--labels", "1", "b"], "['1', 'b']"),
        ([], "SOURCE is missing: usage: prog SOURCE [--FLAG VALUE ...]"),
        (["--steps", "3"], "SOURCE is missing: usage: prog SOURCE [--FLAG VALUE ...]"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_mistakes_are_one_line(argv, message, encoding, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))  # decides how tyro draws its boxes
    with pytest.raises(ValueError, match=r"\w") as error:
        parsed(*argv)
    assert message in str(error.value)
    assert str(error.value).isascii()
    assert "\n" not in str(error.value)
    assert "---" not in str(error.value)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--sigma-data", "-1"], "--sigma-data must be a number above 0, not -1.0"),
        (["--preset", "digits-flow", "--t-std", "nan"], "--t-std must be between 0 and 2.0, not nan"),
    ],
)
def test_what_a_dataclass_refuses_names_the_flag(argv, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        train.main(argv)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Required:
    source: tyro.conf.Positional[str]
    first_rate: float
    rate: float


@pytest.mark.parametrize(
    ("argv", "missing"),
    [
        ([], "SOURCE and --first-rate and --rate are missing"),
        (["--rate", "1"], "SOURCE and --first-rate are missing"),
        (["x"], "--first-rate and --rate are missing"),
        (["x", "--first-rate", "1"], "--rate is missing"),
    ],
)
def test_missing_arguments_are_named(argv, missing):
    usage = "usage: prog SOURCE --first-rate FLOAT --rate FLOAT [--FLAG VALUE ...]"
    with pytest.raises(ValueError, match=f"^{re.escape(f'{missing}: {usage}')}$"):
        parse(Required, argv, prog="prog", description="Does it.")


def test_help_describes_the_flags(capsys):
    with pytest.raises(SystemExit) as stop:
        parsed("--help")
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for part in ("Does it.", "--steps INT", "Number of samples."):
        assert part in out


def raising(error):
    def command(argv):
        raise error

    return command


@pytest.mark.parametrize(
    "allocate", [lambda _: torch.empty(2**50), lambda _: bytearray(2**50)], ids=["torch", "Python"]
)
def test_too_little_memory_of_the_machine_is_one_line(allocate, capsys):
    with pytest.raises(SystemExit) as stop:
        run_command("name", allocate)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("name: error: out of memory: give a smaller --micro-batch-size or --batch-size")
    assert said.count("\n") == 1


def test_memory_is_saved_by_flags_that_the_command_has(capsys):
    with pytest.raises(SystemExit):
        run_command("name", raising(MemoryError()), "--count")
    assert capsys.readouterr().err == "name: error: out of memory: give a smaller --count\n"


def test_a_file_that_cannot_be_written_is_known_before_the_work(tmp_path, monkeypatch):
    check_out("--out", tmp_path / "new" / "folder" / "a.json")
    check_out("--out", Path("a.json"))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    check_out("--out", tmp_path / "file")  # is replaced
    for path, message in [
        (tmp_path, f"--out {tmp_path}: {tmp_path} is a folder"),
        (tmp_path / "file" / "a.json", f"--out {tmp_path}/file/a.json: {tmp_path}/file is a file"),
    ]:
        with pytest.raises(ValueError, match=f"^{re.escape(message)}: name a file in a folder"):
            check_out("--out", path)
    monkeypatch.setattr("os.access", lambda folder, mode: folder != tmp_path)  # root may write everywhere
    with pytest.raises(ValueError, match=f"--out {tmp_path}/new/a: nothing can be written to {tmp_path}: name another"):
        check_out("--out", tmp_path / "new" / "a")


def test_another_runtime_error_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="a fault"):
        run_command("name", raising(RuntimeError("a fault")))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("first\n  second"), "name: error: first second\n"),
        (FileNotFoundError(2, "No such file", "a.png"), "name: error: [Errno 2] No such file: 'a.png'\n"),
        (BrokenPipeError(32, "Broken pipe"), "name: error: [Errno 32] Broken pipe\n"),  # not that of the output
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
            "name: error: out of GPU memory: give a smaller --micro-batch-size or --batch-size (CUDA out of memory)\n",
        ),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_code_2(error, line, capsys):
    with pytest.raises(SystemExit) as stop:
        run_command("name", raising(error))
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", line)


def test_other_errors_keep_their_traceback():
    with pytest.raises(KeyError):
        run_command("name", raising(KeyError("a bug")))


def test_an_interrupt_is_quiet(capsys):
    with pytest.raises(SystemExit) as stop:
        run_command("name", raising(KeyboardInterrupt()))
    assert stop.value.code == 130
    assert capsys.readouterr() == ("", "")


ROOT = Path(__file__).parent.parent
COMMANDS = sorted(path for path in (ROOT / "fastmask").rglob("*.py") if '__name__ == "__main__"' in path.read_text())


# Those that train or draw share `run_command`, so one of them is enough for what does not depend on the command.
SHARING = [path for path in COMMANDS if "kernels" not in path.parts]
READ = [(path, "") for path in COMMANDS] + [(path, "1") for path in COMMANDS if path not in SHARING[:-1]]


def test_the_commands_share_what_reports_mistakes():
    assert len(SHARING) == len(COMMANDS) - 1
    for path in SHARING:
        command = rf'if __name__ == "__main__":\n    run_command\("fastmask.{path.stem}", main(, "--[^"]+")?\)\n\Z'
        assert re.search(command, path.read_text()), path


@pytest.mark.parametrize(("path", "unbuffered"), READ, ids=lambda v: v or "buffered" if isinstance(v, str) else v.name)
def test_a_reader_that_leaves_is_not_an_error(path, unbuffered):
    """As with `| head`, but that the pipe is closed before the first line. Without a buffer the first write fails."""
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", module, *(["--help"] if module != "fastmask.kernels" else [])]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, env=environment, check=False
        )
    finally:
        os.close(write)
    assert done.stderr == ""
    assert done.returncode in (0, 1, -13)  # 0: all was done before it showed; -13: by SIGPIPE, as other programs end


def test_arguments_are_the_process_s(monkeypatch):
    got = []
    monkeypatch.setattr(sys, "argv", ["prog", "a", "--b"])
    run_command("name", got.extend)
    assert got == ["a", "--b"]


def test_fail():
    command = [sys.executable, "-c", "from fastmask.cli import fail; fail('prog', 'no')"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "prog: error: no\n")
    with pytest.raises(SystemExit):
        fail("prog", "no")


def test_devices():
    auto = pick_device("auto")
    assert auto.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["tpu", "meta", "", "cuda:x"])
def test_what_is_no_device(name):
    with pytest.raises(ValueError, match=f"--device must be auto, cpu, cuda or cuda:N, not '{name}'"):
        pick_device(name)


def test_a_gpu_that_is_not_there():
    with pytest.raises(ValueError, match=r"--device cuda:99: this machine has \d+ usable GPUs"):
        pick_device("cuda:99")
