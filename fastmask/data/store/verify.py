"""Background verification of a store's files against the manifest's checksums, once per machine."""

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
_WAIT = 0.5  # seconds between attempts to take a lock


class StoppedError(Exception):
    """The verification was cancelled."""


class Verifier:
    """Verifies a store's files in a background thread.

    A verified file is not read again while its path, size and modification time are unchanged; the cache folder holds
    the list. One process per machine reads, the others wait for it.

    Args:
        store: the store's folder.
        manifest: the store's manifest.
    """

    def __init__(self, store: Path, manifest: Manifest) -> None:
        self._store = store
        self._files = [file for shard in manifest.shards for file in shard.files]
        self._compared = Compared(store)
        self._stop, self._done = threading.Event(), threading.Event()
        self._error: Exception | None = None
        self._unkept = self._last_line = ""
        self._told = False
        self._thread = threading.Thread(target=self._run, name="verify", daemon=True)  # a daemon does not block exit

    def start(self) -> None:
        """Start the thread, unless all files are verified already."""
        waiting = [file for file in self._files if file not in self._compared]
        if not waiting:
            self._done.set()
            return
        size = sum(file.bytes for file in waiting) / 1e9
        say(f"{self._store}: {len(waiting)} files ({size:,.2f} GB) are compared with their checksums meanwhile")
        self._last_line = f"{self._store}: all {len(self._files)} files are those of its manifest"
        self._thread.start()

    def poll(self) -> bool:
        """Return whether all files are verified.

        Raises:
            ValueError: a file does not match the manifest; the message names it.
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
        """Stop the thread; the list of verified files is kept."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(5.0)  # do not wait forever for a hanging file system

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
        """Hold the lock that keeps other processes from reading the same files at the same time."""
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
    """The cached list of verified files of a store, with their sizes and modification times.

    Args:
        store: the store's folder.

    Attributes:
        path: path of the cache file.
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
        """Record a file as verified, in the given state (size and modification time) or the current one."""
        self._known[file.name] = state or _state(self._store / file.name, file)

    def keep(self) -> None:
        """Write the list to the cache; an OSError if that fails."""
        with atomic_write(self.path) as partial:
            partial.write_text(json.dumps(self._known))

    def read_again(self) -> None:
        """Merge the list that another process has written; a damaged or missing file counts as empty."""
        with contextlib.suppress(OSError, ValueError):
            self._known = {**parse_object(read_regular(self.path, MAX_BYTES), self.path), **self._known}


def verifier_of(dataset: Dataset, ranks: Ranks) -> Verifier | None:
    """Start verifying a dataset's files and return the verifier; None if the dataset has no checksums.

    Only local rank 0 verifies.
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
