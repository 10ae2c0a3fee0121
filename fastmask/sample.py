"""`python -m fastmask.sample`: draws samples with the weights of a run or a published checkpoint."""

import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor

from fastmask.cli import parse, pick_device, run_command
from fastmask.console import say
from fastmask.diffusion import Sampling, draw_samples
from fastmask.diffusion.weights import Kind, load_maskdit
from fastmask.files import atomic_write
from fastmask.grid import save_grid
from fastmask.ranks import Ranks, own_device, require_one_process


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Arguments of sampling."""

    source: tyro.conf.Positional[str]
    """Weights: a run folder (its newest intact checkpoint), one of its checkpoints/step-N, or a .pt or .safetensors
    file with the published parameter names."""
    out: str = "samples.png"
    """Output file: a .png grid, or an .npz with `samples` (N, C, H, W) float32 and `labels`."""
    weights: Kind = "ema"
    """Weights to sample with: the averaged weights (ema) or the trained ones (raw)."""
    num_samples: int = 64
    """Number of samples."""
    classes: tuple[int, ...] = ()
    """Class labels, used cyclically. Default: all classes."""
    unconditional: bool = False
    """Sample without labels and without guidance."""
    sampling: Sampling = Sampling()  # noqa: RUF009  (immutable)
    """Solver and guidance."""
    batch_size: int = 256
    """Number of samples per batch."""
    seed: int = 0
    """Seed of the noise; sample i depends on the seed and i only."""
    device: str = "auto"
    """Device: cuda or cpu. auto: the GPU if there is one."""
    num_heads: int = 0
    """Number of encoder heads, for a file that does not record it. 0: as in the published model of that width."""


def main(argv: Sequence[str]) -> None:
    """Parse the arguments, draw the samples and write them."""
    config = parse(SampleConfig, argv, prog="python -m fastmask.sample", description="Draw samples.")
    require_one_process("fastmask.sample")
    check(config)
    out = Path(config.out)
    device = own_device(pick_device(config.device), Ranks())
    net = load_maskdit(config.source, config.num_heads or None, weights=config.weights).eval().to(device)
    labels, columns = labels_of(config, net.model.num_classes)
    guided = net.model.num_classes > 0 and not config.unconditional
    out.parent.mkdir(parents=True, exist_ok=True)  # fail before sampling, not after
    samples = draw_samples(
        net,
        labels,
        config.sampling if guided else config.sampling.unguided(),
        seed=config.seed,
        batch=config.batch_size,
    )
    write(out, samples, labels, columns)
    say(f"{len(samples)} samples: {out}")


def check(config: SampleConfig) -> None:
    """Raise a ValueError for the first invalid argument, before the weights are read."""
    suffix = Path(config.out).suffix
    if suffix not in (".png", ".npz"):
        raise ValueError(f"--out {config.out}: samples are written as .png or .npz")
    if suffix == ".png" and not importlib.util.find_spec("PIL"):
        raise ValueError(f"--out {config.out}: drawing images needs pillow: pip install pillow, or name an .npz")
    if config.num_samples < 1 or config.batch_size < 1:
        raise ValueError("--num-samples and --batch-size must be at least 1")
    config.sampling.check()
    if config.seed < 0:
        raise ValueError(f"--seed must be at least 0, not {config.seed}")
    if config.unconditional and config.classes:
        raise ValueError("--unconditional draws without labels: leave --classes out")


def labels_of(config: SampleConfig, num_classes: int) -> tuple[Tensor, int]:
    """Return the label of each sample, and the number of columns of the grid.

    Raises:
        ValueError: labels outside the classes of the network.
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
    """Write the samples as a .png grid or as .npz arrays, by the suffix of ``out``."""
    if out.suffix == ".png":
        save_grid(out, samples, columns)
        return
    with atomic_write(out) as partial, partial.open("wb") as file:
        np.savez(file, samples=samples.numpy(), labels=labels.numpy())


if __name__ == "__main__":
    run_command("fastmask.sample", main)
