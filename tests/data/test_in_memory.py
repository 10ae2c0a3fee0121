import importlib

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits as published_digits

from fastmask.data.in_memory import Digits, load_digits


def test_split_has_every_scan_once():
    split = load_digits()
    images = torch.cat([split.train_images, split.held_out_images])
    labels = torch.cat([split.train_labels, split.held_out_labels])
    published = published_digits()
    rows = sorted((*row, label) for row, label in zip(published.data.tolist(), published.target.tolist(), strict=True))
    ours = ((images.flatten(1) + 1) * 8).tolist()
    assert sorted((*row, label) for row, label in zip(ours, labels.tolist(), strict=True)) == rows
    assert len(split.held_out_labels) == 359
    assert set(split.held_out_labels.tolist()) == set(range(10))


def test_scans_fill_the_range():
    images = load_digits().train_images
    assert images.shape[1:] == (1, 8, 8)
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (-1, 1)


def test_split_is_always_the_same():
    for ours, theirs in zip(load_digits(), load_digits(), strict=True):
        assert torch.equal(ours, theirs)


def test_reading():
    split, data = load_digits(), Digits(8, None, False)
    assert (len(data), data.shape, data.num_classes) == (1438, (1, 8, 8), 10)
    assert data.class_names == list("0123456789")
    images, labels = data.read(np.array([5, 0, 1437]))
    assert torch.equal(images, split.train_images[[5, 0, 1437]])
    assert torch.equal(labels, split.train_labels[[5, 0, 1437]])
    assert data.to_images(images, 1, torch.arange(3)) is images


def test_without_labels():
    data = Digits(8, 0, False)
    assert (data.num_classes, data.class_names) == (0, [])
    assert not data.read(np.arange(1438))[1].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((16, 10, False), "image_size must be 8, not 16"),
        ((8, 10, True), "leave flip out"),
        ((8, 5, False), "num_classes must be 10, or 0 for none, not 5"),
    ],
)
def test_what_digits_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        Digits(*arguments)


def test_without_scikit_learn(monkeypatch):
    def absent(name, *rest):
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ValueError, match=r"pip install scikit-learn"):
        load_digits()
