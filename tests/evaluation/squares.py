"""A small labelled dataset that a classifier learns in a second, and optional packages."""

import importlib

import numpy as np

from fastmask.evaluation.images import open_images


def squares(path, count=300, side=12, channels=1, classes=3, seed=0):
    """Write images of a bright square whose place is the class, in noise."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    images = generator.integers(0, 120, (count, side, side, channels)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[:4, label * 4 : label * 4 + 4] += 130
    np.savez(path, images=images, labels=labels)
    return path


def opened(path):
    return open_images(str(path))


def loads(package):
    """Return whether an optional package is there and loads: torchvision may be one of another torch."""
    try:
        importlib.import_module(package)
    except Exception:  # noqa: BLE001
        return False
    return True
