"""Evaluation of a network: draws samples, and compares them with reference images."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastmask.data.in_memory import Digits
from fastmask.diffusion import Denoiser, Sampling
from fastmask.diffusion.sampling import draw_batch
from fastmask.evaluation.classifier import Classifier
from fastmask.evaluation.compare import Seen, compare, see
from fastmask.evaluation.digits import ScanExtractor
from fastmask.evaluation.features import Extractor, features_of
from fastmask.evaluation.images import ImageSet, Statistics
from fastmask.generation.model import Batches
from fastmask.grid import to_uint8

READ = 512  # real images read at a time
_KNOWN = 20_000  # training images that the distance ratio looks at
_SHOWN = 512


def own_extractor(training: ImageSet, device: torch.device) -> Extractor:
    """Return the extractor of a dataset: a classifier trained on it."""
    return ScanExtractor(training) if isinstance(training.dataset, Digits) else Classifier(training, device)


@dataclasses.dataclass(frozen=True)
class Draws:
    """How the samples of an evaluation are drawn.

    Attributes:
        sampling: solver and guidance.
        count: number of samples; all classes equally often, in turn.
        seed: seed of the noise; sample i is a function of the seed and i.
        batch: largest number of samples per batch; all batches are of one size.
    """

    sampling: Sampling
    count: int
    seed: int = 0
    batch: int = 256

    def labels(self, num_classes: int) -> Tensor | None:
        """Return the class of each sample, None without classes."""
        return torch.arange(self.count) % num_classes if num_classes else None

    def batches(self, draw: Callable[[int, int], Tensor]) -> Iterator[Tensor]:
        """Yield samples, float32 on the CPU; pixels are rounded to 8 bits, as an image file stores them.

        Args:
            draw: returns samples ``first`` .. ``first + count - 1``, given these two: images in [-1, 1], or latents.
        """
        batches = Batches.of(self.count, self.batch)
        for batch in range(batches.count):
            drawn = draw(batch * batches.size, batches.size)[: batches.kept(batch)].cpu()
            yield as_stored(drawn) if drawn.shape[1] in (1, 3) else drawn

    def of_network(self, net: Denoiser) -> Iterator[Tensor]:
        """Yield samples of a network, undecoded."""
        model = net.model
        sampling = self.sampling if model.num_classes else self.sampling.unguided()

        def draw(first: int, count: int) -> Tensor:
            labels = torch.arange(first, first + count) % max(model.num_classes, 1)
            condition = labels if model.num_classes else model.no_condition(count)
            return draw_batch(net, condition, sampling, seed=self.seed, first=first)

        return self.batches(draw)

    def discard(self, net: Denoiser) -> dict[str, float]:
        """Draw all samples for nothing: every rank has to take part where the weights are sharded."""
        for _ in self.of_network(net):
            pass
        return {}


def as_stored(images: Tensor) -> Tensor:
    """Round images (N, C, H, W) in [-1, 1] to the values that 8 bits have."""
    return to_uint8(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def check_shape(shape: tuple[int, ...], reference: ImageSet) -> None:
    """Raise a ValueError unless generated images have the shape of the reference, (C, H, W)."""
    if shape != reference.shape:
        ours, theirs = (" x ".join(map(str, of)) for of in (shape, reference.shape))
        raise ValueError(f"the generated images are {ours}, and {reference.name} holds {theirs}")


class Outcome(NamedTuple):
    """Result of an evaluation.

    Attributes:
        metrics: metrics by name, see `fastmask.evaluation.compare.compare`.
        images: the first generated images, shape (n, C, H, W).
        labels: their classes; None if unknown.
        samples: number of generated images.
    """

    metrics: dict[str, float]
    images: Tensor
    labels: Tensor | None
    samples: int


class Evaluator:
    """Compares sets of generated images with the same real images.

    Args:
        extractor: the extractor.
        reference: real images, or statistics of them.
        training: the images that the network was trained on; None if they are not at hand.
    """

    def __init__(
        self, extractor: Extractor, reference: ImageSet | Statistics, training: ImageSet | None = None
    ) -> None:
        self.extractor, self.reference, self.training = extractor, reference, training
        self._real: Seen | Statistics
        self._known = None
        if isinstance(reference, Statistics):
            self._real = reference
            return
        self._real = see(extractor, reference, READ)
        if training is not None:
            self._known = see(extractor, training.first(max(_KNOWN, len(reference))), READ)

    @classmethod
    def of_dataset(cls, images: ImageSet, device: torch.device) -> "Evaluator":
        """Return the evaluator of a dataset, by its own extractor and with a part of it held out."""
        training, held_out = images.split()
        return cls(own_extractor(training, device), held_out, training)

    def network(self, net: Denoiser, draws: Draws, *, extrapolate: bool = False) -> Outcome:
        """Evaluate samples of a network, undecoded."""
        return self.images(draws.of_network(net), draws.labels(net.model.num_classes), extrapolate=extrapolate)

    def images(self, batches: Iterable[Tensor], labels: Tensor | None, *, extrapolate: bool = False) -> Outcome:
        """Evaluate generated images, in batches of shape (B, C, H, W); ``labels`` are their requested classes."""
        kept: list[Tensor] = []

        def keeping() -> Iterator[Tensor]:
            for batch in batches:
                if isinstance(self.reference, ImageSet):
                    check_shape(tuple(batch.shape[1:]), self.reference)
                if sum(map(len, kept)) < _SHOWN:
                    kept.append(batch)
                yield batch

        generated = Seen(features_of(self.extractor, keeping()), labels)
        metrics = compare(self.extractor, generated, self._real, self._known, extrapolate=extrapolate)
        shown = torch.cat(kept)[:_SHOWN]
        return Outcome(metrics, shown, None if labels is None else labels[: len(shown)], len(generated))
