"""Images in tables: parquet files, and data sets that Hugging Face's `datasets` saved to the disk (Arrow)."""

import functools
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastmask.data.fingerprint import of_tables

_IMAGES = ("image", "img", "images", "jpg", "png")
_LABELS = ("label", "labels", "cls", "class", "fine_label")


class Table:
    """Rows of an image column (bytes, or a struct of `bytes` and `path`) and perhaps a label column."""

    kind = "table"
    channels = 3

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = list(files)
        self.ignored: list[str] = []
        # Row groups (parquet) or record batches (Arrow), in order: which file, which of its groups, how many rows.
        self._groups = [
            (number, group, rows) for number, file in enumerate(self._files) for group, rows in enumerate(_rows(file))
        ]
        self._starts = np.cumsum([0] + [rows for _, _, rows in self._groups])
        starts = zip(self._groups, self._starts[:-1], strict=True)
        self._firsts = {number: first for (number, group, _), first in starts if group == 0}  # row of a file
        if not self._starts[-1]:
            raise ValueError(f"{self._files[0]} holds no rows")
        schema = _schema(self._files[0])
        self._image = self._column(schema, _IMAGES)
        if not self._image:
            raise ValueError(
                f"{self._files[0]} has no image column ({', '.join(_IMAGES)}), but {', '.join(schema.names)}"
            )
        self._label = self._column(schema, _LABELS)
        self.class_names = self._names(schema) if self._label else []

    def __len__(self) -> int:
        return int(self._starts[-1])

    def name(self, item: int) -> str:
        """Return the file, and which of its rows it is."""
        number = self._groups[self._place(item)[0]][0]
        return f"{self._files[number]}, row {item - int(self._firsts[number])}"

    def count_classes(self) -> int:
        """Return the number of classes, 0 without labels; reads every label that has no name."""
        if self.class_names or not self._label:
            return len(self.class_names)
        arrow = _arrow("pyarrow.compute")
        groups = [_read_group(self._files[number], part, (self._label,)) for number, part, _ in self._groups]
        return 1 + max(int(arrow.max(group.column(self._label)).as_py() or 0) for group in groups)

    def read(self, item: int) -> tuple[bytes, int]:
        """Return the content of an image and its label."""
        group, row = self._place(item)
        number, part, _ = self._groups[group]
        columns = tuple(column for column in (self._image, self._label) if column)
        table = _read_group(self._files[number], part, columns)
        value, label = table.column(self._image)[row].as_py(), 0
        if self._label:
            label = table.column(self._label)[row].as_py()
            if not isinstance(label, int) or label < 0:
                raise ValueError(f"{self.name(item)} has no label: {label!r}")
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise ValueError(f"{self.name(item)} does not hold its image, only {value!r}: embed the files in the table")
        return content, label

    def fingerprint(self) -> str:
        """Return what tells these tables from others."""
        return of_tables(self._files, [rows for _, _, rows in self._groups])

    def _place(self, item: int) -> tuple[int, int]:
        group = int(np.searchsorted(self._starts, item, side="right")) - 1
        return group, item - int(self._starts[group])

    @staticmethod
    def _column(schema: Any, names: Sequence[str]) -> str:
        return next((name for name in names if name in schema.names), "")

    def _names(self, schema: Any) -> list[str]:
        try:
            features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
            return [str(name) for name in features[self._label]["names"]]
        except (KeyError, TypeError, ValueError):
            return []


def _arrow(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError("reading parquet and Arrow files needs pyarrow: pip install pyarrow") from error


@functools.lru_cache(maxsize=2)
def _batches(path: Path) -> list[Any]:
    """Return the record batches of an Arrow file, mapped into memory."""
    arrow, ipc = _arrow("pyarrow"), _arrow("pyarrow.ipc")
    try:
        return list(ipc.open_stream(arrow.memory_map(str(path))))
    except arrow.ArrowInvalid as error:
        raise ValueError(f"{path} cannot be read as an Arrow stream: {error}") from error


def _parquet(path: Path) -> Any:
    arrow, parquet = _arrow("pyarrow"), _arrow("pyarrow.parquet")
    try:
        return parquet.ParquetFile(path)
    except arrow.ArrowInvalid as error:
        raise ValueError(f"{path} cannot be read as parquet: {error}") from error


def _rows(path: Path) -> list[int]:
    if path.suffix == ".parquet":
        metadata = _parquet(path).metadata
        return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    return [batch.num_rows for batch in _batches(path)]


def _schema(path: Path) -> Any:
    return _parquet(path).schema_arrow if path.suffix == ".parquet" else _batches(path)[0].schema


@functools.lru_cache(maxsize=2)
def _read_group(path: Path, group: int, columns: tuple[str, ...]) -> Any:
    if path.suffix == ".parquet":
        # A thread of Arrow's pool would not survive into a worker.
        return _parquet(path).read_row_group(group, columns=list(columns), use_threads=False)
    return _batches(path)[group].select(list(columns))
