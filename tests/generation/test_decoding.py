"""Decoding without a VAE; with one it is tested by `tests/test_sample_latents.py`."""

import pytest
import torch
from util import small_net

from fastmask.diffusion import LatentSpace, Origin
from fastmask.generation.decoding import Decoder, Pictures
from fastmask.grid import preview


def net_of(channels, origin=None):
    net = small_net(depth=1, in_channels=channels)
    net.origin = origin
    return net


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("origin", [None, Origin()], ids=["unknown", "pixels"])
def test_pixels_are_clamped(channels, origin):
    decoder, samples = Decoder(net_of(channels, origin), "a"), torch.randn(2, channels, 8, 8)
    assert not decoder.from_latents
    assert torch.equal(decoder(samples), samples.clamp(-1, 1))


@pytest.mark.parametrize(
    ("channels", "origin"),
    [(4, None), (16, None), (4, Origin(latents=LatentSpace())), (3, Origin(latents=LatentSpace()))],
)
def test_latents_need_a_vae(channels, origin):
    decoder = Decoder(net_of(channels, origin), "runs/a")
    assert decoder.from_latents
    with pytest.raises(
        ValueError, match="runs/a draws latents, and does not record their VAE: give --vae with the name"
    ):
        decoder(torch.randn(1, channels, 8, 8))


def test_a_vae_for_pixels_is_refused():
    with pytest.raises(ValueError, match="runs/a was trained on pixels, which need no VAE: leave --vae out"):
        Decoder(net_of(3, Origin()), "runs/a", "some/vae")
    assert Decoder(net_of(3), "weights.pt", "some/vae").from_latents  # those of an f4 VAE have three channels


@pytest.mark.parametrize("channels", [4, 16, 32])
def test_pictures_without_a_vae_are_previews_and_said_to_be(channels, capsys):
    pictures = Pictures(net_of(channels, Origin(latents=LatentSpace())), "runs/a")
    samples = torch.randn(2, channels, 8, 8)
    for _ in range(2):
        images, kind = pictures(samples, torch.device("cpu"))
        assert kind == "-latents"
        assert torch.equal(images, preview(samples))
    said = "grids show the first three channels of latents, undecoded: runs/a draws latents, and does not record"
    assert capsys.readouterr().out.count(said) == 1


def test_pictures_of_pixels():
    samples = torch.rand(2, 3, 8, 8)
    images, kind = Pictures(net_of(3, Origin()), "runs/a")(samples, torch.device("cpu"))
    assert (kind, torch.equal(images, samples)) == ("", True)
