from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmask.data.images import ImageArray, resize_and_crop
from fastmask.kernels import random_uniform

PATH = Path("some.npz")


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def array(images, image_size=16, mirror=False, **labels):
    return ImageArray(PATH, {"images": images, **labels}, image_size, mirror)


def test_pixels_scale_to_one():
    images = np.array([0, 51, 127, 128, 255], np.uint8).reshape(5, 1, 1, 1)
    data = array(images, 1)
    values = data.to_images(data.read(np.arange(5))[0], 0, torch.arange(5)).flatten()
    torch.testing.assert_close(values, torch.tensor([-1, -0.6, -1 / 255, 1 / 255, 1]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 16, 16, 3), (4, 16, 16, 1), (4, 16, 16)], ids=str)
def test_channels_come_first(shape):
    images = noise(*shape)
    stored, labels = array(images).read(np.array([2, 0]))
    assert stored.dtype == torch.uint8
    assert np.array_equal(stored.permute(0, 2, 3, 1).numpy(), images[[2, 0]].reshape(2, 16, 16, -1))
    assert labels.tolist() == [0, 0]


def test_labels_of_an_array():
    data = array(noise(3, 16, 16, 3), labels=np.array([2, 0, 1]), num_classes=np.array(5))
    assert (data.num_classes, data.class_names) == (5, list("01234"))
    assert data.read(np.array([1, 0]))[1].tolist() == [0, 2]


@pytest.mark.parametrize("shape", [(2, 1, 1, 3), (2, 1, 5, 1), (2, 5, 1), (2, 40, 25, 3), (2, 40, 25)], ids=str)
def test_an_array_of_another_side_is_resized(shape):
    images = noise(*shape)
    stored, _ = array(images).read(np.arange(2))
    gray = len(shape) == 3 or shape[3] == 1
    assert stored.shape == (2, 1 if gray else 3, 16, 16)
    first = Image.fromarray(images[1].reshape(shape[1:3]) if gray else images[1])
    assert np.array_equal(stored[1].permute(1, 2, 0).squeeze(2).numpy(), np.asarray(resize_and_crop(first, 16)))


@pytest.mark.parametrize(
    "images",
    [
        noise(2, 16, 16, 3).astype(np.float32),
        noise(2, 16, 16, 3).astype(np.int64),
        noise(2, 16, 16, 2),
        noise(2, 3, 16, 16),
        noise(2, 16),
        noise(2, 0, 16, 3),
    ],
    ids=lambda images: f"{images.dtype}-{images.shape}",
)
def test_an_array_of_something_else(images):
    with pytest.raises(ValueError, match=r"some\.npz: `images` must be uint8 of shape .*, not ") as error:
        array(images)
    assert f"{images.dtype} of shape {images.shape}" in str(error.value)


def test_mirroring_is_a_function_of_seed_and_global_index():
    images = noise(64, 16, 16, 3)
    data = array(images, mirror=True)
    stored, sample = data.read(np.arange(64))[0], torch.arange(100, 164)
    plain = stored.float() / 127.5 - 1
    drawn = data.to_images(stored, 3, sample)
    flipped = random_uniform(3, sample, 1, 5)[:, 0] < 0.5
    assert 20 < flipped.sum() < 44
    assert torch.equal(drawn[~flipped], plain[~flipped])
    assert torch.equal(drawn[flipped], plain[flipped].flip(3))
    # The same whatever the batch; different at the next visit and under another seed.
    assert torch.equal(data.to_images(stored[40:], 3, sample[40:]), drawn[40:])
    assert not torch.equal(data.to_images(stored, 3, sample + 64), drawn)
    assert not torch.equal(data.to_images(stored, 4, sample), drawn)
    assert torch.equal(array(images).to_images(stored, 3, sample), plain)


def test_crop_keeps_an_image_that_fits():
    pixels = noise(16, 16, 3)
    assert np.array_equal(np.asarray(resize_and_crop(Image.fromarray(pixels), 16)), pixels)


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_halving_averages_boxes(factor):
    pixels = np.repeat(np.repeat(noise(16, 16, 3), factor, 0), factor, 1)
    assert np.array_equal(np.asarray(resize_and_crop(Image.fromarray(pixels), 16)), pixels[::factor, ::factor])
    checkers = np.indices((16 * factor, 16 * factor)).sum(0) % 2 * 200
    shrunk = np.asarray(resize_and_crop(Image.fromarray(checkers.astype(np.uint8)), 16))
    assert (shrunk == 100).all()


def test_the_rest_is_bicubic():
    image = Image.fromarray(noise(52, 50, 3))
    halved = image.resize((25, 26), Image.Resampling.BOX)
    expected = halved.resize((16, 17), Image.Resampling.BICUBIC).crop((0, 0, 16, 16))
    assert np.array_equal(np.asarray(resize_and_crop(image, 16)), np.asarray(expected))


@pytest.mark.parametrize(("height", "width"), [(16, 21), (21, 16), (32, 43), (16, 16)])
def test_crop_takes_the_centre(height, width):
    pixels = noise(height, width, 3)
    image = Image.fromarray(pixels)
    if min(height, width) == 32:
        image = image.resize((width // 2, height // 2), Image.Resampling.BOX)
    top, left = (image.height - 16) // 2, (image.width - 16) // 2
    expected = np.asarray(image)[top : top + 16, left : left + 16]
    assert np.array_equal(np.asarray(resize_and_crop(Image.fromarray(pixels), 16)), expected)


@pytest.mark.parametrize("side", [(3, 5), (1, 1), (1, 300), (17, 16), (31, 31), (33, 500), (257, 129)], ids=str)
def test_any_side_becomes_the_size(side):
    assert resize_and_crop(Image.fromarray(np.full((*side, 3), 77, np.uint8)), 16).size == (16, 16)
    assert (np.asarray(resize_and_crop(Image.fromarray(np.full((*side, 3), 77, np.uint8)), 16)) == 77).all()
