import dataclasses
import hashlib
import json
import os

import numpy as np
import pytest
from stores import edit_manifest, manifest, write

from fastmask.data.store.manifest import (
    DATA_OFFSET,
    Manifest,
    checksum_of,
    first_few,
    npy_header,
    parse_manifest,
    parse_object,
    parse_shard,
    read_manifest,
    sha256_of,
)


@pytest.fixture
def store(tmp_path):
    write(tmp_path / "store")
    return tmp_path / "store"


def change(store, **fields):
    edit_manifest(store, lambda known: known.update(fields))


@pytest.mark.parametrize("about", [manifest(), manifest("pixels"), manifest(copies=1, vae="some/vae")])
def test_a_manifest_comes_back(tmp_path, about):
    written = write(tmp_path / "store", about)
    assert read_manifest(tmp_path / "store") == written
    assert isinstance(written, Manifest)
    assert (written.count, written.class_counts) == (10, [4, 3, 3])
    counted = dict.fromkeys(("num_classes", "class_names", "class_counts", "shards"))
    assert {**vars(about), **counted} == {**vars(written), **counted}


def test_fields_that_came_later_do_no_harm(store):
    change(store, comment="hand-made")
    assert read_manifest(store).count == 10


def test_a_newer_version(store):
    change(store, version=2)
    with pytest.raises(ValueError, match=r"manifest\.json is of version 2 of the format, newer than .* \(1\): update"):
        read_manifest(store)


