"""The digits' evaluation, on sets of digits whose quality is known."""

import numpy as np
import pytest
import torch

from fastmask.data.in_memory import Digits
from fastmask.evaluation.digits import ScanExtractor
from fastmask.evaluation.evaluator import Evaluator
from fastmask.evaluation.images import ImageSet

TRAINING = ImageSet.whole("digits", Digits(8, 10, flip=False))
HELD_OUT = ImageSet.whole("digits (held out)", Digits(8, 10, flip=False, held_out=True))
REAL, LABELS = next(HELD_OUT.batches(len(HELD_OUT)))


@pytest.fixture(scope="module")
def evaluator():
    made = Evaluator.of_dataset(TRAINING, torch.device("cpu"))
    assert isinstance(made.extractor, ScanExtractor)
    return made


def test_no_scan_is_in_both_splits():
    known = {scan.numpy().tobytes() for images, _ in TRAINING.batches(2000) for scan in images}
    assert len(known) > 1400
    assert not known & {scan.numpy().tobytes() for scan in REAL}


def test_real_digits_judged_as_generated(evaluator):
    metrics = evaluator.images([REAL], LABELS).metrics
    assert metrics["agreement"] == metrics["classifier_accuracy"] > 0.97
    assert metrics["distance_ratio"] == pytest.approx(1)
    assert metrics["frechet"] == pytest.approx(0, abs=1e-6)
    assert 0 < metrics["frechet_held_out"] < 3


def test_copies_of_training_digits(evaluator):
    images, labels = next(TRAINING.batches(len(TRAINING)))
    metrics = evaluator.images([images[-len(REAL) :]], labels[-len(REAL) :]).metrics
    assert metrics["distance_ratio"] < 1e-6
    assert metrics["agreement"] > 0.97
    assert metrics["frechet"] == pytest.approx(metrics["frechet_held_out"], rel=0.5)


def test_digits_of_the_wrong_class(evaluator):
    assert evaluator.images([REAL], (LABELS + 1) % 10).metrics["agreement"] < 0.03


def test_one_digit_over_and_over(evaluator):
    metrics = evaluator.images([REAL[:1].expand(300, -1, -1, -1)], LABELS[:1].expand(300)).metrics
    assert metrics["agreement"] == 1
    assert metrics["frechet"] > 10 * metrics["frechet_held_out"]
    assert metrics["recall"] < 0.1


def test_noise(evaluator):
    noise = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, REAL.shape)).float()
    metrics = evaluator.images(noise.split(100), LABELS).metrics
    assert metrics["agreement"] < 0.3
    assert metrics["distance_ratio"] > 2
    assert metrics["precision"] < 0.1
