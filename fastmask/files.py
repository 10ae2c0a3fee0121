"""Files that are whole or absent, whatever stops the process that writes them."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_UMASK = os.umask(0)
os.umask(_UMASK)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path that becomes ``path`` when the block ends well and is removed otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    try:
        yield partial
        if partial.exists():
            apply_umask(partial)
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


def apply_umask(path: Path) -> None:
    """Let others read a file as the umask says: safetensors makes files that its owner alone can read."""
    path.chmod(0o666 & ~_UMASK)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a file as a lock inside the block; the system lets go of it when the process ends, however it does.

    Raises:
        ValueError: another process holds it; says which, and on which machine.
    """
    import fcntl  # noqa: PLC0415  (not on Windows, where nothing that needs it runs)

    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(descriptor, 300).decode(errors="replace").strip() or "another process"
            raise ValueError(f"{path.parent} is in use by {holder}: wait for it, or name another folder") from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        os.close(descriptor)


def sync(file: Any) -> None:
    """Wait until what was written to an open file is on the disk."""
    file.flush()
    os.fsync(file.fileno())
