import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from stores import edit_manifest, manifest, records_of, write

from fastmask.data import StoreDataset, batches, open_data
from fastmask.data.images.pixels import images_of
from fastmask.data.latents import latents_of
from fastmask.data.store import reader as store
from fastmask.data.store.reader import damaged_files


def opened(path, image_size=32, num_classes=None, flip=False):
    return StoreDataset(path, image_size, num_classes, flip)


@pytest.mark.parametrize("shard_size", [1, 3, 4, 10, 99])
def test_records_come_back(tmp_path, shard_size):
    about = write(tmp_path / "store", shard_size=shard_size)
    data = opened(tmp_path / "store")
    records, labels = records_of(about, 10)
    ids = np.array([9, 0, 3, 3, 4, 7, 8])
    stored, read_labels = data.read(ids)
    assert (len(data), data.shape, data.num_classes, data.class_names) == (10, (4, 4, 4), 3, ["a", "b", "c"])
    assert (stored.dtype, read_labels.dtype) == (torch.float16, torch.int64)
    assert np.array_equal(stored.numpy(), records[ids, 0])
    assert np.array_equal(read_labels.numpy(), labels[ids])


def test_flipping_counts_the_stored_mirror_images_too(tmp_path):
    about = write(tmp_path / "store")
    data = opened(tmp_path / "store", flip=True)
    records, labels = records_of(about, 10)
    assert len(data) == 20
    stored, read_labels = data.read(np.array([2, 12, 19]))
    assert np.array_equal(stored.numpy(), records[[2, 2, 9], [0, 1, 1]])
    assert read_labels.tolist() == labels[[2, 2, 9]].tolist()
    parts = batches(data, batch_size=8, seed=1, start=0, stop=20, num_workers=0, device=torch.device("cpu"))
    seen = {record.numpy().tobytes() for stored, _ in parts for record in stored}
    assert seen == {record.tobytes() for record in records.reshape(20, 8, 4, 4)}


def test_latents_are_drawn_with_the_stores_scale_and_shift(tmp_path):
    write(tmp_path / "store")
    data = opened(tmp_path / "store")
    stored, sample = data.read(np.arange(10))[0], torch.arange(50, 60)
    torch.testing.assert_close(data.to_images(stored, 3, sample), (latents_of(stored, 3, sample) - 0.25) * 0.5)


def test_a_scale_and_shift_per_channel(tmp_path):
    scale, shift = [1.0, 2.0, 3.0, 4.0], [0.5, 0.0, -1.0, 2.0]
    write(tmp_path / "store", manifest(scale=scale, shift=shift))
    data = opened(tmp_path / "store")
    stored, sample = data.read(np.arange(10))[0], torch.arange(10)
    drawn, latents = data.to_images(stored, 3, sample), latents_of(stored, 3, sample)
    for channel in range(4):
        exact = (latents[:, channel] - shift[channel]) * scale[channel]
        torch.testing.assert_close(drawn[:, channel], exact)


def test_latents_without_moments_are_trained_on_as_they_are(tmp_path):
    about = write(tmp_path / "store", manifest(kind="latents", copies=1))
    data = opened(tmp_path / "store")
    stored, _ = data.read(np.arange(10))
    assert data.shape == (8, 4, 4)
    assert torch.equal(data.to_images(stored, 0, torch.arange(10)), (stored.float() - about.shift) * about.scale)


def test_pixels(tmp_path):
    about = write(tmp_path / "store", manifest("pixels"))
    records, _ = records_of(about, 10)
    for flip in (False, True):
        data = opened(tmp_path / "store", image_size=8, flip=flip)
        assert (len(data), data.shape) == (10, (3, 8, 8))
        stored, sample = data.read(np.arange(10))[0], torch.arange(100, 110)
        assert stored.dtype == torch.uint8
        assert np.array_equal(stored.numpy(), records[:, 0])
        assert torch.equal(data.to_images(stored, 7, sample), images_of(stored, 7, sample, flip))


def test_skipped_items_leave_no_gap(tmp_path):
    about = write(tmp_path / "store", skip=(0, 4, 5, 6, 7, 9))
    assert [shard.count for shard in about.shards] == [3, 0, 1]
    assert [name for shard in about.shards for name in shard.skipped] == [f"item {i}" for i in (0, 4, 5, 6, 7, 9)]
    assert about.class_counts == [1, 1, 2]
    records, labels = records_of(about, 10)
    stored, read_labels = opened(tmp_path / "store").read(np.arange(4))
    assert np.array_equal(stored.numpy(), records[[1, 2, 3, 8], 0])
    assert read_labels.tolist() == labels[[1, 2, 3, 8]].tolist()


