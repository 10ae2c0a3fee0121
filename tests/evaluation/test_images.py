"""Sets of images, and statistics of ADM's evaluator."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastmask.data.dataset import open_data
from fastmask.evaluation.images import ImageSet, Statistics, holds_statistics, open_images
from fastmask.evaluation.metrics import Gaussian, frechet_distance


def test_statistics_of_a_file(tmp_path):
    path = tmp_path / "stats.npz"
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3))
    assert holds_statistics(path)
    ours = Statistics(path)
    assert frechet_distance(ours.frechet, Gaussian(torch.ones(3).double(), torch.eye(3).double())) == pytest.approx(3)
    assert ours.spatial is None
    for arrays, message in [
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"`mu` has shape \(3,\) and `sigma` \(4, 4\)"),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "is not finite"),
        ({"mu": np.array([{}], dtype=object), "sigma": np.eye(3)}, "holds no statistics"),
    ]:
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match=message):
            Statistics(path)
    np.savez(path, arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    assert not holds_statistics(path)


def test_sample_files_of_adm_are_datasets(tmp_path):
    """`arr_0` holds the images and `arr_1` the labels."""
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3)).astype(np.uint8)
    np.savez(tmp_path / "adm.npz", images, np.arange(12) % 4)
    dataset = open_data(str(tmp_path / "adm.npz"), image_size=8, num_classes=None, flip=False)
    assert (len(dataset), dataset.num_classes, dataset.shape) == (12, 4, (3, 8, 8))
    whole = ImageSet.whole("adm", dataset)
    batches = list(whole.batches(5))
    assert [len(part) for part, _ in batches] == [5, 5, 2]
    pixels = torch.cat([part for part, _ in batches])
    assert np.array_equal(((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy(), images)
    assert torch.cat([labels for _, labels in batches]).tolist() == (np.arange(12) % 4).tolist()


def test_images_keep_their_side(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 14, 3)).astype(np.uint8)
    (tmp_path / "images").mkdir()
    Image.fromarray(pixels).save(tmp_path / "images" / "0.png")
    np.savez(tmp_path / "a.npz", images=pixels[None])
    for name in ("images", "a.npz"):
        assert open_images(str(tmp_path / name)).shape == (3, 9, 9)
        assert open_images(str(tmp_path / name), 6).shape == (3, 6, 6)
    assert open_images("digits").shape == (1, 8, 8)


def test_a_split_is_fixed_and_disjoint(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((50, 4, 4, 3), np.uint8))
    whole = open_images(str(tmp_path / "a.npz"))
    training, held_out = whole.split()
    assert sorted([*training.ids, *held_out.ids]) == list(range(50))
    assert len(held_out) == 10
    again, _ = open_images(str(tmp_path / "a.npz")).split()
    assert np.array_equal(training.ids, again.ids)
    assert again.fingerprint() == training.fingerprint() != held_out.fingerprint()
    some = whole.some(20)
    assert len(set(some.ids)) == 20
    assert some.ids.tolist() == sorted(some.ids)
    assert some.ids.tolist() != list(range(20))
    assert whole.some(50) is whole
    assert training.first(7).ids.tolist() == training.ids[:7].tolist()
