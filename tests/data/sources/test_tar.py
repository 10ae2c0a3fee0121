import contextlib
import io
import json
import tarfile

import numpy as np
import pytest

from fastmask.data.sources.folders import HIDDEN, NO_IMAGE
from fastmask.data.sources.open import open_source
from fastmask.data.sources.tar import LINKS, PARTS


def tar(path, members, mode="w"):
    with tarfile.open(path, mode) as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path.read_bytes()


def everything(source):
    return [(source.name(i), *source.read(i)) for i in range(len(source))]


def test_webdataset(tmp_path):
    first, second = tmp_path / "0.tar", tmp_path / "1.tar"
    tar(first, {"a/x.jpg": b"X", "a/x.cls": b"7", "y.cls": b"0\n", "y.PNG": b"YY", "readme.txt": b""})
    tar(second, {"z.seg.jpg": b"", "z.jpg": b"Z", "z.json": b'{"label": 3}'})
    source = open_source(tmp_path)
    assert (source.kind, source.class_names) == ("webdataset", [str(number) for number in range(8)])
    assert source.left_out == {NO_IMAGE: ["readme.txt"], PARTS: ["z.seg.jpg"]}
    assert source.lines()[0] == "webdataset, 3 images, 8 classes by .cls and .json: 0, 1, 2, ..., 7"
    assert everything(source) == [
        (f"{first}:a/x.jpg", b"X", 7),
        (f"{first}:y.PNG", b"YY", 0),
        (f"{second}:z.jpg", b"Z", 3),
    ]
    assert everything(open_source(second)) == [(f"{second}:z.jpg", b"Z", 3)]


def test_webdataset_without_labels(tmp_path):
    tar(tmp_path / "0.tar", {"x.jpg": b"X", "y.jpg": b"Y"})
    assert [label for _, _, label in everything(open_source(tmp_path / "0.tar"))] == [0, 0]


def test_images_without_a_label_among_others(tmp_path):
    members = {"a.jpg": b"", "a.cls": b"1", "b.jpg": b"", "c.jpg": b"", "c.json": b"{}", "d.jpg": b"", "d.cls": b"-1"}
    tar(tmp_path / "0.tar", {**members, "e.jpg": b"", "e.json": b"[" * 100_000})
    source = open_source(tmp_path)
    assert source.read(0) == (b"", 1)
    for item, name in enumerate("bcde", 1):
        with pytest.raises(ValueError, match=rf"0\.tar:{name}\.jpg has no label, as others have \(--num-classes 0"):
            source.read(item)
    assert "4 images have no label, as the others have (--num-classes 0 takes the images without labels)" in (
        source.lines()
    )
    assert open_source(tmp_path, labelled=False).read(1) == (b"", 0)


def test_labels_that_are_names(tmp_path):
    tar(tmp_path / "0.tar", {"a.jpg": b"A", "a.cls": b"dog\n", "b.jpg": b"B", "b.json": b'{"label": "cat"}'})
    source = open_source(tmp_path)
    assert source.class_names == ["cat", "dog"]
    assert [label for _, _, label in everything(source)] == [1, 0]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.cls": b"-1", "b.cls": b"-1"}, r"0\.tar: label -1 is below 0, as in a test split"),
        ({"a.cls": b"7", "b.cls": b"cat"}, r"mixes labels that are names \(cat\) with labels that are numbers \(7\)"),
        ({"a.cls": b"4294967297"}, r"0\.tar: label 4294967297 is above 999999"),
        ({"a.json": b'{"label": 1.5}'}, r"0\.tar:a\.json: a label must be a number or a name, not 1\.5"),
        (
            {"a.json": b'{"label": 1' + b" " * 2**20 + b"}"},
            r"a\.json has 1,048,588 bytes, more than the 1,048,576 it may",
        ),
        ({"a.cls": b"x" * 2000}, r"a\.cls has 2,000 bytes, more than the 1,024 it may have"),
        ({"a.png": b"", "a.cls": b"1"}, r"a\.cls is the label of two images, a\.jpg and a\.png: keep one"),
        ({"a.cls": b"1", "labels.json": b'{"a.jpg": 1}'}, r"holds labels of samples and labels\.json: remove one"),
    ],
)
def test_labels_that_cannot_be(tmp_path, members, message):
    tar(tmp_path / "0.tar", {"a.jpg": b"A", "b.jpg": b"B", **members})
    with pytest.raises(ValueError, match=rf"{message}.*--num-classes 0") as error:
        open_source(tmp_path / "0.tar")
    assert "\n" not in str(error.value)
    source = open_source(tmp_path / "0.tar", labelled=False)
    assert {label for _, _, label in everything(source)} == {0}


