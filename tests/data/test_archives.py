import io
import tarfile

import pytest

from fastmask.data.sources import open_source


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
    assert (source.kind, source.class_names, source.ignored) == ("webdataset", [], ["readme.txt"])
    assert everything(source) == [
        (f"{first}:a/x.jpg", b"X", 7),
        (f"{first}:y.PNG", b"YY", 0),
        (f"{second}:z.jpg", b"Z", 3),
    ]
    assert everything(open_source(second)) == [(f"{second}:z.jpg", b"Z", 3)]


def test_webdataset_without_labels(tmp_path):
    tar(tmp_path / "0.tar", {"x.jpg": b"X", "y.jpg": b"Y"})
    assert [label for _, _, label in everything(open_source(tmp_path / "0.tar"))] == [0, 0]


def test_labels_that_cannot_be_read(tmp_path):
    tar(
        tmp_path / "0.tar",
        {"a.jpg": b"", "a.cls": b"cat", "b.jpg": b"", "c.jpg": b"", "c.json": b"{}", "d.jpg": b"", "d.cls": b"-1"},
    )
    source = open_source(tmp_path)
    for item, message in enumerate(
        [r"0\.tar:a\.cls holds no label: b'cat'", r"b\.jpg has no label, as others have", "c.json holds", "d.cls holds"]
    ):
        with pytest.raises(ValueError, match=message):
            source.read(item)


def test_imagenet_as_it_is_distributed(tmp_path):
    dogs = tar(tmp_path / "n02.tar", {"n00000002_1.JPEG": b"dog 1", "n00000002_2.JPEG": b"dog 2"})
    cats = tar(tmp_path / "n01.tar", {"n00000001_9.JPEG": b"cat", "thumbs.db": b""})
    whole = tmp_path / "imagenet" / "ILSVRC2012_img_train.tar"
    whole.parent.mkdir()
    tar(whole, {"n00000002.tar": dogs, "n00000001.tar": cats})
    source = open_source(whole)
    assert (source.kind, source.class_names) == ("imagenet-tar", ["n00000001", "n00000002"])
    assert source.ignored == ["thumbs.db"]
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


def test_a_tar_that_is_cut_off(tmp_path):
    path = tmp_path / "0.tar"
    content = tar(path, {"a.jpg": b"a" * 3000, "b.jpg": b"b" * 3000})
    source = open_source(path)
    path.write_bytes(content[:2000])
    with pytest.raises(ValueError, match=r"0\.tar:a\.jpg is cut off"):
        source.read(0)
