"""`python -m fastmask.prepare --features`: of pixels, of the images behind latents, and what is refused."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from stores import manifest, write
from teachers import Small

from fastmask.data import StoreDataset
from fastmask.data.fingerprint import of_weights
from fastmask.data.images.reader import ImageReader
from fastmask.data.sources.open import open_source
from fastmask.data.sources.source import labels_sha256, names_sha256
from fastmask.data.store.features import StoredFeatures
from fastmask.data.store.manifest import read_manifest
from fastmask.data.store.writer import LOCK, StoreWriter
from fastmask.data.teacher import Teacher
from fastmask.files import locked
from fastmask.prepare import main

FLAGS = ("--features", "teachers:small", "--batch-size", "2", "--num-workers", "0", "--device", "cpu")
COUNT = 9


@pytest.fixture
def images(tmp_path):
    """Nine images of two classes, and one that is damaged."""
    for i in range(COUNT):
        path = tmp_path / "images" / ("cat", "dog")[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    (tmp_path / "images" / "cat" / "03b.png").write_bytes(b"no image")
    return tmp_path / "images"


def latents_of(images, store, **fields):
    """Write a store of latents as `fastmask.prepare` writes it, but for the latents, which no VAE made."""
    source = open_source(images)
    origin = {"kind": source.kind, "items": len(source), "sha256": names_sha256(str(images), len(source), source.name)}
    origin["labels_sha256"] = labels_sha256(source.names_of(None), source.labels)
    bad = [item for item in range(len(source)) if source.name(item).endswith("03b.png")]
    with StoreWriter(store, manifest(**{"source": origin, **fields}), len(source), 4) as writer:
        for number in writer.numbers():
            with writer.shard(number) as shard:
                for item in writer.items_of(number):
                    if item in bad:
                        shard.skipped.append(source.name(item))
                    else:
                        shard.add(np.zeros((1, 2, 8, 4, 4), np.float16), np.array([source.labels[item]]))
        writer.finish(source.class_names)
    return store


def expected(images, grid, size=32):
    """Return the features of the intact images, in the order of their source."""
    source, teacher = open_source(images), Teacher("teachers:small", grid, torch.device("cpu"))
    read = ImageReader(source, size)
    intact = [item for item in range(len(source)) if not source.name(item).endswith("03b.png")]
    pixels = torch.from_numpy(np.stack([read(item)[0] for item in intact]))
    return teacher(pixels.float() / 127.5 - 1).half()


def read_features(store):
    about = read_manifest(store)
    data = StoreDataset(store, about.image_size, None, False)
    return StoredFeatures(data, False).reader(np.arange(len(data)))


def test_features_of_pixels(images, tmp_path, capsys):
    store = tmp_path / "store"
    pixels = ("--space", "pixel", "--image-size", "16", "--num-workers", "0", "--shard-size", "4", "--on-bad", "skip")
    main([str(images), str(store), *pixels, "--device", "cpu"])
    before = {path.name: path.read_bytes() for path in store.glob("*.npy")}
    main([str(store), *FLAGS, "--features-grid", "4"])
    about = read_manifest(store)
    assert about.features is not None
    described = about.features.teacher, about.features.sha256, about.features.precision
    assert described == ("teachers:small", of_weights(Small()), "float32 on cpu")
    assert about.features.shape == (16, 24)
    assert torch.equal(read_features(store), expected(images, 4, 16))
    assert all((store / name).read_bytes() == content for name, content in before.items())
    capsys.readouterr()
    main([str(store), *FLAGS, "--features-grid", "4"])
    assert capsys.readouterr().out == f"{store}: its features are there already\n"
    with pytest.raises(ValueError, match="holds features of teachers:small, 4 x 4 already: take a copy of the store"):
        main([str(store), *FLAGS, "--features-grid", "8"])
    main(["--check", str(store), "--device", "cpu"])
    assert "features of teachers:small" in capsys.readouterr().out


def test_features_of_the_images_behind_latents(images, tmp_path):
    store = latents_of(images, tmp_path / "store")
    main([str(images), str(store), *FLAGS])
    about = read_manifest(store)
    assert (about.count, about.features.grid) == (COUNT, 2)
    assert torch.equal(read_features(store), expected(images, 2))
    moved = tmp_path / "moved"
    images.rename(moved)  # the path is not part of the names
    again = latents_of(moved, tmp_path / "again")
    main([str(moved), str(again), *FLAGS, "--features-grid", "4"])
    assert torch.equal(read_features(again), expected(moved, 4))


def test_other_images_or_another_order_are_refused(images, tmp_path):
    store = latents_of(images, tmp_path / "store")
    refused = "holds other images or labels than those that .*store was made from, or in another order"
    (images / "cat" / "00.png").rename(images / "cat" / "99.png")  # now the last one
    with pytest.raises(ValueError, match=refused):
        main([str(images), str(store), *FLAGS])
    (images / "cat" / "99.png").rename(images / "cat" / "00.png")
    Image.new("RGB", (40, 40)).save(images / "dog" / "zz.png")
    with pytest.raises(ValueError, match=refused):
        main([str(images), str(store), *FLAGS])
    (images / "dog" / "zz.png").unlink()
    with pytest.raises(ValueError, match=refused):  # without labels the order of classes is not known
        main([str(images), str(store), *FLAGS, "--num-classes", "0"])
    (images / "labels.json").write_text('{"cat": 1, "dog": 0}')
    with pytest.raises(ValueError, match=refused):
        main([str(images), str(store), *FLAGS])
    (images / "labels.json").unlink()
    Image.new("RGB", (40, 40)).save(images / "cat" / "03b.png")  # it was damaged, and left out
    with pytest.raises(ValueError, match="shard 0 holds 3 images, and 4 were given"):
        main([str(images), str(store), *FLAGS])
    (images / "cat" / "03b.png").write_bytes(b"no image")
    content = (images / "dog" / "01.png").read_bytes()
    (images / "dog" / "01.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"01.png .* \(it was readable when the store was made\)"):
        main([str(images), str(store), *FLAGS])
    (images / "dog" / "01.png").write_bytes(content)
    assert read_manifest(store).features is None
    main([str(images), str(store), *FLAGS])
    assert torch.equal(read_features(store), expected(images, 2))


def test_two_processes_write_the_same(images, tmp_path):
    stores = [latents_of(images, tmp_path / name) for name in ("alone", "two")]
    main([str(images), str(stores[0]), *FLAGS])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "fastmask.prepare", str(images), str(stores[1]), *FLAGS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    environment["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__) + "/..", os.environ.get("PYTHONPATH", "")])
    subprocess.run(command, env=environment, check=True, timeout=120)
    for file in stores[0].glob("*[!k]"):  # but for the lock
        assert (stores[1] / file.name).read_bytes() == file.read_bytes(), file.name


def test_what_is_refused(images, tmp_path):
    store, pixels = latents_of(images, tmp_path / "store"), tmp_path / "pixels"
    write(pixels, manifest("pixels"))
    with pytest.raises(
        ValueError, match=r"holds moments, and features are those of images: python -m fastmask.prepare IMA"
    ):
        main([str(store), *FLAGS])
    with pytest.raises(ValueError, match=r"holds the images themselves: leave .*images out"):
        main([str(images), str(pixels), *FLAGS, "--features-grid", "4"])
    with pytest.raises(ValueError, match="give --features-grid: the image size over the patch size"):
        main([str(pixels), *FLAGS])
    with pytest.raises(ValueError, match="--features-grid is the grid of --features, which are missing"):
        main([str(images), str(tmp_path / "new"), "--features-grid", "4"])
    with pytest.raises(ValueError, match="features_grid must be at least 1, not 0"):
        main([str(pixels), *FLAGS, "--features-grid", "0"])
    with pytest.raises(ValueError, match="is not a store"):
        main([str(images), str(tmp_path / "new"), *FLAGS])
    with pytest.raises(ValueError, match="name a source and the store"):
        main([*FLAGS])
    imported = latents_of(images, tmp_path / "imported", crop="imported")
    with pytest.raises(ValueError, match="holds imported latents, and of which images, in which order, is not known"):
        main([str(images), str(imported), *FLAGS])
    with locked(store / LOCK):
        command = [sys.executable, "-m", "fastmask.prepare", str(images), str(store), *FLAGS]
        ended = subprocess.run(command, env={**os.environ}, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert "is in use by process" in ended.stderr
