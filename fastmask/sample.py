"""`python -m fastmask.sample`: draws samples with the weights of a run, or with published ones."""

import dataclasses
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor

from fastmask.cli import parse, pick_device, run_command
from fastmask.console import say
from fastmask.diffusion import draw_samples
from fastmask.diffusion.weights import Kind, load_maskdit
from fastmask.files import atomic_write
from fastmask.grid import save_grid
from fastmask.ranks import Ranks, own_device, require_one_process


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """What to draw."""

    source: tyro.conf.Positional[str]
    """A run folder, whose newest whole checkpoint is taken, one of its checkpoints/step-N, or a .pt or .safetensors
    file of weights in the published names."""
    out: str = "samples.png"
    """A .png grid, or an .npz of `samples` (N, C, H, W) float32 and `labels`."""
    weights: Kind = "ema"
    """Averaged weights, or the raw ones that are trained."""
    num_samples: int = 64
    """Number of samples."""
    classes: tuple[int, ...] = ()
    """Labels to draw, in turn; all of them when none are named."""
    unconditional: bool = False
    """Draw without labels and without guidance."""
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
    require_one_process("fastmask.sample")
    check(config)
    out = Path(config.out)
    device = own_device(pick_device(config.device), Ranks())
    net = load_maskdit(config.source, config.num_heads or None, weights=config.weights).eval().to(device)
    labels, columns = labels_of(config, net.model.num_classes)
    guided = net.model.num_classes > 0 and not config.unconditional
    out.parent.mkdir(parents=True, exist_ok=True)  # where that fails it does before the work
    samples = draw_samples(
        net,
        labels,
        seed=config.seed,
        num_steps=config.num_steps,
        cfg_scale=config.cfg_scale if guided else None,
        batch=config.batch_size,
    )
    write(out, samples, labels, columns)
    say(f"{len(samples)} samples: {out}")


def check(config: SampleConfig) -> None:
    """Raise a ValueError that names the first argument that cannot be, whatever the source is."""
    suffix = Path(config.out).suffix
    if suffix not in (".png", ".npz"):
        raise ValueError(f"--out {config.out}: samples are written as .png or .npz")
    if suffix == ".png" and not importlib.util.find_spec("PIL"):
        raise ValueError(f"--out {config.out}: drawing images needs pillow: pip install pillow, or name an .npz")
    if config.num_samples < 1 or config.batch_size < 1:
        raise ValueError("--num-samples and --batch-size must be at least 1")
    if config.num_steps < 2:
        raise ValueError(f"--num-steps must be at least 2, not {config.num_steps}")
    if not 0 <= config.cfg_scale < math.inf:
        raise ValueError(f"--cfg-scale must be a number of at least 0, not {config.cfg_scale}")
    if config.seed < 0:
        raise ValueError(f"--seed must be at least 0, not {config.seed}")
    if config.unconditional and config.classes:
        raise ValueError("--unconditional draws without labels: leave --classes out")


def labels_of(config: SampleConfig, num_classes: int) -> tuple[Tensor, int]:
    """Return the label of each sample, and how many samples to draw in a row.

    Raises:
        ValueError: classes that the network does not know.
    """
    if config.classes and not num_classes:
        raise ValueError(f"{config.source} was trained without labels: leave --classes out")
    bad = sorted({label for label in config.classes if not 0 <= label < num_classes})
    if bad:
        raise ValueError(
            f"--classes {' '.join(map(str, bad))}: the classes are 0 .. {num_classes - 1}, and --unconditional draws "
            f"without any"
        )
    none = (num_classes,) if config.unconditional or not num_classes else ()
    classes = none or config.classes or tuple(range(num_classes))
    labels = torch.tensor(classes).repeat(-(-config.num_samples // len(classes)))[: config.num_samples]
    return labels, len(classes) if 1 < len(classes) <= 16 else 8


def write(out: Path, samples: Tensor, labels: Tensor, columns: int) -> None:
    """Write samples as a grid or as arrays, as the name of the file says."""
    if out.suffix == ".png":
        save_grid(out, samples, columns)
        return
    with atomic_write(out) as partial, partial.open("wb") as file:
        np.savez(file, samples=samples.numpy(), labels=labels.numpy())


if __name__ == "__main__":
    run_command("fastmask.sample", main)
