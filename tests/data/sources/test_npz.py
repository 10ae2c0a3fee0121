import io
import os
import pickle
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from fastmask.data.sources import npz
from fastmask.data.sources.npz import free_memory, read_npz

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


def test_compressed_and_other_arrays_beside(tmp_path, capsys):
    path = written(tmp_path, compressed=True, moments=np.ones((4, 8, 2, 2), np.float16), names=np.array(["a", "b"]))
    assert read_npz(path, None).keys() == {"moments"}
    assert capsys.readouterr().out == f"{path}: left out: names\n"


def test_scale_and_shift_come_with_moments(tmp_path, capsys):
    arrays = {"moments": np.ones((4, 8, 2, 2), np.float16), "scale": np.ones(4), "shift": np.float32(0.5)}
    assert read_npz(written(tmp_path, **arrays), None).keys() == {"moments", "scale", "shift"}
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "values", [IMAGES.transpose(3, 1, 2, 0), np.asfortranarray(IMAGES), IMAGES[:, ::2], IMAGES[:1]]
)
def test_arrays_in_any_order_in_memory(tmp_path, values):
    for compressed in (False, True):
        assert np.array_equal(read_npz(written(tmp_path, compressed, images=values), None)["images"], values)


@pytest.mark.parametrize("name", ["label", "mabels", "y"])
def test_labels_of_another_name_are_not_left_out_in_silence(tmp_path, name):
    path = written(tmp_path, images=IMAGES, **{name: np.arange(4)})
    with pytest.raises(
        ValueError, match=f"holds no `labels`, but `{name}`, 4 integers: give them the name `labels`, or"
    ):
        read_npz(path, None)
    assert read_npz(path, 0).keys() == {"images"}
    both = written(tmp_path, images=IMAGES, labels=np.zeros(4, int), **{name: np.arange(4)})
    assert not read_npz(both, None)["labels"].any()


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
        ({"images": IMAGES}, 3, "holds no `labels`, but num_classes is 3"),
        ({"images": IMAGES, "labels": np.arange(3)}, None, r"must be 4 integers, not int64 of shape \(3,\)"),
        ({"images": IMAGES, "labels": np.zeros((4, 1), int)}, None, r"must be 4 integers, not int64 of shape \(4, 1\)"),
        ({"images": IMAGES, "labels": np.zeros(4)}, None, r"must be 4 integers, not float64 of shape \(4,\)"),
        ({"images": IMAGES, "labels": np.zeros(4, bool)}, None, "`labels` is not a numpy array of numbers"),
        ({"images": IMAGES, "labels": np.array(["cat"] * 4)}, None, "`labels` is not a numpy array of numbers"),
        ({"images": IMAGES, "labels": np.array([0, 10**6, 1, 2])}, None, "label 1000000 is outside 0 .. 999999"),
        ({"images": IMAGES, "labels": np.array([0, 3, 1, 2])}, 3, "label 3 is outside 0 .. 2"),
        ({"images": IMAGES, "labels": np.array([0, -1, 1, 127], np.int8)}, None, "label -1 is outside 0 .. "),
        ({"images": IMAGES, "labels": np.array([0, -1, 1, 2])}, 3, "label -1 is outside 0 .. 2"),
        ({"images": IMAGES, "labels": np.array([0, 2**63, 1, 2], np.uint64)}, None, f"label {2**63} is outside"),
        ({"images": np.array([{}, 1], object)}, None, "`images` is not a numpy array of numbers"),
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


def claiming(path, shape, content=b"1234"):
    """Write an `.npz` whose images are as large as a header says, and no larger in the file than what is given."""
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("images.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + content)
    return path


def test_a_header_that_claims_200_tb(tmp_path):
    path = claiming(tmp_path / "data.npz", (10**9, 256, 256, 3))
    with pytest.raises(
        ValueError, match=r"`images` has 132 bytes, not those of uint8 of shape \(1000000000, 256, 256, 3"
    ):
        read_npz(path, None)


def test_more_than_the_memory_holds(tmp_path, monkeypatch):
    """12 GB deflate to 12 MB."""
    path = claiming(tmp_path / "data.npz", (200, 100, 100, 3), bytes(6 * 10**6))
    assert path.stat().st_size < 10**4
    monkeypatch.setattr(npz, "free_memory", lambda: 5 * 10**6)
    with pytest.raises(ValueError, match=r"data\.npz takes 0\.0 GB of memory, and 0\.0 GB are free: give it in parts"):
        read_npz(path, None)
    monkeypatch.setattr(npz, "free_memory", lambda: None)
    assert read_npz(path, None)["images"].shape == (200, 100, 100, 3)


CODE = """
import resource, sys
from pathlib import Path
from fastmask.data.sources.npz import read_npz

pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (100 << 20),) * 2)
try:
    read_npz(Path(sys.argv[1]), None)
except ValueError as error:
    print(error)
"""


@pytest.mark.once
def test_memory_that_cannot_be_had_is_one_line(tmp_path):
    path = claiming(tmp_path / "data.npz", (1000, 400, 400, 3), bytes(480 * 10**6))
    found = subprocess.run([sys.executable, "-c", CODE, str(path)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found
    assert found.stdout.endswith("`images` takes 0.5 GB of memory, which cannot be had\n")


def test_free_memory():
    free = free_memory()
    total = os.sysconf("SC_PHYS_PAGES") * resource.getpagesize()
    assert free is None if not Path("/proc/meminfo").exists() else 0 < free <= total


def test_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "data.npz")
    with pytest.raises(ValueError, match=r"is not an \.npz file"):
        read_npz(tmp_path / "data.npz", None)


def test_pickles_are_never_loaded(tmp_path, capsys):
    class Harm:
        def __reduce__(self):
            return print, ("harm",)

    file = io.BytesIO()
    np.lib.format.write_array(file, np.array([Harm()], object), allow_pickle=True)
    with zipfile.ZipFile(tmp_path / "data.npz", "w") as written:
        written.writestr("images.npy", file.getvalue())
    with pytest.raises(ValueError, match="`images` is not a numpy array of numbers"):
        read_npz(tmp_path / "data.npz", None)
    assert capsys.readouterr().out == ""
