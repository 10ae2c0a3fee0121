"""The classifier of a dataset, and what it sees."""

import numpy as np
import pytest
import torch
from squares import opened, squares

from fastmask.evaluation import classifier
from fastmask.evaluation.classifier import Classifier


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTMASK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(classifier, "_STEPS", 60)


def test_it_learns_and_is_kept(tmp_path, capsys):
    images = opened(squares(tmp_path / "a.npz"))
    training, held_out = images.split()
    assert (len(training), len(held_out)) == (240, 60)
    assert not set(training.ids) & set(held_out.ids)
    first = Classifier(training)
    assert "training a classifier on 240 images" in capsys.readouterr().out
    pixels, labels = next(held_out.batches(100))
    seen = first(pixels)
    assert (seen.logits.argmax(1) == labels).float().mean() > 0.95
    # The mean variance of a feature is 1 over the training set.
    values = first(next(training.batches(1000))[0]).values
    assert values.var(0).mean() == pytest.approx(1, rel=1e-4)
    # Another one of the same images is read from the cache, and has the same bits.
    again = Classifier(training)
    assert "training a classifier" not in capsys.readouterr().out
    assert again.sha256 == first.sha256
    assert torch.equal(again(pixels).values, seen.values)
    # Other images train another.
    assert Classifier(opened(squares(tmp_path / "b.npz", seed=1)).split()[0]).sha256 != first.sha256


def test_a_damaged_cache_is_trained_again(tmp_path, capsys):
    training, _ = opened(squares(tmp_path / "a.npz")).split()
    first = Classifier(training)
    (file,) = (tmp_path / "cache" / "classifiers").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    capsys.readouterr()
    assert Classifier(training).sha256 == first.sha256
    assert "training a classifier" in capsys.readouterr().out


@pytest.mark.parametrize("shape", [(1, 8), (3, 16), (4, 9), (16, 32), (3, 130)], ids=str)
def test_any_shape_is_taken(shape):
    channels, side = shape
    net = classifier._Network(channels, side, 5)
    values = net.features(torch.randn(2, channels, side, side))
    assert values.shape == (2, 64)
    assert net.head(values).shape == (2, 5)


def test_labels_are_needed(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((40, 8, 8, 1), np.uint8))
    with pytest.raises(ValueError, match=r"has no classes, and the classifier .* give --extractor inception or dinov2"):
        Classifier(opened(tmp_path / "a.npz"))
