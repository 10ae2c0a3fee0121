"""Evaluation on the digits dataset: classifier agreement, Frechet distance, figures."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from sklearn.svm import SVC

from fastmask.data.in_memory import DigitsSplit
from fastmask.files import atomic_write

_ROWS = 8  # number of digits shown per class


Scans = NDArray[np.float64]


def judge(generated: Scans, labels: NDArray[np.int64], real: DigitsSplit) -> dict[str, float]:
    """Compare generated digits with real ones.

    Args:
        generated: shape (N, 64), N the number of held-out scans.
        labels: requested class of each digit, shape (N,).
        real: the real scans.

    Returns:
        `agreement`: fraction of generated digits classified as the requested class by a support vector machine fitted
        to the training scans; `classifier_accuracy`: its accuracy on the held-out scans. `distance_ratio`: mean
        distance to the nearest training scan, of generated digits relative to held-out scans; near 0 means copies.
        `frechet`: Frechet distance of generated digits to the held-out scans; `frechet_held_out`: the same for as many
        training scans, as a baseline. Smaller is better; a lack of variety increases it.
    """
    train, held_out = rows_of(real.train_images), rows_of(real.held_out_images)
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
    """Return the Frechet distance of Gaussians fitted to two sets of rows.

    |mean_a - mean_b|^2 + trace(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))
    """
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    shift = a.mean(0) - b.mean(0)
    # The root has the trace of the symmetric (a^(1/2) b a^(1/2))^(1/2); negative eigenvalues are rounding errors.
    values, vectors = np.linalg.eigh(cov_a)
    root_a = vectors * np.sqrt(values.clip(0)) @ vectors.T
    trace_of_root = np.sqrt(np.linalg.eigvalsh(root_a @ cov_b @ root_a).clip(0)).sum()
    return float(shift @ shift + np.trace(cov_a) + np.trace(cov_b) - 2 * trace_of_root)


def draw_digits(path: Path, generated: NDArray[np.float32], labels: NDArray[np.int64], real: DigitsSplit) -> None:
    """Plot real and generated digits side by side, one column per class."""
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
    """Plot the losses of a run over its steps, with the unmasked stage shaded."""
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axis = figure.subplots()
    masked = [line for line in stats if line["mask_ratio"] > 0]
    # The reconstruction loss is 0 in the unmasked stage, which a logarithmic axis cannot show.
    for name, lines in (("loss", stats), ("denoising", stats), ("reconstruction", masked)):
        axis.plot([line["step"] for line in lines], [line[name] for line in lines], label=name)
    unmasked = [line["step"] for line in stats if line["mask_ratio"] == 0]
    if unmasked:
        axis.axvspan(unmasked[0], unmasked[-1], alpha=0.12, label="trained unmasked")
    axis.set(xlabel="step", ylabel="loss per image", yscale="log")
    axis.legend()
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=100)


def rows_of(images: torch.Tensor) -> Scans:
    """Return (N, 1, 8, 8) scans in [-1, 1] as (N, 64) rows."""
    return images.double().flatten(1).numpy()
