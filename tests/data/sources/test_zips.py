import contextlib
import json
import struct
import zipfile

import numpy as np
import pytest

from fastmask.data.sources.folders import HIDDEN, NO_IMAGE
from fastmask.data.sources.open import open_source


def pack(path, members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path.read_bytes()


def everything(source):
    return [(source.name(i), *source.read(i)) for i in range(len(source))]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_the_form_of_dataset_tools(tmp_path, method):
    path = tmp_path / "edm.zip"
    images = {f"00000/img0000000{i}.png": b"%d" % i * 1000 for i in (1, 0, 2)}
    listed = {"labels": [[name, int(name[-5]) + 3] for name in images]}
    pack(path, {**images, "dataset.json": json.dumps(listed)}, method)
    source = open_source(path)
    assert (source.kind, source.channels) == ("zip", 3)
    assert everything(source) == [(f"{path}:{name}", images[name], int(name[-5]) + 3) for name in sorted(images)]
    assert source.lines() == [
        "zip, 3 images, 6 classes by dataset.json: 0, 1, 2, ..., 5",
        "3 of the classes have no image",
    ]
    pack(path, {**images, "dataset.json": '{"labels": null}'}, method)
    assert open_source(path).class_names == []
    pack(path, images, method)
    with pytest.raises(ValueError, match=r"edm\.zip numbers its images as dataset_tools does .* has no dataset\.json"):
        open_source(path)
    pack(path, {**images, "dataset.json": '{"labels": [["../x.png", 1]]}'}, method)
    with pytest.raises(ValueError, match=r"edm\.zip:dataset\.json names \.\./x\.png, which leads out of the folder"):
        open_source(path)


def test_class_folders(tmp_path):
    path = tmp_path / "photos.zip"
    members = {"photos/": b"", "photos/10/a.jpg": b"a", "photos/9/b.JPG": b"b", "photos/9/notes.txt": b""}
    pack(path, {**members, "__MACOSX/photos/9/._b.JPG": b"", "photos/.DS_Store": b"", "photos/9/Thumbs.db": b""})
    source = open_source(path)
    assert everything(source) == [(f"{path}:photos/10/a.jpg", b"a", 1), (f"{path}:photos/9/b.JPG", b"b", 0)]
    assert source.class_names == ["9", "10"]
    hidden = ["__MACOSX/photos/9/._b.JPG", "photos/.DS_Store", "photos/9/Thumbs.db"]
    assert source.left_out == {HIDDEN: hidden, NO_IMAGE: ["photos/9/notes.txt"]}
    assert [label for _, _, label in everything(open_source(path, labelled=False))] == [0, 0]


def test_zips_that_cannot_be(tmp_path):
    path = tmp_path / "a.zip"
    for content in (b"", b"PK\5\6 and nothing more", b"no zip at all"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.zip cannot be read as a zip: "):
            open_source(path)
    path.write_bytes(pack(path, {"a.png": b"x" * 1000, "b.png": b"x"})[:-40])
    with pytest.raises(ValueError, match=r"a\.zip cannot be read as a zip: "):
        open_source(path)
    pack(path, {"a.txt": b"x"})
    with pytest.raises(ValueError, match=r"a\.zip holds no images: expected CLASS/IMAGE\.png .*; found a\.txt$"):
        open_source(path)
    pack(path, {"cat/../../a.png": b"x"})
    with pytest.raises(ValueError, match=r"a\.zip cannot be read as a zip: cat/\.\./\.\./a\.png leads out of it"):
        open_source(path)
    path.write_bytes(pack(path, {"a.png": b"old", "b.png": b"new"}).replace(b"b.png", b"a.png"))
    with pytest.raises(ValueError, match=r"a\.zip cannot be read as a zip: it holds a\.png twice: pack it again"):
        open_source(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_that_are_not_read(tmp_path, method):
    pack(tmp_path / "a.zip", {"a.png": b"x" * 100}, method)
    with pytest.raises(ValueError, match=rf"a\.zip:a\.png is compressed by method {method}: pack the zip plainly"):
        open_source(tmp_path / "a.zip").read(0)


def test_an_encrypted_file(tmp_path):
    content = bytearray(pack(tmp_path / "a.zip", {"a.png": b"x"}))
    content[content.index(b"PK\1\2") + 8] |= 1
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.zip:a\.png is encrypted"):
        open_source(tmp_path / "a.zip").read(0)


def test_what_inflates_is_bounded(tmp_path):
    """By what the list says, and that by what an image's file may have."""
    path = tmp_path / "a.zip"
    content = bytearray(pack(path, {"a.png": bytes(2**24)}, zipfile.ZIP_DEFLATED))
    entry = content.index(b"PK\1\2")
    struct.pack_into("<I", content, entry + 24, 1000)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.png is damaged: its checksum is not that of the zip's list"):
        open_source(path).read(0)
    struct.pack_into("<I", content, entry + 24, 2**31)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.png has 2,147,483,648 bytes, more than the 1,073,741,824 it may have"):
        open_source(path).read(0)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_flipped_bits_are_a_line_or_change_nothing(tmp_path, method):
    path, random = tmp_path / "a.zip", np.random.default_rng(0)
    members = {f"{i}.png": random.bytes(50) * 3 for i in range(4)}
    content, right, refused = pack(path, members, method), set(members.values()), 0
    for place in random.integers(0, len(content), 500):
        changed = bytearray(content)
        changed[place] ^= 1 << int(random.integers(8))
        path.write_bytes(changed)
        with contextlib.suppress(ValueError):
            source = open_source(path)
            for item in range(len(source)):
                refused += 1
                assert source.read(item)[0] in right
                refused -= 1  # where it was not refused
    assert refused > 50
