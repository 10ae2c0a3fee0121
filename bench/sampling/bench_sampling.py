"""Sampling with guidance: `fastmask.diffusion.draw_batch`, with and without an interval, and a plain loop.

The plain loop is EDM's Heun sampler (arXiv 2206.00364, algorithm 1) over the same network in plain modules
(`bench/baselines/plain.py`), which is called twice per evaluation: with the label and without. All have the same
weights and noise, and are checked against each other before they are timed. On a CPU: S/2 at 256x256, batch 4, fp32;
`--full` adds B/2.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import rows
from bench.baselines.plain import PlainDiT
from bench.train.steps import as_trained, config_of
from fastmask.diffusion import EDM, Denoiser, Sampling, draw_batch
from fastmask.kernels import random_normal
from fastmask.testing import relative_error
from fastmask.training.config import build_model

BATCH, SIDE, SEED = 4, 32, 0
ROUNDS = {"s2": 5, "b2": 3}
SAMPLING = Sampling(sample_steps=6, cfg_scale=1.5)
INTERVAL = (0.28, 2.9)  # noise levels, as in arXiv 2404.07724
_LATENT_STREAM = 6  # of `draw_batch`
_SAME = 1e-4  # relative error of fp32 images after 11 evaluations


class PlainSampler:
    """EDM's denoiser and Heun's loop, as they are usually written.

    Args:
        model: the network.
        sampling: number of steps and guidance scale.
        process: sigma_data.
    """

    def __init__(self, model: PlainDiT, sampling: Sampling, process: EDM) -> None:
        self.model, self.sampling, self.sigma_data = model, sampling, process.sigma_data

    def denoised(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        total = sigma**2 + self.sigma_data**2
        times = (sigma.log() / 4).expand(len(x))
        raw = self.model(x / total.sqrt(), times, labels, None, None)
        return self.sigma_data**2 / total * x + sigma * self.sigma_data / total.sqrt() * raw

    def guided(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        known = self.denoised(x.float(), sigma.float(), labels)
        none = self.denoised(x.float(), sigma.float(), torch.full_like(labels, self.model.y_embedder.num_classes))
        return (none + self.sampling.cfg_scale * (known - none)).double()

    @torch.no_grad()
    def __call__(self, noise: Tensor, labels: Tensor, sigmas: Tensor) -> Tensor:
        x = noise.double() * sigmas[0]
        for i, (sigma, after) in enumerate(itertools.pairwise(sigmas)):
            slope = (x - self.guided(x, sigma, labels)) / sigma
            moved = x + (after - sigma) * slope
            if i < len(sigmas) - 2:
                slope = (slope + (moved - self.guided(moved, after, labels)) / after) / 2
                moved = x + (after - sigma) * slope
            x = moved
        return x.float()


def samplers(size: str, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """Return the calls to compare, each of which draws one batch."""
    config = config_of(size, 8 * SIDE, "masked-0.5")
    torch.manual_seed(0)
    with device:
        model = build_model(config, 4, SIDE)
        labels = torch.arange(BATCH) * 7
    for parameter in model.parameters():  # zero-initialised layers would make part of the work trivial
        torch.nn.init.normal_(parameter, std=0.02)
    net = Denoiser(model, config.process).eval()
    plain = PlainSampler(_plain(net, config.network, device), SAMPLING, config.process)
    noise = random_normal(SEED, torch.arange(BATCH, device=device), 4 * SIDE * SIDE, _LATENT_STREAM)
    sigmas = config.process.times(SAMPLING.sample_steps).to(device)

    def ours(sampling: Sampling) -> Callable[[], Tensor]:
        return as_trained(config)(lambda: draw_batch(net, labels, sampling, seed=SEED))

    return {
        "plain": lambda: plain(noise.view(BATCH, 4, SIDE, SIDE), labels, sigmas),
        "ours": ours(SAMPLING),
        "ours interval": ours(dataclasses.replace(SAMPLING, guidance_interval=INTERVAL)),
    }


def _plain(net: Denoiser, network: Any, device: torch.device) -> PlainDiT:
    with device:
        plain = PlainDiT(
            input_size=SIDE,
            patch_size=network.patch_size,
            width=network.width,
            depth=network.depth,
            num_heads=network.num_heads,
            num_classes=net.model.num_classes,
            decoder_width=network.decoder_width,
            decoder_depth=network.decoder_depth,
            decoder_num_heads=network.decoder_num_heads,
        )
    plain.load_state_dict(net.model.state_dict())
    return plain.eval()


@pytest.mark.parametrize("size", ["s2", "b2"])
def bench_sampling(benchmark, sampled, progress, request, size):
    if size != "s2" and not request.config.getoption("full"):
        pytest.skip(f"{size} takes minutes on a CPU: give --full")
    device = rows.default_device()
    calls = samplers(size, device)
    # The interval changes the images; without one they are the same.
    drawn = {name: calls[name]() for name in ("plain", "ours")}
    assert relative_error(drawn["ours"], drawn["plain"]) < _SAME
    off = benchmark.disabled
    with progress.of(f"sampling, {size}", len(calls), long=True) as told:
        times = rows.take(calls, device, rounds=1 if off else ROUNDS[size], warmup=0 if off else 1, progress=told)
    case = {"size": size, "image_size": 8 * SIDE, "batch": BATCH, "precision": "fp32", **_told(SAMPLING)}
    for variant, taken in times.items():
        sampled(case, variant, taken, device)


def _told(sampling: Sampling) -> dict[str, Any]:
    return {name: getattr(sampling, name) for name in ("solver", "sample_steps", "cfg_scale")}
