"""The store writer: shard by shard, so that an interrupted process resumes."""

import contextlib
import dataclasses
import fcntl
import json
import os
import platform
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fastmask.data.store.manifest import (
    DATA_OFFSET,
    MANIFEST,
    MAX_CLASSES,
    UNFINISHED,
    Manifest,
    Shard,
    StoredFile,
    check_length,
    npy_header,
    parse_manifest,
    parse_object,
    parse_shard,
    sha256_of,
)
from fastmask.data.store.reader import map_shard
from fastmask.files import atomic_write, open_lock, read_regular, sync, write_durably
from fastmask.ranks import Ranks, barrier, from_first

LOCK = ".lock"


class ShardWriter:
    """Writes the records of one shard.

    Attributes:
        count: number of records so far.
        skipped: names of the items that could not be read; the caller appends to it.
    """

    def __init__(self, records: BinaryIO, manifest: Manifest, num_classes: int = 0) -> None:
        self._records, self._manifest = records, manifest
        self._num_classes = num_classes or MAX_CLASSES
        self._dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self._labels: list[NDArray[np.int32]] = []
        self.skipped: list[str] = []
        self.count = 0
        records.write(bytes(DATA_OFFSET))

    def add(self, records: NDArray[Any], labels: NDArray[Any], name: Callable[[int], str] | None = None) -> None:
        """Append records (B, copies, channels, height, width) and their labels (B,), integers.

        Args:
            records: records with the manifest's dtype and shape.
            labels: labels of the records.
            name: returns the name of the record at an index of the batch, for messages.

        Raises:
            ValueError: records or labels do not fit the store, or the disk cannot be written.
        """
        self._check_labels(labels, name or "record {} of a batch".format)
        if records.shape != (len(labels), *self._manifest.shape) or records.dtype != self._dtype:
            raise ValueError(f"records of {records.dtype} {records.shape} are not those of the store")
        with _told(self._records.name):
            self._records.write(np.ascontiguousarray(records).data)
        self._labels.append(labels.astype("<i4"))
        self.count += len(labels)

    def _check_labels(self, labels: NDArray[Any], name: Callable[[int], str]) -> None:
        if not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"labels must be integers, not {labels.dtype}")
        bad = np.flatnonzero((labels < 0) | (labels >= self._num_classes))
        if len(bad):
            raise ValueError(
                f"{name(int(bad[0]))} has label {labels[bad[0]]}, which is outside 0 .. {self._num_classes - 1}, "
                + (
                    "the largest that a store holds"
                    if self._num_classes == MAX_CLASSES
                    else "the classes of the source"
                )
            )

    def close(self, labels: Path) -> None:
        """Write the header of the records, and the file of labels."""
        self._records.seek(0)
        self._records.write(npy_header(self._dtype, (self.count, *self._manifest.shape)))
        sync(self._records)
        values = np.concatenate([np.empty(0, "<i4"), *self._labels])
        with atomic_write(labels) as partial, partial.open("wb") as file:
            file.write(npy_header(values.dtype, values.shape))
            file.write(values.data)
            sync(file)


