"""Writes a store, shard by shard, so that a process that was stopped goes on where it was."""

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fastmask.data.manifest import (
    DATA_OFFSET,
    MANIFEST,
    UNFINISHED,
    Manifest,
    Shard,
    StoredFile,
    check_length,
    sha256_of,
    shard_from_fields,
)
from fastmask.data.store import map_shard
from fastmask.files import sync, whole_file, write_durably

_LOCK = ".lock"


class ShardWriter:
    """Takes the records of one shard.

    Attributes:
        count: records so far.
        skipped: names of the items that could not be read; add to it.
    """

    def __init__(self, records: BinaryIO, manifest: Manifest) -> None:
        self._records, self._manifest = records, manifest
        self._dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self._labels: list[NDArray[np.int32]] = []
        self.skipped: list[str] = []
        self.count = 0
        records.write(bytes(DATA_OFFSET))

    def add(self, records: NDArray[Any], labels: NDArray[Any]) -> None:
        """Append records (B, copies, channels, height, width) and their labels (B,)."""
        if records.shape != (len(labels), *self._manifest.shape) or records.dtype != self._dtype:
            raise ValueError(f"records of {records.dtype} {records.shape} are not those of the store")
        self._records.write(np.ascontiguousarray(records).data)
        self._labels.append(labels.astype("<i4"))
        self.count += len(labels)

    def close(self, labels: Path) -> None:
        """Put the header in front of the records, and write the labels beside."""
        self._records.seek(0)
        self._records.write(_header(self._dtype, (self.count, *self._manifest.shape)))
        sync(self._records)
        values = np.concatenate([np.empty(0, "<i4"), *self._labels])
        with whole_file(labels) as partial, partial.open("wb") as file:
            file.write(_header(values.dtype, values.shape))
            file.write(values.data)
            sync(file)


class StoreWriter:
    """Writes a store of one record per item of a source, but for those that are skipped. A context manager.

    Shard n holds the items n * shard_size up to (n + 1) * shard_size. A finished shard is recorded on the disk; what
    was under way when the process was stopped is done again.

    Args:
        path: the store's folder.
        manifest: what it will hold, with no shards or counts yet.
        items: of the source.
        shard_size: items per shard.

    Raises:
        ValueError: on entering: the store is finished, is made of something else or is being written.
    """

    def __init__(self, path: Path, manifest: Manifest, items: int, shard_size: int) -> None:
        self.path, self._manifest, self._items, self._shard_size = path, manifest, items, shard_size
        self._lock: int | None = None

    def __enter__(self) -> "StoreWriter":
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = lock_store(self.path)
        try:
            self._begin()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)

    def items_of(self, number: int) -> range:
        """Return the items that a shard holds."""
        return range(number * self._shard_size, min(self._items, (number + 1) * self._shard_size))

    def numbers(self) -> range:
        """Return the numbers of all shards."""
        return range(-(-self._items // self._shard_size))

    def finished(self, number: int) -> Shard | None:
        """Return a shard that is finished, None if it is not."""
        path = self._record(number)
        if not path.exists():
            return None
        try:
            shard = shard_from_fields(json.loads(path.read_text()))
            check_length(self.path, shard, self._manifest)
        except (ValueError, KeyError, TypeError):
            return None  # it is done again
        return shard

    @contextlib.contextmanager
    def shard(self, number: int) -> Iterator[ShardWriter]:
        """Yield what takes the records of a shard, which is finished when the block ends well."""
        records, labels = (self.path / f"{number:05}{suffix}" for suffix in (".npy", ".labels.npy"))
        try:
            with whole_file(records) as partial, partial.open("wb") as file:
                writer = ShardWriter(file, self._manifest)
                yield writer
                writer.close(labels)
            stored, beside = (StoredFile(p.name, p.stat().st_size, sha256_of(p)) for p in (records, labels))
            shard = Shard(writer.count, stored, beside, writer.skipped)
            write_durably(self._record(number), json.dumps(dataclasses.asdict(shard)).encode())
        except OSError as error:
            raise ValueError(
                f"{error.filename or records} cannot be written: {error.strerror or error}; finished shards are kept, "
                f"and the same command goes on"
            ) from error

    def finish(self, class_names: list[str]) -> Manifest:
        """Write the manifest of all shards, and return it.

        Args:
            class_names: of the labels; what they lack is named by its number. With none of them and no label above 0
                there are no classes.
        """
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
        write_durably(self.path / MANIFEST, manifest.to_json().encode())
        self._clean()
        return manifest

    def _clean(self) -> None:
        for path in (self.path / UNFINISHED, *map(self._record, self.numbers())):
            path.unlink(missing_ok=True)

    def _record(self, number: int) -> Path:
        return self.path / f"{number:05}.json"

    def _begin(self) -> None:
        for partial in self.path.glob(".partial-*"):
            partial.unlink()  # of a process that was killed
        if (self.path / MANIFEST).exists():
            self._clean()
            raise ValueError(f"{self.path} is a finished store: give another folder, or delete it first")
        plan = {"items": self._items, "shard_size": self._shard_size, **json.loads(self._manifest.to_json())}
        path = self.path / UNFINISHED
        if path.exists():
            try:
                before = json.loads(path.read_text())
            except ValueError as error:
                raise ValueError(f"{path} is damaged ({error}): delete {self.path} and begin anew") from error
            changed = [
                f"{name} {before.get(name)} -> {value}" for name, value in plan.items() if before.get(name) != value
            ]
            if changed:
                raise ValueError(
                    f"{self.path} holds an unfinished store of something else ({', '.join(changed)}): give what it was "
                    f"begun with, or another folder"
                )
            return
        others = [entry.name for entry in self.path.iterdir() if entry.name != _LOCK]
        if others:
            raise ValueError(f"{self.path} is not empty ({sorted(others)[0]}): a store wants a folder of its own")
        write_durably(path, json.dumps(plan).encode())


def lock_store(store: Path) -> int:
    """Return a descriptor that keeps other processes from writing to a store until it is closed."""
    lock = os.open(store / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        other = os.read(lock, 32).decode(errors="replace").strip()
        os.close(lock)
        raise ValueError(
            f"{store} is being written by another process ({other}): wait for it, or give another folder"
        ) from None
    os.truncate(lock, 0)
    os.write(lock, f"process {os.getpid()}".encode())
    return lock


def _header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """Return the first `DATA_OFFSET` bytes of an .npy of version 1.0."""
    said = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': {tuple(map(int, shape))}, }}"
    text = said.ljust(DATA_OFFSET - 11).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text
