"""Stores at URLs: fetched whole into a folder of this machine, each file against its checksum, then read from there."""

import concurrent.futures
import contextlib
import datetime
import fcntl
import hashlib
import importlib
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastmask.console import say, without_secrets
from fastmask.data.store.manifest import MANIFEST, MAX_BYTES, StoredFile, parse_manifest, read_manifest
from fastmask.data.store.stalls import within
from fastmask.files import atomic_write, cache_folder, open_lock, read_regular, sync, write_durably

_BLOCK = 8 << 20  # bytes asked for at a time
_IN_FLIGHT = 4  # files at once: one connection alone seldom fills the line
_SAY_EVERY = 5.0  # seconds
_FETCHING = ".fetching.json"
_LOCK = ".lock"


class _NoAnswerError(ValueError):
    """Nothing answers at a URL, as opposed to one that answers that it has no such file, or not for us."""


def is_url(data: str) -> bool:
    """Return whether a name of data is a URL, such as s3://bucket/store."""
    return "://" in data


def local_copy(url: str) -> Path:
    """Return the folder of a whole copy of a store, fetched as far as it is not there yet.

    Args:
        url: of the store's folder, of any kind that fsspec reads: s3, gs, http, https, file and so on.

    Returns:
        A folder of its own in that of the environment's FASTMASK_CACHE, or else in ~/.cache/fastmask.

    Raises:
        ValueError: no store there, no way to reach it and no whole copy of it here, a file that is not what the
            manifest says, or no space; what was fetched is kept, and the next call resumes.
    """
    store = RemoteStore(url)
    store.fetch()
    return store.folder


