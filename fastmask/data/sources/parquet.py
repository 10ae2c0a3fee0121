"""Image tables: parquet files, and datasets saved to disk by Hugging Face's `datasets` (Arrow)."""

import contextlib
import functools
import importlib
import json
import os
import reprlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastmask.console import printable
from fastmask.data.fingerprint import fingerprint_of, of_tables
from fastmask.data.sources.labels import WITHOUT, check_label, to_numbers
from fastmask.data.sources.source import Source, some
from fastmask.files import open_regular, read_regular

_IMAGES = ("image", "img", "images", "jpg", "png")
_LABELS = ("label", "labels", "cls", "class", "fine_label")


class _File(NamedTuple):
    """Metadata of a file: its schema, and the rows per row group (parquet) or record batch (Arrow)."""

    schema: Any
    rows: list[int]


class Table(Source):
    """Rows with an image column (bytes, or a struct of `bytes` and `path`) and an optional label column."""

    kind = "table"

    def __init__(self, files: Sequence[Path], labelled: bool = True) -> None:
        super().__init__(labelled)
        self._files = list(files)
        found = [_outline(file) for file in self._files]
        # Row groups in order: file number, group number in the file, number of rows.
        self._groups = [
            (number, group, rows) for number, file in enumerate(found) for group, rows in enumerate(file.rows)
        ]
        self._starts = np.cumsum([0] + [rows for _, _, rows in self._groups])
        starts = zip(self._groups, self._starts[:-1], strict=True)
        self._firsts = {number: first for (number, group, _), first in starts if group == 0}  # first row of each file
        if min(self._starts) < 0:
            raise ValueError(f"{self._files[0]} or one after it is damaged: it has a number of rows below 0")
        if not self._starts[-1]:
            raise ValueError(f"{self._files[0]} holds no rows")
        names = found[0].schema.names
        self._image = next((name for name in _IMAGES if name in names), "")
        if not self._image:
            raise ValueError(f"{self._files[0]} has no image column ({', '.join(_IMAGES)}), but {some(names)}")
        column = next((name for name in _LABELS if name in names), "") if labelled else ""
        for path, file in zip(self._files, found, strict=True):
            for name in filter(None, (self._image, column)):
                if name not in file.schema.names:
                    raise ValueError(f"{path} has no column {name}, as {self._files[0]} has")
        for name in names:
            if name not in (self._image, column):
                self.leave_out("columns", name)
        if column:
            self._label(column, found[0].schema)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def name(self, item: int) -> str:
        """Return the file and the row of an image."""
        number = self._groups[self._place(item)[0]][0]
        return printable(f"{self._files[number]}, row {item - int(self._firsts[number])}")

    def content(self, item: int) -> bytes:
        """Return the content of an image."""
        group, row = self._place(item)
        value = self._column(group, self._image)[row].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise ValueError(f"{self.name(item)} does not hold its image, only {value!r}: embed the files in the table")
        return content

    def _column(self, group: int, name: str) -> Any:
        number, part, rows = self._groups[group]
        values = _read_group(self._files[number], part, name)
        if len(values) != rows:
            raise ValueError(
                f"{self._files[number]} is damaged: {len(values)} rows of column {name} where {rows} are said"
            )
        return values

    def fingerprint(self) -> str:
        """Return a hash of the tables, columns and labels."""
        tables = of_tables(self._files, [rows for _, _, rows in self._groups])
        return fingerprint_of([tables, self._image, np.array(self.known_labels(), np.int64)])

    def _place(self, item: int) -> tuple[int, int]:
        group = int(np.searchsorted(self._starts, item, side="right")) - 1
        return group, item - int(self._starts[group])

    def _label(self, column: str, schema: Any) -> None:
        """Record the labels of a column, numbers or names."""
        where = f"{self._files[0]}, column {column}"
        types, kind = _arrow("pyarrow.types"), schema.field(column).type
        if types.is_dictionary(kind):
            kind = kind.value_type
        groups = (self._column(group, column) for group in range(len(self._groups)))
        self.labelled_by = f"column {column}"
        if types.is_string(kind) or types.is_large_string(kind):
            self.labels, self.class_names = to_numbers([name for group in groups for name in _texts(group)], where)
            return
        if not types.is_integer(kind):
            raise ValueError(f"{where} holds {kind}, and a label must be a number or a name ({WITHOUT})")
        labels = np.concatenate([_numbers(group, where) for group in groups])
        highest = int(labels.max())
        check_label(highest, where)
        names = _class_names(schema, column)
        if names and highest >= len(names):
            raise ValueError(f"{where}: label {highest} has no name among the {len(names)} of the table ({WITHOUT})")
        self.labels = np.maximum(labels, -1).astype(np.int32)
        self.class_names = names or [str(label) for label in range(highest + 1)]


