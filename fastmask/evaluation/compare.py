"""Comparison of generated images with reference images in the features of one extractor."""

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor

from fastmask.evaluation.features import Extractor, Features, features_of
from fastmask.evaluation.images import ImageSet, Statistics
from fastmask.evaluation.metrics import (
    Gaussian,
    extrapolated_frechet,
    frechet_bias,
    frechet_distance,
    inception_score,
    kernel_distance,
    manifold_metrics,
    nearest_distance,
)

FEW = 10_000  # a Frechet distance of fewer images is mostly bias
FEWEST = 6  # density and coverage look at five neighbours of an image


@dataclasses.dataclass(frozen=True)
class Seen:
    """Images as an extractor sees them.

    Attributes:
        features: their features.
        labels: their classes, int64 (N,); None if unknown.
    """

    features: Features
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.features.values)


def see(extractor: Extractor, images: ImageSet, batch: int) -> Seen:
    """Return the images of a set as an extractor sees them, ``batch`` at a time."""
    labels: list[Tensor] = []

    def pixels() -> Iterable[Tensor]:
        for part, classes in images.batches(batch):
            labels.append(classes)
            yield part

    features = features_of(extractor, pixels())
    return Seen(features, torch.cat(labels) if images.num_classes else None)


def compare(
    extractor: Extractor,
    generated: Seen,
    reference: Seen | Statistics,
    training: Seen | None = None,
    *,
    extrapolate: bool = False,
) -> dict[str, float]:
    """Return the metrics of generated images.

    Args:
        extractor: the extractor of all features, whose names the metrics get.
        generated: the generated images.
        reference: real images, or their statistics, which allow fewer metrics.
        training: the images that the model was trained on, for the distance ratio and a baseline.
        extrapolate: add the Frechet distance extrapolated to infinitely many samples.

    Returns:
        The Frechet distance (`fid`, `fd_dinov2` or `frechet`) and `.._bias`, its expected excess for so few samples.
        With images as reference: the kernel distance, `precision`, `recall`, `density` and `coverage`. From Inception:
        `is`, and `sfid`. From a classifier of the dataset: `agreement`, the fraction of generated images classified as
        the requested class, and `classifier_accuracy`, its accuracy on the reference images. With training images:
        `frechet_held_out`, the Frechet distance of as many training images as were generated, and `distance_ratio`, the
        mean distance to the nearest training image, of generated images relative to reference images (near 0: copies).

    Raises:
        ValueError: features of other sizes, or too few images.
    """
    names, values = extractor.names, generated.features.values
    frechet = names["frechet"]
    gaussian = reference.frechet if isinstance(reference, Statistics) else Gaussian.of(reference.features.values)
    found = {
        frechet: frechet_distance(Gaussian.of(values), gaussian),
        f"{frechet}_bias": frechet_bias(values, gaussian),
    }
    if extrapolate:
        found[f"{frechet}_infinity"] = extrapolated_frechet(values, gaussian)
    if (spatial := _spatial(reference)) and generated.features.spatial is not None:
        found[names["spatial"]] = frechet_distance(Gaussian.of(generated.features.spatial), spatial)
    logits = generated.features.logits
    if "score" in names and logits is not None:
        found[names["score"]] = inception_score(logits)
    if isinstance(reference, Statistics):
        return found
    found[names["kernel"]] = kernel_distance(values, reference.features.values)
    found |= manifold_metrics(values, reference.features.values)
    if "score" not in names and logits is not None:  # a classifier of this dataset
        if generated.labels is not None:
            found["agreement"] = _accuracy(logits, generated.labels)
        if reference.labels is not None and reference.features.logits is not None:
            found["classifier_accuracy"] = _accuracy(reference.features.logits, reference.labels)
    if training is not None:
        known = training.features.values
        found["frechet_held_out"] = frechet_distance(Gaussian.of(known[: len(values)]), gaussian)
        nearest = nearest_distance(values, known), nearest_distance(reference.features.values, known)
        found["distance_ratio"] = nearest[0] / nearest[1]
    return found


def _spatial(reference: Seen | Statistics) -> Gaussian | None:
    if isinstance(reference, Statistics):
        return reference.spatial
    return None if reference.features.spatial is None else Gaussian.of(reference.features.spatial)


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).double().mean())
