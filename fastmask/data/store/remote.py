"""Stores at URLs: fetched completely to a local folder, with verified checksums, and read from there."""

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

_BLOCK = 8 << 20  # bytes per request
_IN_FLIGHT = 4  # concurrent files: a single connection seldom saturates the network
_SAY_EVERY = 5.0  # seconds
_FETCHING = ".fetching.json"
_LOCK = ".lock"


class _NoAnswerError(ValueError):
    """The server is unreachable, as opposed to one that reports a missing file or no permission."""


def is_url(data: str) -> bool:
    """Return whether the name of a dataset is a URL, such as s3://bucket/store."""
    return "://" in data


def local_copy(url: str) -> Path:
    """Fetch a store, as far as it is not cached yet, and return its local folder.

    Args:
        url: URL of the store's folder, with any scheme that fsspec supports: s3, gs, http, https, file and so on.

    Returns:
        The store's folder below FASTMASK_CACHE from the environment, or else below ~/.cache/fastmask.

    Raises:
        ValueError: there is no store at the URL, it is unreachable and not cached completely, a file does not match the
            manifest, or the disk is full. Fetched files are kept, and the next call resumes.
    """
    store = RemoteStore(url)
    store.fetch()
    return store.folder


class RemoteStore:
    """A store at a URL, and its local copy.

    The store is fetched completely before use: training reads records in random order over the whole store, so the
    first steps need every shard, and fetching on demand would only stall them.

    Files with their final name in the copy's folder are complete, and belong to the manifest in that folder:
    `manifest.json` if all files are present, `.fetching.json` before that.

    Args:
        url: URL of the store's folder.

    Attributes:
        url: the URL without credentials, for messages.
        folder: folder of the copy, which does not have to exist yet.
        manifest: the manifest at the URL; the copy's if the server is unreachable and the copy is complete.

    Raises:
        ValueError: there is no store at the URL, or it is unreachable and not cached completely.
    """

    def __init__(self, url: str) -> None:
        url = url.rstrip("/")
        self.url = without_secrets(url)
        self.folder = cache_folder() / _folder_name(url)
        with _one_line(self.url):
            reader = importlib.import_module("fsspec.core")  # late import: optional, not needed for local files
            self._files_there, self._root = reader.url_to_fs(url, **_options(url))
        self._content = self._read_manifest()
        self.manifest = parse_manifest(self._content, f"{self.url}/{MANIFEST}")
        self._files = [file for shard in self.manifest.shards for file in shard.files]

    def plan(self) -> str:
        """Describe the size of the store, and of its files that are not cached yet."""
        lacking = self._lacking()
        total, to_come = (sum(file.bytes for file in files) / 1e9 for files in (self._files, lacking))
        return (
            f"{len(self._files)} files of {total:,.2f} GB, {len(lacking)} of them ({to_come:,.2f} GB) not yet in "
            f"{self.folder}"
        )

    def fetch(self) -> None:
        """Complete the copy. One of several processes fetches, the others wait for it.

        Raises:
            ValueError: the connection was lost, a file does not match the manifest, or the disk is full.
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
                # Copies of different dates would be trained on as if they were one store.
                raise ValueError(
                    f"{error}; {self.folder} is a whole copy of {day}: where several machines train, give its path"
                ) from error
            say(f"warning: {error}: continuing with the copy of {day} in {self.folder}")
            return read_regular(path, MAX_BYTES)

    def _there(self) -> dict[str, str]:
        """Return the checksums, by name, of the files that belong in the copy's folder; some can be missing."""
        for path in (self.folder / MANIFEST, self.folder / _FETCHING):
            with contextlib.suppress(OSError, ValueError):
                shards = parse_manifest(read_regular(path, MAX_BYTES), path).shards
                return {file.name: file.sha256 for shard in shards for file in shard.files}
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
        """Delete files that do not belong to this manifest, and write it as the manifest of the files in the folder."""
        manifest, fetching = self.folder / MANIFEST, self.folder / _FETCHING
        for partial in self.folder.glob(".partial-*"):
            partial.unlink()  # left by a killed process
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
        """Yield the content of a file at the URL in blocks."""
        where = f"{self.url}/{name}"
        with _one_line(where):
            yield from within(self._read(f"{self._root}/{name}"))

    def _read(self, path: str) -> Iterator[bytes]:
        # 0 reads one stream: not every web server supports range requests.
        size = 0 if _is_web(self.url) else _BLOCK
        with self._files_there.open(path, "rb", block_size=size) as file:
            while block := file.read(_BLOCK):
                yield block


class _Progress:
    """Progress of a copy, measured from its folder, so that a waiting process can report it too."""

    def __init__(self, folder: Path, files: list[StoredFile]) -> None:
        self._folder, self._files = folder, files
        self._began = self._said = time.monotonic()
        self._first = self._there()[1]

    def __call__(self) -> None:
        if time.monotonic() - self._said >= _SAY_EVERY:
            self._said = time.monotonic()
            say(self.line())

    def line(self) -> str:
        """Return fetched files and bytes, and bytes per second since construction."""
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
    """Convert a backend's errors to a ValueError of one line; a `_NoAnswerError` if the server is unreachable."""
    try:
        yield
    except ImportError as error:
        missing = getattr(error.__cause__ or error, "name", None)
        said = f"pip install {missing}" if missing else without_secrets(str(error))
        raise ValueError(f"{where} cannot be read: {said}") from error
    except Exception as error:
        # Each backend has its own exceptions. For HTTP, fsspec raises FileNotFoundError whatever the cause.
        cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
        if isinstance(cause, (FileNotFoundError, KeyError)) or getattr(cause, "status", None) in (404, 410):
            raise ValueError(f"{where} does not exist: is that the URL of a whole store?") from error
        said = without_secrets(" ".join(f"{type(cause).__name__}: {cause}".split())).removesuffix(":")
        line = f"{where} cannot be read ({said})"
        raise (_NoAnswerError if _no_answer(cause) else ValueError)(line) from error


def _is_web(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def _options(url: str) -> dict[str, Any]:
    """Return additional fsspec options for a URL."""
    if not _is_web(url):
        return {}
    # aiohttp's default is five minutes per file, too little for a large shard, and no proxy.
    timeout = importlib.import_module("aiohttp").ClientTimeout(total=None, sock_connect=30, sock_read=60)
    return {"client_kwargs": {"timeout": timeout, "trust_env": True}}


def _no_answer(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return not isinstance(error, (PermissionError, IsADirectoryError, NotADirectoryError))
    # Not all connection errors of botocore and aiohttp are an OSError.
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
    """Return a readable and unique folder name for a URL, without its query."""
    last = re.sub(r"[^\w.-]", "-", re.split(r"[?#]", url)[0].rpartition("/")[2]).lstrip(".")
    return f"{last}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
