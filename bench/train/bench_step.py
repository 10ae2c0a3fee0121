"""Whole optimizer steps: a masked preset beside the dense DiT of the same encoder, on the same code.

The bound by operations is printed beside the measured time (extra_info, shown with --benchmark-verbose or in the JSON).
"""

import pytest
import torch

from fastmask.config import build_model, preset_config
from fastmask.counts import forward_macs
from fastmask.diffusion import EDMLoss, EDMPrecond, TrainingObjective, training_draws
from fastmask.ema import EMA
from fastmask.masking import kept_count
from fastmask.optim import make_optimizer
from fastmask.presets import PRESETS

BATCH = 4


@pytest.mark.parametrize("preset", ["dit-s2-in256", "s2-in256", "dit-b2-in256", "b2-in256"])
def bench_step(benchmark, preset):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = preset_config(preset, PRESETS)
    torch.manual_seed(0)
    net = EDMPrecond(build_model(config, 4, config.image_size // 8), config.sigma_data).to(device)
    for parameter in net.parameters():  # zero-initialised layers would make part of the step trivial
        torch.nn.init.normal_(parameter, std=0.02)
    objective = TrainingObjective(net, EDMLoss(config.sigma_data, config.mae_coef))
    optimizer, ema = make_optimizer(net, config), EMA(net, config.ema_decay)
    keep = kept_count(net.model.length, config.mask_ratio)
    images = torch.randn(BATCH, 4, config.image_size // 8, config.image_size // 8, device=device) * 0.5
    labels = torch.randint(config.num_classes, (BATCH,), device=device)

    def step():
        draws = training_draws(
            images,
            labels,
            seed=0,
            offset=0,
            num_classes=config.num_classes,
            label_drop=config.label_drop,
            length=net.model.length,
            keep=keep,
            p_mean=config.p_mean,
            p_std=config.p_std,
        )
        loss = objective(images, *draws).total.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(net)
        if device == "cuda":
            torch.cuda.synchronize()
        return loss

    loss = benchmark.pedantic(step, rounds=3, warmup_rounds=1)
    assert torch.isfinite(loss)
    median = benchmark.stats.stats.median
    benchmark.extra_info["images_per_s"] = round(BATCH / median, 2)
    benchmark.extra_info["forward_gmac_per_image"] = round(forward_macs(net.model, keep) / 1e9, 3)
    benchmark.extra_info["gflop_per_s"] = round(6e-9 * forward_macs(net.model, keep) * BATCH / median, 1)
