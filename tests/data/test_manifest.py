import hashlib
import json

import pytest
from stores import manifest, write

from fastmask.data.manifest import Manifest, read_manifest, sha256_of


@pytest.fixture
def store(tmp_path):
    write(tmp_path / "store")
    return tmp_path / "store"


def change(store, **fields):
    path = store / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "parquet"}, "is not the manifest of a fastmask store"),
        ({"version": "x"}, "is damaged"),
        ({"shape": 3}, "is damaged"),
        ({"kind": "sounds"}, "is damaged .*sounds"),
        ({"dtype": "float64"}, "is damaged .*float64"),
        ({"count": 11}, "is damaged: its counts do not add up"),
        ({"class_names": ["a"]}, "is damaged"),
        ({"shards": [{"count": 1}]}, "is damaged"),
    ],
)
def test_a_damaged_manifest(store, fields, message):
    change(store, **fields)
    with pytest.raises(ValueError, match=message) as error:
        read_manifest(store)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"format": "fastmask-store"}'])
def test_no_manifest_at_all(store, text):
    (store / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json is "):
        read_manifest(store)


@pytest.mark.parametrize(
    "name", ["../a.npy", "/a.npy", "a/b.npy", "a\\b.npy", "..", ".lock", "", "a\0", "manifest.json"]
)
def test_names_that_lead_out_of_the_folder(store, name):
    shards = json.loads((store / "manifest.json").read_text())["shards"]
    shards[1]["labels"]["name"] = name
    change(store, shards=shards)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged \(TypeError: .* (folder|twice)\)$"):
        read_manifest(store)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"name": "00000.npy"}, r"00000\.npy is named twice"),
        ({"bytes": 10**15}, r"00001\.npy of 1000000000000000 bytes cannot hold 4 records"),
        ({"bytes": "9"}, r"00001\.npy of 9 bytes cannot hold"),
    ],
)
def test_files_that_cannot_be(store, edit, message):
    shards = json.loads((store / "manifest.json").read_text())["shards"]
    shards[1]["records"].update(edit)
    change(store, shards=shards)
    with pytest.raises(ValueError, match=rf"manifest\.json is damaged .*{message}"):
        read_manifest(store)


def test_no_store(tmp_path, store):
    with pytest.raises(ValueError, match=r"is not a store: it holds no manifest\.json"):
        read_manifest(tmp_path)
    (store / "manifest.json").rename(store / "unfinished.json")
    with pytest.raises(ValueError, match="is a store that is not finished: the command that began it goes on with it"):
        read_manifest(store)


@pytest.mark.parametrize("name", ["00001.npy", "00002.labels.npy"])
@pytest.mark.parametrize("damage", ["gone", "cut off", "longer"])
def test_a_file_that_is_not_whole(store, name, damage):
    path = store / name
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if damage == "cut off" else content + b"x")
    with pytest.raises(ValueError, match=rf"{name} (is missing from the store|has [\d,]+ bytes instead of)"):
        read_manifest(store)


def test_checksums_are_those_of_sha256sum(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 3_000_000)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(b"x" * 3_000_000).hexdigest()
