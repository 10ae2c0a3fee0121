import numpy as np
import pytest
import torch
from PIL import Image
from util import small_net

from fastmask.diffusion import Sampling
from fastmask.generation.model import Model
from fastmask.generation.strip import draw_strip


@pytest.mark.parametrize(("solver", "steps", "columns"), [("heun", 2, 3), ("heun", 9, 8), ("dpmpp-2m", 3, 3)])
def test_rows_are_samples_and_columns_go_to_their_images(tmp_path, solver, steps, columns):
    model, settings = Model(small_net(input_size=32, depth=1), "a"), {"solver": solver, "sample_steps": steps}
    draw_strip(tmp_path / "strip.png", model, [1, 4], 3, Sampling(**settings), seed=2, guide=None)
    images = model.sample([1, 4, 1], seed=2, **settings)
    with Image.open(tmp_path / "strip.png") as image:
        strip = np.asarray(image).astype(int)
    assert strip.shape == (3 * 32, columns * 32, 3)
    # The last denoised image is the sample, but for the rounding of fp64.
    assert np.abs(strip[:, -32:] - torch.cat(list(images)).int().numpy()).max() <= 1
    first = np.abs(strip[:, :32] - strip[:, -32:]).mean()
    later = np.abs(strip[:, -64:-32] - strip[:, -32:]).mean()
    assert first > later
