"""Figures of an evaluation: generated images beside real ones, and the loss of a run."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from fastmask.files import atomic_write
from fastmask.grid import to_rgb, to_uint8

_ROWS, _MOST_CLASSES = 8, 10  # images shown per class, and classes
_BORDER = 1


def draw_comparison(
    path: Path, generated: Tensor, labels: Tensor | None, real: Tensor, real_labels: Tensor | None, names: list[str]
) -> None:
    """Plot real and generated images side by side, one column per class, of at most ten classes.

    Args:
        path: the file.
        generated: shape (N, C, H, W) in [-1, 1], C = 1 or 3.
        labels: int64 (N,); None mixes the images.
        real: as ``generated``.
        real_labels: as ``labels``.
        names: class names.
    """
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    sides = (("real", real, real_labels), ("generated", generated, labels))
    shown = _classes_shown(labels, real_labels)
    for axis, (title, images, classes) in zip(figure.subplots(1, 2), sides, strict=True):
        columns = [_column(images if c is None or classes is None else images[classes == c]) for c in shown]
        if shown[0] is None:
            columns = [_column(images[i * _ROWS : (i + 1) * _ROWS]) for i in range(len(shown))]
        canvas = np.concatenate(columns, axis=1)
        axis.imshow(canvas, cmap="gray", vmin=0, vmax=255)
        width = canvas.shape[1] // len(shown)
        ticks = [names[c] for c in shown if c is not None]
        slanted = max(map(len, ticks), default=0) > 2
        axis.set(title=title, yticks=[])
        axis.set_xticks(
            [i * width + width / 2 for i in range(len(ticks))],
            ticks,
            rotation=40 if slanted else 0,
            ha="right" if slanted else "center",
        )
    _save(figure, path)


def draw_loss(path: Path, stats: list[dict[str, Any]]) -> None:
    """Plot the loss and its terms over the steps, with the unmasked stage shaded, from the reports of a run."""
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axis = figure.subplots()
    names = list(stats[0])  # the loss, its terms, and the loss by noise level
    for name in itertools.takewhile(lambda name: "/" not in name, names[names.index("loss") :]):
        lines = [line for line in stats if line.get(name, 0) > 0]  # a logarithmic axis cannot show 0
        axis.plot([line["step"] for line in lines], [line[name] for line in lines], label=name)
    unmasked = [line["step"] for line in stats if line["mask_ratio"] == 0]
    if unmasked and len(unmasked) < len(stats):
        axis.axvspan(unmasked[0], unmasked[-1], alpha=0.12, label="trained unmasked")
    axis.set(xlabel="step", ylabel="loss per image", yscale="log")
    axis.legend()
    _save(figure, path)


def _classes_shown(labels: Tensor | None, real_labels: Tensor | None) -> list[int | None]:
    if labels is None or real_labels is None:
        return [None] * _MOST_CLASSES
    both = sorted(set(labels.tolist()) & set(real_labels.tolist()))
    return [*both[:_MOST_CLASSES]] or [None] * _MOST_CLASSES


def _column(images: Tensor) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """Return up to eight images as a column, uint8 (8 (H + 2), W + 2, 3), black where there are too few."""
    _, _, height, width = images.shape
    pixels = torch.zeros(_ROWS, height + 2 * _BORDER, width + 2 * _BORDER, 3, dtype=torch.uint8)
    shown = to_rgb(to_uint8(images[:_ROWS]))
    pixels[: len(shown), _BORDER:-_BORDER, _BORDER:-_BORDER] = shown
    return pixels.flatten(0, 1).numpy()


def _save(figure: Figure, path: Path) -> None:
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=100)
