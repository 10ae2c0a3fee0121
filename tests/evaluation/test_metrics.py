"""Metrics against closed forms, and against a second implementation on the same features."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from squares import loads

from fastmask.evaluation.metrics import (
    Gaussian,
    extrapolated_frechet,
    frechet_bias,
    frechet_distance,
    inception_score,
    kernel_distance,
    manifold_metrics,
    nearest_distance,
)


def draw(count, width=6, *, seed=0, shift=0.0, scale=1.0):
    generator = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(width, width)) / width**0.5
    return torch.from_numpy((generator.normal(size=(count, width)) * scale) @ mixing + shift)


def test_frechet_distance_of_known_gaussians():
    eye = torch.eye(4, dtype=torch.float64)
    a, b = Gaussian(torch.zeros(4).double(), eye), Gaussian(torch.full((4,), 2.0).double(), 9 * eye)
    assert frechet_distance(a, b) == pytest.approx(4 * 2**2 + 4 * (3 - 1) ** 2)
    assert frechet_distance(a, a) == 0


@pytest.mark.parametrize("count", [50, 4])  # fewer images than features: singular covariances
def test_frechet_distance_is_that_of_the_matrix_root(count):
    a, b = draw(count, seed=1), draw(count, seed=2, shift=0.3, scale=1.5)
    cov_a, cov_b = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    shift = (a.mean(0) - b.mean(0)).numpy()
    expected = shift @ shift + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    assert frechet_distance(Gaussian.of(a), Gaussian.of(b)) == pytest.approx(expected, abs=1e-6)


def test_identical_sets_have_no_distance():
    features = draw(300)
    one = Gaussian.of(features)
    assert frechet_distance(one, one) < 1e-9
    found = manifold_metrics(features, features)
    assert found == pytest.approx({"precision": 1, "recall": 1, "density": 6 / 5, "coverage": 1}, abs=0.02)
    assert nearest_distance(features, features) < 1e-6
    # An unbiased estimate is 0 in expectation only, and below 0 for identical subsets.
    assert abs(kernel_distance(features, features)) < 0.05


def test_the_bias_is_that_of_fewer_samples():
    """Samples of one distribution are at distance 0 in the limit, so the whole distance is bias."""
    reference = Gaussian.of(draw(200_000, 32, seed=5))
    features = draw(5000, 32, seed=6)
    distance = frechet_distance(Gaussian.of(features), reference)
    assert frechet_bias(features, reference) == pytest.approx(distance, rel=0.2)
    assert abs(extrapolated_frechet(features, reference)) < 0.4 * distance


def test_the_bias_of_samples_whose_classes_come_in_turn():
    """Every second sample is of one class, whose distance to all classes is not a matter of the number of samples."""
    turns = 20.0 * (torch.arange(4000) % 2)[:, None]
    reference, features = Gaussian.of(draw(4000, 8, seed=5) + turns), draw(4000, 8, seed=6) + turns
    assert abs(frechet_bias(features, reference)) < 1
    assert frechet_distance(Gaussian.of(features[::2]), reference) > 100


def test_extrapolation_keeps_a_real_distance():
    reference = Gaussian.of(draw(200_000, 8, seed=5))
    features = draw(2000, 8, seed=6, shift=1.0)
    exact = frechet_distance(Gaussian.of(draw(200_000, 8, seed=7, shift=1.0)), reference)
    assert extrapolated_frechet(features, reference) == pytest.approx(exact, rel=0.03)


def test_inception_score_of_known_predictions():
    certain = 100 * torch.eye(10).repeat(100, 1)
    assert inception_score(certain) == pytest.approx(10)
    assert inception_score(torch.zeros(1000, 10)) == pytest.approx(1)
    # Consecutive splits: one class each leaves no variety within a split.
    assert inception_score(certain.sort(0).values[:, :1] * torch.ones(1, 10), splits=10) == pytest.approx(1)


def test_kernel_distance_of_shifted_points():
    a, b = torch.zeros(10, 3), torch.ones(10, 3)
    assert kernel_distance(a, b, subsets=3) == pytest.approx(1 + 8 - 2)  # (0 + 1)^3, (3/3 + 1)^3, (0 + 1)^3


def test_manifold_metrics_by_definition():
    generated, reference = draw(60, 3, seed=3), draw(80, 3, seed=4, shift=0.2)
    far = torch.cdist(generated, reference)

    def radii(rows, k):
        return torch.cdist(rows, rows).sort(1).values[:, k]

    wanted = {
        "precision": (far <= radii(reference, 3)).any(1).double().mean(),
        "recall": (far <= radii(generated, 3)[:, None]).any(0).double().mean(),
        "density": (far <= radii(reference, 5)).double().sum(1).mean() / 5,
        "coverage": (far.amin(0) <= radii(reference, 5)).double().mean(),
    }
    assert manifold_metrics(generated, reference) == pytest.approx({name: float(v) for name, v in wanted.items()})


def test_a_missing_mode_lowers_recall_and_noise_lowers_precision():
    reference = torch.cat([draw(500, seed=1), draw(500, seed=2, shift=50)])
    one_mode = manifold_metrics(draw(1000, seed=3), reference)
    assert one_mode["recall"] < 0.6 < 0.9 < one_mode["precision"]
    assert one_mode["coverage"] < 0.6
    noisy = manifold_metrics(draw(1000, seed=3, scale=30), reference)
    assert noisy["precision"] < 0.3


def test_blocks_change_nothing(monkeypatch):
    a, b = draw(50, seed=3), draw(40, seed=4)
    whole = manifold_metrics(a, b), nearest_distance(a, b)
    monkeypatch.setattr("fastmask.evaluation.metrics._BLOCK", 7)
    assert manifold_metrics(a, b) == pytest.approx(whole[0])
    assert nearest_distance(a, b) == pytest.approx(whole[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Gaussian.of(draw(1)), "a covariance needs at least 2 images, not 1"),
        (lambda: frechet_distance(Gaussian.of(draw(9, 3)), Gaussian.of(draw(9, 4))), "features of 3 and of 4 values"),
        (lambda: manifold_metrics(draw(5), draw(50)), "need more than 5 images on each side, not 5"),
        (lambda: kernel_distance(draw(1), draw(50)), "at least 2 images on each side"),
        (lambda: extrapolated_frechet(draw(19), Gaussian.of(draw(50))), "at least 20 images, not 19"),
    ],
)
def test_too_little_data_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.skipif(not loads("torch_fidelity"), reason="torch-fidelity is not there, or does not load")
def test_metrics_are_those_of_torch_fidelity():
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric  # noqa: PLC0415
    from torch_fidelity.metric_isc import isc_features_to_metric  # noqa: PLC0415
    from torch_fidelity.metric_kid import kid_features_to_metric  # noqa: PLC0415
    from torch_fidelity.metric_prc import prc_features_to_metric  # noqa: PLC0415

    a, b = draw(3000, 32, seed=1), draw(3000, 32, seed=2, shift=0.1, scale=1.1)
    fid = fid_statistics_to_metric(fid_features_to_statistics(a), fid_features_to_statistics(b), False)
    assert frechet_distance(Gaussian.of(a), Gaussian.of(b)) == pytest.approx(
        fid["frechet_inception_distance"], rel=1e-3
    )
    isc = isc_features_to_metric(a, splits=10, shuffle=False)["inception_score_mean"]
    assert inception_score(a) == pytest.approx(isc, rel=1e-3)
    # Subsets of all rows: no randomness.
    kid = kid_features_to_metric(a, b, kid_subsets=1, kid_subset_size=3000, verbose=False)
    assert kernel_distance(a, b, subsets=1, size=3000) == pytest.approx(kid["kernel_inception_distance_mean"], rel=1e-3)
    prc = prc_features_to_metric(a, b, prc_neighborhood=3, prc_batch_size=1000, save_cpu_ram=True, verbose=False)
    found = manifold_metrics(a, b)
    assert found["precision"] == pytest.approx(prc["precision"], abs=1e-3)
    assert found["recall"] == pytest.approx(prc["recall"], abs=1e-3)