class StoreWriter:
    """Writes a store with one record per item of a source, except skipped ones. A context manager.

    Shard n holds the items from n * shard_size up to (n + 1) * shard_size. Finished shards are recorded on disk; an
    interrupted shard is written again. Several ranks write one store together, each its own shards.

    Args:
        path: the store's folder.
        manifest: the store's manifest, without shards and counts.
        items: number of items in the source.
        shard_size: items per shard.
        ranks: the processes that write the store; all must enter and finish.
        num_classes: labels must be below it; 0 if unknown.

    Attributes:
        before: number of items in shards that were finished on entering.
        todo: numbers of the unfinished shards that this rank has to write.

    Raises:
        ValueError: the manifest is invalid; on entering: the store is finished, has another source or configuration, or
            is being written.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        items: int,
        shard_size: int,
        ranks: Ranks = Ranks(),  # noqa: B008  (immutable)
        num_classes: int = 0,
    ) -> None:
        parse_manifest(manifest.to_json().encode(), path / MANIFEST)  # fail now, not after days of encoding
        self._num_classes = num_classes
        self.path, self._manifest, self._items, self._shard_size = path, manifest, items, shard_size
        self._ranks, self._lock = ranks, -1
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._ending: Future[None] | None = None

    def __enter__(self) -> "StoreWriter":
        try:
            plan, unfinished = from_first(self._ranks, self._begin)
            self._meet = barrier(self._ranks)
            if self._ranks.rank:
                with _told(self.path):
                    self._take_lock(fcntl.LOCK_SH)
                if changed := self._changed(plan):
                    raise ValueError(
                        f"process {self._ranks.rank} would write another store than the first one ({changed}): all "
                        f"need the same images, packages and kind of device"
                    )
        except BaseException:
            self._unlock()
            raise
        self.before = self._items - sum(len(self.items_of(number)) for number in unfinished)
        self.todo = unfinished[self._ranks.rank :: self._ranks.count]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()  # waits for the last shard
        self._unlock()

    def items_of(self, number: int) -> range:
        """Return the items of a shard."""
        return range(number * self._shard_size, min(self._items, (number + 1) * self._shard_size))

    def numbers(self) -> range:
        """Return the numbers of all shards."""
        return range(-(-self._items // self._shard_size))

    def finished(self, number: int) -> Shard | None:
        """Return a finished shard, None if it is not finished."""
        path = self._record(number)
        if not path.exists():
            return None
        try:
            shard = parse_shard(read_regular(path), path)
            check_length(self.path, shard, self._manifest)
        except ValueError:
            return None  # the shard is written again
        return shard

    @contextlib.contextmanager
    def shard(self, number: int) -> Iterator[ShardWriter]:
        """Yield the writer of a shard.

        After the block, a thread finishes the shard while the next one is filled; its errors are raised by the next
        `shard` or by `finish`.
        """
        if self._ending and self._ending.done():
            self._ending.result()
        records = self.path / f"{number:05}.npy"
        with contextlib.ExitStack() as stack:
            with _told(records):
                file = stack.enter_context(atomic_write(records)).open("wb")
                stack.callback(_told(records)(file.close))  # flushes the buffer
                writer = ShardWriter(file, self._manifest, self._num_classes)
            yield writer
            self._wait()
            opened = stack.pop_all()
        self._ending = self._thread.submit(self._end, number, writer, opened)

    def _end(self, number: int, writer: ShardWriter, opened: contextlib.ExitStack) -> None:
        """Flush a shard to disk, compute its checksums, and record it."""
        records, labels = (self.path / f"{number:05}{suffix}" for suffix in (".npy", ".labels.npy"))
        with _told(records):
            with opened:
                writer.close(labels)
            stored, beside = (StoredFile(p.name, p.stat().st_size, sha256_of(p)) for p in (records, labels))
            shard = Shard(writer.count, stored, beside, writer.skipped)
            write_durably(self._record(number), json.dumps(dataclasses.asdict(shard)).encode())

    def _wait(self) -> None:
        """Wait for the shard that is being finished, and raise its error."""
        if self._ending:
            self._ending.result()

    def finish(self, class_names: list[str]) -> Manifest:
        """Write the manifest of all shards, and return it.

        Args:
            class_names: names of the classes; classes beyond them are named by their number. Without names and with no
                label above 0, the store has no classes.
        """
        self._wait()
        self._meet()
        return from_first(self._ranks, lambda: self._finish(class_names))

    def items_elsewhere(self) -> int:
        """Return the number of items in finished shards of other ranks or earlier runs."""
        numbers = set(self.numbers()) - set(self.todo)
        return sum(len(self.items_of(number)) for number in numbers if self._record(number).exists())

    def _finish(self, class_names: list[str]) -> Manifest:
        os.listdir(self.path)  # refreshes the view of a network file system
        found = [self.finished(number) for number in self.numbers()]
        shards = [shard for shard in found if shard]
        if len(shards) < len(found):
            raise ValueError(f"{self.path}: shard {found.index(None)} is not finished")
        counts = np.zeros(len(class_names), np.int64)
        for shard in shards:
            here = np.bincount(map_shard(self.path, self._manifest, shard)[1], minlength=len(counts))
            counts = np.pad(counts, (0, len(here) - len(counts))) + here
        if not class_names and len(counts) == 1:
            counts = counts[:0]
        names = class_names + [str(label) for label in range(len(class_names), len(counts))]
        manifest = dataclasses.replace(
            self._manifest, num_classes=len(names), class_names=names, class_counts=counts.tolist(), shards=shards
        )
        with _told(self.path / MANIFEST):
            write_durably(self.path / MANIFEST, manifest.to_json().encode())
            self._clean()
        return manifest

    def _clean(self) -> None:
        for path in (self.path / UNFINISHED, *map(self._record, self.numbers())):
            path.unlink(missing_ok=True)

    def _record(self, number: int) -> Path:
        return self.path / f"{number:05}.json"

    def _begin(self) -> tuple[dict[str, Any], list[int]]:
        """Lock the store, create or resume it, and return its plan and the unfinished shards."""
        with _told(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock(fcntl.LOCK_EX)
            os.truncate(self._lock, 0)
            os.write(self._lock, f"process {os.getpid()} on {platform.node()}".encode())
            self._begin_or_go_on()
            unfinished = [number for number in self.numbers() if not self.finished(number)]
            for number in unfinished:
                self._record(number).unlink(missing_ok=True)  # a record that does not match its files
            if self._ranks.count > 1:
                self._take_lock(fcntl.LOCK_SH)  # shared with the other ranks, which wait for this result
        return self._plan(), unfinished

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _take_lock(self, kind: int) -> None:
        """Lock the store against other processes, for as long as this one keeps the lock file open.

        Child processes do not inherit a lock of this kind, so a worker that outlives this process does not keep the
        store locked. It does not exclude a second writer in the same process.
        """
        if self._lock < 0:
            self._lock = open_lock(self.path / LOCK)
        try:
            fcntl.lockf(self._lock, kind | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            other = os.pread(self._lock, 256, 0).decode(errors="replace").strip()
            raise ValueError(
                f"{self.path} is being written by another process ({other}): wait for it, or give another folder"
            ) from None

    def _plan(self) -> dict[str, Any]:
        """Return the configuration of the store, which must not change until it is finished."""
        return {
            "items": self._items,
            "shard_size": self._shard_size,
            **json.loads(json.dumps(self._manifest.to_fields())),
        }

    def _changed(self, before: dict[str, Any]) -> str:
        """Describe the differences from another plan, "" if there are none."""
        plan = self._plan().items()
        return ", ".join(
            f"{name} {before[name]} -> {value}" for name, value in plan if before.get(name, value) != value
        )

    def _begin_or_go_on(self) -> None:
        for partial in self.path.glob(".partial-*"):
            partial.unlink()  # left by a killed process
        if (self.path / MANIFEST).exists():
            self._clean()
            raise ValueError(f"{self.path} is a finished store: give another folder, or delete it first")
        path = self.path / UNFINISHED
        if path.exists():
            try:
                before = parse_object(read_regular(path), path)
            except ValueError as error:
                raise ValueError(f"{error}: delete {self.path} and start over") from error
            if changed := self._changed(before):
                raise ValueError(
                    f"{self.path} holds an unfinished store of something else ({changed}): give what it was begun "
                    f"with, or another folder"
                )
            return
        others = [entry.name for entry in self.path.iterdir() if entry.name != LOCK]
        if others:
            raise ValueError(f"{self.path} is not empty ({sorted(others)[0]}): a store wants a folder of its own")
        write_durably(path, json.dumps(self._plan()).encode())


@contextlib.contextmanager
def _told(path: Path | str) -> Iterator[None]:
    """Convert an OSError of a write to a ValueError that tells how to resume."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{error.filename or path} cannot be written: {error.strerror or error}; finished shards are kept, "
            f"and the same command resumes"
        ) from error
