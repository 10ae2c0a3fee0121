"""A small VAE for tests."""

import pytest
import torch


def small_vae(**settings):
    """Return an `AutoencoderKL` of f8 with random weights, always the same; skips the test without diffusers."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    torch.manual_seed(0)
    blocks = 4
    return diffusers.AutoencoderKL(
        **{
            "block_out_channels": (4,) * blocks,
            "down_block_types": ("DownEncoderBlock2D",) * blocks,
            "up_block_types": ("UpDecoderBlock2D",) * blocks,
            "layers_per_block": 1,
            "norm_num_groups": 2,
            "latent_channels": 4,
            **settings,
        }
    )
