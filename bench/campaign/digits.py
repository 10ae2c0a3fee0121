"""A short training run of the preset `digits`, masked, then unmasked, with its loss compared to a reference run.

The reference is a CPU run in fp32, `bench/results/digits-cpu.json`, with the same weights, order, noise and masks, so
that only rounding differs. The scans are stored in `bench/digits.npz`: the 1,797 of scikit-learn, its copy of the UCI
dataset "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak; CC BY 4.0). The file was made by

    python -c "import numpy, sklearn.datasets as s; d = s.load_digits(); numpy.savez_compressed('bench/digits.npz',
        images=d.images.astype('uint8'), labels=d.target.astype('uint8'))"
"""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import rows
from bench.campaign.state import Campaign
from bench.train.steps import as_trained
from fastmask.data.loader import sample_ids
from fastmask.diffusion import Denoiser, MaskedDenoising, Objective, training_draws
from fastmask.diffusion.masking import kept_count
from fastmask.diffusion.objective import TOTAL
from fastmask.files import atomic_write
from fastmask.models.maskdit import MaskDiTConfig
from fastmask.presets import PRESETS
from fastmask.training.config import TrainConfig, build_model, preset_config
from fastmask.training.ema import EMA
from fastmask.training.optim import learning_rate, make_optimizer

SCANS = rows.ROOT / "bench" / "digits.npz"
RECORD = rows.RESULTS / "digits-cpu.json"
WINDOW = 50  # steps per mean
# Largest relative deviation of a mean. On a CPU, rounding the inputs and results of Linear layers, and their gradients,
# to bfloat16 changed no mean by more than 0.9 %.
BAND = 0.03


def full_config() -> TrainConfig:
    """Return the preset, shortened to a minute and a half on a CPU core."""
    return preset_config("digits", PRESETS).replace(max_steps=400, unmask_steps=100, seed=0)


def tiny_config() -> TrainConfig:
    """Return a configuration that trains in a second."""
    network = MaskDiTConfig(width=16, depth=1, decoder_width=16, decoder_depth=1)
    steps = {"max_steps": 6, "unmask_steps": 2, "warmup_steps": 2}
    return full_config().replace(network=network, batch_size=16, **steps)


def load_scans() -> tuple[Tensor, Tensor]:
    """Return the scans in [-1, 1], float32 (1797, 1, 8, 8), and their labels, int64."""
    with np.load(SCANS) as file:
        return torch.from_numpy(file["images"]).float()[:, None] / 8 - 1, torch.from_numpy(file["labels"]).long()


def train(config: TrainConfig, device: torch.device, bf16: bool) -> list[float]:
    """Return the loss of each step; the randomness depends on the seed alone and is the same on every device."""
    with as_trained(config):
        return _train(config, device, bf16)


def _train(config: TrainConfig, device: torch.device, bf16: bool) -> list[float]:
    scans, labels = load_scans()
    torch.manual_seed(config.seed)
    net = Denoiser(build_model(config, 1, 8), config.process).to(device)  # created on the CPU: the same weights
    objective = Objective(net, [MaskedDenoising(config.objective.mae_coef)])
    optimizer = make_optimizer(net, config.optim, [EMA(net, config.ema.ema_decay)])
    length = net.model.length
    losses = []
    for step in range(config.max_steps):
        offset = step * config.batch_size
        ids = torch.from_numpy(sample_ids(config.seed, offset, config.batch_size, len(scans)))
        images = scans[ids].to(device)
        draws = training_draws(
            config.process,
            images,
            labels[ids].to(device),
            seed=config.seed,
            offset=offset,
            drop=net.model.drop,
            label_drop=config.objective.label_drop,
            length=length,
            keep=kept_count(length, config.masking.ratio_at(step, config.max_steps)),
        )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optim, step, config.masking.masked_steps(config.max_steps))
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            loss = objective(images, *draws)[TOTAL].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())  # read at the end: reading synchronises
    return torch.stack(losses).tolist()


def means(losses: list[float], window: int) -> list[float]:
    """Return the mean of every ``window`` steps."""
    return [round(sum(losses[i : i + window]) / window, 6) for i in range(0, len(losses), window)]


def worst_deviation(found: list[float], expected: list[float]) -> float:
    """Return the largest relative deviation of a mean; infinity for different lengths or NaN."""
    if len(found) != len(expected):
        return float("inf")
    shares = [abs(a - b) / b for a, b in zip(found, expected, strict=True)]
    return max(share if share == share else float("inf") for share in shares)


def record(path: Path = RECORD) -> dict[str, Any]:
    """Train on the CPU in fp32, and write and return the reference curve."""
    config, device, start = full_config(), torch.device("cpu"), time.perf_counter()
    losses = train(config, device, bf16=False)
    made = {
        "config": config.recorded(),
        "window": WINDOW,
        "means": means(losses, WINDOW),
        "seconds": round(time.perf_counter() - start, 1),
        "commit": rows.commit(),
        **rows.machine(device),
    }
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(made, indent=1) + "\n")
    return made


def expected_means(config: TrainConfig) -> list[float]:
    """Return the recorded curve; a ValueError if there is none for this configuration."""
    again = "make it again with `python -m bench.campaign --record-digits`"
    if not RECORD.exists():
        raise ValueError(f"{RECORD} is missing: {again}")
    recorded = json.loads(RECORD.read_text())
    now, first = (json.loads(json.dumps(some.recorded())) for some in (config, TrainConfig()))
    then = {**first, **recorded["config"]}  # a field added later had its default
    free = {name for name, rule in config.on_resume().items() if "free" in rule}
    if any(then.get(name) != value for name, value in now.items() if name not in free):
        raise ValueError(f"{RECORD} is of another configuration: {again}")
    return recorded["means"]


def todo(campaign: Campaign) -> list[str]:
    """Return the outstanding items."""
    return [] if campaign.is_done("digits") else [f"{full_config().max_steps} steps"]


def run(campaign: Campaign) -> None:
    """Train, and compare and store the curve; a deviation outside the band is a failure."""
    if campaign.is_done("digits"):
        return
    with campaign.attempt("digits", preset="digits"):
        if campaign.miniature:
            config, window = tiny_config(), 2
            expected = means(train(config, torch.device("cpu"), bf16=False), window)
        else:
            config, window = full_config(), WINDOW
            expected = expected_means(config)
        bf16, start = not campaign.miniature, time.perf_counter()
        found = means(train(config, campaign.device, bf16), window)
        seconds = time.perf_counter() - start
        deviation = worst_deviation(found, expected)
        figures = {
            "means": found,
            "expected": expected,
            "deviation": round(deviation, 5),
            "band": BAND,
            "seconds": round(seconds, 2),
        }
        case = {"preset": "digits", "steps": config.max_steps, "precision": "bf16" if bf16 else "fp32"}
        if not deviation <= BAND:
            raise AssertionError(f"the loss is {deviation:.1%} off the CPU's, {BAND:.0%} are allowed: {found}")
        campaign.store("digits", case, "ours", figures)
        campaign.say(f"  loss {found[0]} -> {found[-1]}, at most {deviation:.2%} off the CPU's; {seconds:.1f} s")
