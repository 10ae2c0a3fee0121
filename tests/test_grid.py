import numpy as np
import pytest
import torch
from PIL import Image

from fastmask.grid import save_grid


def drawn(tmp_path, images, columns):
    array = save_grid(tmp_path / "grid.png", images, columns)
    with Image.open(tmp_path / "grid.png") as image:
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), array)
    return array


def test_grid_of_gray(tmp_path):
    images = torch.tensor([-1.0, -0.6, 0.0, 0.6, 1.0, 9.0, -9.0])[:, None, None, None].expand(-1, 1, 32, 40)
    array = drawn(tmp_path, images, 3)
    assert array.shape == (3 * 32, 3 * 40, 3)
    corners = array[::32, ::40]
    assert corners[..., 0].tolist() == [[0, 51, 128], [204, 255, 255], [0, 0, 0]]
    assert (array == array[..., :1]).all()
    assert (array.reshape(3, 32, 3, 40, 3) == corners[:, None, :, None]).all()


def test_grid_of_colours(tmp_path):
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    array = drawn(tmp_path, images, 2)
    expected = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    assert np.array_equal(array[:32, 32:], expected[1])
    assert np.array_equal(array[32:, :32], expected[2])


def test_grid_of_latents(tmp_path):
    images = torch.randn(2, 4, 32, 32)
    array = drawn(tmp_path, images, 2)
    expected = ((images[1, :3] / 3 + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    assert np.array_equal(array[:, 32:], expected)


@pytest.mark.parametrize(("side", "zoom"), [(8, 4), (16, 2), (28, 2), (32, 1), (64, 1), (1, 32)])
def test_small_images_are_enlarged(tmp_path, side, zoom):
    images = torch.rand(3, 3, side, side) * 2 - 1
    array = drawn(tmp_path, images, 2)
    assert array.shape == (2 * side * zoom, 2 * side * zoom, 3)
    first = ((images[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(array[: side * zoom : zoom, zoom - 1 : side * zoom : zoom], first)


@pytest.mark.parametrize("channels", [2, 16, 32])
def test_latents_of_any_number_of_channels_are_drawn(tmp_path, channels):
    images = torch.randn(2, channels, 32, 32)
    array = drawn(tmp_path, images, 2)
    shown = torch.cat([images, torch.zeros(2, 1, 32, 32)], 1)[1, :3] / 3
    assert np.array_equal(array[:, 32:], ((shown + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())


def test_without_pillow(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"drawing images needs pillow: pip install pillow"):
        save_grid(tmp_path / "grid.png", torch.zeros(1, 1, 8, 8), 1)
