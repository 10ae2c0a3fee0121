"""Parquet and Arrow files; most tests need pyarrow, which is optional."""

import importlib
import json
import subprocess
import sys

import pytest

from fastmask.data.sources.open import open_source

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
    with pytest.raises(ValueError, match="row 1 has no label, as others have"):
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


def write_parquet(arrow, path, **columns):
    images = [b"image %d" % i for i in range(len(next(iter(columns.values()))))]
    importlib.import_module("pyarrow.parquet").write_table(arrow.table({"image": images, **columns}), path)
    return path


@pytest.mark.parametrize("packed", [False, True])
def test_labels_that_are_names(tmp_path, arrow, packed):
    names = arrow.array(["dog", "10", None, "cat", ""])
    path = write_parquet(
        arrow, tmp_path / "a.parquet", label=names.dictionary_encode() if packed else names, text=[""] * 5
    )
    source = open_source(path)
    assert source.class_names == ["10", "cat", "dog"]
    assert source.labels.tolist() == [2, 0, -1, 1, -1]
    assert source.lines() == [
        "table, 5 images, 3 classes by column label: 10, cat, dog",
        "2 images have no label, as the others have (--num-classes 0 takes the images without labels)",
        "left out, columns: 1 (text)",
    ]


def test_names_that_are_numbers_are_in_their_order(tmp_path, arrow):
    path = write_parquet(arrow, tmp_path / "a.parquet", label=[str(i) for i in range(11, -1, -1)])
    assert open_source(path).labels.tolist() == list(range(11, -1, -1))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([-1, -1], "label -1 is below 0, as in a test split, which comes without its labels"),
        ([None, -1], "label -1 is below 0"),
        ([0, 2**40], "label 1099511627776 is above 999999"),
        ([0.5, 1.0], "holds double, and a label must be a number or a name"),
        ([True, False], "holds bool, and a label must be a number or a name"),
        ([[1], [0, 1]], "holds list<.*>, and a label must be a number or a name"),
    ],
)
def test_labels_that_cannot_be(tmp_path, arrow, labels, message):
    path = write_parquet(arrow, tmp_path / "a.parquet", label=labels)
    with pytest.raises(ValueError, match=rf"a\.parquet, column label:? {message}.*--num-classes 0"):
        open_source(path)
    source = open_source(path, labelled=False)
    assert [source.read(item)[1] for item in range(2)] == [0, 0]


def test_a_label_without_a_name(tmp_path, arrow):
    table = table_of(arrow, 0, 4).set_column(1, "label", arrow.array([0, 1, 2, 0]))
    importlib.import_module("pyarrow.parquet").write_table(
        table.replace_schema_metadata({"huggingface": NAMES}), tmp_path / "a.parquet"
    )
    with pytest.raises(ValueError, match=r"label 2 has no name among the 2 of the table \(--num-classes 0"):
        open_source(tmp_path / "a.parquet")


def test_a_file_that_lacks_a_column(tmp_path, arrow):
    write_parquet(arrow, tmp_path / "a.parquet", label=[1])
    write_parquet(arrow, tmp_path / "b.parquet", tag=[1])
    with pytest.raises(ValueError, match=r"b\.parquet has no column label, as .*a\.parquet has"):
        open_source(tmp_path)
    assert len(open_source(tmp_path, labelled=False)) == 2


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (b"", "cannot be read as that of a saved dataset"),
        (b"\xff", "cannot be read as that of a saved dataset"),
        (b"[" * 100_000, "cannot be read as that of a saved dataset: maximum recursion"),
        (b"[]", "cannot be read as that of a saved dataset"),
        (b'{"_data_files": 7}', "cannot be read as that of a saved dataset"),
        (b'{"_data_files": [7]}', "cannot be read as that of a saved dataset"),
        (b'{"_data_files": []}', "names no files"),
        (b'{"_data_files": [{"filename": 7}]}', r"must name \.arrow files of its folder, not 7"),
        (
            b'{"_data_files": [{"filename": "../a.arrow"}]}',
            r"must name \.arrow files of its folder, not '\.\./a\.arrow'",
        ),
        (
            b'{"_data_files": [{"filename": "/etc/passwd"}]}',
            r"must name \.arrow files of its folder, not '/etc/passwd'",
        ),
        (b" " * (2**24 + 1), "has 16,777,217 bytes, which is above the limit"),
    ],
)
def test_a_state_that_cannot_be(tmp_path, state, message):
    (tmp_path / "state.json").write_bytes(state)
    with pytest.raises(ValueError, match=f"state.json {message}"):
        open_source(tmp_path)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_files_that_are_cut_off_or_of_something_else(tmp_path, arrow, kind):
    folder = saved(arrow, tmp_path / "data", kind)
    path = folder / f"data-00001.{kind}"
    content = path.read_bytes()
    for damaged in (b"", b"nonsense", content[:100], content[: len(content) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"data-00001\.{kind} (cannot be read as|holds no rows)") as error:
            open_source(folder)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_flipped_bits_do_not_end_the_process(tmp_path, arrow, kind):
    """Arrow follows offsets wherever they lead, unless it is asked to look at them before."""
    folder = saved(arrow, tmp_path / "data", kind)
    program = """
import contextlib, pathlib, random, sys
from fastmask.data.sources.open import open_source
path, draw, refused = pathlib.Path(sys.argv[1]), random.Random(0), 0
content = path.read_bytes()
for number in range(400):
    changed = bytearray(content)
    changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file = path.with_name(f"{number}{path.suffix}")
    file.write_bytes(changed)
    refused += 1
    with contextlib.suppress(ValueError):
        source = open_source(file)
        for item in range(len(source)):
            source.read(item)
        refused -= 1
    file.unlink()
print(refused)
"""
    command = [sys.executable, "-c", program, str(folder / f"data-00000.{kind}")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30


def test_without_pyarrow(tmp_path, monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(importlib, "import_module", absent)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match="needs pyarrow: pip install pyarrow"):
        open_source(tmp_path / "a.parquet")
