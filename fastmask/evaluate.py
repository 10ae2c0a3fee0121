"""`python -m fastmask.evaluate RUN`: judges the digits that a run draws against real ones, and draws both."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray

from fastmask.cli import fail, parse, run_command
from fastmask.console import say
from fastmask.data.digits import DigitsSplit, load_digits
from fastmask.diffusion import draw_samples
from fastmask.distributed import require_one_process
from fastmask.files import whole_file
from fastmask.report import read_stats
from fastmask.rundir import find_checkpoint, locate, step_of
from fastmask.weights import load_maskdit

try:
    from matplotlib.figure import Figure
    from scipy.spatial.distance import cdist
    from sklearn.svm import SVC
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    fail("fastmask.evaluate", f"{error.name} is not installed: pip install matplotlib scipy scikit-learn")

_ROWS = 8  # digits drawn per class

Scans = NDArray[np.float64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What to judge."""

    run_dir: tyro.conf.Positional[str]
    """Folder of a run on the digits, or one of its checkpoints/step-N."""
    cfg_scale: float = 2.0
    """Guidance; 1 is none."""
    num_steps: int = 18
    """Noise levels of the sampler."""
    seed: int = 0
    """Seed of the noise."""


def main(argv: Sequence[str]) -> None:
    """Judge a run as the arguments say, and leave `summary.json`, `digits.png` and `loss.png` in its folder."""
    config = parse(EvaluateConfig, argv, prog="python -m fastmask.evaluate", description="Judge a run on the digits.")
    require_one_process("fastmask.evaluate")
    place = locate(config.run_dir)
    if place.run is None or place.file:
        raise ValueError(f"{config.run_dir} is not the folder of a run: name the --run-dir that it was trained with")
    run_dir, checkpoint = place.run, find_checkpoint(place, ("ema.safetensors", "state.json"), say)
    net = load_maskdit(checkpoint).eval()
    model = net.model
    if (model.in_channels, model.input_size, model.num_classes) != (1, 8, 10):
        raise ValueError(
            f"{run_dir} was not trained on the digits and their labels: this command knows no other data yet"
        )
    step = step_of(checkpoint)
    stats = read_stats(run_dir, step)
    if not stats:
        raise ValueError(f"{run_dir} reported nothing up to its checkpoint of step {step}: train on to its next report")
    real = load_digits()
    labels = torch.arange(len(real.held_out_labels)) % 10
    samples = draw_samples(net, labels, seed=config.seed, num_steps=config.num_steps, cfg_scale=config.cfg_scale).clamp(
        -1, 1
    )
    summary = {
        **judge(_rows(samples), labels.numpy(), real),
        "images_per_s": round(float(np.median([line["images_per_s"] for line in stats])), 1),
        "train_s": round(stats[-1]["train_s"], 1),
        "cfg_scale": config.cfg_scale,
        "num_steps": config.num_steps,
        "step": step,
    }
    with whole_file(run_dir / "summary.json") as partial:
        partial.write_text(json.dumps(summary, indent=2) + "\n")
    draw_digits(run_dir / "digits.png", samples.numpy(), labels.numpy(), real)
    draw_loss(run_dir / "loss.png", stats)
    say(
        f"agreement {summary['agreement']:.1%} (the classifier reads {summary['classifier_accuracy']:.1%} of held-out "
        f"scans)  |  distance ratio {summary['distance_ratio']:.2f} (1: as far from the training scans as held-out "
        f"ones)  |  {summary['images_per_s']:,.0f} images/s in training",
    )
    say(
        f"Frechet distance to the held-out scans {summary['frechet']:.2f} (of as many training scans: "
        f"{summary['frechet_held_out']:.2f})  |  trained {summary['train_s']:.0f} s",
    )
    for name in ("summary.json", "digits.png", "loss.png"):
        say(f"wrote {run_dir / name}")


