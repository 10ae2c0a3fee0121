"""What the commands share: arguments by tyro, one line for what a user can mend, and files that are whole or absent."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import tyro

T = TypeVar("T")

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_BOX = re.compile("[\u2500-\u257f]")


def parse(kind: type[T], argv: Sequence[str], *, prog: str, description: str, default: T | None = None) -> T:
    """Return the arguments of a command as an instance of a dataclass.

    Args:
        kind: the dataclass.
        argv: the arguments.
        prog: how the command is called, for `--help`.
        description: the first lines of `--help`.
        default: where absent arguments come from.

    Raises:
        ValueError: an unknown flag (names the near ones) or a value that cannot be read.
        SystemExit: after `--help`, with code 0.
    """
    said = io.StringIO()
    omit = (tyro.conf.OmitArgPrefixes,)
    try:
        with contextlib.redirect_stderr(said):
            if default is None:
                return tyro.cli(kind, prog=prog, description=description, args=argv, config=omit)
            return tyro.cli(kind, prog=prog, description=description, args=argv, default=default, config=omit)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(_one_line(said.getvalue())) from None


def run_command(name: str, command: Callable[[Sequence[str]], None]) -> None:
    """Run a command on the process's arguments: what a user can mend becomes one line and exit code 2."""
    try:
        command(sys.argv[1:])
    except torch.OutOfMemoryError as error:
        fail(name, f"out of GPU memory: give a smaller --micro-batch-size or --batch-size ({str(error).split('.')[0]})")
    except (ValueError, OSError) as error:
        fail(name, str(error))


def fail(name: str, message: str) -> None:
    """Print one line on the error stream and exit with code 2."""
    sys.stderr.write(f"{name}: error: {' '.join(message.split())}\n")
    sys.exit(2)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path that becomes ``path`` when the block ends well and is removed otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _one_line(box: str) -> str:
    """Return tyro's boxed error as one line: what is wrong, and the flags it thinks were meant."""
    lines = [_BOX.sub("", _ANSI.sub("", line)).strip() for line in box.splitlines()[1:]]
    message = " ".join(lines[: lines.index("")]) if "" in lines else " ".join(lines)
    near = [line.split()[0] for line in lines if line.startswith("--")]
    if message.startswith("Unrecognized") and near:
        return f"{message}: did you mean {' or '.join(near[:3])}?"
    return f"{message} (--help lists every flag)"
