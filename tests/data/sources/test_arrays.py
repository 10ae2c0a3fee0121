import gzip

import numpy as np
import pytest

from fastmask.data.sources import arrays
from fastmask.data.sources.open import open_source


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def everything(source):
    """Return (name, content, label) of all images."""
    return [(source.name(i), *source.read(i)) for i in range(len(source))]


def idx(path, values, *, pack=False):
    shape = b"".join(int(side).to_bytes(4, "big") for side in values.shape)
    content = b"\0\0\x08" + bytes([values.ndim]) + shape + values.tobytes()
    path.write_bytes(gzip.compress(content) if pack else content)


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


def test_idx_files_of_a_folder_are_all_named(tmp_path):
    """The training set first."""
    for name in ("t10k", "train", "extra"):
        idx(tmp_path / f"{name}-images-idx3-ubyte", noise(1, 2, 2))
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the whole line is compared)
        open_source(tmp_path)
    names = " or ".join(f"{tmp_path}/{name}-images-idx3-ubyte" for name in ("train", "extra", "t10k"))
    assert str(error.value) == f"{tmp_path} holds several files of images: name one of them, {names}"


def test_idx_says_which_labels_it_wants(tmp_path):
    path = tmp_path / "train-images-idx3-ubyte"
    idx(path, noise(3, 5, 4))
    source = open_source(path)
    assert (source.side, source.labels) == (4, None)
    assert source.lines()[1] == f"there are no labels: {tmp_path / 'train-labels-idx1-ubyte'} is not there"
    idx(tmp_path / "train-labels-idx1-ubyte.gz", np.array([1, 0, 1], np.uint8), pack=True)
    assert open_source(path).lines() == ["idx, 3 images, 2 classes by labels: 0, 1"]
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(b"damaged")
    assert open_source(path, labelled=False).lines() == ["idx, 3 images, no classes (--num-classes 0)"]


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("shape", [(2**31, 1000, 100), (2**32 - 1,) * 4, (60, 2**20, 2**10)], ids=str)
def test_idx_that_claims_terabytes(tmp_path, pack, shape):
    """Nothing of it is allocated."""
    content = b"\0\0\x08" + bytes([len(shape)]) + np.array(shape, ">u4").tobytes() + bytes(1000)
    (tmp_path / "images-idx").write_bytes(gzip.compress(content) if pack else content)
    with pytest.raises(
        ValueError, match="images-idx is cut off, or not an IDX file: it is too short for values of shape"
    ):
        open_source(tmp_path / "images-idx")


def test_idx_larger_than_the_memory(tmp_path, monkeypatch):
    idx(tmp_path / "images-idx", np.zeros((100, 100, 100), np.uint8), pack=True)
    monkeypatch.setattr(arrays.os, "sysconf", lambda name: 1000)
    with pytest.raises(ValueError, match=r"images-idx takes 0\.0 GiB in memory, more than half of this machine's 0\.0"):
        open_source(tmp_path / "images-idx")


def test_idx_with_something_behind_it(tmp_path):
    path = tmp_path / "images-idx"
    idx(path, noise(3, 5, 4))
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(ValueError, match=r"or not an IDX file: more than 60 values of shape \(3, 5, 4\)"):
        open_source(path)


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
    with pytest.raises(ValueError, match=r"b\.npz: `images` must be uint8 of .*, not float16 of shape \(3, 8, 4, 4\)"):
        open_source(tmp_path / "b.npz")