def open_saved(folder: Path, labelled: bool = True) -> Table:
    """Open a dataset that Hugging Face's `datasets` saved to a folder, by its `state.json`."""
    state = folder / "state.json"
    try:
        files = [file["filename"] for file in json.loads(read_regular(state, 2**24))["_data_files"]]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{state} cannot be read as that of a saved dataset: {error}") from error
    for file in files:
        if not isinstance(file, str) or not file.endswith(".arrow") or Path(file).name != file:
            raise ValueError(f"{state} must name .arrow files of its folder, not {reprlib.repr(file)}")
    if not files:
        raise ValueError(f"{state} names no files")
    return Table([folder / file for file in files], labelled)


def _numbers(column: Any, where: str) -> NDArray[np.int64]:
    """Return a column's integers, -1 for null."""
    arrow = _arrow("pyarrow")
    try:
        numbers: NDArray[np.int64] = column.cast(arrow.int64()).fill_null(-1).to_numpy(zero_copy_only=False)
    except arrow.ArrowInvalid as error:
        raise ValueError(f"{where}: {error}") from error
    return numbers


def _texts(column: Any) -> list[str | None]:
    """Return a column's strings, None for null or empty; each distinct string is in memory once."""
    column = column if hasattr(column, "indices") else column.dictionary_encode()
    names = [sys.intern(name) if name else None for name in column.dictionary.to_pylist()]
    return [None if number is None else names[number] for number in column.indices.to_pylist()]


def _class_names(schema: Any, column: str) -> list[str]:
    """Return the class names that `datasets` wrote to the schema, if any."""
    try:
        names = json.loads(schema.metadata[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return []
    return [printable(str(name)) for name in names] if isinstance(names, list) else []


def _arrow(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError("reading parquet and Arrow files needs pyarrow: pip install pyarrow") from error


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Convert Arrow's errors for a damaged file to a ValueError of one line."""
    lib = _arrow("pyarrow.lib")
    try:
        yield
    except (lib.ArrowException, OSError, EOFError, MemoryError, OverflowError) as error:
        kind = "parquet" if path.suffix == ".parquet" else "an Arrow stream"
        raise ValueError(f"{path} cannot be read as {kind}: {' '.join(str(error).split())}") from error


@functools.lru_cache(maxsize=2)
def _batches(path: Path) -> list[Any]:
    """Return the record batches of a memory-mapped Arrow file."""
    arrow, ipc = _arrow("pyarrow"), _arrow("pyarrow.ipc")
    os.close(open_regular(path))
    with _damage_named(path):
        return list(ipc.open_stream(arrow.memory_map(str(path))))


def _parquet(path: Path) -> Any:
    parquet = _arrow("pyarrow.parquet")
    os.close(open_regular(path))
    return parquet.ParquetFile(path, page_checksum_verification=True)


def _outline(path: Path) -> _File:
    with _damage_named(path):
        if path.suffix == ".parquet":
            file = _parquet(path)
            groups = range(file.metadata.num_row_groups)
            return _File(file.schema_arrow, [file.metadata.row_group(group).num_rows for group in groups])
        batches = _batches(path)
        if not batches:
            raise ValueError(f"{path} holds no rows")
        return _File(batches[0].schema, [batch.num_rows for batch in batches])


@functools.lru_cache(maxsize=2)
def _read_group(path: Path, group: int, column: str) -> Any:
    """Return a column of a row group, with validated offsets, which Arrow trusts otherwise."""
    with _damage_named(path):
        if path.suffix == ".parquet":
            # Arrow's thread pool does not survive a fork into a worker.
            table = _parquet(path).read_row_group(group, columns=[column], use_threads=False)
            values = table.column(column).combine_chunks()
        else:
            values = _batches(path)[group].column(column)
        values.validate(full=True)
    return values
