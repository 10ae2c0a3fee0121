"""Files that are whole or absent, whatever stops the process that writes them."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


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


def write_durably(path: Path, content: bytes) -> None:
    """Write a file that is there, whole, even if the machine loses its power after this returned."""
    with whole_file(path) as partial, partial.open("wb") as file:
        file.write(content)
        sync(file)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the names of the files before it too
    finally:
        os.close(folder)


def sync(file: Any) -> None:
    """Wait until what was written to an open file is on the disk."""
    file.flush()
    os.fsync(file.fileno())
