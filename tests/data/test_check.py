import numpy as np
import pytest
import torch
from stores import manifest, write

from fastmask.data import check
from fastmask.data.check import check_store


def test_a_whole_store(tmp_path):
    write(tmp_path / "store", manifest("pixels"), skip=(4,))
    found = check_store(tmp_path / "store")
    assert (found.warnings, found.damaged) == ([], [])
    assert found.images.shape == (9, 3, 8, 8)
    records, classes, figures, skipped = found.lines
    assert records == "9 records of pixels, uint8 (1, 3, 8, 8), image_size 8, 3 shards"
    assert classes == "3 classes of 3 records in the middle, from 2 (b) to 4 (a)"
    assert figures.startswith("as trained on, of 9 images: mean ")
    means = [float(word) for word in figures.split("mean ")[1].split(",")[0].split()]
    assert means == pytest.approx(found.images.mean((0, 2, 3)).tolist(), abs=1e-3)
    assert skipped == "1 images were left out: item 4"


@pytest.mark.parametrize(("scale", "fits"), [(1.0, True), (0.9, True), (0.1, False), (10.0, False)])
def test_a_scale_that_does_not_fit(tmp_path, scale, fits):
    write(tmp_path / "store", manifest(scale=scale, vae="some/vae"))
    found = check_store(tmp_path / "store")
    assert "VAE some/vae" in found.lines[2]
    assert len(found.warnings) == (not fits)
    if not fits:
        assert found.warnings[0].startswith(f"the scale {scale:g} brings the latents to a standard deviation of ")


def test_records_are_taken_from_all_of_the_store(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "_SAMPLED", 4)
    about = write(tmp_path / "store", manifest("pixels"), count=40, shard_size=10)
    found = check_store(tmp_path / "store")
    stored = np.concatenate([np.load(tmp_path / "store" / shard.records.name) for shard in about.shards])
    assert torch.equal(found.images, torch.from_numpy(stored[::10, 0]).float() / 127.5 - 1)


def test_copies_of_mirrored_images_are_looked_at_too(tmp_path, monkeypatch):
    def records(about, count):
        values = np.random.default_rng(0).standard_normal((count, *about.shape)).astype(np.float16)
        values[3, 1, 0, 0, 0] = np.inf
        return values, np.zeros(count)

    monkeypatch.setattr("stores.records_of", records)
    write(tmp_path / "store", class_names=[])
    assert check_store(tmp_path / "store").warnings == ["some stored values are not finite"]


def test_what_is_odd(tmp_path, monkeypatch):
    write(tmp_path / "store", class_names=["a", "b", "c", "none", "nothing"])
    assert "2 of 5 classes have no record" in check_store(tmp_path / "store").warnings
    monkeypatch.setattr(
        "stores.records_of", lambda about, count: (np.full((count, *about.shape), 7, np.uint8), np.zeros(count))
    )
    write(tmp_path / "flat", manifest("pixels"))
    assert check_store(tmp_path / "flat").warnings[-1] == "10 of 10 records are of one value throughout"
    infinite = np.full((10, *manifest().shape), np.inf, np.float16)
    monkeypatch.setattr("stores.records_of", lambda about, count: (infinite, np.zeros(count)))
    write(tmp_path / "infinite")
    assert check_store(tmp_path / "infinite").warnings[-1] == "some stored values are not finite"


def test_damage(tmp_path):
    write(tmp_path / "store", class_names=[], count=1)
    path = tmp_path / "store" / "00000.npy"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    found = check_store(tmp_path / "store")
    assert found.damaged == [f"{path} is damaged: its SHA-256 is not that of the manifest"]
    assert found.lines[1] == "no labels"