def test_any_flipped_bit_is_found(store):
    """But for white space and for what the checksum's own name becomes, of which `--check` tells."""
    path, before = store / "manifest.json", read_manifest(store)
    whole = path.read_bytes()
    taken = []
    for place in np.random.default_rng(0).choice(len(whole) * 8, 400, replace=False):
        content = bytearray(whole)
        content[place // 8] ^= 1 << (place % 8)
        try:
            found = parse_manifest(bytes(content), path)
        except ValueError as error:
            assert "\n" not in str(error)  # noqa: PT017  (one line, whatever was damaged)
        else:
            taken.append(place)
            assert found == before
    assert len(taken) < 40


def test_a_manifest_from_before_there_were_checksums(store):
    written = read_manifest(store)
    edit_manifest(store, lambda fields: None, signed=False)
    assert read_manifest(store) == written
    edit_manifest(store, lambda fields: [fields.pop(name) for name in ("decoder", "encoder")], signed=False)
    assert read_manifest(store) == written  # nor was it said what had decoded


def test_one_that_was_edited(store):
    path = store / "manifest.json"
    path.write_text(path.read_text().replace('"scale": 0.5', '"scale": 0.6'))
    with pytest.raises(
        ValueError, match=r"manifest\.json is damaged, or was edited: its checksum .* must lose its `che"
    ):
        read_manifest(store)
    edit_manifest(store, lambda fields: None, signed=False)
    assert read_manifest(store).scale == 0.6


def test_the_checksum_is_documented():
    """As docs/store.md says: SHA-256 of the other fields, sorted by name, with no white space."""
    fields = {"b": [1, 0.5], "a": "é", "checksum": "any"}
    assert checksum_of(fields) == hashlib.sha256(b'{"a":"\\u00e9","b":[1,0.5]}').hexdigest()


HUGE, DEEP = 10**400, [[[[[]]]]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "parquet"}, "is not the manifest of a fastmask store"),
        ({"format": ["fastmask-store"]}, "is not the manifest of a fastmask store"),
        ({"version": "x"}, "version"),
        ({"version": 0}, "version"),
        ({"version": True}, "version"),
        ({"version": 1.0}, "version"),
        ({"version": None}, "version"),
        ({"checksum": 3}, "its checksum is not that of its content"),
        ({"shape": 3}, "shape"),
        ({"shape": [2, 8, 4]}, "shape"),
        ({"shape": [2, 8, 4, 4.0]}, "shape"),
        ({"shape": [2, 8, 4, True]}, "shape"),
        ({"shape": [2, 8, 4, -4]}, "shape"),
        ({"shape": [2, 8, 4, HUGE]}, "shape"),
        ({"shape": [8, 2, 4, 4]}, "shape"),
        ({"shape": [2, 4, 4, 8]}, r"cannot be float16 of shape \(2, 4, 4, 8\)"),
        ({"shape": [2, 7, 4, 4]}, r"cannot be float16 of shape \(2, 7, 4, 4\)"),
        ({"image_size": 33}, "of images of side 33 cannot be float16 of shape"),
        ({"image_size": 0}, "image_size"),
        ({"image_size": 32.0}, "image_size"),
        ({"kind": "sounds"}, "kind"),
        ({"kind": "pixels"}, "pixels of images of side 32 cannot be float16"),
        ({"kind": None}, "kind"),
        ({"dtype": "float64"}, "dtype"),
        ({"dtype": "uint8"}, "moments of images of side 32 cannot be uint8"),
        ({"count": 11}, "its counts do not add up: 11 records, and 10 in its shards"),
        ({"count": 10.0}, "count"),
        ({"count": HUGE}, "count"),
        ({"class_names": ["a"]}, "3 classes with 1 names and 3 counts"),
        ({"class_names": ["a", 1, "c"]}, "class_names"),
        ({"class_names": "abc"}, "class_names"),
        ({"class_counts": [4, 3, 2]}, "its counts do not add up: 10 records, and 9 in its classes"),
        ({"class_counts": [4, 3.0, 3]}, "class_counts"),
        ({"class_counts": [14, -7, 3]}, "class_counts"),
        ({"class_counts": []}, "3 classes with 3 names and 0 counts"),
        ({"num_classes": -1}, "num_classes"),
        ({"num_classes": 2**40}, "num_classes"),
        ({"num_classes": True, "class_names": ["a"], "class_counts": [10]}, "num_classes"),
        ({"scale": 0}, "scale"),
        ({"scale": -1.0}, "scale"),
        ({"scale": float("nan")}, "scale"),
        ({"scale": float("inf")}, "scale"),
        ({"scale": HUGE}, "scale"),
        ({"scale": "0.5"}, "scale"),
        ({"scale": True}, "scale"),
        ({"scale": None}, "scale"),
        ({"scale": []}, "scale has 0 values for 4 channels"),
        ({"scale": [1.0] * 8}, "scale has 8 values for 4 channels"),
        ({"scale": [1.0, 1.0, float("nan"), 1.0]}, "scale"),
        ({"scale": [1.0, 1.0, "1", 1.0]}, "scale"),
        ({"shift": float("-inf")}, "shift"),
        ({"shift": float("nan")}, "shift"),
        ({"shift": [1.0, 2.0]}, "shift has 2 values for 4 channels"),
        ({"shift": {"a": 1}}, "shift"),
        ({"crop": 3}, "crop"),
        ({"vae": ["x"]}, "vae"),
        ({"vae_sha256": "abc"}, "vae_sha256"),
        ({"source": []}, "source"),
        ({"shards": {}}, "shards"),
        ({"shards": [3]}, "shards"),
        ({"shards": [{"count": 1}]}, "shards"),
        ({"shards": DEEP}, "shards"),
    ],
)
def test_a_damaged_manifest(store, fields, message):
    path = store / "manifest.json"
    known = {**json.loads(path.read_text()), **fields}
    if "checksum" not in fields:
        known["checksum"] = checksum_of(known)
    path.write_text(json.dumps(known))
    with pytest.raises(ValueError, match=message) as error:
        read_manifest(store)
    assert "manifest.json is " in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < len(str(path)) + 250


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        '{"format": "fastmask-store"}',
        "[" * 100_000,
        '{"format":' * 100_000,
        '{"format": "fastmask-store", "version": ' + "9" * 5000 + "}",
        '{"format": "fastmask-store", "version": 1, "source": ' + "[" * 900 + "]" * 900 + "}",
        "\xff\xfe",
    ],
    ids=range(10),
)
def test_no_manifest_at_all(store, text):
    (store / "manifest.json").write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match=r"manifest\.json is ") as error:
        read_manifest(store)
    assert "\n" not in str(error.value)


