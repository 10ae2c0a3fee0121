import io
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from stores import edit_manifest, write
from vaes import small_vae

from fastmask.data import open_data
from fastmask.data.fingerprint import fingerprint_of, of_arrays, of_files, of_tables, sampled, size_of

WORDS = ["cat", "dog"]


def noise(count, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def folder(path):
    for i, pixels in enumerate(noise(6, 8, 8, 3)):
        file = path / WORDS[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(pixels))
    return path


def tar(path, seed=0, start=0, classes=2):
    with tarfile.open(path, "w") as file:
        for i, pixels in enumerate(noise(6, 8, 8, 3, seed=seed)):
            for name, content in ((f"{i + start}.png", png(pixels)), (f"{i + start}.cls", b"%d" % (i % classes))):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
    return path


def zipped(path, seed=0, start=0, classes=2):
    with zipfile.ZipFile(path, "w") as file:
        for i, pixels in enumerate(noise(6, 8, 8, 3, seed=seed)):
            file.writestr(f"{i % classes}/{i + start}.png", png(pixels))
    return path


def imagenet(path):
    path.mkdir()
    for name in ("n00000001.tar", "n00000002.tar"):
        tar(path / name)
    return path


def store(path):
    write(path)
    return path


def images(path):
    np.savez(path, images=noise(80, 8, 8, 3), labels=np.arange(80) % 3)
    return path


def moments(path):
    values = np.random.default_rng(0).standard_normal((80, 8, 4, 4)).astype(np.float32)
    np.savez(path, moments=values, labels=np.arange(80) % 3, scale=np.ones(1), shift=np.zeros(1))
    return path


def table(path, first=0):
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    rows = {"image": [png(pixels) for pixels in noise(6, 8, 8, 3)], "label": [first, 1, 0, 1, 0, 1]}
    parquet.write_table(arrow.table(rows), path)
    return path


KINDS = {
    "folder": (folder, 8),
    "data.tar": (tar, 8),
    "photos.zip": (zipped, 8),
    "imagenet": (imagenet, 8),
    "store": (store, 32),
    "images.npz": (images, 8),
    "moments.npz": (moments, 32),
    "table.parquet": (table, 8),
}


def fingerprint(path, size, **options):
    options = {"image_size": size, "num_classes": None, "flip": False, "decoder": "pil", **options}
    return open_data(str(path), **options).fingerprint()


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_content_at_another_path(tmp_path, kind, monkeypatch):
    make, size = KINDS[kind]
    (tmp_path / "a").mkdir()
    path = make(tmp_path / "a" / kind)
    before = fingerprint(path, size)
    assert fingerprint(path, size) == before
    moved = tmp_path / "deep" / "er" / f"other-{kind}"
    moved.parent.mkdir(parents=True)
    shutil.move(path, moved)
    assert fingerprint(moved, size) == before
    monkeypatch.chdir(moved.parent)
    assert fingerprint(moved.name, size) == before
    (tmp_path / "again").mkdir()
    assert fingerprint(make(tmp_path / "again" / kind), size) == before


def changed_arrays(path, **edits):
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **{name: edits[name](value) if name in edits else value for name, value in arrays.items()})


def replaced(path, old, new):
    content = path.read_bytes()
    assert content.count(old)
    path.write_bytes(content.replace(old, new, 1))


def set_first(value):
    def edit(values):
        values.flat[0] = value
        return values

    return edit


CHANGES = {
    "folder": [
        lambda path: (path / "cat" / "0.png").write_bytes(png(noise(1, 8, 9, 3)[0])),
        lambda path: (path / "cat" / "0.png").rename(path / "cat" / "9.png"),
        lambda path: (path / "cat" / "0.png").rename(path / "dog" / "0.png"),
        lambda path: (path / "cat" / "0.png").unlink(),
        lambda path: replaced(path / "cat" / "2.png", b"IDAT", b"IDAU"),  # of the same size, and damaged
    ],
    "data.tar": [
        lambda path: tar(path, start=1),
        lambda path: tar(path, seed=1),
        lambda path: tar(path, classes=1),
    ],
    "photos.zip": [
        lambda path: zipped(path, start=1),
        lambda path: zipped(path, seed=1),
        lambda path: zipped(path, classes=3),
    ],
    "imagenet": [
        lambda path: (path / "n00000002.tar").unlink(),
        lambda path: tar(path / "n00000001.tar", start=1),
    ],
    "store": [
        lambda path: edit_manifest(path, lambda fields: fields.update(scale=0.75)),
        lambda path: edit_manifest(path, lambda fields: fields.update(shift=[0.25, 0.25, 0.25, 0.5])),
        lambda path: edit_manifest(path, lambda fields: fields["shards"][0]["records"].update(sha256="0" * 64)),
        lambda path: edit_manifest(path, lambda fields: fields["shards"][1]["labels"].update(sha256="0" * 64)),
    ],
    "images.npz": [
        lambda path: changed_arrays(path, images=set_first(0)),
        lambda path: changed_arrays(path, labels=set_first(2)),
        lambda path: changed_arrays(path, images=lambda values: values[:70], labels=lambda values: values[:70]),
    ],
    "moments.npz": [
        lambda path: changed_arrays(path, moments=set_first(0)),
        lambda path: changed_arrays(path, labels=set_first(2)),
        lambda path: changed_arrays(path, scale=set_first(0.5)),
        lambda path: changed_arrays(path, shift=set_first(0.5)),
    ],
    "table.parquet": [lambda path: table(path, first=1)],
}


