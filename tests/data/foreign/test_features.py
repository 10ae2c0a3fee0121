import os

import numpy as np
import pytest
from latent_files import everything, features_of, moments_of

from fastmask.data.foreign.features import feature_folders
from fastmask.data.foreign.open import open_latents

VALUES = moments_of(11, channels=4)
LABELS = [i % 3 for i in range(11)]


def test_features(tmp_path):
    features, labels = features_of(tmp_path, VALUES, LABELS)
    for path in (tmp_path, features):
        latents = open_latents(path)
        records, found = everything(latents)
        assert (latents.kind, latents.holds) == ("fast-dit", "latents")
        assert str(latents.scaled_by) == "scale 1, shift 0 (they are scaled already)"
        assert np.array_equal(records[:, 0], VALUES)
        assert found == LABELS
        assert latents.notes == [f"labels of {labels.name}"]
    (features / "notes.txt").write_text("")
    assert open_latents(tmp_path).notes[1] == "left out: 1 files that are no .npy (notes.txt, ...)"


@pytest.mark.parametrize(
    ("folder", "item", "value", "message"),
    [
        (0, 1, VALUES[:2], r"features/1\.npy holds no latent, but float32 of shape \(2, 4, 4, 4\)"),
        (0, 1, VALUES[0], r"features/1\.npy holds no latent, but float32 of shape \(4, 4, 4\)"),
        (0, 1, VALUES[:1].astype(int), r"features/1\.npy holds no latent, but int64"),
        (1, 1, np.array([1, 2]), r"labels/1\.npy holds no label, but int64 of shape \(2,\)"),
        (1, 1, np.array([1.5]), r"labels/1\.npy holds no label, but float64 of shape \(1,\)"),
        (1, 1, np.array([-1]), r"labels/1\.npy has label -1, which is outside"),
        (1, 1, np.array([2**40]), r"labels/1\.npy has label 1099511627776, which is outside"),
        (0, 1, None, r"features/1\.npy cannot be read as an \.npy"),
        (1, 1, None, r"labels/1\.npy cannot be read as an \.npy"),
    ],
)
def test_a_file_that_is_damaged(tmp_path, folder, item, value, message):
    path = features_of(tmp_path, VALUES, LABELS)[folder] / f"{item}.npy"
    if value is None:
        path.write_bytes(b"cut")
    else:
        np.save(path, value)
    latents = open_latents(tmp_path)
    with pytest.raises(ValueError, match=message):
        latents.read(1)
    latents.read(0)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"1\.npy is not a regular file"):
        latents.read(1)


def test_a_file_that_is_missing(tmp_path):
    features, _ = features_of(tmp_path, VALUES, LABELS)
    (features / "4.npy").unlink()
    with pytest.raises(ValueError, match=r"features holds 10 \.npy files, but no 4\.npy: which is missing"):
        open_latents(tmp_path)


def test_several_sizes_in_one_folder(tmp_path):
    features_of(tmp_path, VALUES, LABELS)
    for name in ("features", "labels"):
        (tmp_path / f"imagenet512_{name}").mkdir()
        np.save(tmp_path / f"imagenet512_{name}" / "0.npy", VALUES[:1])
    with pytest.raises(
        ValueError, match=r"several kinds \(imagenet256_features, imagenet512_features\): name one of these folders"
    ):
        open_latents(tmp_path)
    assert len(open_latents(tmp_path / "imagenet256_features")) == 11


def test_folders_of_something_else(tmp_path):
    (tmp_path / "a_features").mkdir()
    assert feature_folders(tmp_path) == feature_folders(tmp_path / "gone") == []
