import pickle
import zipfile

import numpy as np
import pytest

from fastmask.data.npz import read_npz

IMAGES = np.arange(4 * 2 * 2 * 3, dtype=np.uint8).reshape(4, 2, 2, 3)


def written(tmp_path, compressed=False, **arrays):
    path = tmp_path / "data.npz"
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int32, np.uint64, ">i8"])
def test_labels_of_any_integer_type(tmp_path, dtype):
    arrays = read_npz(written(tmp_path, images=IMAGES, labels=np.array([2, 0, 5, 0], dtype)), None)
    assert arrays["labels"].dtype == np.dtype("=i8")
    assert arrays["labels"].tolist() == [2, 0, 5, 0]
    assert arrays["num_classes"] == 6
    assert np.array_equal(arrays["images"], IMAGES)


def test_highest_label_of_a_small_type_does_not_wrap(tmp_path):
    labels = np.array([255, 0, 0, 0], np.uint8)
    assert read_npz(written(tmp_path, images=IMAGES, labels=labels), None)["num_classes"] == 256


def test_compressed_and_other_arrays_beside(tmp_path):
    path = written(tmp_path, compressed=True, moments=np.ones((4, 8, 2, 2), np.float16), names=np.array(["a", "b"]))
    assert read_npz(path, None).keys() == {"moments"}


def test_num_classes_may_exceed_the_labels(tmp_path):
    assert read_npz(written(tmp_path, images=IMAGES, labels=np.arange(4)), 10)["num_classes"] == 10


@pytest.mark.parametrize("num_classes", [None, 0])
def test_without_labels(tmp_path, num_classes):
    assert read_npz(written(tmp_path, images=IMAGES), num_classes).keys() == {"images"}


def test_no_classes_leaves_the_labels_out(tmp_path):
    assert read_npz(written(tmp_path, images=IMAGES, labels=np.arange(4)), 0).keys() == {"images"}


@pytest.mark.parametrize(
    ("arrays", "num_classes", "message"),
    [
        ({}, None, "must hold either `images` or `moments`"),
        ({"pixels": IMAGES}, None, "must hold either `images` or `moments`"),
        ({"images": IMAGES, "moments": IMAGES}, None, "must hold either `images` or `moments`"),
        ({"images": IMAGES[:0]}, None, "holds no samples"),
        ({"images": np.uint8(3)}, None, "holds no samples"),
        ({"images": IMAGES}, 3, "holds no `labels`, which num_classes 3 asks for"),
        ({"images": IMAGES, "labels": np.arange(3)}, None, r"must be 4 integers, not int64 of shape \(3,\)"),
        ({"images": IMAGES, "labels": np.zeros((4, 1), int)}, None, r"must be 4 integers, not int64 of shape \(4, 1\)"),
        ({"images": IMAGES, "labels": np.zeros(4)}, None, r"must be 4 integers, not float64 of shape \(4,\)"),
        ({"images": IMAGES, "labels": np.zeros(4, bool)}, None, "must be 4 integers, not bool"),
        ({"images": IMAGES, "labels": np.array([0, 3, 1, 2])}, 3, "label 3 is outside 0 .. 2"),
        ({"images": IMAGES, "labels": np.array([0, -1, 1, 127], np.int8)}, None, "label -1 is outside 0 .. "),
        ({"images": IMAGES, "labels": np.array([0, -1, 1, 2])}, 3, "label -1 is outside 0 .. 2"),
        ({"images": IMAGES, "labels": np.array([0, 2**63, 1, 2], np.uint64)}, None, f"label {2**63} is outside"),
        ({"images": np.array([{}, 1], object)}, None, "cannot be read as an .npz of plain arrays: Object arrays"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path, arrays, num_classes, message):
    path = written(tmp_path, **arrays)
    with pytest.raises(ValueError, match=message) as error:
        read_npz(path, num_classes)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"text", pickle.dumps({"images": 1}), b"PK\x03\x04 cut off"])
def test_a_file_of_something_else(tmp_path, content):
    (tmp_path / "data.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"data\.npz is not an \.npz file, or is cut off: write it with numpy\.savez"):
        read_npz(tmp_path / "data.npz", None)


def test_a_renamed_npy(tmp_path):
    np.save(tmp_path / "data.npy", IMAGES)
    (tmp_path / "data.npy").rename(tmp_path / "data.npz")
    with pytest.raises(ValueError, match=r"is not an \.npz file"):
        read_npz(tmp_path / "data.npz", None)


@pytest.mark.parametrize("name", ["images", "images.npy"])
def test_a_zip_of_something_else(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "data.npz", "w") as file:
        file.writestr(name, "no array")
    with pytest.raises(ValueError, match="`images` is not a numpy array"):
        read_npz(tmp_path / "data.npz", None)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_damaged_file_never_escapes(tmp_path, compressed):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 9, (4, 16, 16, 3), dtype=np.uint8)
    path = written(tmp_path, compressed, images=images, labels=np.arange(4))
    whole = path.read_bytes()
    refused = []
    for _ in range(200):
        content = bytearray(whole[: rng.integers(len(whole))] if rng.random() < 0.2 else whole)
        for i in rng.integers(0, max(1, len(content)), 3):
            content[i : i + 1] = rng.bytes(1)
        path.write_bytes(content)
        try:
            read_npz(path, None)
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 100
    assert all(message.startswith(str(path)) for message in refused)
