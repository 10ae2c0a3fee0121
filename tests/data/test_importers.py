import collections
import importlib
import io
import json
import pickle
import tarfile
import zipfile

import numpy as np
import pytest

from fastmask.data.decoding import read_ahead
from fastmask.data.importers import open_latents


def moments_of(count, channels=8):
    return np.random.default_rng(0).standard_normal((count, channels, 4, 4)).astype(np.float32)


def everything(latents):
    records, labels = zip(*(latents.read(i) for i in range(len(latents))), strict=True)
    return np.stack(records), list(labels)


def lmdb_of(path, moments, labels, **others):
    lmdb = pytest.importorskip("lmdb", reason="lmdb is not installed")
    with lmdb.open(str(path), map_size=2**24) as base, base.begin(write=True) as transaction:
        for i, (moment, label) in enumerate(zip(moments, labels, strict=True)):
            transaction.put(f"z-{i}".encode(), moment.tobytes())
            transaction.put(f"y-{i}".encode(), str(label).encode())
        transaction.put(b"length", str(len(labels)).encode())
        for key, value in others.items():
            transaction.put(key.replace("_", "-").encode(), value)
    return path


def tar_of(path, samples):
    with tarfile.open(path, "w") as file:
        for name, content in samples.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def test_maskdits_lmdb(tmp_path):
    moments, labels = moments_of(5), [0, 0, 1, 2, 2]
    latents = open_latents(lmdb_of(tmp_path / "train", moments, labels))
    assert (latents.kind, latents.holds, latents.scale, latents.shift) == ("maskdit-lmdb", "moments", 0.18215, 0.0)
    records, found = everything(pickle.loads(pickle.dumps(latents)))
    assert np.array_equal(records[:, 0], moments)
    assert records.shape[1] == 1
    assert found == labels
    assert latents.name(3) == f"{tmp_path / 'train'}, key z-3"
    parts = read_ahead(latents.read, latents.name, [range(2), range(2, 5)], num_workers=2)
    assert np.array_equal(np.concatenate([part.values for part in parts])[:, 0], moments)


def test_mirror_images_of_maskdits_lmdb(tmp_path):
    moments = moments_of(6)
    moments[3:] = moments[:3, ..., ::-1] + 0.1 * moments[3:]  # nearly
    records, labels = everything(open_latents(lmdb_of(tmp_path / "train", moments, [0, 1, 1] * 2)))
    assert np.array_equal(records, moments.reshape(2, 3, 8, 4, 4).swapaxes(0, 1))
    assert labels == [0, 1, 1]
    one = open_latents(lmdb_of(tmp_path / "one", moments[[0, 3]], [5, 5]))
    assert (len(one), one.read(0)[0].shape) == (1, (2, 8, 4, 4))


@pytest.mark.parametrize("common", [0, 5])
def test_labels_that_repeat_by_chance_are_no_mirror_images(tmp_path, common):
    """Nor are images that are all alike, such as scans on a plain ground."""
    ground = np.cos(np.arange(4) - 1.5) * np.ones((4, 1))  # symmetric
    moments, labels = (moments_of(8) + common * ground).astype(np.float32), [0, 1] * 4
    records, found = everything(open_latents(lmdb_of(tmp_path / "train", moments, labels)))
    assert np.array_equal(records[:, 0], moments)
    assert found == labels


def test_an_lmdb_that_is_damaged(tmp_path):
    latents = open_latents(lmdb_of(tmp_path / "train", moments_of(3), [0, 1, 2], z_1=b"1234" * 5))
    with pytest.raises(ValueError, match=r"train, key z-1 holds 5 values, not moments of 4 channels"):
        latents.read(1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "data.mdb").write_bytes(b"nothing" * 9)
    with pytest.raises(ValueError, match="other cannot be read as LMDB"):
        open_latents(tmp_path / "other")
    pytest.importorskip("lmdb").open(str(tmp_path / "empty")).close()
    with pytest.raises(ValueError, match="empty has no key length"):
        open_latents(tmp_path / "empty")


