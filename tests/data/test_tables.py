"""Parquet and Arrow files; all but the last test need pyarrow, which is optional."""

import importlib
import json

import pytest

from fastmask.data.sources import open_source

NAMES = json.dumps({"info": {"features": {"label": {"names": ["cat", "dog"]}}}})


@pytest.fixture
def arrow():
    return pytest.importorskip("pyarrow", reason="pyarrow is not installed")


def table_of(arrow, first, count, **columns):
    images = [{"bytes": b"image %d" % i, "path": None} for i in range(first, first + count)]
    labels = [i % 2 for i in range(first, first + count)]
    table = arrow.table({"image": images, "label": labels, **columns})
    return table.replace_schema_metadata({"huggingface": NAMES})


def write_arrow(arrow, path, table, rows):
    with arrow.OSFile(str(path), "wb") as file, arrow.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=rows)


def saved(arrow, folder, kind):
    """Write two files of 7 and 3 rows, in groups of two."""
    folder.mkdir()
    tables = [table_of(arrow, 0, 7), table_of(arrow, 7, 3)]
    names = [f"data-0000{i}.{kind}" for i in range(2)]
    for name, table in zip(names, tables, strict=True):
        if kind == "parquet":
            importlib.import_module("pyarrow.parquet").write_table(table, folder / name, row_group_size=2)
        else:
            write_arrow(arrow, folder / name, table, 2)
    if kind == "arrow":
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return folder


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_rows_in_order(tmp_path, arrow, kind):
    folder = saved(arrow, tmp_path / "data", kind)
    source = open_source(folder)
    assert (source.kind, len(source), source.class_names) == ("table", 10, ["cat", "dog"])
    assert [source.read(i) for i in (9, 0, 6, 7)] == [(b"image %d" % i, i % 2) for i in (9, 0, 6, 7)]
    assert source.name(6) == f"{folder / f'data-00000.{kind}'}, row 6"
    assert source.name(8) == f"{folder / f'data-00001.{kind}'}, row 1"
    assert len(open_source(folder / f"data-00001.{kind}")) == 3


def test_plain_bytes_and_no_labels(tmp_path, arrow):
    write = importlib.import_module("pyarrow.parquet").write_table
    write(arrow.table({"jpg": [b"a", b"b"], "text": ["x", "y"]}), tmp_path / "a.parquet")
    source = open_source(tmp_path / "a.parquet")
    assert source.class_names == []
    assert source.read(1) == (b"b", 0)


def test_rows_that_cannot_be_read(tmp_path, arrow):
    write = importlib.import_module("pyarrow.parquet").write_table
    table = {"image": [{"bytes": None, "path": "a.jpg"}, {"bytes": b"x", "path": None}], "label": [0, None]}
    write(arrow.table(table), tmp_path / "a.parquet")
    source = open_source(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"row 0 does not hold its image, only .*a\.jpg.*: embed the files"):
        source.read(0)
    with pytest.raises(ValueError, match="row 1 has no label: None"):
        source.read(1)


def test_tables_that_cannot_be(tmp_path, arrow):
    write = importlib.import_module("pyarrow.parquet").write_table
    write(arrow.table({"pixels": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"has no image column \(image, img, .*\), but pixels"):
        open_source(tmp_path / "a.parquet")
    for kind in ("parquet", "arrow"):
        (tmp_path / f"b.{kind}").write_bytes(b"nothing of the sort")
        with pytest.raises(ValueError, match=rf"b\.{kind} cannot be read as "):
            open_source(tmp_path / f"b.{kind}")


def test_without_pyarrow(tmp_path, monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(importlib, "import_module", absent)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match="needs pyarrow: pip install pyarrow"):
        open_source(tmp_path / "a.parquet")