class RemoteStore:
    """A store at a URL, and its copy on this machine.

    All of it is fetched before it is used: training reads records in a random order over the whole store, so its first
    steps want every shard, and files that were fetched when they are first read would only make those steps wait.

    Of the files in the copy's folder those are whole that have their final name, and they are those of the manifest
    that lies there too: `manifest.json` where all are there, `.fetching.json` before that.

    Args:
        url: of the store's folder.

    Attributes:
        url: of the store's folder, as it may be printed.
        folder: of the copy, which may not be there yet.
        manifest: the one at the URL. If nothing answers there, the one of the copy if that is whole.

    Raises:
        ValueError: no store there, or no way to reach it and no whole copy.
    """

    def __init__(self, url: str) -> None:
        url = url.rstrip("/")
        self.url = without_secrets(url)
        self.folder = cache_folder() / _folder_name(url)
        with _one_line(self.url):
            reader = importlib.import_module("fsspec.core")  # late: what trains on files of this machine does without
            self._files_there, self._root = reader.url_to_fs(url, **_options(url))
        self._content = self._read_manifest()
        self.manifest = parse_manifest(self._content, f"{self.url}/{MANIFEST}")
        self._files = [file for shard in self.manifest.shards for file in (shard.records, shard.labels)]

    def plan(self) -> str:
        """Return how large the store is, and how much of it is not here yet."""
        lacking = self._lacking()
        total, to_come = (sum(file.bytes for file in files) / 1e9 for files in (self._files, lacking))
        return (
            f"{len(self._files)} files of {total:,.2f} GB, {len(lacking)} of them ({to_come:,.2f} GB) not yet in "
            f"{self.folder}"
        )

    def fetch(self) -> None:
        """Make the copy whole. Of several processes one fetches, and the others wait for it.

        Raises:
            ValueError: a connection that was cut, a file that is not what the manifest says, or no space.
        """
        if self._is_whole():
            return
        with self._locked():
            if self._is_whole():
                return  # another process has fetched it
            say(f"fetching {self.url}: {self.plan()}")
            try:
                self._begin()
                self._check_space()
                progress = _Progress(self.folder, self._files)
                self._fetch_files(progress)
                write_durably(self.folder / MANIFEST, self._content)
                (self.folder / _FETCHING).unlink()
            except (OSError, ValueError) as error:
                kept = len(self._files) - len(self._lacking())
                raise ValueError(
                    f"{error}; {kept} of {len(self._files)} files are kept, and the same command resumes"
                ) from error
            say(f"fetched {self.url}: {progress.line()}")

    def _read_manifest(self) -> bytes:
        where = f"{self.url}/{MANIFEST}"
        try:
            with _one_line(where):
                content = bytearray()
                for block in within(self._read(f"{self._root}/{MANIFEST}")):
                    content += block
                    if len(content) > MAX_BYTES:
                        raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
                return bytes(content)
        except _NoAnswerError as error:
            path = self.folder / MANIFEST
            try:
                read_manifest(self.folder)
            except ValueError:
                raise error from None
            day = f"{datetime.datetime.fromtimestamp(path.stat().st_mtime):%Y-%m-%d %H:%M}"
            if os.environ.get("WORLD_SIZE", "1") != os.environ.get("LOCAL_WORLD_SIZE", "1"):
                # Their copies may be of several days, which would be trained on as if they were one store.
                raise ValueError(
                    f"{error}; {self.folder} is a whole copy of {day}: where several machines train, give its path"
                ) from error
            say(f"warning: {error}: continuing with the copy of {day} in {self.folder}")
            return read_regular(path, MAX_BYTES)

    def _there(self) -> dict[str, str]:
        """Return the checksums of the files in the copy's folder by their names; some of them may be missing."""
        for path in (self.folder / MANIFEST, self.folder / _FETCHING):
            with contextlib.suppress(OSError, ValueError):
                shards = parse_manifest(read_regular(path, MAX_BYTES), path).shards
                return {file.name: file.sha256 for shard in shards for file in (shard.records, shard.labels)}
        return {}

    def _lacking(self) -> list[StoredFile]:
        there = self._there()
        return [
            file
            for file in self._files
            if there.get(file.name) != file.sha256 or _length(self.folder / file.name) != file.bytes
        ]

    def _is_whole(self) -> bool:
        path = self.folder / MANIFEST
        return path.exists() and read_regular(path, MAX_BYTES) == self._content and not self._lacking()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                lock = open_lock(self.folder / _LOCK)
                stack.callback(os.close, lock)
                progress = _Progress(self.folder, self._files)
                while not _lock(lock):
                    progress()
                    time.sleep(0.2)
            except OSError as error:
                raise ValueError(
                    f"{self.folder} cannot be written ({error}): set FASTMASK_CACHE to a folder that can"
                ) from error
            yield

    def _begin(self) -> None:
        """Drop what is not of this manifest, and put it where it vouches for what is left and for what comes."""
        manifest, fetching = self.folder / MANIFEST, self.folder / _FETCHING
        for partial in self.folder.glob(".partial-*"):
            partial.unlink()  # of a process that was killed
        before = self._there()
        if manifest.exists():
            os.replace(manifest, fetching)
        wanted = {file.name: file.sha256 for file in self._files}
        changed = [name for name in before.keys() | wanted.keys() if before.get(name) != wanted.get(name)]
        for name in changed:
            (self.folder / name).unlink(missing_ok=True)
        if before and changed:
            say(f"{len(changed)} files of {self.url} are others than when it was fetched before")
        write_durably(fetching, self._content)

    def _check_space(self) -> None:
        needed, free = sum(file.bytes for file in self._lacking()), shutil.disk_usage(self.folder).free
        if needed > free:
            raise ValueError(
                f"{self.url} needs {needed / 1e9:,.2f} GB more, {self.folder} has {free / 1e9:,.2f} GB: set "
                f"FASTMASK_CACHE to a folder with more"
            )

    def _fetch_files(self, progress: "_Progress") -> None:
        stop = threading.Event()
        pool = concurrent.futures.ThreadPoolExecutor(_IN_FLIGHT)
        try:
            running = {pool.submit(self._fetch_file, file, stop) for file in self._lacking()}
            while running:
                first = concurrent.futures.FIRST_COMPLETED
                done, running = concurrent.futures.wait(running, _SAY_EVERY, first)
                for future in done:
                    future.result()
                progress()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)

    def _fetch_file(self, file: StoredFile, stop: threading.Event) -> None:
        where, digest, length = f"{self.url}/{file.name}", hashlib.sha256(), 0
        with atomic_write(self.folder / file.name) as partial, partial.open("wb") as copy:
            for block in self._blocks(file.name):
                if stop.is_set():
                    raise concurrent.futures.CancelledError
                length += len(block)
                if length > file.bytes:
                    break
                digest.update(block)
                copy.write(block)
            if length != file.bytes:
                has = "more" if length > file.bytes else f"{length:,}"
                raise ValueError(
                    f"{where} has {has} bytes instead of {file.bytes:,}: it is cut off, or of another store"
                )
            if digest.hexdigest() != file.sha256:
                raise ValueError(f"{where} is damaged, there or on the way: its SHA-256 is not that of the manifest")
            sync(copy)

    def _blocks(self, name: str) -> Iterator[bytes]:
        """Yield the content of a file at the URL."""
        where = f"{self.url}/{name}"
        with _one_line(where):
            yield from within(self._read(f"{self._root}/{name}"))

    def _read(self, path: str) -> Iterator[bytes]:
        # 0 is one stream: not every web server can begin in the middle of a file.
        size = 0 if _is_web(self.url) else _BLOCK
        with self._files_there.open(path, "rb", block_size=size) as file:
            while block := file.read(_BLOCK):
                yield block


