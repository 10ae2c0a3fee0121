import gzip
import json

import numpy as np
import pytest

from fastmask.data.sources import open_source


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def files(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def everything(source):
    """Return (name, content, label) of all images."""
    return [(source.name(i), *source.read(i)) for i in range(len(source))]


def idx(path, values, *, pack=False):
    shape = b"".join(int(side).to_bytes(4, "big") for side in values.shape)
    content = b"\0\0\x08" + bytes([values.ndim]) + shape + values.tobytes()
    path.write_bytes(gzip.compress(content) if pack else content)


def test_a_folder_per_class(tmp_path):
    files(tmp_path, "dog/b.png", "cat/z.JPG", "cat/deep/a.png", "cat/notes.txt")
    source = open_source(tmp_path)
    assert (source.kind, source.channels, source.class_names) == ("folder", 3, ["cat", "dog"])
    assert source.ignored == ["cat/notes.txt"]
    assert everything(source) == [
        (str(tmp_path / name), name.encode(), label)
        for name, label in [("cat/deep/a.png", 0), ("cat/z.JPG", 0), ("dog/b.png", 1)]
    ]


def test_a_folder_without_classes(tmp_path):
    files(tmp_path, "b.png", "a.png")
    source = open_source(tmp_path)
    assert source.class_names == []
    assert [label for _, _, label in everything(source)] == [0, 0]


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize(("labels", "names"), [((2, 0), ["0", "1", "2"]), (("dog", "cat"), ["cat", "dog"])])
def test_labels_of_a_file(tmp_path, listed, labels, names):
    files(tmp_path, "x/a.png", "b.png")
    given = {"x/a.png": labels[0], "b.png": labels[1], "gone.png": labels[0]}
    (tmp_path / "labels.json").write_text(json.dumps({"labels": list(given.items())} if listed else given))
    source = open_source(tmp_path)
    assert source.class_names == names
    assert source.ignored == []
    found = {name: names[label] for name, _, label in everything(source)}
    assert found == {str(tmp_path / "x" / "a.png"): str(labels[0]), str(tmp_path / "b.png"): str(labels[1])}


def test_names_of_class_folders(tmp_path):
    files(tmp_path, "n1/a.png", "n2/b.png")
    (tmp_path / "labels.json").write_text('{"n1": "tench", "n2": "goldfish"}')
    assert open_source(tmp_path).class_names == ["tench", "goldfish"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"a.png": 1.5}', r"the label of a\.png must be a number or a name, not 1\.5"),
        ('{"a.png": 1}', r"has no label for b\.png, and for 1 of 2 images"),
        ('{"a.png": 1, "b.png": "x"}', "mixes labels that are names with labels that are numbers"),
        ('{"a.png": 1, "b.png": -1}', "label -1 is below 0"),
    ],
)
def test_labels_that_cannot_be(tmp_path, text, message):
    files(tmp_path, "a.png", "b.png")
    (tmp_path / "labels.json").write_text(text)
    with pytest.raises(ValueError, match=rf"labels\.json.*{message}"):
        open_source(tmp_path)


def test_folders_that_cannot_be(tmp_path):
    files(tmp_path, "a/b.txt")
    with pytest.raises(ValueError, match=r"holds no images: expected .*/CLASS/IMAGE\.png"):
        open_source(tmp_path)
    files(tmp_path, "a/b.png", "c.png")
    with pytest.raises(ValueError, match=r"images beside its class folders \(c\.png\): move them into one"):
        open_source(tmp_path)


def test_symbolic_links_are_followed_and_a_loop_is_found(tmp_path):
    files(tmp_path, "elsewhere/a.png", "data/x/b.png")
    (tmp_path / "data" / "y").symlink_to(tmp_path / "elsewhere")
    source = open_source(tmp_path / "data")
    assert source.class_names == ["x", "y"]
    (tmp_path / "data" / "x" / "up").symlink_to(tmp_path / "data")
    with pytest.raises(ValueError, match=r"x/up is a symbolic link to a folder that holds it: remove the link"):
        open_source(tmp_path / "data")


