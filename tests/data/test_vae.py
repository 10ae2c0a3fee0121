"""Encoding by diffusers' AutoencoderKL; all but the last test need diffusers, which is optional."""

import importlib

import numpy as np
import pytest
import torch
from vaes import small_vae

from fastmask.data.vae import Autoencoder

CPU = torch.device("cpu")


@pytest.fixture
def vae(tmp_path):
    small_vae().save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def pixels_of(count=3, channels=3):
    return np.random.default_rng(0).integers(0, 256, (count, channels, 32, 32), dtype=np.uint8)


def test_moments_are_the_vaes(vae):
    encoder, pixels = Autoencoder(str(vae), CPU), pixels_of()
    assert (encoder.channels, encoder.downsampling, encoder.scale, encoder.shift) == (4, 8, 0.18215, 0.0)
    moments = encoder.moments(pixels, flip=True)
    assert (moments.dtype, moments.shape) == (np.float16, (3, 2, 8, 4, 4))
    images = torch.from_numpy(pixels).float() / 127.5 - 1
    with torch.no_grad():
        for copy, some in ((0, images), (1, images.flip(3))):
            posterior = small_vae().eval().encode(some).latent_dist
            exact = torch.cat([posterior.mean, posterior.logvar], 1).numpy()
            np.testing.assert_allclose(moments[:, copy].astype(np.float32), exact, rtol=1e-3, atol=1e-3)
    assert np.array_equal(encoder.moments(pixels, flip=False), moments[:, :1])


def test_grey_images_are_coloured(vae):
    encoder, grey = Autoencoder(str(vae), CPU), pixels_of(channels=1)
    assert np.array_equal(encoder.moments(grey, False), encoder.moments(grey.repeat(3, 1), False))


def test_scale_and_shift_of_the_configuration(tmp_path):
    settings = {"scaling_factor": 0.36, "shift_factor": 0.11, "latent_channels": 16}
    small_vae(**settings).save_pretrained(tmp_path / "pipeline" / "vae")
    encoder = Autoencoder(str(tmp_path / "pipeline"), CPU)
    assert (encoder.channels, encoder.scale, encoder.shift) == (16, 0.36, 0.11)


def test_means_and_deviations_per_channel(tmp_path):
    means, deviations = [0.1, 0.2, -0.3, 0.4], [1.0, 2.0, 0.5, 4.0]
    small_vae(scaling_factor=0.5, latents_mean=means, latents_std=deviations).save_pretrained(tmp_path / "vae")
    encoder = Autoencoder(str(tmp_path / "vae"), CPU)
    assert (encoder.scale, encoder.shift) == ([0.5, 0.25, 1.0, 0.125], means)
    latents = torch.tensor([means, means]).view(2, 4, 1, 1) + torch.tensor(deviations).view(1, 4, 1, 1)
    torch.testing.assert_close(encoder.scaling.apply(latents), torch.full((2, 4, 1, 1), 0.5))


def test_latents_are_decoded(vae):
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = small_vae().eval().decode(latents).sample.clamp(-1, 1)
    torch.testing.assert_close(Autoencoder(str(vae), CPU).decode(latents), expected, rtol=1e-4, atol=1e-5)


def test_the_hash_is_of_the_weights(vae, tmp_path):
    small_vae(scaling_factor=1.0).save_pretrained(tmp_path / "same")
    other = small_vae()
    with torch.no_grad():
        other.quant_conv.bias += 1
    other.save_pretrained(tmp_path / "other")
    first, same, different = (
        Autoencoder(str(path), CPU).sha256 for path in (vae, tmp_path / "same", tmp_path / "other")
    )
    assert first == same
    assert first != different


def test_moments_that_overflow(tmp_path):
    vae = small_vae()
    with torch.no_grad():
        vae.quant_conv.bias += 1e6
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="not finite in float16"):
        Autoencoder(str(tmp_path / "vae"), CPU).moments(pixels_of(), False)


@pytest.mark.parametrize("damage", ["no folder", "empty folder", "weights gone", "weights cut off", "config cut off"])
def test_a_vae_that_cannot_be_loaded(vae, tmp_path, damage):
    weights = vae / "diffusion_pytorch_model.safetensors"
    if damage == "no folder":
        vae = tmp_path / "nowhere"
    elif damage == "empty folder":
        vae = tmp_path / "empty"
        vae.mkdir()
    elif damage == "weights gone":
        weights.unlink()
    elif damage == "weights cut off":
        weights.write_bytes(weights.read_bytes()[:100])
    else:
        (vae / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"--vae .* cannot be loaded: ") as error:
        Autoencoder(str(vae), CPU)
    assert "\n" not in str(error.value)


class HubConnectError(Exception):
    """As those of the packages that the hub is asked by."""


@pytest.mark.parametrize("cause", [HubConnectError(), ConnectionResetError(), TimeoutError()])
def test_a_hub_that_does_not_answer(monkeypatch, cause):
    """diffusers says that the model has no file named config.json."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

    def absent(name, **options):
        try:
            raise OSError("cannot be located") from cause
        except OSError as error:
            raise OSError(f"{name} does not appear to have a file named config.json.") from error

    monkeypatch.setattr(diffusers.AutoencoderKL, "from_pretrained", absent)
    with pytest.raises(ValueError, match=r"^--vae some/vae cannot be loaded: it was not fetched before, and the"):
        Autoencoder("some/vae", CPU)


def test_the_published_configuration_in_full_size():
    """Stable Diffusion's KL-f8: 83.7M parameters, 256x256 images to moments 8x32x32; shapes alone."""
    with torch.device("meta"):
        vae = small_vae(block_out_channels=(128, 256, 512, 512), layers_per_block=2, norm_num_groups=32)
        moments = vae.encode(torch.empty(1, 3, 256, 256)).latent_dist.parameters
    assert moments.shape == (1, 8, 32, 32)
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863


def test_without_diffusers(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ValueError, match=r"needs diffusers: pip install diffusers \(--space pixel"):
        Autoencoder("any", CPU)
