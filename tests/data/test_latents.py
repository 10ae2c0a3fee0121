from pathlib import Path

import numpy as np
import pytest
import torch

from fastmask.data.foreign.open import open_latents
from fastmask.data.in_memory import Moments, Synthetic, holds_moments
from fastmask.data.latents import (
    ScaledBy,
    Scaling,
    all_finite,
    check_label,
    check_latent,
    latents_of,
    number_or_list,
    sample_records,
    shown,
)
from fastmask.data.sources.npz import read_npz
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
    ("moments", "image_size", "flip", "message"),
    [
        (
            moments_of(),
            64,
            False,
            "holds moments of side 4, which are not those of image_size 64 at a downsampling of 8",
        ),
        (moments_of(), 35, False, "holds moments of side 4, which are not those of image_size 35"),
        (moments_of()[:, :7], 32, False, r"of shape \(N, 2C, h, w\), .* not float32 of shape \(5, 7, 4, 4\)"),
        (moments_of()[..., :3], 32, False, r"of shape \(5, 8, 4, 3\) are not those of square images"),
        (moments_of()[0], 32, False, r"not float32 of shape \(8, 4, 4\)"),
        (moments_of()[..., :0, :0], 32, False, "are not those of square images"),
        (moments_of().astype(np.float64), 32, False, "must be float16 or float32 .*, not float64"),
        (moments_of().astype(np.int32), 32, False, "must be float16 or float32 .*, not int32"),
        (moments_of().astype(">f4"), 32, False, "must be float16 or float32 .*, not >f4"),
        (
            moments_of()[:, :4],
            32,
            False,
            "holds moments of 2 channels, whose scale is not known: write arrays `scale` and",
        ),
        (moments_of(), 32, True, "a flipped latent is not that of the flipped image"),
    ],
)
def test_what_cannot_be_trained_on(moments, image_size, flip, message):
    with pytest.raises(ValueError, match=message):
        Moments(PATH, {"moments": moments}, image_size, flip)


def wide(**arrays):
    """Return moments of a VAE of 16 channels that divides sides by 16."""
    moments = np.random.default_rng(0).standard_normal((5, 32, 4, 4)).astype(np.float16)
    return {"moments": moments, **arrays}


@pytest.mark.parametrize("scale", [0.3611, np.linspace(0.2, 0.5, 16, dtype=np.float32)])
def test_moments_of_any_channels_and_downsampling(scale):
    arrays = wide(scale=np.array(scale), shift=np.array(0.1159))
    data = Moments(PATH, arrays, 64, False)
    assert data.shape == (16, 4, 4)
    stored, sample = data.read(np.arange(5))[0], torch.arange(5)
    exact = (latents_of(stored, 3, sample).numpy() - 0.1159) * np.reshape(scale, (-1, 1, 1))
    np.testing.assert_allclose(data.to_images(stored, 3, sample).numpy(), exact, rtol=1e-5, atol=1e-6)
    assert data.describe().startswith("5 moments (32, 4, 4) of images downsampled by 16, 0 classes, scale 0.")
    assert data.describe().endswith("shift 0.1159 (the file's `scale` and `shift`)")


def test_the_default_scale_is_said():
    said = Moments(PATH, {"moments": moments_of()}, 32, False).describe()
    assert said == (
        "5 moments (8, 4, 4) of images downsampled by 8, 0 classes, scale 0.18215, shift 0 (Stable Diffusion's KL-f8, "
        "since the file holds no `scale` and `shift`)"
    )


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {},
            "holds moments of 16 channels, whose scale is not known: .*fastmask.prepare with --latent-scale and",
        ),
        ({"scale": np.ones(16)}, r"holds `scale` alone: `scale` and `shift` go together \(0 is no shift\)"),
        ({"shift": np.ones(16)}, "holds `shift` alone"),
        (
            {"scale": np.ones(8), "shift": np.zeros(1)},
            r"`scale` must be a finite float above 0, .* 16 channels, not float64",
        ),
        ({"scale": np.zeros(1), "shift": np.zeros(1)}, "`scale` must be a finite float above 0"),
        ({"scale": np.ones(1, int), "shift": np.zeros(1)}, "`scale` must be a finite float above 0"),
        ({"scale": np.array([np.nan]), "shift": np.zeros(1)}, "`scale` must be a finite float above 0"),
        ({"scale": np.ones(1), "shift": np.array([np.inf])}, "`shift` must be a finite float, or one for each"),
    ],
)
def test_a_scale_that_is_not_known(arrays, message):
    with pytest.raises(ValueError, match=message):
        Moments(PATH, wide(**arrays), 64, False)


