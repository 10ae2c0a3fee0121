"""The data of a configuration: what the dataset decides, and what the command line does."""

import dataclasses

import numpy as np
import pytest
import torch

from fastmask.data.config import DataConfig

CPU = torch.device("cpu")
PRESET = DataConfig()


@pytest.fixture
def pixels(tmp_path):
    path = tmp_path / "images.npz"
    images = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    np.savez(path, images=images, labels=np.arange(20) % 3)
    return str(path)


def opened(config, given=()):
    return config.open(PRESET, given, seed=0, device=CPU)


def test_the_data_of_the_preset_are_as_it_says():
    config, dataset = opened(PRESET)
    assert config == PRESET
    assert (dataset.shape, dataset.num_classes) == ((1, 8, 8), 10)


def test_other_data_bring_their_classes_and_side(pixels):
    config, dataset = opened(DataConfig(data=pixels))
    assert (config.num_classes, config.image_size) == (3, 16)
    assert dataset.shape == (3, 16, 16)
    assert dataclasses.replace(config, num_classes=10, image_size=8) == DataConfig(data=pixels)


def test_what_was_given_stays(pixels):
    config, _ = opened(DataConfig(data=pixels, image_size=16, num_classes=5), given={"image_size", "num_classes"})
    assert (config.num_classes, config.image_size) == (5, 16)
    config, _ = opened(DataConfig(data=pixels, num_classes=10), given={"num_classes"})  # the same as the preset's
    assert config.num_classes == 10
    config, dataset = opened(DataConfig(data=pixels), given={"image_size"})
    assert (config.image_size, dataset.shape) == (8, (3, 8, 8))


def test_bad_images_cannot_be_skipped_in_arrays(pixels):
    with pytest.raises(ValueError, match="--on-bad skip is for images that are decoded at each visit"):
        opened(DataConfig(data=pixels, on_bad="skip"))


def test_number_of_workers():
    PRESET.check()
    with pytest.raises(ValueError, match="num_workers must be at least 0, not -1"):
        DataConfig(num_workers=-1).check()
