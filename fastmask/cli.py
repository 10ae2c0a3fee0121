"""Shared code of the commands: argument parsing (tyro), user errors reported in one line."""

import contextlib
import dataclasses
import io
import os
import re
import select
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import tyro

from fastmask.console import without_secrets
from fastmask.help import needs_value, positional, show_page, usage_of

T = TypeVar("T")

_RENAMED = {"--mirror": "--flip", "--no-mirror": "--no-flip", "--num-steps": "--sample-steps"}
_FLAT = (tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands)
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_BOX = re.compile(r"[\u2500-\u257f]|^ *-{3,} *$")  # box-drawing characters, or hyphens if the output is not UTF-8


def parse(kind: type[T], argv: Sequence[str], *, prog: str, description: str, default: T | None = None) -> T:
    """Parse the arguments of a command into a dataclass.

    Args:
        kind: the dataclass.
        argv: the arguments.
        prog: name of the command, for `--help`.
        description: first lines of `--help`.
        default: instance with the default values.

    Raises:
        ValueError: an unknown flag (suggests similar ones) or an invalid value.
        SystemExit: after `--help`, with code 0.
    """
    if show_page(argv, kind, prog=prog, description=description, default=default):
        sys.exit(0)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            if default is None:
                return tyro.cli(kind, prog=prog, description=description, args=argv, config=_FLAT)
            return tyro.cli(kind, prog=prog, description=description, args=argv, default=default, config=_FLAT)
    except SystemExit:
        message = _one_line(said.getvalue())
        if message.startswith("Missing from"):
            raise ValueError(f"{_missing(kind, message)}: {usage_of(kind, prog)}") from None
        for name in (argument.split("=")[0] for argument in argv):
            if name in _RENAMED and message.startswith("Unrecognized") and name in message:
                raise ValueError(f"{name} is called {_RENAMED[name]} now") from None
        raise ValueError(message) from None


def pick_device(name: str) -> torch.device:
    """Return a device by name; "auto" is the GPU if there is one. A ValueError if it is not usable."""
    try:
        device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, not {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: this machine has {torch.cuda.device_count()} usable GPUs")
    return device


def check_out(flag: str, path: Path) -> None:
    """Raise a ValueError, before the work, if a file cannot be written; its folder need not exist yet."""
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not above.is_dir():
        wrong = f"{path} is a folder" if path.is_dir() else f"{above} is a file"
        raise ValueError(f"{flag} {path}: {wrong}: name a file in a folder, or in one that is made")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{flag} {path}: nothing can be written to {above}: name another folder")


def run_command(
    name: str, command: Callable[[Sequence[str]], None], smaller: str = "--micro-batch-size or --batch-size"
) -> None:
    """Run a command on the process's arguments; user errors are printed in one line, with exit code 2.

    If the reader of the output closes the pipe, such as `head`, exit silently with code 1.

    Args:
        name: name of the command, for messages.
        command: the command.
        smaller: the flags that need less memory with a smaller value.
    """
    try:
        command(sys.argv[1:])
    except BrokenPipeError as error:
        if not _reader_has_left():  # another pipe or a socket broke
            fail(name, str(error))
        sys.exit(1)
    except torch.OutOfMemoryError as error:
        fail(name, f"out of GPU memory: give a smaller {smaller} ({str(error).split('.')[0]})")
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):  # torch's CPU allocator
            raise
        reason = f" ({error})" if str(error) else ""
        fail(name, f"out of memory: give a smaller {smaller}{reason}")
    except (ValueError, OSError) as error:
        fail(name, str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        _flush()


def fail(name: str, message: str) -> None:
    """Print one line to stderr and exit with code 2."""
    sys.stderr.write(f"{name}: error: {without_secrets(' '.join(message.split()))}\n")
    sys.exit(2)


def _reader_has_left() -> bool:
    """Return whether stdout is a pipe that its reader has closed."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
    except (AttributeError, OSError):  # no poll() on this system, or stdout is not a file
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _flush() -> None:
    """Flush stdout now: at exit a broken pipe would print a traceback."""
    if sys.stdout is None:  # closed before Python started
        return
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _missing(kind: Any, message: str) -> str:
    """Return which arguments are missing, from tyro's message, which lists them; positional ones come first."""
    plain, listed = positional(kind), message.partition(": ")[2]
    names = [field.name for field in dataclasses.fields(kind) if needs_value(field)]
    flags = {name: "--" + name.replace("_", "-") for name in names if name not in plain}
    missing = [name.upper() for name in names if name in plain and not listed.startswith("--")]
    missing += [flag for flag in flags.values() if flag in listed.split()]
    return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"


def _one_line(box: str) -> str:
    """Convert tyro's boxed error to one line: the message and the suggested flags."""
    lines = [_BOX.sub("", _ANSI.sub("", line)).strip() for line in box.splitlines()[1:]]
    while lines and not lines[0]:
        lines.pop(0)
    message = " ".join(lines[: lines.index("")]) if "" in lines else " ".join(lines)
    near = [line.split()[0] for line in lines if line.startswith("--")]
    if message.startswith("Unrecognized") and near:
        return f"{message}: did you mean {' or '.join(near[:3])}?"
    refused = re.fullmatch(r"Error parsing [\w.]+: ([a-z_]+)( must .*)", message)
    if refused:  # by the check of a dataclass, which names its field
        return f"--{refused[1].replace('_', '-')}{refused[2]}"
    return f"{message} (--help lists every flag)"
