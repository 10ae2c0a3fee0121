"""Files that are whole or absent, whatever stops the process that writes them, and files that may be planted."""

import contextlib
import errno
import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_UMASK = os.umask(0)
os.umask(_UMASK)
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path that becomes ``path`` when the block ends well and is removed otherwise.

    An OSError of a full or failing disk names ``path``, which the system's own error does not.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    try:
        with named(path):
            partial.unlink(missing_ok=True)  # of a killed process, or a link that would be written through
            yield partial
            if partial.exists():
                apply_umask(partial)
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Let an OSError of a full or failing disk inside the block name a file, which the system's own error does not."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_ERRORS and error.filename is None:
            error.filename = str(path)
        raise


def write_durably(path: Path, content: bytes) -> None:
    """Write a file that is there, whole, even if the machine loses its power after this returned."""
    with atomic_write(path) as partial, partial.open("wb") as file:
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
def locked(path: Path, patience: float = 0.0) -> Iterator[None]:
    """Hold a file as a lock inside the block; the system lets go of it when the process ends, however it does.

    Args:
        path: the file.
        patience: seconds to wait for it.

    Raises:
        ValueError: another process holds it; says which, and on which machine.
    """
    import fcntl  # noqa: PLC0415  (not on Windows, where nothing that needs it runs)

    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = open_lock(path)
    try:
        until = time.monotonic() + patience
        while True:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() < until:
                    time.sleep(0.1)
                    continue
                holder = os.read(descriptor, 300).decode(errors="replace").strip() or "another process"
                raise ValueError(f"{path.parent} is in use by {holder}: wait for it, or name another folder") from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        os.close(descriptor)


class Presence:
    """Tells whether a path still is the file that it was: not removed, and not in a folder that was moved or replaced.

    Args:
        path: the file.
        interval: seconds in which one look is enough, since a file system may be slow.
    """

    def __init__(self, path: Path, interval: float = 5.0) -> None:
        self._path, self._interval = path, interval
        self._first, self._looked_at = self._look(), time.monotonic()

    def is_lost(self) -> bool:
        """Return whether it was seen that the file is gone, or is another."""
        if time.monotonic() - self._looked_at < self._interval:
            return False
        self._looked_at = time.monotonic()
        return self._look() != self._first

    def is_another(self) -> bool:
        """Return whether there is a file by now that somebody else has made."""
        return self._look() not in (None, self._first)

    def _look(self) -> tuple[int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino


def sync(file: Any) -> None:
    """Wait until what was written to an open file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def cache_folder() -> Path:
    """Return the folder for what can be had again: that of the environment's FASTMASK_CACHE, or ~/.cache/fastmask."""
    return Path(os.environ.get("FASTMASK_CACHE") or "~/.cache/fastmask").expanduser()


def open_regular(path: Path | str) -> int:
    """Return a descriptor that reads a regular file.

    Raises:
        ValueError: a pipe, a device or anything else that need not have an end.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    return _checked_regular(descriptor, path)


def read_regular(path: Path | str, max_bytes: int | None = None) -> bytes:
    """Return the content of a regular file; a ValueError for any other kind and for one above ``max_bytes``."""
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if max_bytes is not None and size > max_bytes:
            raise ValueError(f"{path} has {size:,} bytes, which is above the limit of {max_bytes:,}")
        return file.read(size)  # not to the end: a file may grow while it is read


def open_lock(path: Path) -> int:
    """Return a descriptor of a lock file, which is created if absent and never emptied.

    Raises:
        ValueError: another kind of file, or a link, by which somebody else's file would be opened for writing.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o644)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(f"{path} is a symbolic link, which a lock file must not be: remove it") from error
        raise
    _checked_regular(descriptor, path)
    if os.fstat(descriptor).st_nlink > 1:
        os.close(descriptor)
        raise ValueError(f"{path} is a hard link to another file, which a lock file must not be: remove it")
    return descriptor


def _checked_regular(descriptor: int, path: Path | str) -> int:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path} is not a regular file")
    return descriptor