def test_captions_are_no_labels(tmp_path):
    """As img2dataset writes them."""
    samples = {f"{i}.{suffix}": b"{}" if suffix == "json" else b"x" for i in "ab" for suffix in ("jpg", "json", "txt")}
    tar(tmp_path / "0.tar", samples)
    source = open_source(tmp_path)
    assert everything(source) == [(f"{tmp_path}/0.tar:{i}.jpg", b"x", 0) for i in "ab"]
    assert source.lines() == [
        "webdataset, 2 images, no classes",
        "left out, beside an image of a sample: 4 (a.json, a.txt, b.json, ...)",
    ]


def test_a_caption_of_any_kind_needs_no_label(tmp_path):
    tar(tmp_path / "0.tar", {"a.jpg": b"A", "a.json": b'{"caption": "a cat"}', "b.jpg": b"B", "b.json": b"\xff"})
    assert [label for _, _, label in everything(open_source(tmp_path))] == [0, 0]
    tar(tmp_path / "0.tar", {"a.jpg": b"A", "a.json": b"["})
    assert open_source(tmp_path, labelled=False).lines()[0] == "webdataset, 1 images, no classes (--num-classes 0)"


def test_names_with_dots(tmp_path):
    """WebDataset's own name ends at the first dot; where that leaves no image, the last one is meant."""
    members = {"photo.v1.jpg": b"1", "photo.v1.cls": b"3", "photo.v2.jpg": b"2", "photo.v2.cls": b"4"}
    tar(tmp_path / "0.tar", {**members, "n0144_1.orig.JPG": b"3", "n0144_1.cls": b"5"})
    found = [
        (f"{tmp_path}/0.tar:{name}", content, label)
        for name, content, label in (
            ("photo.v1.jpg", b"1", 3),
            ("photo.v2.jpg", b"2", 4),
            ("n0144_1.orig.JPG", b"3", 5),
        )
    ]
    assert everything(open_source(tmp_path)) == found
    tar(tmp_path / "0.tar", {"n1.orig.jpg": b"", "n1.small.jpg": b"", "n1.cls": b"5"})
    with pytest.raises(ValueError, match=r"n1\.cls is the label of two images, n1\.orig\.jpg and n1\.small\.jpg"):
        open_source(tmp_path)


def test_masks_beside_every_image_are_no_images(tmp_path):
    tar(tmp_path / "0.tar", {"a.jpg": b"A", "a.seg.png": b"", "b.jpg": b"B", "b.seg.png": b""})
    source = open_source(tmp_path)
    assert [content for _, content, _ in everything(source)] == [b"A", b"B"]
    assert source.left_out == {PARTS: ["a.seg.png", "b.seg.png"]}
    tar(tmp_path / "0.tar", {"a.jpg": b"A", "a.1.jpg": b"B", "b.jpg": b"C"})  # copies of a name, as browsers make them
    assert [content for _, content, _ in everything(open_source(tmp_path))] == [b"A", b"B", b"C"]


@pytest.mark.parametrize("root", ["", "./", "/", "photos/", "./my/photos/"])
def test_class_folders(tmp_path, root):
    path = tmp_path / "photos.tar"
    tar(path, {f"{root}{name}": name.encode() for name in ("10/b.jpg", "9/a.jpg", "10/deep/c.jpg", "10/notes.txt")})
    source = open_source(path)
    inside = root.lstrip("./")
    assert (source.kind, source.class_names) == ("tar", ["9", "10"])
    assert everything(source) == [
        (f"{path}:{inside}10/b.jpg", b"10/b.jpg", 1),
        (f"{path}:{inside}9/a.jpg", b"9/a.jpg", 0),
        (f"{path}:{inside}10/deep/c.jpg", b"10/deep/c.jpg", 1),
    ]
    assert source.left_out == {NO_IMAGE: [f"{inside}10/notes.txt"]}
    said = [f"all of its images lie in {inside}, whose folders are taken"] if inside else []
    assert source.lines()[:2] == ["tar, 3 images, 2 classes by folder: 9, 10", *said, *source.left_out_lines()][:2]


