"""`python -m fastmask.prepare` with latents of other projects."""

from pathlib import Path

import numpy as np
import pytest
import torch
from latent_files import EDM2_MEAN, EDM2_STD, edm2_of, features_of, latent_tar_of, raw_moments, shards_of

from fastmask.data import open_data
from fastmask.data.store.manifest import read_manifest
from fastmask.prepare import main

LATENTS = ("--image-size", "32", "--num-workers", "0", "--shard-size", "5", "--batch-size", "2", "--device", "cpu")


def imported(source, store, *flags):
    """Import latents 4x4 of another project."""
    main([str(source), str(store), *LATENTS, *flags])
    return read_manifest(store)


def trained_on(store, count):
    """Return what is trained on, without the noise of the posterior if that is small."""
    data = open_data(str(store), image_size=32, num_classes=None, flip=False)
    return data.to_images(data.read(np.arange(count))[0], 0, torch.arange(count)).numpy()


@pytest.mark.parametrize("whose", ["edm2", "repa"])
def test_latents_are_imported(tmp_path, capsys, whose):
    mean, std = (EDM2_MEAN, EDM2_STD) if whose == "edm2" else (np.zeros(4), np.full(4, 5.0))
    raw = raw_moments(40, mean, std)
    source = edm2_of(tmp_path / "source", raw, [i % 2 for i in range(40)])
    manifest = imported(source, tmp_path / "store")
    assert (manifest.kind, manifest.shape, manifest.class_counts) == ("moments", (1, 8, 4, 4), [20, 20])
    assert (manifest.source["kind"], manifest.image_size) == (whose, 32)
    scale, shift = (0.5 / EDM2_STD, EDM2_MEAN) if whose == "edm2" else (np.full(4, 0.18215), np.zeros(4))
    expected = (raw[:, :4] - shift[:, None, None]) * scale[:, None, None]
    np.testing.assert_allclose(trained_on(tmp_path / "store", 40), expected, rtol=1e-2, atol=1e-2)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{source}: {whose}, 40 moments (8, 4, 4) without flipped images"
    assert said[1].startswith(f"{source}: taken for {whose}, by the mean of channels ")
    assert said[2].startswith(f"{source}: scale 0.1")
    assert said[2].endswith("deviation of 0.5)" if whose == "edm2" else "as REPA trains on it)")
    assert said[3].startswith(f"{source}: as trained on, of 40 latents: mean ")
    assert said[4] == f"{source}: latents of side 4 of images of side 32, a downsampling of 8"
    assert "warning" not in "".join(said)
    main(["--check", str(tmp_path / "store"), "--device", "cpu"])
    assert "the sheet shows latents as they are: " in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds latents of images of side 32: give --image-size 32"):
        imported(source, tmp_path / "other", "--image-size", "256")
    with pytest.raises(ValueError, match=r"holds latents \(\w+\), of which --space pixel cannot be made"):
        imported(source, tmp_path / "other", "--space", "pixel")


def test_latents_whose_project_is_not_known(tmp_path, capsys):
    source = edm2_of(tmp_path / "source", raw_moments(20, 0.5 * EDM2_MEAN))
    with pytest.raises(ValueError, match=r"source: the mean of .* give --latents edm2 or --latents repa"):
        imported(source, tmp_path / "store")
    assert imported(source, tmp_path / "a", "--latents", "repa").scale == 0.18215
    assert "taken for repa, as --latents says" in capsys.readouterr().out
    manifest = imported(source, tmp_path / "b", "--latent-scale", "0.5", "--latent-shift", "1", "2", "3", "4")
    assert (manifest.scale, manifest.shift, manifest.source["kind"]) == (0.5, [1.0, 2.0, 3.0, 4.0], "edm2-layout")
    assert "scale 0.5, shift 1 2 3 4 (--latent-scale and --latent-shift)" in capsys.readouterr().out


def test_a_scale_that_does_not_fit_is_said(tmp_path, capsys):
    source = edm2_of(tmp_path / "source", raw_moments(20, np.zeros(4)))
    imported(source, tmp_path / "store")
    assert "warning: " in (said := capsys.readouterr().out)
    assert "the standard deviation is not near 1 as trained on: are scale and shift those of these latents?" in said