def test_a_link_to_itself_is_an_image_that_cannot_be_read(tmp_path):
    files(tmp_path, "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "b.png")
    source = open_source(tmp_path)
    with pytest.raises(OSError, match=r"b\.png"):
        source.read(1)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 4), (3, 5, 4, 3)], ids=str)
def test_idx(tmp_path, pack, shape):
    images, labels = noise(*shape), np.array([2, 0, 1], np.uint8)
    suffix = ".gz" if pack else ""
    path = tmp_path / f"train-images-idx{len(shape)}-ubyte{suffix}"
    idx(path, images, pack=pack)
    idx(tmp_path / f"train-labels-idx1-ubyte{suffix}", labels, pack=pack)
    for source in (open_source(path), open_source(tmp_path)):
        assert (source.kind, source.channels, source.class_names) == ("idx", 3 if shape[3:] == (3,) else 1, list("012"))
        pixels = np.stack([pixels for _, pixels, _ in everything(source)])
        assert np.array_equal(pixels.reshape(shape), images)
        assert [label for _, _, label in everything(source)] == [2, 0, 1]
        assert source.name(1) == f"{path}, image 1"


def test_idx_that_cannot_be(tmp_path):
    path = tmp_path / "t-images-idx3-ubyte"
    idx(path, noise(3, 5, 4))
    assert open_source(path).class_names == []
    idx(tmp_path / "t-labels-idx1-ubyte", noise(2))
    with pytest.raises(ValueError, match=r"\(2,\) labels, .* has 3 images"):
        open_source(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"is cut off, or not an IDX file: 59 values of shape \(3, 5, 4\)"):
        open_source(path)
    for content, message in [
        (b"GIF89a", "not an IDX file"),
        (b"", "not an IDX file"),
        (b"\x1f\x8bxx", "cannot be read"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            open_source(path)
    idx(tmp_path / "u-images-idx3-ubyte", noise(1, 2, 2))
    with pytest.raises(ValueError, match="holds several files of images: name one of them"):
        open_source(tmp_path)


@pytest.mark.parametrize("shape", [(3, 5, 4), (3, 5, 4, 1), (3, 5, 4, 3)], ids=str)
def test_npz(tmp_path, shape):
    np.savez(tmp_path / "a.npz", images=noise(*shape), labels=np.array([1, 0, 1]))
    source = open_source(tmp_path / "a.npz")
    assert (source.kind, source.class_names) == ("npz", ["0", "1"])
    assert np.array_equal(np.stack([pixels for _, pixels, _ in everything(source)]).reshape(shape), noise(*shape))


def test_npz_that_cannot_be(tmp_path):
    np.savez(tmp_path / "a.npz", moments=np.zeros((3, 8, 4, 4), np.float16))
    np.savez(tmp_path / "b.npz", images=np.zeros((3, 8, 4, 4), np.float16))
    with pytest.raises(
        ValueError, match=r"holds moments of latents, which are trained on as they are: --data .*a\.npz"
    ):
        open_source(tmp_path / "a.npz")
    with pytest.raises(ValueError, match="`images` must be uint8"):
        open_source(tmp_path / "b.npz")


def test_nothing_that_is_known(tmp_path):
    files(tmp_path, "a.zip")
    with pytest.raises(ValueError, match=r"gone does not exist: name a folder, \.tar"):
        open_source(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"a\.zip is no folder, \.tar"):
        open_source(tmp_path / "a.zip")
    (tmp_path / "hub" / "train").mkdir(parents=True)
    files(tmp_path / "hub", "dataset_dict.json")
    with pytest.raises(ValueError, match=r"holds several splits: name one of them, .*hub/train"):
        open_source(tmp_path / "hub")


def test_parquet_files_of_several_splits(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001-b42a775f407cee45"):
        (tmp_path / f"{name}.parquet").touch()
    with pytest.raises(ValueError, match=r"holds several splits \(test, train\): put the files of one, or links to"):
        open_source(tmp_path)
