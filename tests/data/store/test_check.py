import json
import re

import numpy as np
import pytest
import torch
from stores import edit_manifest, manifest, write

from fastmask.data.store import check
from fastmask.data.store.check import check_store


def test_a_whole_store(tmp_path):
    write(tmp_path / "store", manifest("pixels"), skip=(4,))
    found = check_store(tmp_path / "store")
    assert (found.warnings, found.damaged) == ([], [])
    assert found.images.shape == (9, 3, 8, 8)
    records, classes, skipped, figures = found.lines
    assert records == "9 records of pixels, uint8 (1, 3, 8, 8), image_size 8, 3 shards"
    assert classes == "3 classes, median 3 records, from 2 (b) to 4 (a)"
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


def test_copies_of_flipped_images_are_looked_at_too(tmp_path, monkeypatch):
    def records(about, count):
        values = np.random.default_rng(0).standard_normal((count, *about.shape)).astype(np.float16)
        values[3, 1, 0, 0, 0] = np.inf
        return values, np.zeros(count, int)

    monkeypatch.setattr("stores.records_of", records)
    write(tmp_path / "store", class_names=[])
    found = check_store(tmp_path / "store")
    assert found.damaged == [f"{tmp_path / 'store' / '00000.npy'}: record 3 holds values that are not finite"]
    assert len(found.images) == 0


def test_what_is_odd(tmp_path, monkeypatch):
    write(tmp_path / "store", class_names=["a", "b", "c", "none", "nothing"])
    assert "2 of 5 classes have no record" in check_store(tmp_path / "store").warnings
    monkeypatch.setattr(
        "stores.records_of", lambda about, count: (np.full((count, *about.shape), 7, np.uint8), np.zeros(count, int))
    )
    write(tmp_path / "flat", manifest("pixels"))
    assert check_store(tmp_path / "flat").warnings[-1] == "10 of 10 records are of one value throughout"


def test_damage(tmp_path):
    write(tmp_path / "store", class_names=[], count=1)
    path = tmp_path / "store" / "00000.npy"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    found = check_store(tmp_path / "store")
    assert found.damaged == [f"{path} is damaged: its SHA-256 is not that of the manifest"]
    assert found.lines[1] == "no labels"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"scale": 0.9}, "is damaged, or was edited: its checksum is not that of its content"),
        ({"shift": [0.0, 0.25, 0.25, 0.25]}, "its checksum is not that"),
        ({"class_counts": [3, 4, 3]}, "its checksum is not that"),
        ({"class_names": ["a", "c", "b"]}, "its checksum is not that"),
        ({"shape": [1, 16, 4, 4]}, "its checksum is not that"),
        ({"source": {"kind": "other"}}, "its checksum is not that"),
    ],
)
def test_any_change_of_the_manifest_is_found(tmp_path, edit, message):
    write(tmp_path / "store")
    fields = json.loads((tmp_path / "store" / "manifest.json").read_text())
    (tmp_path / "store" / "manifest.json").write_text(json.dumps({**fields, **edit}))
    with pytest.raises(ValueError, match=message):
        check_store(tmp_path / "store")


@pytest.mark.parametrize(
    ("edit", "damage"),
    [
        ({"class_counts": [3, 4, 3]}, r"manifest\.json is damaged: 4 records have label 0 \(a\), and it says 3$"),
        (
            {"shape": [1, 16, 4, 4]},
            r"00000\.npy holds float16 of shape \(4, 2, 8, 4, 4\) by its header, and float16 of shape "
            r"\(4, 1, 16, 4, 4\) by the manifest",
        ),
        (
            {"num_classes": 2, "class_names": ["a", "b"], "class_counts": [4, 6]},
            "record 2 has label 2, which is outside",
        ),
    ],
)
def test_a_manifest_without_a_checksum_is_told_and_compared_with_the_shards(tmp_path, edit, damage):
    write(tmp_path / "store")
    edit_manifest(tmp_path / "store", lambda fields: None, signed=False)
    found = check_store(tmp_path / "store")
    assert found.damaged == []
    assert found.warnings[0].startswith("manifest.json carries no checksum of itself")
    edit_manifest(tmp_path / "store", lambda fields: fields.update(edit), signed=False)
    (line,) = check_store(tmp_path / "store").damaged
    assert re.search(damage, line)