def test_more_shards_than_are_kept_open(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_OPEN_FILES", 4)
    about = write(tmp_path / "store", shard_size=1)
    data = opened(tmp_path / "store")
    for _ in range(2):
        assert np.array_equal(data.read(np.arange(10))[0].numpy(), records_of(about, 10)[0][:, 0])


def test_a_store_that_is_gone_is_one_line(tmp_path):
    """What is mapped can still be read; what is not mapped yet is no error of a worker with its traceback."""
    write(tmp_path / "store", shard_size=4)
    data = opened(tmp_path / "store")
    data.read(np.arange(4))
    (tmp_path / "store").rename(tmp_path / "gone")
    data.read(np.arange(4))
    with pytest.raises(ValueError, match=r"store cannot be read any more: .*No such file or directory: .*00001.npy"):
        data.read(np.arange(8))


def test_another_process_can_be_handed_the_store(tmp_path):
    write(tmp_path / "store")
    data = opened(tmp_path / "store")
    expected = data.read(np.arange(10))[0]
    assert len(pickle.dumps(data)) < 5000
    assert torch.equal(pickle.loads(pickle.dumps(data)).read(np.arange(10))[0], expected)
    arguments = {"batch_size": 4, "seed": 0, "start": 0, "stop": 20, "device": torch.device("cpu")}
    for (a, _), (b, _) in zip(
        batches(data, num_workers=0, **arguments), batches(data, num_workers=2, **arguments), strict=True
    ):
        assert torch.equal(a, b)


def test_labels(tmp_path):
    write(tmp_path / "store", class_names=["a"])
    assert opened(tmp_path / "store").class_names == ["a", "1", "2"]
    assert opened(tmp_path / "store", num_classes=5).class_names == ["a", "1", "2", "3", "4"]
    without = opened(tmp_path / "store", num_classes=0)
    assert (without.num_classes, without.class_names) == (0, [])
    assert not without.read(np.arange(10))[1].any()


@pytest.mark.parametrize(
    ("about", "arguments", "message"),
    [
        (manifest(), {"image_size": 64}, "holds images of side 32, not 64: give --image-size 32"),
        (manifest(), {"num_classes": 2}, "has 3 classes, more than num_classes 2"),
        (manifest(copies=1), {"flip": True}, "no latents of flipped images: prepare it from images"),
    ],
)
def test_what_a_store_is_not(tmp_path, about, arguments, message):
    write(tmp_path / "store", about)
    with pytest.raises(ValueError, match=message):
        opened(tmp_path / "store", **arguments)


def test_a_store_of_nothing(tmp_path):
    write(tmp_path / "store", count=2, skip=(0, 1))
    with pytest.raises(ValueError, match="holds no records"):
        opened(tmp_path / "store")


def test_a_store_without_labels(tmp_path):
    write(tmp_path / "store", count=1, class_names=[])
    assert opened(tmp_path / "store").num_classes == 0
    with pytest.raises(ValueError, match="has no labels, but num_classes is 3"):
        opened(tmp_path / "store", num_classes=3)


def test_a_folder_with_a_manifest_is_a_store(tmp_path):
    write(tmp_path / "store")
    data = open_data(str(tmp_path / "store"), image_size=32, num_classes=None, flip=True)
    assert isinstance(data, StoreDataset)
    assert len(data) == 20


@pytest.mark.parametrize("name", ["00001.npy", "00002.labels.npy"])
@pytest.mark.parametrize("place", [0, 127, 130, -1])
def test_any_flipped_bit_is_found(tmp_path, name, place):
    about = write(tmp_path / "store")
    assert list(damaged_files(tmp_path / "store", about)) == []
    content = bytearray((tmp_path / "store" / name).read_bytes())
    content[place] ^= 4
    (tmp_path / "store" / name).write_bytes(content)
    assert list(damaged_files(tmp_path / "store", about)) == [
        f"{tmp_path / 'store' / name} is damaged: its SHA-256 is not that of the manifest"
    ]


def test_the_page_reads_a_store_in_ten_lines(tmp_path, monkeypatch):
    page = (Path(__file__).parents[3] / "docs" / "store.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len([line for line in example.splitlines() if line]) <= 10
    about = write(tmp_path / "store")
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(compile(example, "docs/store.md", "exec"), scope)
    records, labels = records_of(about, 10)
    assert np.array_equal(scope["records"], records[8:])
    assert np.array_equal(scope["labels"], labels[8:])
    assert scope["manifest"]["count"] == 10


def test_what_is_recognised_is_said(tmp_path, capsys):
    write(tmp_path / "store", manifest(vae="some/vae"), skip=(4, 5), class_names=["a", "b", "c", "d"])
    open_data(str(tmp_path / "store"), image_size=32, num_classes=None, flip=False)
    assert capsys.readouterr().out == (
        f"{tmp_path / 'store'}: a store of 8 moments (2, 8, 4, 4), 4 classes (a, b, c, ...), 2 images left out when it "
        f"was made, scale 0.5, shift 0.25 (its manifest; VAE some/vae)\n"
    )
    edit_manifest(tmp_path / "store", lambda fields: fields.update(class_names=["a\n\x1b[2J", "b", "c", "d"]))
    open_data(str(tmp_path / "store"), image_size=32, num_classes=None, flip=False)
    assert r"4 classes (a\n\x1b[2J, b, c, ...)" in capsys.readouterr().out
    write(tmp_path / "pixels", manifest("pixels"), class_names=[], count=1)
    open_data(str(tmp_path / "pixels"), image_size=8, num_classes=None, flip=False)
    assert capsys.readouterr().out.endswith("pixels: a store of 1 pixels (1, 3, 8, 8), no labels\n")


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, -np.nan])
@pytest.mark.parametrize("place", [0, 3, -1])
def test_values_that_are_not_finite_are_refused(tmp_path, value, place):
    about = write(tmp_path / "store")
    path = tmp_path / "store" / "00001.npy"
    records = np.lib.format.open_memmap(path, "r+")
    records[2].flat[place] = value
    records.flush()
    data = opened(tmp_path / "store", flip=True)
    bad = 6 if place >= 0 else 16  # the last value is of the flipped image
    assert about.count == 10
    data.read(np.array([i for i in range(20) if i != bad]))
    with pytest.raises(ValueError, match=r"store/00001\.npy: record 2 holds values that are not finite"):
        data.read(np.array([3, bad]))


