import collections
import importlib
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from latent_files import everything, latent_tar_of, lmdb_of, moments_of, tar_of

from fastmask.data.foreign.maskdit import LatentTars, Lmdb, latent_tars
from fastmask.data.foreign.open import open_latents
from fastmask.data.images.reader import read_ahead


def test_lmdb(tmp_path):
    moments, labels = moments_of(5), [0, 0, 1, 2, 2]
    latents = open_latents(lmdb_of(tmp_path / "train", moments, labels))
    assert (latents.kind, latents.holds, latents.downsampling) == ("maskdit-lmdb", "moments", 8)
    assert str(latents.scaled_by) == "scale 0.18215, shift 0 (Stable Diffusion's KL-f8, as MaskDiT trains on it)"
    assert latents.notes == ["5 keys z-I"]
    records, found = everything(pickle.loads(pickle.dumps(latents)))
    assert np.array_equal(records[:, 0], moments)
    assert records.shape[1] == 1
    assert found == labels
    assert latents.name(3) == f"{tmp_path / 'train'}, key z-3"
    parts = read_ahead(latents.read, latents.name, [range(2), range(2, 5)], num_workers=2)
    assert np.array_equal(np.concatenate([part.values for part in parts])[:, 0], moments)


def test_mirror_images_of_an_lmdb(tmp_path):
    moments = moments_of(6)
    moments[3:] = moments[:3, ..., ::-1] + 0.1 * moments[3:]  # nearly
    latents = open_latents(lmdb_of(tmp_path / "train", moments, [0, 1, 1] * 2))
    records, labels = everything(latents)
    assert np.array_equal(records, moments.reshape(2, 3, 8, 4, 4).swapaxes(0, 1))
    assert labels == [0, 1, 1]
    assert latents.notes == ["6 keys z-I, the second half of which are of the flipped images"]
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
    latents = open_latents(lmdb_of(tmp_path / "train", moments_of(3), [0, 1, 2], z_1=b"1234" * 5, z_2=b"x" * 33))
    with pytest.raises(ValueError, match=r"train, key z-1 holds 20 bytes, not float32 moments of 4 channels"):
        latents.read(1)
    with pytest.raises(ValueError, match=r"train, key z-2 holds 33 bytes, not float32 moments"):
        latents.read(2)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "data.mdb").write_bytes(b"nothing" * 9)
    with pytest.raises(ValueError, match="other cannot be read as LMDB"):
        open_latents(tmp_path / "other")
    pytest.importorskip("lmdb").open(str(tmp_path / "empty")).close()
    with pytest.raises(ValueError, match="empty has no key length"):
        open_latents(tmp_path / "empty")


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"length": b"1000000000"}, r"the key length says 1,000,000,000 records, and there are 7 keys in all"),
        ({"length": b"4"}, r"the key length says 4 records, and there are 7 keys in all"),
        ({"length": b"9" * 5000}, "the key length holds no number"),
        ({"length": b"-1"}, "the key length holds no number"),
        ({"length": b"three"}, "the key length holds no number"),
        ({"y_1": b"dog"}, "key y-1 holds no label, but b'dog'"),
        ({"y_1": b"-1"}, "key y-1 holds no label, but b'-1'"),
        ({"y_1": b"4294967297"}, "key y-1 has label 4294967297, which is outside"),
        ({"y_1": b"9" * 5000}, "key y-1 holds no label"),
    ],
)
def test_an_lmdb_that_claims_what_it_does_not_hold(tmp_path, others, message):
    with pytest.raises(ValueError, match=message) as error:
        open_latents(lmdb_of(tmp_path / "train", moments_of(3), [0, 1, 2], **others))
    assert len(str(error.value)) < len(str(tmp_path)) + 150


CODE = """
import sys
from pathlib import Path
from fastmask.data.foreign.open import open_latents

try:
    for item in range(len(latents := open_latents(Path(sys.argv[1])))):
        latents.read(item)
except ValueError as error:
    print(error)
"""


def test_an_lmdb_that_is_cut_off(tmp_path):
    """Reading what is gone would be a SIGBUS, so another process does it."""
    path = lmdb_of(tmp_path / "train", moments_of(200, side=16), [0] * 200)
    size = (path / "data.mdb").stat().st_size
    os.truncate(path / "data.mdb", size // 2)
    found = subprocess.run([sys.executable, "-c", CODE, str(path)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found
    assert "data.mdb is cut off: it has " in found.stdout
    assert len(found.stdout.splitlines()) == 1


def test_an_lmdb_that_is_a_pipe(tmp_path):
    pytest.importorskip("lmdb")
    os.mkfifo(tmp_path / "data.mdb")
    with pytest.raises(ValueError, match=r"data\.mdb is not a regular file"):
        Lmdb(tmp_path)


def test_without_lmdb(tmp_path, monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(importlib, "import_module", absent)
    (tmp_path / "data.mdb").write_bytes(b"")
    with pytest.raises(ValueError, match="reading LMDB needs lmdb: pip install lmdb"):
        open_latents(tmp_path)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_tars(tmp_path, protocol):
    moments = moments_of(3)
    for path in (latent_tar_of(tmp_path / "0.tar", moments, [0, 1, 0], protocol), tmp_path):
        latents = open_latents(path)
        records, labels = everything(latents)
        assert (latents.kind, latents.holds) == ("maskdit-webdataset", "moments")
        assert np.array_equal(records[:, 0], moments)
        assert labels == [0, 1, 0]
        assert latents.notes == ["1 tars, pickled arrays"]


class Harm:
    def __reduce__(self):
        return print, ("harm",)


@pytest.mark.parametrize(
    "value",
    [Harm(), collections.OrderedDict(), [1], np.zeros((8, 4)), np.zeros((8, 4, 4), int), np.zeros((7, 4, 4))],
)
def test_pickles_that_are_no_latents(tmp_path, value, capsys):
    latents = LatentTars([tar_of(tmp_path / "0.tar", {"a.latent": pickle.dumps(value), "a.cls": b"0"})])
    with pytest.raises(ValueError, match=r"0\.tar:a\.latent (is not a pickled array|holds no latent)"):
        latents.read(0)
    assert capsys.readouterr().out == ""


def test_a_pickle_that_is_cut_off(tmp_path):
    content = pickle.dumps(moments_of(1)[0])
    for length in (0, 1, 60, len(content) - 1):
        latents = LatentTars([tar_of(tmp_path / "0.tar", {"a.latent": content[:length], "a.cls": b"0"})])
        with pytest.raises(ValueError, match=r"a\.latent is not a pickled array"):
            latents.read(0)


def test_tars_of_something_else(tmp_path):
    tar_of(tmp_path / "a.tar", {"a.jpg": b"", "a.cls": b"0"})
    (tmp_path / "b.tar").write_bytes(b"x")
    assert latent_tars(tmp_path / "a.tar") == latent_tars(tmp_path / "b.tar") == latent_tars(tmp_path) == []