def judge(generated: Scans, labels: NDArray[np.int64], real: DigitsSplit) -> dict[str, float]:
    """Return how generated digits compare with real ones.

    Args:
        generated: shape (N, 64), N the number of held-out scans.
        labels: the class that each was asked for, shape (N,).
        real: the scans.

    Returns:
        `agreement`: share of generated digits that a support vector machine fitted to the training scans reads as the
        class asked for; `classifier_accuracy`: its own on the held-out scans. `distance_ratio`: mean distance of
        generated digits to the nearest training scan over that of held-out scans; near 0 means copies. `frechet`:
        Frechet distance of generated digits to the held-out scans; `frechet_held_out`: of as many training scans to
        the held-out ones, what real digits get. Smaller is better; missing variety raises it.
    """
    train, held_out = _rows(real.train_images), _rows(real.held_out_images)
    classifier = SVC().fit(train, real.train_labels.numpy())
    nearest = {name: cdist(scans, train).min(1).mean() for name, scans in [("new", generated), ("real", held_out)]}
    return {
        "agreement": float((classifier.predict(generated) == labels).mean()),
        "classifier_accuracy": float(classifier.score(held_out, real.held_out_labels.numpy())),
        "distance_ratio": float(nearest["new"] / nearest["real"]),
        "frechet": frechet_distance(generated, held_out),
        "frechet_held_out": frechet_distance(train[: len(held_out)], held_out),
    }


def frechet_distance(a: Scans, b: Scans) -> float:
    """Return the Frechet distance of the Gaussians fitted to two sets of rows.

    |mean_a - mean_b|^2 + trace(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))
    """
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    shift = a.mean(0) - b.mean(0)
    # The trace of the root is that of (a^(1/2) b a^(1/2))^(1/2), which is symmetric; values below 0 are rounding.
    values, vectors = np.linalg.eigh(cov_a)
    root_a = vectors * np.sqrt(values.clip(0)) @ vectors.T
    trace_of_root = np.sqrt(np.linalg.eigvalsh(root_a @ cov_b @ root_a).clip(0)).sum()
    return float(shift @ shift + np.trace(cov_a) + np.trace(cov_b) - 2 * trace_of_root)


def draw_digits(path: Path, generated: NDArray[np.float32], labels: NDArray[np.int64], real: DigitsSplit) -> None:
    """Draw real digits beside generated ones, a column per class."""
    sides = [("real", real.train_images.numpy(), real.train_labels.numpy()), ("generated", generated, labels)]
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    for axis, (title, images, classes) in zip(figure.subplots(1, 2), sides, strict=True):
        columns = [
            np.pad(images[classes == c][:_ROWS, 0], ((0, 0), (1, 1), (1, 1)), constant_values=-1) for c in range(10)
        ]
        axis.imshow(
            np.concatenate([column.reshape(-1, 10) for column in columns], axis=1), cmap="gray", vmin=-1, vmax=1
        )
        axis.set(title=title, xticks=np.arange(10) * 10 + 4.5, xticklabels=range(10), yticks=[])
    _save(figure, path)


def draw_loss(path: Path, stats: list[dict[str, Any]]) -> None:
    """Draw the losses of a run over its steps, the masked and the unmasked stage told apart."""
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axis = figure.subplots()
    masked = [line for line in stats if line["mask_ratio"] > 0]
    # Nothing is reconstructed in the unmasked stage, and a logarithmic axis has no zero.
    for name, lines in (("loss", stats), ("denoising", stats), ("reconstruction", masked)):
        axis.plot([line["step"] for line in lines], [line[name] for line in lines], label=name)
    unmasked = [line["step"] for line in stats if line["mask_ratio"] == 0]
    if unmasked:
        axis.axvspan(unmasked[0], unmasked[-1], alpha=0.12, label="trained unmasked")
    axis.set(xlabel="step", ylabel="loss per image", yscale="log")
    axis.legend()
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=100)


def _rows(images: torch.Tensor) -> Scans:
    """Return (N, 1, 8, 8) scans in [-1, 1] as (N, 64) rows."""
    return images.double().flatten(1).numpy()


if __name__ == "__main__":
    run_command("fastmask.evaluate", main)