def test_a_manifest_that_is_no_file_of_a_manifests_size(store, monkeypatch):
    path = store / "manifest.json"
    with path.open("r+b") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(ValueError, match=r"manifest\.json has 1,099,511,627,776 bytes, which is above the limit"):
        read_manifest(store)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"manifest\.json is not a regular file"):
        read_manifest(store)


@pytest.mark.parametrize(
    "name",
    [
        "../a.npy",
        "/a.npy",
        "a/b.npy",
        "a\\b.npy",
        "..",
        ".lock",
        ".a.npy",
        "",
        "a\0.npy",
        "a.npy\n",
        "manifest.json",
        "sheet.png",
        7,
        None,
        "a" * 256 + ".npy",
    ],
)
def test_names_that_no_shard_can_have(store, name):
    """They would lead out of the folder, or to a file that is something else."""
    edit_manifest(store, lambda fields: fields["shards"][1]["labels"].update(name=name))
    with pytest.raises(ValueError, match=r"manifest\.json is damaged \(Expected .* at shards\[1\]\.labels\.name\)$"):
        read_manifest(store)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"name": "00000.npy"}, r"00000\.npy is named twice"),
        ({"bytes": 10**13}, r"00001\.npy of 10000000000000 bytes cannot hold 4 records"),
        ({"bytes": 10**15}, r"shards\[1\]\.records\.bytes"),
        ({"bytes": "9"}, r"shards\[1\]\.records\.bytes"),
        ({"sha256": "9"}, r"shards\[1\]\.records\.sha256"),
        ({"sha256": 9}, r"shards\[1\]\.records\.sha256"),
    ],
)
def test_files_that_cannot_be(store, edit, message):
    edit_manifest(store, lambda fields: fields["shards"][1]["records"].update(edit))
    with pytest.raises(ValueError, match=rf"manifest\.json is damaged .*{message}"):
        read_manifest(store)


def test_no_store(tmp_path, store):
    with pytest.raises(ValueError, match=r"is not a store: it holds no manifest\.json"):
        read_manifest(tmp_path)
    (store / "manifest.json").rename(store / "unfinished.json")
    with pytest.raises(ValueError, match="is a store that is not finished: the command that began it resumes it"):
        read_manifest(store)


@pytest.mark.parametrize("name", ["00001.npy", "00002.labels.npy"])
@pytest.mark.parametrize("damage", ["gone", "cut off", "longer", "folder", "fifo"])
def test_a_file_that_is_not_whole(store, name, damage):
    path = store / name
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage == "fifo":
        os.mkfifo(path)
    elif damage != "gone":
        path.write_bytes(content[:-1] if damage == "cut off" else content + b"x")
    message = rf"{name} (is missing from the store|has [\d,]+ bytes instead of|is not a regular file)"
    with pytest.raises(ValueError, match=message):
        read_manifest(store)


def test_checksums_are_those_of_sha256sum(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 3_000_000)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(b"x" * 3_000_000).hexdigest()


def test_a_shard_of_an_unfinished_store(store):
    shard = read_manifest(store).shards[1]
    content = json.dumps(dataclasses.asdict(shard)).encode()
    assert parse_shard(content, "00001.json") == shard
    for damaged in (content[:-1], b"[]", b"{}", content.replace(b"00001.npy", b"../01.npy")):
        with pytest.raises(ValueError):  # noqa: PT011  (the shard is written again, and nobody is told)
            parse_shard(damaged, "00001.json")


def test_a_name_is_one_line():

    assert first_few(["a"]) == "a"
    assert first_few(["a\n", "b", "c", "d"]) == r"a\n, b, c, ..."


@pytest.mark.parametrize("content", [b"{", b"3", b"[]", b"null", b"[" * 10**6, b'{"a":' + b"9" * 5000 + b"}"])
def test_no_object(content):
    with pytest.raises(ValueError, match=r"^a\.json is damaged \(") as error:
        parse_object(content, "a.json")
    assert "\n" not in str(error.value)


def test_a_header_always_fits():
    header = npy_header(np.dtype("<f2"), (2**40, 2, 2**10, 2**12, 2**12))
    assert len(header) == DATA_OFFSET
