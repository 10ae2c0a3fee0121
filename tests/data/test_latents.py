from pathlib import Path

import numpy as np
import pytest
import torch

from fastmask.data.latents import Moments, Scaling, Synthetic
from fastmask.kernels import random_normal

PATH = Path("some.npz")


def moments_of(count=5, dtype=np.float32):
    return np.random.default_rng(0).standard_normal((count, 8, 4, 4)).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_posterior_in_float64(dtype):
    moments = moments_of(dtype=dtype)
    data = Moments(PATH, {"moments": moments}, 32, False)
    sample = torch.tensor([7, 10**10, 0])
    latents = data.to_images(data.read(np.array([4, 0, 2]))[0], 3, sample)
    mean, log_variance = moments[[4, 0, 2]].astype(np.float64).reshape(3, 2, 4, 4, 4).swapaxes(0, 1)
    noise = random_normal(3, sample, 64, 4).double().numpy().reshape(3, 4, 4, 4)
    exact = 0.18215 * (mean + np.exp(log_variance / 2) * noise)
    assert latents.dtype == torch.float32
    np.testing.assert_allclose(latents.numpy(), exact, rtol=1e-5, atol=1e-6)


def test_log_variance_is_clamped():
    moments = np.zeros((3, 8, 4, 4), np.float32)
    moments[:, 4:] = np.array([-1000, 1000, 20])[:, None, None, None]
    data = Moments(PATH, {"moments": moments}, 32, False)
    low, high, limit = data.to_images(torch.from_numpy(moments), 0, torch.zeros(3, dtype=torch.int64))
    assert torch.equal(high, limit)
    assert low.abs().max() < 1e-6
    assert low.any()


def test_a_sample_is_drawn_anew_at_each_visit():
    data = Moments(PATH, {"moments": moments_of(1)}, 32, False)
    stored = data.read(np.zeros(2, np.int64))[0]
    first = data.to_images(stored, 0, torch.tensor([0, 1]))
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first.flip(0), data.to_images(stored, 0, torch.tensor([1, 0])))
    assert not torch.equal(first, data.to_images(stored, 1, torch.tensor([0, 1])))


def test_labels_and_shape():
    arrays = {"moments": moments_of(), "labels": np.array([3, 1, 0, 2, 2]), "num_classes": np.array(4)}
    data = Moments(PATH, arrays, 32, False)
    assert (len(data), data.shape, data.num_classes, data.class_names) == (5, (4, 4, 4), 4, ["0", "1", "2", "3"])
    assert data.read(np.array([0, 4]))[1].tolist() == [3, 2]


def test_without_labels_there_are_no_classes():
    data = Moments(PATH, {"moments": moments_of()}, 32, False)
    assert (data.num_classes, data.class_names) == (0, [])
    assert not data.read(np.arange(5))[1].any()


@pytest.mark.parametrize(
    ("moments", "image_size", "mirror", "message"),
    [
        (moments_of(), 64, False, r"of shape \(N, 8, 8, 8\) for image_size 64, not float32 of shape \(5, 8, 4, 4\)"),
        (moments_of()[:, :4], 32, False, r"not float32 of shape \(5, 4, 4, 4\)"),
        (moments_of().astype(np.float64), 32, False, "must be float16 or float32 .*, not float64"),
        (moments_of().astype(np.int32), 32, False, "must be float16 or float32 .*, not int32"),
        (moments_of().astype(">f4"), 32, False, "must be float16 or float32 .*, not >f4"),
        (moments_of(), 35, False, "image_size must be a multiple of 8 for latents, not 35"),
        (moments_of(), 32, True, "a mirrored latent is not that of the mirrored image"),
    ],
)
def test_what_cannot_be_trained_on(moments, image_size, mirror, message):
    with pytest.raises(ValueError, match=message):
        Moments(PATH, {"moments": moments}, image_size, mirror)


def test_synthetic_is_a_function_of_the_id():
    data = Synthetic(32, 7)
    ids = np.array([999_999, 0, 12])
    latents, labels = data.read(ids)
    assert latents.shape == (3, 4, 4, 4)
    again, same = data.read(ids[::-1].copy())
    assert torch.equal(latents, again.flip(0))
    assert torch.equal(labels, same.flip(0))
    assert data.to_images(latents, 0, torch.arange(3)) is latents


def test_synthetic_statistics():
    latents, labels = Synthetic(32, 7).read(np.arange(2000))
    assert latents.mean().abs() < 0.02
    assert latents.std() == pytest.approx(1, abs=0.02)
    counts = torch.bincount(labels, minlength=7)
    assert len(counts) == 7
    assert counts.min() > 200


def test_synthetic_without_classes():
    assert not Synthetic(32, 0).read(np.arange(100))[1].any()


def test_synthetic_needs_whole_latents():
    with pytest.raises(ValueError, match="image_size must be a multiple of 8 for latents, not 12"):
        Synthetic(12, 0)


@pytest.mark.parametrize(("scale", "shift"), [(0.5, 0.25), ([0.5, 2.0, 1.0, 4.0], [1.0, 0.0, -1.0, 0.5])])
def test_scaling_and_back(scale, shift):
    latents = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 4, 3, 3), np.float32))
    scaled = Scaling(scale, shift).apply(latents)
    per_channel = (np.broadcast_to(np.float32(value), 4)[:, None, None] for value in (scale, shift))
    expected_scale, expected_shift = per_channel
    np.testing.assert_array_equal(scaled.numpy(), (latents.numpy() - expected_shift) * expected_scale)
    torch.testing.assert_close(Scaling(scale, shift).undo(scaled), latents)
