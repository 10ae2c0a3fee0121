"""The digits' own extractor: pixels as features, and a support vector machine as classifier."""

import hashlib
import importlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastmask.evaluation.features import Features
from fastmask.evaluation.images import ImageSet


class ScanExtractor:
    """An `Extractor` for the digits: `values` are the 64 pixels, `logits` the answer of a support vector machine.

    Args:
        training: the scans that the classifier is fitted to.
    """

    names = {"frechet": "frechet", "kernel": "kernel_distance"}  # noqa: RUF012  (a constant)

    def __init__(self, training: ImageSet) -> None:
        svm: Any = importlib.import_module("sklearn.svm")
        images, labels = next(training.batches(len(training)))
        rows = images.double().flatten(1).numpy()
        self._classifier = svm.SVC().fit(rows, labels.numpy())
        version = importlib.import_module("sklearn").__version__
        self.name = f"pixels, and an SVC of scikit-learn {version} fitted to the training scans"
        self.sha256 = hashlib.sha256(rows.tobytes()).hexdigest()

    def __call__(self, images: Tensor) -> Features:
        """Return the features of scans (B, 1, 8, 8) in [-1, 1]."""
        rows = images.double().flatten(1)
        classes = torch.from_numpy(self._classifier.predict(rows.numpy()))
        return Features(rows.float(), functional.one_hot(classes, 10).float())