def test_class_folders_over_several_tars(tmp_path):
    tar(tmp_path / "0.tar", {"cat/a.jpg": b"1", "eel/a.jpg": b"2"})
    tar(tmp_path / "1.tar", {"cat/a.jpg": b"3", "dog/a.jpg": b"4"})
    source = open_source(tmp_path)
    assert source.class_names == ["cat", "dog", "eel"]
    assert [(content, label) for _, content, label in everything(source)] == [
        (b"1", 0),
        (b"2", 2),
        (b"3", 0),
        (b"4", 1),
    ]


@pytest.mark.parametrize("root", ["", "data/"])
def test_a_list_of_labels(tmp_path, root):
    images = {f"{root}00000/img00000000.png": b"0", f"{root}00000/img00000001.png": b"1"}
    listed = {"labels": [["00000/img00000000.png", 6], ["00000/img00000001.png", 2]]}
    tar(tmp_path / "0.tar", {**images, f"{root}dataset.json": json.dumps(listed).encode()})
    source = open_source(tmp_path)
    assert [label for _, _, label in everything(source)] == [6, 2]
    assert source.lines()[0] == "tar, 2 images, 7 classes by dataset.json: 0, 1, 2, ..., 6"
    tar(tmp_path / "1.tar", {f"{root}00000/img00000000.png": b"0", f"{root}dataset.json": b"{}"})
    with pytest.raises(ValueError, match=rf"1\.tar holds a {root}dataset\.json, as another tar does"):
        open_source(tmp_path)


def test_splits_are_no_classes(tmp_path):
    tar(tmp_path / "0.tar", {"train/cat/a.jpg": b"", "val/cat/a.jpg": b""})
    with pytest.raises(
        ValueError, match=r"holds splits, not classes \(train, val\): unpack it and name one of them, or"
    ):
        open_source(tmp_path)


def test_what_systems_leave_behind(tmp_path):
    members = {"._cat": b"", "cat/._0.jpg": b"", "__MACOSX/cat/0.jpg": b"", "cat/.ipynb_checkpoints/0.jpg": b""}
    tar(tmp_path / "0.tar", {**members, "cat/0.jpg": b"cat", "cat/Thumbs.db": b"", "dog/0.jpg": b"dog"})
    source = open_source(tmp_path)
    assert source.class_names == ["cat", "dog"]
    assert [(content, label) for _, content, label in everything(source)] == [(b"cat", 0), (b"dog", 1)]
    assert source.left_out == {HIDDEN: [*members, "cat/Thumbs.db"]}


def test_imagenet_as_it_is_distributed(tmp_path):
    dogs = tar(tmp_path / "n02.tar", {"n00000002_1.JPEG": b"dog 1", "n00000002_2.JPEG": b"dog 2"})
    cats = tar(tmp_path / "n01.tar", {"n00000001_9.JPEG": b"cat", "thumbs.db": b"", "notes.txt": b""})
    whole = tmp_path / "imagenet" / "ILSVRC2012_img_train.tar"
    whole.parent.mkdir()
    tar(whole, {"._n00000002.tar": b"x", "n00000002.tar": dogs, "n00000001.tar": cats, "README": b"x"})
    source = open_source(whole)
    assert (source.kind, source.class_names) == ("imagenet-tar", ["n00000001", "n00000002"])
    assert source.left_out == {HIDDEN: ["._n00000002.tar", "thumbs.db"], NO_IMAGE: ["README", "notes.txt"]}
    assert [label for _, _, label in everything(open_source(whole, labelled=False))] == [0, 0, 0]
    expected = [("n00000002_1.JPEG", b"dog 1", 1), ("n00000002_2.JPEG", b"dog 2", 1), ("n00000001_9.JPEG", b"cat", 0)]
    assert everything(source) == [(f"{whole}:{name}", content, label) for name, content, label in expected]
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    (unpacked / "n00000001.tar").write_bytes(cats)
    (unpacked / "n00000002.tar").write_bytes(dogs)
    assert sorted((c, label) for _, c, label in everything(open_source(unpacked))) == sorted(
        (c, label) for _, c, label in expected
    )


