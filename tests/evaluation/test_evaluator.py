"""Evaluation of a network and of images, by the dataset's own classifier."""

import numpy as np
import pytest
import torch
from squares import opened, squares
from util import small_net

from fastmask.diffusion import Sampling
from fastmask.evaluation import classifier
from fastmask.evaluation.evaluator import Draws, Evaluator


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTMASK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(classifier, "_STEPS", 60)


def test_images_of_the_dataset_are_close_and_noise_is_not(tmp_path):
    evaluator = Evaluator.of_dataset(opened(squares(tmp_path / "a.npz")), torch.device("cpu"))
    generated, labels = next(opened(squares(tmp_path / "b.npz", seed=1)).batches(60))
    good = evaluator.images([generated], labels).metrics
    bad = evaluator.images([torch.rand(60, 1, 12, 12) * 2 - 1], labels).metrics
    wrong = evaluator.images([generated], labels.roll(1)).metrics
    assert good["agreement"] > 0.9 > 0.5 > wrong["agreement"]
    assert good["frechet"] < 0.1 * bad["frechet"]
    assert bad["precision"] < good["precision"]
    assert good["distance_ratio"] == pytest.approx(1, rel=0.2)


def test_labels_of_the_samples():
    draws = Draws(Sampling(), 7)
    assert draws.labels(3).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert draws.labels(0) is None


def test_samples_of_a_network_are_8_bit_and_the_same_in_any_batch(tmp_path):
    net = small_net(in_channels=1, input_size=12, patch_size=2, num_classes=3).eval()
    sampling = Sampling(sample_steps=2)
    whole = torch.cat(list(Draws(sampling, 10, seed=3).of_network(net)))
    parts = list(Draws(sampling, 10, seed=3, batch=4).of_network(net))
    assert [len(part) for part in parts] == [4, 4, 2]
    levels = (whole + 1) * 127.5
    assert torch.allclose(levels, levels.round(), atol=1e-3)
    assert (whole - torch.cat(parts)).abs().max() < 0.01
    evaluator = Evaluator.of_dataset(opened(squares(tmp_path / "a.npz")), torch.device("cpu"))
    outcome = evaluator.network(net, Draws(sampling, 10, seed=3))
    assert outcome.samples == 10
    assert torch.equal(outcome.images, whole)
    assert outcome.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    assert np.isfinite(list(outcome.metrics.values())).all()


def test_images_of_another_shape_are_refused(tmp_path):
    evaluator = Evaluator.of_dataset(opened(squares(tmp_path / "a.npz")), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"the generated images are 3 x 12 x 12, and .*a.npz .* holds 1 x 12 x 12"):
        evaluator.images([torch.zeros(10, 3, 12, 12)], None)