class _Progress:
    """Says how far a copy is, read off its folder, so that a process that waits for another can say it too."""

    def __init__(self, folder: Path, files: list[StoredFile]) -> None:
        self._folder, self._files = folder, files
        self._began = self._said = time.monotonic()
        self._first = self._there()[1]

    def __call__(self) -> None:
        if time.monotonic() - self._said >= _SAY_EVERY:
            self._said = time.monotonic()
            say(self.line())

    def line(self) -> str:
        """Return files and bytes that are there, and bytes per second since the first call."""
        done, there = self._there()
        speed = (there - self._first) / (time.monotonic() - self._began)
        total = sum(file.bytes for file in self._files)
        return f"{done}/{len(self._files)} files  {there / 1e9:,.2f}/{total / 1e9:,.2f} GB  {speed / 1e6:,.0f} MB/s"

    def _there(self) -> tuple[int, int]:
        whole = [_length(self._folder / file.name) for file in self._files]
        partial = [_length(self._folder / f".partial-{file.name}") for file in self._files]
        return sum(length >= 0 for length in whole), sum(max(0, length) for length in whole + partial)


@contextlib.contextmanager
def _one_line(where: str) -> Iterator[None]:
    """Make one line of what a backend raises inside the block; a `_NoAnswerError` if nothing answers."""
    try:
        yield
    except ImportError as error:
        missing = getattr(error.__cause__ or error, "name", None)
        said = f"pip install {missing}" if missing else without_secrets(str(error))
        raise ValueError(f"{where} cannot be read: {said}") from error
    except Exception as error:
        # Every backend raises kinds of its own. Of HTTP fsspec says that there is no file, whatever the cause.
        cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
        if isinstance(cause, (FileNotFoundError, KeyError)) or getattr(cause, "status", None) in (404, 410):
            raise ValueError(f"{where} does not exist: is that the URL of a whole store?") from error
        said = without_secrets(" ".join(f"{type(cause).__name__}: {cause}".split())).removesuffix(":")
        line = f"{where} cannot be read ({said})"
        raise (_NoAnswerError if _no_answer(cause) else ValueError)(line) from error


def _is_web(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def _options(url: str) -> dict[str, Any]:
    """Return what fsspec is to know of a URL besides."""
    if not _is_web(url):
        return {}
    # Of itself aiohttp gives a file five minutes in all, which is little for a large shard, and knows of no proxy.
    timeout = importlib.import_module("aiohttp").ClientTimeout(total=None, sock_connect=30, sock_read=60)
    return {"client_kwargs": {"timeout": timeout, "trust_env": True}}


def _no_answer(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return not isinstance(error, (PermissionError, IsADirectoryError, NotADirectoryError))
    # Those of botocore and aiohttp are not all an OSError.
    return any(word in kind.__name__ for kind in type(error).__mro__ for word in ("Connection", "Timeout"))


def _lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _length(path: Path) -> int:
    """Return the length of a file, -1 if there is none."""
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return -1


def _folder_name(url: str) -> str:
    """Return a name that can be read, that no other URL has, and that holds nothing of a query."""
    last = re.sub(r"[^\w.-]", "-", re.split(r"[?#]", url)[0].rpartition("/")[2]).lstrip(".")
    return f"{last}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