@pytest.mark.parametrize(("kind", "number"), [(kind, i) for kind, edits in CHANGES.items() for i in range(len(edits))])
def test_other_content(tmp_path, kind, number):
    make, size = KINDS[kind]
    path = make(tmp_path / kind)
    before = fingerprint(path, size)
    CHANGES[kind][number](path)
    assert fingerprint(path, size) != before


def test_what_does_not_change_a_store(tmp_path):
    path = store(tmp_path / "store")
    before = fingerprint(path, 32)
    edit_manifest(
        path, lambda fields: fields.update(class_names=["x", "y", "z"], source={"kind": "copy"}), signed=False
    )
    assert fingerprint(path, 32) == before
    assert fingerprint(path, 32, flip=True) == before
    edit_manifest(path, lambda fields: fields.update(scale=[fields["scale"]] * 4))
    assert fingerprint(path, 32) != before  # as it is written: nobody asks whether it comes to the same


def test_embedded_and_synthetic_data():
    pytest.importorskip("sklearn")
    digits = open_data("digits", image_size=8, num_classes=10, flip=False)
    assert digits.fingerprint() == open_data("digits", image_size=8, num_classes=10, flip=False).fingerprint()
    sizes = {
        open_data("synthetic", image_size=size, num_classes=classes, flip=False).fingerprint()
        for size in (32, 64)
        for classes in (0, 10)
    }
    assert len({*sizes, digits.fingerprint()}) == 5


def test_images_that_are_encoded_as_they_come(tmp_path):
    small_vae().save_pretrained(tmp_path / "vae")
    small_vae(latent_channels=8).save_pretrained(tmp_path / "other")
    path = folder(tmp_path / "folder")
    found = {fingerprint(path, 16, vae=vae) for vae in ("", str(tmp_path / "vae"), str(tmp_path / "other"))}
    assert len(found) == 3


def test_it_is_cheap(tmp_path, monkeypatch):
    """Of many files a few are read."""
    read = []
    of_files([str(i) for i in range(10_000)], [3] * 10_000, [], lambda item: read.append(item) or b"")
    assert (len(read), read[0], read[-1]) == (64, 0, 9999)
    values = np.zeros((10_000, 4), np.uint8)
    before = of_arrays(values, np.zeros(10_000, int))
    values[5] = 1  # which is not among the sample
    assert of_arrays(values, np.zeros(10_000, int)) == before
    values[-1] = 1
    assert of_arrays(values, np.zeros(10_000, int)) != before


def test_parts_do_not_run_into_one_another():
    assert fingerprint_of(["ab", "c"]) != fingerprint_of(["a", "bc"])
    assert fingerprint_of([np.zeros(4, np.uint8)]) != fingerprint_of([np.zeros((2, 2), np.uint8)])
    assert fingerprint_of([b"a"]) == fingerprint_of(["a"])
    assert len(fingerprint_of([])) == 32
    assert fingerprint_of(["caf\udce9"])  # a name that is not UTF-8
    assert of_files(["a", "b"], [1, 2], [], lambda item: b"") != of_files(["a", "b"], [2, 1], [], lambda item: b"")


def test_small_counts_and_absent_files(tmp_path):
    assert sampled(1).tolist() == [0]
    assert sampled(5).tolist() == [0, 1, 2, 3, 4]
    (tmp_path / "a").write_bytes(b"123")
    assert (size_of(str(tmp_path / "a")), size_of(str(tmp_path / "gone"))) == (3, -1)


def test_tables_of_one_length(tmp_path):
    for name, content in (("a", b"x" * 200_000), ("b", b"x" * 199_999 + b"y"), ("c", b"x" * 200_000)):
        (tmp_path / name).write_bytes(content)
    found = [of_tables([Path(tmp_path / name)], [3]) for name in "abc"]
    assert found[0] == found[2] != found[1]
    assert of_tables([tmp_path / "a"], [4]) != found[0]
