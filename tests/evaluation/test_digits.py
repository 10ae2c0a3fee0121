import numpy as np
import pytest
import scipy.linalg

from fastmask.data.in_memory import load_digits
from fastmask.evaluation import digits
from fastmask.evaluation.digits import frechet_distance, judge

REAL = load_digits()


def rows(images):
    return images.double().flatten(1).numpy()


def gaussian(mean, covariance, count=200):
    """Return rows whose mean and covariance are exactly these."""
    white = np.random.default_rng(len(mean)).standard_normal((count, len(mean)))
    white -= white.mean(0)
    white = white @ np.linalg.inv(scipy.linalg.sqrtm(np.cov(white, rowvar=False)))
    return white @ scipy.linalg.sqrtm(covariance) + mean


def random_covariance(seed, size=6):
    root = np.random.default_rng(seed).standard_normal((size, size))
    return root @ root.T


def test_frechet_of_a_shift():
    a = np.random.default_rng(0).standard_normal((50, 3))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + np.array([1, 2, -2])) == pytest.approx(9)


def test_frechet_of_gaussians_along_the_axes():
    a, b = gaussian([0, 1, 5], np.diag([1, 4, 9])), gaussian([3, 1, 1], np.diag([16, 1, 9]))
    assert frechet_distance(a, b) == pytest.approx((9 + 0 + 16) + ((1 - 4) ** 2 + (2 - 1) ** 2 + 0))


def test_frechet_of_any_gaussians():
    a, b = random_covariance(0), random_covariance(1)
    mean = np.arange(6.0)
    exact = 55 + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    assert frechet_distance(gaussian(mean, a), gaussian(mean * 0, b)) == pytest.approx(exact)
    assert frechet_distance(gaussian(mean * 0, b), gaussian(mean, a)) == pytest.approx(exact)


def test_frechet_of_one_point():
    b = gaussian([1, 2], np.diag([4, 9]))
    assert frechet_distance(np.zeros((10, 2)), b) == pytest.approx(1 + 4 + 4 + 9)


def test_real_digits_judged_as_generated():
    figures = judge(rows(REAL.held_out_images), REAL.held_out_labels.numpy(), REAL)
    assert figures["agreement"] == figures["classifier_accuracy"] > 0.97
    assert figures["distance_ratio"] == pytest.approx(1)
    assert figures["frechet"] == pytest.approx(0, abs=1e-6)
    assert 0 < figures["frechet_held_out"] < 3


def test_copies_of_training_digits():
    count = len(REAL.held_out_labels)
    figures = judge(rows(REAL.train_images[-count:]), REAL.train_labels[-count:].numpy(), REAL)
    assert figures["distance_ratio"] == 0
    assert figures["agreement"] > 0.97
    assert figures["frechet"] == pytest.approx(figures["frechet_held_out"], rel=0.5)


def test_digits_of_the_wrong_class():
    figures = judge(rows(REAL.held_out_images), (REAL.held_out_labels.numpy() + 1) % 10, REAL)
    assert figures["agreement"] < 0.03


def test_one_digit_over_and_over():
    count = len(REAL.held_out_labels)
    one = rows(REAL.held_out_images[:1]).repeat(count, axis=0)
    figures = judge(one, REAL.held_out_labels[:1].numpy().repeat(count), REAL)
    assert figures["agreement"] == 1
    assert figures["frechet"] > 10 * figures["frechet_held_out"]


def test_noise():
    count = len(REAL.held_out_labels)
    figures = judge(np.random.default_rng(0).uniform(-1, 1, (count, 64)), REAL.held_out_labels.numpy(), REAL)
    assert figures["agreement"] < 0.3
    assert figures["distance_ratio"] > 2


def test_the_loss_curve_has_no_reconstruction_where_nothing_is_masked(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(digits, "_save", lambda figure, path: drawn.append(figure))
    losses = [(1.0, 0.9, 0.5, 0.5), (0.9, 0.8, 0.4, 0.5), (0.7, 0.7, 0.1, 0.0), (0.6, 0.6, 0.0, 0.0)]
    names = ("loss", "denoising", "reconstruction", "mask_ratio")
    digits.draw_loss(
        tmp_path / "loss.png", [{"step": i, **dict(zip(names, of, strict=True))} for i, of in enumerate(losses)]
    )
    lines = {line.get_label(): line.get_ydata() for line in drawn[0].axes[0].get_lines()}
    assert list(lines["reconstruction"]) == [0.5, 0.4]
    assert list(lines["loss"]) == [1.0, 0.9, 0.7, 0.6]
