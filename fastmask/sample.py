"""`python -m fastmask.sample`: draws samples with the weights of a run, or with published ones."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import tyro

from fastmask.checkpoint import checkpoints
from fastmask.cli import parse, pick_device, run_command
from fastmask.console import say
from fastmask.diffusion import EDMPrecond, draw_samples
from fastmask.distributed import Ranks, own_device
from fastmask.files import whole_file
from fastmask.report import save_grid
from fastmask.weights import load_maskdit


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """What to draw."""

    source: tyro.conf.Positional[str]
    """A run folder, or a .pt or .safetensors file of weights in the published names."""
    out: str = "samples.png"
    """A .png grid, or an .npz of `samples` (N, C, H, W) float32 and `labels`."""
    num_samples: int = 64
    """How many."""
    classes: tuple[int, ...] = ()
    """Labels to draw, in turn; all of them when none are named."""
    cfg_scale: float = 1.5
    """Guidance; 1 is none."""
    num_steps: int = 40
    """Noise levels of the sampler."""
    batch_size: int = 256
    """Samples drawn at a time."""
    seed: int = 0
    """Seed of the noise: sample i is a function of it and i."""
    device: str = "auto"
    """Where to draw: cuda, cpu; auto is the GPU if there is one."""
    num_heads: int = 0
    """Encoder heads of a file that does not state them; 0 takes those of the published size."""


def main(argv: Sequence[str]) -> None:
    """Draw samples as the arguments say."""
    config = parse(SampleConfig, argv, prog="python -m fastmask.sample", description="Draw samples.")
    out = Path(config.out)
    if out.suffix not in (".png", ".npz"):
        raise ValueError(f"--out {out}: samples are written as .png or .npz")
    if config.num_samples < 1 or config.batch_size < 1:
        raise ValueError("--num-samples and --batch-size must be at least 1")
    device = own_device(pick_device(config.device), Ranks())
    net = load_net(config.source, config.num_heads or None).to(device)
    if config.classes and not net.model.num_classes:
        raise ValueError(f"{config.source} was trained without labels: leave --classes out")
    classes = config.classes or tuple(range(net.model.num_classes)) or (0,)
    labels = torch.tensor(classes).repeat(-(-config.num_samples // len(classes)))[: config.num_samples]
    scale = config.cfg_scale if net.model.num_classes else None
    samples = draw_samples(
        net, labels, seed=config.seed, num_steps=config.num_steps, cfg_scale=scale, batch=config.batch_size
    )
    if out.suffix == ".png":
        save_grid(out, samples, columns=len(classes) if 1 < len(classes) <= 16 else 8)
    else:
        with whole_file(out) as partial, partial.open("wb") as file:
            np.savez(file, samples=samples.numpy(), labels=labels.numpy())
    say(f"{len(samples)} samples: {out}")


def load_net(source: str, num_heads: int | None = None) -> EDMPrecond:
    """Return the denoiser of a run folder (its newest averaged weights) or of a file of weights."""
    path = Path(source)
    if not path.exists():
        raise ValueError(f"{path} does not exist: name a run folder, or a .pt or .safetensors file of weights")
    if path.is_dir():
        found = checkpoints(path)
        if not found:
            raise ValueError(f"{path} holds no checkpoint of a run")
        path = found[-1] / "ema.safetensors"
    return load_maskdit(path, num_heads).eval()


if __name__ == "__main__":
    run_command("fastmask.sample", main)