@pytest.mark.parametrize("name", ["0.tar", "n00000001.tar"])
def test_tars_that_cannot_be_read(tmp_path, name):
    path = tmp_path / name
    for content in (b"x" * 2000, b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} cannot be read as a tar: "):
            open_source(path)
    tar(path, {"a.txt": b""})
    with pytest.raises(ValueError, match=r"holds no images"):
        open_source(path)
    tar(path, {"a.jpg": b"x"}, "w:gz")
    with pytest.raises(ValueError, match=rf"{name} cannot be read as a tar: "):
        open_source(tmp_path)


@pytest.mark.parametrize("name", ["0.tar", "n00000001.tar"])
def test_a_tar_that_is_cut_off(tmp_path, name):
    """Anywhere: at the end of a file too, where tarfile finds nothing wrong."""
    path = tmp_path / name
    content = tar(path, {"a.jpg": b"a" * 3000, "b.jpg": b"b" * 3000})
    source = open_source(path)
    path.write_bytes(content[:2000])
    with pytest.raises(ValueError, match=rf"{name}:a\.jpg is cut off"):
        source.read(0)
    for size in (100, 600, 2000, 3500, 4000, 4200, 7100):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=rf"{name} cannot be read as a tar: "):
            open_source(path)
    for size in (512 + 3072, 2 * (512 + 3072)):
        path.write_bytes(content[:size])
        assert f"{path} ends without the mark of an end: it may be cut off there" in open_source(path).lines()


def test_a_damaged_header_does_not_end_a_tar(tmp_path):
    path = tmp_path / "0.tar"
    content = bytearray(tar(path, dict.fromkeys(("a.jpg", "b.jpg", "c.jpg"), b"x")))
    content[1024 + 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"0\.tar cannot be read as a tar: its header at byte 1,024 is damaged"):
        open_source(path)


def test_tars_that_were_concatenated(tmp_path):
    first, second = (tar(tmp_path / f"{i}.tar", {f"{i}.jpg": b"x"}) for i in range(2))
    (tmp_path / "0.tar").write_bytes(first + second)
    with pytest.raises(ValueError, match=r"0\.tar cannot be read as a tar: something follows its end at byte 1,024"):
        open_source(tmp_path / "0.tar")


def test_a_name_that_a_tar_holds_twice(tmp_path):
    path = tmp_path / "0.tar"
    tar(path, {"cat/a.jpg": b"old"})
    with tarfile.open(path, "a") as file:
        info = tarfile.TarInfo("./cat/a.jpg")
        info.size = 3
        file.addfile(info, io.BytesIO(b"new"))
    with pytest.raises(ValueError, match=r"0\.tar cannot be read as a tar: it holds cat/a\.jpg twice: pack it again"):
        open_source(path)


