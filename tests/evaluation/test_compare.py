"""Which metrics a comparison gives, and of which images."""

import pytest
import torch

from fastmask.evaluation.compare import Seen, compare
from fastmask.evaluation.features import Features, features_of
from fastmask.evaluation.metrics import Gaussian, frechet_distance

GENERATOR = torch.Generator().manual_seed(0)


class Plain:
    name, sha256, names = "plain", "", {"frechet": "fd", "kernel": "kd"}

    def __call__(self, images):
        return Features(images.flatten(1))


def seen(count, shift=0.0, logits=None, labels=None):
    return Seen(Features(torch.randn(count, 4, generator=GENERATOR) + shift, logits), labels)


def test_metrics_have_the_names_of_the_extractor():
    found = compare(Plain(), seen(50), seen(60))
    assert found.keys() == {"fd", "fd_bias", "kd", "precision", "recall", "density", "coverage"}
    assert compare(Plain(), seen(50), seen(60), extrapolate=True).keys() - found.keys() == {"fd_infinity"}


def test_a_classifier_gives_agreement_and_accuracy():
    labels = torch.arange(40) % 4
    right = torch.nn.functional.one_hot(labels, 4).float()
    found = compare(Plain(), seen(40, 0, right, labels.where(labels > 0, 3)), seen(40, 0, right.roll(1, 0), labels))
    assert found["agreement"] == pytest.approx(0.75)
    assert found["classifier_accuracy"] == 0
    assert "agreement" not in compare(Plain(), seen(40, 0, right), seen(40, 0, right, labels))


def test_copies_are_near_their_training_images():
    training, reference = seen(200), seen(50)
    copies = Seen(Features(training.features.values[:50] + 1e-4))
    assert compare(Plain(), copies, reference, training)["distance_ratio"] < 1e-3
    far = compare(Plain(), seen(50, 5.0), reference, training)
    assert far["distance_ratio"] > 3
    assert far["fd"] > 10 * far["frechet_held_out"]


def test_the_baseline_is_of_as_many_images_as_were_generated():
    training, reference = seen(200), seen(50)
    found = compare(Plain(), seen(20), reference, training)
    whole = Gaussian.of(reference.features.values)
    expected = frechet_distance(Gaussian.of(training.features.values[:20]), whole)
    assert found["frechet_held_out"] == pytest.approx(expected)


def test_features_are_joined_over_batches():
    images = torch.randn(7, 2, 3, 3)
    joined = features_of(Plain(), images.split(3))
    assert torch.equal(joined.values, images.flatten(1))
    assert joined.logits is None
    assert joined.spatial is None