def test_latents_of_lightningdit(tmp_path, capsys):
    latents = 3 * np.random.default_rng(0).standard_normal((10, 32, 4, 4)).astype(np.float32) + 1
    source = shards_of(tmp_path / "light", latents, [i % 3 for i in range(10)])
    manifest = imported(source, tmp_path / "store", "--image-size", "64", "--vae", "their VA-VAE")
    assert (manifest.kind, manifest.shape, manifest.image_size) == ("latents", (2, 32, 4, 4), 64)
    assert (manifest.class_counts, manifest.vae) == ([4, 3, 3], "their VA-VAE")
    assert "latents of side 4 of images of side 64, a downsampling of 16" in (said := capsys.readouterr().out)
    assert "(latents_stats.pt, to a mean of 0 and a deviation of 1)" in said
    data = open_data(str(tmp_path / "store"), image_size=64, num_classes=None, flip=True)
    images = data.to_images(data.read(np.arange(20))[0], 0, torch.arange(20)).numpy()
    mean, std = (np.reshape(value, (-1, 1, 1)) for value in (latents.mean((0, 2, 3)), latents.std((0, 2, 3), ddof=1)))
    np.testing.assert_allclose(images[:10], (latents - mean) / std, rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(images[10:], (latents[..., ::-1] + 1 - mean) / std, rtol=1e-2, atol=1e-2)
    one = imported(source, tmp_path / "one", "--image-size", "64", "--no-flip")
    assert one.shape == (1, 32, 4, 4)
    assert "left out: the latents of flipped images (--no-flip)" in capsys.readouterr().out
    (source / "latents_stats.pt").unlink()
    with pytest.raises(ValueError, match=r"latents_stats\.pt is not there: give --latent-scale and --latent-shift"):
        imported(source, tmp_path / "other", "--image-size", "64")
    with pytest.raises(ValueError, match="holds latents of side 4, and does not say of what images: give their side"):
        imported(source, tmp_path / "other", "--image-size", "63", "--latent-scale", "1", "--latent-shift", "0")
    for flags in (
        ["--latent-scale", "1"],
        ["--latent-shift", "1"],
        ["--latent-scale", "1", "2", "--latent-shift", "0"],
    ):
        with pytest.raises(ValueError, match=r"--latent-scale and --latent-shift go together .* each of 32 channels"):
            imported(source, tmp_path / "other", "--image-size", "64", *flags)


def test_moments_of_an_npz(tmp_path):
    moments = raw_moments(6, np.zeros(16), channels=16)
    np.savez(tmp_path / "some.npz", moments=moments, labels=np.arange(6))
    with pytest.raises(ValueError, match="holds no arrays `scale` and `shift`: give --latent-scale and --latent-shift"):
        imported(tmp_path / "some.npz", tmp_path / "store")
    flags = ("--latent-scale", "0.36", "--latent-shift", "0.12", "--image-size", "64")
    manifest = imported(tmp_path / "some.npz", tmp_path / "store", *flags)
    assert (manifest.shape, manifest.num_classes, manifest.image_size) == ((1, 32, 4, 4), 6, 64)
    assert (manifest.scale, manifest.shift) == (0.36, 0.12)


def test_latents_that_cannot_be_imported(tmp_path, capsys):
    values = raw_moments(8, EDM2_MEAN)
    values[2] = np.inf
    source = edm2_of(tmp_path / "a", values)
    with pytest.raises(ValueError, match=r"00000002\.npy holds values that are not finite in float16 \(--on-bad skip"):
        imported(source, tmp_path / "store")
    assert imported(source, tmp_path / "store", "--on-bad", "skip").count == 7
    with pytest.raises(ValueError, match=r"moments of shape \(8, 4, 3\) are not those of square images"):
        imported(edm2_of(tmp_path / "b", values[..., :3]), tmp_path / "other")
    source = edm2_of(tmp_path / "c", values)
    (source / "dataset.json").write_text('{"labels": []}')
    with pytest.raises(ValueError, match="holds no latents"):
        imported(source, tmp_path / "other")


@pytest.mark.parametrize("name", ["edm2", "repa.zip", "fast", "light", "0.tar"])
def test_training_on_latents_in_a_layout_of_others_names_prepare(tmp_path, name):
    moments = raw_moments(4, np.zeros(4))
    if name == "fast":
        features_of(tmp_path / name, moments[:, :4], range(4))
    elif name == "light":
        shards_of(tmp_path / name, moments, range(4))
    elif name == "0.tar":
        latent_tar_of(tmp_path / name, moments, range(4))
    else:
        edm2_of(tmp_path / Path(name).stem, moments, packed=name.endswith("zip"))
    with pytest.raises(
        ValueError, match=rf"{name} holds latents .*: make a store of them by python -m fastmask\.prepare"
    ):
        open_data(str(tmp_path / name), image_size=32, num_classes=None, flip=False)


def test_values_that_are_not_finite_are_told_of_their_file(tmp_path):
    np.savez(tmp_path / "some.npz", moments=np.full((6, 8, 4, 4), np.nan, np.float32))
    with pytest.raises(ValueError, match=r"some\.npz: record 0 holds values that are not finite"):
        imported(tmp_path / "some.npz", tmp_path / "store")