def test_without_lmdb(tmp_path, monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(importlib, "import_module", absent)
    (tmp_path / "data.mdb").write_bytes(b"")
    with pytest.raises(ValueError, match="reading LMDB needs lmdb: pip install lmdb"):
        open_latents(tmp_path)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_maskdits_tars(tmp_path, protocol):
    moments = moments_of(3)
    samples = {f"{i:07}.latent": pickle.dumps(moment, protocol) for i, moment in enumerate(moments)}
    samples |= {f"{i:07}.cls": str(i % 2).encode() for i in range(3)}
    for path in (tar_of(tmp_path / "0.tar", dict(sorted(samples.items()))), tmp_path):
        latents = open_latents(path)
        records, labels = everything(latents)
        assert (latents.kind, latents.holds) == ("maskdit-webdataset", "moments")
        assert np.array_equal(records[:, 0], moments)
        assert labels == [0, 1, 0]


class Harm:
    def __reduce__(self):
        return print, ("harm",)


@pytest.mark.parametrize("value", [Harm(), collections.OrderedDict(), [1], np.zeros((8, 4)), np.zeros((8, 4, 4), int)])
def test_pickles_that_are_no_latents(tmp_path, value, capsys):
    latents = open_latents(tar_of(tmp_path / "0.tar", {"a.latent": pickle.dumps(value), "a.cls": b"0"}))
    with pytest.raises(ValueError, match=r"0\.tar:a\.latent (is not a pickled array|holds no latent)"):
        latents.read(0)
    assert capsys.readouterr().out == ""


def test_a_pickle_that_is_cut_off(tmp_path):
    content = pickle.dumps(moments_of(1)[0])
    for length in (0, 1, 60, len(content) - 1):
        latents = open_latents(tar_of(tmp_path / "0.tar", {"a.latent": content[:length], "a.cls": b"0"}))
        with pytest.raises(ValueError, match=r"a\.latent is not a pickled array"):
            latents.read(0)


def test_fast_dits_features(tmp_path):
    features, labels = tmp_path / "imagenet256_features", tmp_path / "imagenet256_labels"
    features.mkdir()
    labels.mkdir()
    values = moments_of(11, channels=4)
    for i, value in enumerate(values):
        np.save(features / f"{i}.npy", value[None])
        np.save(labels / f"{i}.npy", np.array([i % 3]))
    latents = open_latents(tmp_path)
    records, found = everything(latents)
    assert (latents.kind, latents.holds, latents.scale) == ("fast-dit", "latents", 1.0)
    assert np.array_equal(records[:, 0], values)
    assert found == [i % 3 for i in range(11)]
    np.save(features / "1.npy", values[:2])
    (features / "2.npy").write_bytes(b"")
    (labels / "3.npy").write_bytes(b"cut")
    (features / "4.npy").unlink()
    for item in (1, 2, 3, 4):
        with pytest.raises((ValueError, OSError)):
            latents.read(item)


@pytest.mark.parametrize("packed", [False, True])
def test_edm2s_layout(tmp_path, packed):
    raw = moments_of(4)
    raw[:, 4:] = np.abs(raw[:, 4:])
    raw[0, 4] = 0
    names = [f"0000{i % 2}/img-mean-std-0000000{i}.npy" for i in range(4)]
    path = tmp_path / "edm2"
    for name, value in zip(names, raw, strict=True):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(path / name, value)
    (path / "dataset.json").write_text(json.dumps({"labels": [[name, i] for i, name in enumerate(names)]}))
    if packed:
        with zipfile.ZipFile(tmp_path / "edm2.zip", "w") as file:
            for member in path.rglob("*.*"):
                file.write(member, member.relative_to(path))
        path = tmp_path / "edm2.zip"
    latents = open_latents(path)
    records, labels = everything(latents)
    assert (latents.kind, latents.holds, labels) == ("edm2", "moments", [0, 1, 2, 3])
    assert np.array_equal(records[:, 0, :4], raw[:, :4])
    np.testing.assert_allclose(np.exp(records[:, 0, 4:] / 2), raw[:, 4:], rtol=1e-5, atol=1e-12)
    assert np.isfinite(records).all()
    # What EDM2 trains on: (latent - 5.81) * 0.5 / 4.17 in the first channel.
    assert (latents.scale[0], latents.shift[0]) == (pytest.approx(0.5 / 4.17), 5.81)


def test_edm2_that_is_damaged(tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "a.npy").write_bytes(b"cut")
    (tmp_path / "dataset.json").write_text('{"labels": [["0/a.npy", 1], ["0/gone.npy", 1]]}')
    latents = open_latents(tmp_path)
    for item in (0, 1):
        with pytest.raises((ValueError, OSError)):
            latents.read(item)
    (tmp_path / "dataset.json").write_text('{"labels": null}')
    with pytest.raises(ValueError, match=r"dataset\.json lists no labels"):
        open_latents(tmp_path)


def test_what_holds_no_latents(tmp_path):
    (tmp_path / "folder" / "cat").mkdir(parents=True)
    tar_of(tmp_path / "a.tar", {"a.jpg": b"", "a.cls": b"0"})
    (tmp_path / "b.tar").write_bytes(b"x")
    (tmp_path / "b.zip").write_bytes(b"x")
    for name in ("folder", "a.tar", "b.tar", "b.zip", "gone"):
        assert open_latents(tmp_path / name) is None
