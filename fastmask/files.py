"""Atomic writes, file locks, and safe opening of untrusted paths."""

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
    """Yield a temporary path that is renamed to ``path`` if the block succeeds and removed otherwise.

    An OSError of a full or failing disk gets ``path`` as its file name, which the system's error lacks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    try:
        with named(path):
            partial.unlink(missing_ok=True)  # left by a killed process, or a link that would be followed
            yield partial
            if partial.exists():
                apply_umask(partial)
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Add a file name to an OSError of a full or failing disk inside the block."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_ERRORS and error.filename is None:
            error.filename = str(path)
        raise


def write_durably(path: Path, content: bytes) -> None:
    """Atomic write that is durable: the file survives a power failure after this returns."""
    with atomic_write(path) as partial, partial.open("wb") as file:
        file.write(content)
        sync(file)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # also covers files renamed before
    finally:
        os.close(folder)


def apply_umask(path: Path) -> None:
    """Set the permissions of a file from the umask: safetensors creates files readable by the owner only."""
    path.chmod(0o666 & ~_UMASK)


@contextlib.contextmanager
def locked(path: Path, patience: float = 0.0) -> Iterator[None]:
    """Hold a file lock inside the block; the system releases it when the process ends.

    Args:
        path: the file.
        patience: seconds to wait for the lock.

    Raises:
        ValueError: another process holds the lock; the message has its id and host.
    """
    import fcntl  # noqa: PLC0415  (not on Windows, where nothing needs it)

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
    """Detects whether a path still is the same file: not removed, and not in a moved or replaced folder.

    Args:
        path: the file.
        interval: minimum number of seconds between checks, since the file system can be slow.
    """

    def __init__(self, path: Path, interval: float = 5.0) -> None:
        self._path, self._interval = path, interval
        self._first, self._looked_at = self._look(), time.monotonic()

    def is_lost(self) -> bool:
        """Return whether the file is gone or was replaced, as of the last check."""
        if time.monotonic() - self._looked_at < self._interval:
            return False
        self._looked_at = time.monotonic()
        return self._look() != self._first

    def is_another(self) -> bool:
        """Return whether the path is now a different file."""
        return self._look() not in (None, self._first)

    def _look(self) -> tuple[int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino


def sync(file: Any) -> None:
    """Flush and fsync an open file."""
    file.flush()
    os.fsync(file.fileno())


def cache_folder() -> Path:
    """Return the cache folder: FASTMASK_CACHE of the environment, or ~/.cache/fastmask."""
    return Path(os.environ.get("FASTMASK_CACHE") or "~/.cache/fastmask").expanduser()


def open_regular(path: Path | str) -> int:
    """Open a regular file for reading, and return its descriptor.

    Raises:
        ValueError: a pipe, a device or another file that can be endless.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    return _checked_regular(descriptor, path)


def read_regular(path: Path | str, max_bytes: int | None = None) -> bytes:
    """Return the content of a regular file; a ValueError for other files and for more than ``max_bytes``."""
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if max_bytes is not None and size > max_bytes:
            raise ValueError(f"{path} has {size:,} bytes, which is above the limit of {max_bytes:,}")
        return file.read(size)  # not to the end: the file can grow while it is read


def open_lock(path: Path) -> int:
    """Open a lock file without truncating it, and return its descriptor; it is created if absent.

    Raises:
        ValueError: not a regular file, or a link, which would open another file for writing.
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
