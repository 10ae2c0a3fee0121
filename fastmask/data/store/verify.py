"""Compares a store's files with the checksums of its manifest while training begins, once on each machine."""

import contextlib
import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from fastmask.console import say
from fastmask.data.dataset import Dataset
from fastmask.data.store.manifest import MAX_BYTES, Manifest, StoredFile, parse_object
from fastmask.data.store.reader import StoreDataset
from fastmask.files import atomic_write, cache_folder, open_lock, open_regular, read_regular
from fastmask.ranks import Ranks

_BLOCK = 1 << 20
_WAIT = 0.5  # seconds between looks at a lock that another process holds


class StoppedError(Exception):
    """Nobody wants to know any more."""


class Verifier:
    """Reads a store's files in a thread, and tells whether one of them is not what the manifest says.

    A file that was compared before is not read again while its path, length and time of change are the same; which ones
    were is kept in the cache folder. Of several processes of a machine one reads, and the others wait for it.

    Args:
        store: the store's folder.
        manifest: the store's.
    """

    def __init__(self, store: Path, manifest: Manifest) -> None:
        self._store = store
        self._files = [file for shard in manifest.shards for file in (shard.records, shard.labels)]
        self._compared = Compared(store)
        self._stop, self._done = threading.Event(), threading.Event()
        self._error: Exception | None = None
        self._unkept = self._last_line = ""
        self._told = False
        self._thread = threading.Thread(target=self._run, name="verify", daemon=True)  # it does not keep a process

    def start(self) -> None:
        """Begin, unless all files were compared before."""
        waiting = [file for file in self._files if file not in self._compared]
        if not waiting:
            self._done.set()
            return
        size = sum(file.bytes for file in waiting) / 1e9
        say(f"{self._store}: {len(waiting)} files ({size:,.2f} GB) are compared with their checksums meanwhile")
        self._last_line = f"{self._store}: all {len(self._files)} files are those of its manifest"
        self._thread.start()

    def poll(self) -> bool:
        """Return whether all files have been compared.

        Raises:
            ValueError: a file is not what the manifest says; names it.
        """
        if self._unkept and not self._told:
            say(f"warning: {self._unkept}: which files were compared is not kept, and all are compared at each start")
            self._told = True
        if self._error:
            raise ValueError(str(self._error)) from self._error
        done = self._done.is_set()
        if done and self._last_line:
            say(self._last_line)
            self._last_line = ""
        return done

    def stop(self) -> None:
        """Let the thread end, with what it has compared kept."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(5.0)  # a file system that hangs is not waited for

    def _run(self) -> None:
        try:
            with self._locked():
                self._compared.read_again()
                for file in self._files:
                    if file not in self._compared:
                        self._compare(file)
            self._done.set()
        except StoppedError:
            return
        except Exception as error:  # noqa: BLE001  (`poll` raises it)
            self._error = error

    def _compare(self, file: StoredFile) -> None:
        path = self._store / file.name
        before = _state(path, file)
        digest = hashlib.sha256()
        with open(open_regular(path), "rb") as opened:
            while block := opened.read(_BLOCK):
                if self._stop.is_set():
                    raise StoppedError
                digest.update(block)
        if digest.hexdigest() != file.sha256:
            raise ValueError(
                f"{path} is damaged: its SHA-256 is not that of the manifest; copy or fetch it again, or prepare the "
                f"store again"
            )
        if before == _state(path, file):
            self._compared.add(file, before)
        try:
            if not self._unkept:
                self._compared.keep()
        except OSError as error:
            self._unkept = str(error)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other processes from reading the same files at the same time."""
        try:
            self._compared.path.parent.mkdir(parents=True, exist_ok=True)
            lock = open_lock(self._compared.path.with_suffix(".lock"))
        except (OSError, ValueError) as error:
            self._unkept = str(error)
            yield
            return
        try:
            while not _take(lock):
                if self._stop.wait(_WAIT):
                    raise StoppedError
            yield
        finally:
            os.close(lock)


class Compared:
    """Which files of a store are known to be those of its manifest, by their lengths and times of change.

    Args:
        store: the store's folder.

    Attributes:
        path: where that is kept.
    """

    def __init__(self, store: Path) -> None:
        name = hashlib.sha256(os.fsencode(os.path.realpath(store))).hexdigest()[:16]
        self.path = cache_folder() / "compared" / f"{name}.json"
        self._store = store
        self._known: dict[str, object] = {}
        self.read_again()

    def __contains__(self, file: StoredFile) -> bool:
        try:
            return self._known.get(file.name) == _state(self._store / file.name, file)
        except OSError:
            return False

    def add(self, file: StoredFile, state: list[object] | None = None) -> None:
        """Take down that a file was compared, at a length and time of change, or at those of now."""
        self._known[file.name] = state or _state(self._store / file.name, file)

    def keep(self) -> None:
        """Write what is known, for the next start; an OSError if that cannot be."""
        with atomic_write(self.path) as partial:
            partial.write_text(json.dumps(self._known))

    def read_again(self) -> None:
        """Take over what another process has written; what is damaged or absent is as if nothing were known."""
        with contextlib.suppress(OSError, ValueError):
            self._known = {**parse_object(read_regular(self.path, MAX_BYTES), self.path), **self._known}


def verifier_of(dataset: Dataset, ranks: Ranks) -> Verifier | None:
    """Return what compares a dataset's files with their checksums, begun; None if it has none.

    Of the processes of a machine the first one does it.
    """
    if not isinstance(dataset, StoreDataset) or ranks.local:
        return None
    verifier = Verifier(dataset.path, dataset.manifest)
    verifier.start()
    return verifier


def _state(path: Path, file: StoredFile) -> list[object]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, file.sha256]


def _take(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