def test_the_largest_values_of_either_sign_are_finite(tmp_path, monkeypatch):
    largest = np.finfo(np.float16).max
    values = np.resize(np.array([largest, -largest, 0, -0.0, 1e-7], np.float16), (10, *manifest().shape))
    monkeypatch.setattr("stores.records_of", lambda about, count: (values, np.zeros(count, int)))
    write(tmp_path / "store", class_names=[])
    assert np.array_equal(opened(tmp_path / "store").read(np.arange(10))[0].numpy(), values[:, 0])


@pytest.mark.parametrize("label", [-1, 3, 2**31 - 1])
def test_labels_outside_the_classes_are_refused(tmp_path, label):
    write(tmp_path / "store")
    labels = np.lib.format.open_memmap(tmp_path / "store" / "00001.labels.npy", "r+")
    labels[1] = label
    labels.flush()
    data = opened(tmp_path / "store")
    data.read(np.arange(4))
    with pytest.raises(
        ValueError, match=rf"store/00001\.labels\.npy: record 1 has label {label}, which is outside 0 \.\. 2$"
    ):
        data.read(np.array([0, 7]))


@pytest.mark.parametrize("name", ["00001.npy", "00001.labels.npy"])
def test_a_file_of_another_shape_or_type(tmp_path, name):
    """Of the right length: a manifest without a checksum may have been edited, and a shard be another store's."""
    write(tmp_path / "store")
    path = tmp_path / "store" / name
    values = np.load(path)
    np.save(path, values.reshape(2, -1, *values.shape[1:]) if values.ndim == 1 else values.swapaxes(1, 2))
    data = opened(tmp_path / "store")
    with pytest.raises(ValueError, match=rf"{name} holds .* of shape .* by its header, and .* by the manifest"):
        data.read(np.arange(10))
    edit_manifest(tmp_path / "store", lambda fields: fields.update(shape=[1, 16, 4, 4]), signed=False)
    with pytest.raises(ValueError, match=r"00000\.npy holds float16 of shape \(4, 2, 8, 4, 4\) by its header"):
        opened(tmp_path / "store").read(np.arange(4))


@pytest.mark.parametrize("name", ["00001.npy", "00001.labels.npy"])
def test_a_file_that_changed_after_the_store_was_opened(tmp_path, name):
    write(tmp_path / "store")
    path = tmp_path / "store" / name
    data = opened(tmp_path / "store")
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"store/{name} has {len(content) - 1:,} bytes instead of {len(content):,}"):
        data.read(np.arange(10))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=rf"store/{name} is not a regular file"):
        data.read(np.arange(10))


CUT = """
import sys
from pathlib import Path
import numpy as np
from fastmask.data import StoreDataset

store = Path(sys.argv[1])
data = StoreDataset(store, 32, None, False)
data.read(np.arange(3000))
with open(store / "00000.npy", "r+b") as file:
    file.truncate(300)
try:
    data.read(np.array([2999]))
except ValueError as error:
    print(error)
"""


@pytest.mark.once
def test_a_shard_that_is_cut_while_it_is_mapped(tmp_path):
    """Reading what is gone would be a SIGBUS, so another process does it."""
    write(tmp_path / "store", count=3000, shard_size=3000)
    found = subprocess.run(
        [sys.executable, "-c", CUT, str(tmp_path / "store")], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found
    assert re.fullmatch(
        r".*store/00000\.npy was cut to 300 of [\d,]+ bytes while it was in use: copy it again\n", found.stdout
    )
