import math

import pytest
import torch
from util import small_net

from fastmask.diffusion import EDM, Sampling, draw_samples


@pytest.mark.parametrize("sigma_data", [0.5, 1.7])
def test_coefficients_are_table_1(sigma_data):
    sigma = [0.002, 0.3, 1.0, 80.0]
    exact = [
        (
            1 / math.sqrt(s**2 + sigma_data**2),
            math.log(s) / 4,
            sigma_data**2 / (s**2 + sigma_data**2),
            s * sigma_data / math.sqrt(s**2 + sigma_data**2),
            (s**2 + sigma_data**2) / (s * sigma_data) ** 2,
        )
        for s in sigma
    ]
    found = EDM(sigma_data=sigma_data).coefficients(torch.tensor(sigma, dtype=torch.float64))
    assert found._fields == ("c_in", "c_noise", "c_skip", "c_out", "weight")
    torch.testing.assert_close(torch.stack(found, 1), torch.tensor(exact, dtype=torch.float64), rtol=1e-14, atol=0)


def test_noised_images_and_their_signal_to_noise_ratio():
    images, noise, t = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.tensor([0.25, 3.0])
    assert torch.equal(EDM().noised(images, noise, t), images + torch.stack([0.25 * noise[0], 3 * noise[1]]))
    levels = torch.tensor([[0.002], [1.0], [80.0]], dtype=torch.float64)
    exact = [[-2 * math.log(level)] for level in levels.flatten().tolist()]
    torch.testing.assert_close(EDM().log_snr(levels), torch.tensor(exact, dtype=torch.float64), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("name", "values", "rule"),
    [
        ("sigma_data", (0, -0.5, math.inf, math.nan), "a number above 0"),
        ("p_mean", (math.inf, -math.inf, math.nan), "a number"),
        ("p_std", (-0.1, math.inf, math.nan), "at least 0"),
    ],
)
def test_numbers_that_no_process_has(name, values, rule):
    for value in values:
        with pytest.raises(ValueError, match=f"{name} must be {rule}, not {value}"):
            EDM(**{name: value})


@pytest.mark.parametrize("num_steps", [1, 0, -3])
def test_too_few_steps(num_steps):
    message = f"num_steps must be at least 2, not {num_steps}"
    with pytest.raises(ValueError, match=message):
        EDM().times(num_steps)
    with pytest.raises(ValueError, match=f"--sample-steps must be at least 2, not {num_steps}"):
        draw_samples(small_net(), torch.tensor([0]), Sampling(sample_steps=num_steps), seed=0)


@pytest.mark.parametrize("levels", [{"sigma_min": 0.0}, {"sigma_min": -1.0}, {"sigma_max": 0.001}, {"rho": 0.0}])
def test_levels_that_do_not_fall(levels):
    with pytest.raises(ValueError, match="noise levels must fall from sigma_max"):
        EDM().times(5, **levels)