def test_links_and_what_else_is_no_file(tmp_path):
    """A hard link is the file that it names."""
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as file:
        for name, kind, link in [
            ("cat", tarfile.DIRTYPE, ""),
            ("cat/a.jpg", tarfile.REGTYPE, ""),
            ("dog/b.jpg", tarfile.LNKTYPE, "./cat/a.jpg"),
            ("dog/c.jpg", tarfile.SYMTYPE, "../cat/a.jpg"),
            ("dog/d.jpg", tarfile.FIFOTYPE, ""),
            ("dog/e.jpg", tarfile.CHRTYPE, ""),
            ("dog/f.jpg", tarfile.LNKTYPE, "gone.jpg"),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, link, 3 if kind == tarfile.REGTYPE else 0
            file.addfile(info, io.BytesIO(b"cat"))
    source = open_source(path)
    assert everything(source) == [(f"{path}:cat/a.jpg", b"cat", 0), (f"{path}:dog/b.jpg", b"cat", 1)]
    assert source.left_out == {LINKS: ["dog/c.jpg", "dog/d.jpg", "dog/e.jpg", "dog/f.jpg"]}


@pytest.mark.parametrize("name", ["../a.jpg", "cat/../../a.jpg", ".."])
def test_names_that_lead_out(tmp_path, name):
    tar(tmp_path / "0.tar", {name: b"x", "b.jpg": b"x"})
    with pytest.raises(ValueError, match=r"0\.tar cannot be read as a tar: .* leads out of it"):
        open_source(tmp_path)


def sparse(path, real):
    """Write a tar of a file that is a hole from byte 512, in the form that GNU tar gives it, and a plain one."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as file:
        info = tarfile.TarInfo("a.jpg")
        info.size, info.type = 512, tarfile.GNUTYPE_SPARSE
        header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
        header[386:410] = b"%011o\0%011o\0" % (0, 512)
        header[483:495] = b"%011o\0" % real if real < 2**33 else b"\x80" + real.to_bytes(11, "big")
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        file.fileobj.write(bytes(header) + b"z" * 512)
        file.offset += 1024
        plain = tarfile.TarInfo("b.jpg")
        plain.size = 1
        file.addfile(plain, io.BytesIO(b"b"))


@pytest.mark.parametrize("real", [4096, 2**40])
def test_a_file_with_holes(tmp_path, real):
    """What lies in the tar is less than the file; a terabyte of it is not allocated."""
    sparse(tmp_path / "0.tar", real)
    source = open_source(tmp_path)
    assert source.read(1) == (b"b", 0)
    with pytest.raises(ValueError, match=r"0\.tar:a\.jpg is stored with holes: pack the tar without --sparse"):
        source.read(0)


@pytest.mark.parametrize("size", [10_000, 2**40, 2**62, 2**80])
@pytest.mark.parametrize("name", ["0.tar", "n00000001.tar"])
def test_a_size_beyond_the_tar(tmp_path, name, size):
    info = tarfile.TarInfo("a.jpg")
    info.size = size
    (tmp_path / name).write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    with pytest.raises(ValueError, match=rf"{name} cannot be read as a tar: "):
        open_source(tmp_path / name)


def test_a_class_in_imagenets_tar_ends_where_it_says(tmp_path):
    """Not in the header of the one that follows, if the mark of its end is missing."""
    inner = {f"n0000000{i}.tar": tar(tmp_path / "i", {f"{i}.JPEG": b"%d" % i})[:1024] for i in range(3)}
    tar(tmp_path / "whole.tar", inner)
    source = open_source(tmp_path / "whole.tar")
    assert [(content, label) for _, content, label in everything(source)] == [(b"0", 0), (b"1", 1), (b"2", 2)]
    assert len([line for line in source.lines() if "ends without the mark" in line]) == 3


def test_a_file_in_imagenets_tar_does_not_reach_into_the_next_class(tmp_path):
    """Its size is damaged, and the whole tar is long enough."""
    info = tarfile.TarInfo("0.JPEG")
    info.size = 2000
    inner = {"n00000000.tar": info.tobuf() + bytes(512), "n00000001.tar": tar(tmp_path / "i", {"1.JPEG": b"1"})}
    tar(tmp_path / "whole.tar", inner)
    with pytest.raises(ValueError, match=r"whole\.tar:n00000000\.tar cannot be read as a tar: 0\.JPEG is cut off, or"):
        open_source(tmp_path / "whole.tar")


def test_flipped_bits_are_a_line_or_change_nothing_that_is_counted(tmp_path):
    """Wherever they are in the headers."""
    path, random = tmp_path / "0.tar", np.random.default_rng(0)
    members = {f"{i}.{suffix}": b"%d" % i for i in range(4) for suffix in ("jpg", "cls")}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = len(content), {"comment": "x"}
            file.addfile(info, io.BytesIO(content))
    content = path.read_bytes()
    refused = 0
    for place in random.integers(0, 8 * 4 * 512, 600):
        changed = bytearray(content)
        changed[place] ^= 1 << int(random.integers(8))
        path.write_bytes(changed)
        try:
            source = open_source(path)
        except ValueError:
            refused += 1
            continue
        assert len(source) == 4
        for item in range(4):
            with contextlib.suppress(ValueError):
                source.read(item)
    assert refused > 100