def test_values_that_are_not_finite():
    moments = moments_of()
    moments[3, 5, 0, 1] = np.inf
    data = Moments(PATH, {"moments": moments}, 32, False)
    data.read(np.array([0, 1, 2, 4]))
    with pytest.raises(ValueError, match=r"some\.npz: moments 3 hold values that are not finite"):
        data.read(np.array([0, 3]))


def test_the_same_file_as_what_a_store_is_made_of(tmp_path):
    path = tmp_path / "some.npz"
    np.savez(path, moments=moments_of(), labels=np.array([3, 1, 0, 2, 2]))
    assert holds_moments(path)
    latents = open_latents(path)
    assert (latents.kind, latents.holds, latents.downsampling, len(latents)) == ("npz-moments", "moments", 8, 5)
    record, label = latents.read(4)
    assert np.array_equal(record, moments_of()[4:])
    assert (label, latents.name(4)) == (2, f"{path}, moments 4")
    assert latents.scaled_by.scale == 0.18215
    np.savez(path, **wide())
    latents = open_latents(path)
    assert (latents.scaled_by, latents.downsampling) == (None, None)
    assert latents.unscaled == f"{path} holds no arrays `scale` and `shift`"
    np.savez(path, **wide(scale=np.ones(16), shift=np.zeros(16)))
    assert open_latents(path).scaled_by == ScaledBy([1.0] * 16, [0.0] * 16, "the file's `scale` and `shift`")
    assert Moments(path, read_npz(path, None), 128, False).shape == (16, 4, 4)
    np.savez(path, images=np.zeros((1, 4, 4, 3), np.uint8))
    assert not holds_moments(path)


def test_a_sample_of_records():
    asked = []

    def read(item):
        asked.append(item)
        if item == 0:
            raise OSError("gone")
        return np.full((1, 4, 2, 2), np.nan if item == 999 else item), 0

    found = sample_records(read, 1000, "some")
    assert (len(asked), min(asked), max(asked)) == (64, 0, 999)
    assert [int(record[0, 0, 0, 0]) for record, _ in found] == [item for item in asked if item not in (0, 999)]
    with pytest.raises(ValueError, match=r"^gone$"):
        sample_records(read, 1, "some")


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_finite_values(dtype):
    limits = np.finfo(dtype)
    edges = [limits.max, limits.min, limits.tiny, -limits.tiny, limits.smallest_subnormal, 0.0, -0.0]
    values = np.array(edges * 9, dtype).reshape(7, 9)
    assert all_finite(values)
    assert all_finite(values[:0])
    for bad in (np.inf, -np.inf, np.nan, -np.nan):
        for place in (0, 31, 62):
            changed = values.copy()
            changed.flat[place] = bad
            assert not all_finite(changed)


def test_labels_and_latents_that_are_none():
    assert check_label(999_999, "a") == 999_999
    for label in (-1, 10**6, 2**32 + 1):
        with pytest.raises(ValueError, match=rf"^a has label {label}, which is outside 0 \.\. 999999$"):
            check_label(label, "a")
    values = np.zeros((3, 4, 4), np.float16)
    assert check_latent(values, "a") is values
    for other, even in ((values, True), (values[0], False), (values[:0], False), (values.astype(int), False)):
        with pytest.raises(ValueError, match=r"^a holds no latent, but (float16|int64) of shape "):
            check_latent(other, "a", even=even)


def test_numbers_for_a_line():
    assert shown(0.18215) == "0.18215"
    assert shown([0.5, 1 / 3]) == "0.5 0.33333"
    assert number_or_list([2.0]) == 2.0
    assert number_or_list([1.0, 2.0]) == [1.0, 2.0]


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
