"""A classifier trained on the dataset itself, for features and predictions where no published extractor applies.

Distances in its features compare models of one dataset with each other. They are not FID, and no other dataset's or
paper's numbers are comparable with them.
"""

import contextlib
from collections.abc import Iterator

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastmask.console import say
from fastmask.data.fingerprint import of_weights
from fastmask.evaluation.features import Features
from fastmask.evaluation.images import ImageSet
from fastmask.files import atomic_write, cache_folder

_VERSION = 1  # changes with the network or its training, which makes cached weights another classifier
_WIDTHS = (16, 32, 64)
_INPUT_SIDE = 64  # larger images are averaged down to it
_SMALLEST_SIDE = 7  # of the feature maps
_STEPS, _BATCH, _LR = 1200, 128, 3e-3
_READ = 1024


class Classifier:
    """A small convolutional network, trained for about a minute; an `Extractor`.

    `values` are its pooled last feature maps (64 numbers), with a mean variance of 1 over the training set; `logits`
    are its predictions.

    Args:
        training: labelled images or latents.
        device: device of training and features.

    Raises:
        ValueError: the training set has no labels, or one class.
    """

    names = {"frechet": "frechet", "kernel": "kernel_distance"}  # noqa: RUF012  (a constant)

    def __init__(self, training: ImageSet, device: torch.device | None = None) -> None:
        if training.num_classes < 2:
            raise ValueError(
                f"{training.name} has {training.num_classes or 'no'} class{'es' * (training.num_classes != 1)}, and "
                f"the classifier that evaluates images needs labels of at least 2: give --extractor inception or dinov2"
            )
        self._device = device or torch.device("cpu")
        with _seeded(0):
            self._net = _Network(training.shape[0], training.shape[1], training.num_classes)
        path = cache_folder() / "classifiers" / f"{training.fingerprint()}-{_VERSION}.safetensors"
        try:
            self._net.load_state_dict(safetensors.torch.load_file(path))
        except (OSError, RuntimeError, safetensors.SafetensorError):  # missing, damaged or of another shape
            say(f"training a classifier on {len(training):,} images of {training.name}, whose features are compared")
            images, labels = _in_memory(training)
            _fit(self._net, images, labels, self._device)
            _standardise(self._net, images, self._device)
            with atomic_write(path) as partial:
                safetensors.torch.save_file(self._net.state_dict(), partial)
        self.sha256 = of_weights(self._net)
        self.name = f"classifier trained on {training.name}, version {_VERSION}"
        self._net.to(self._device).eval()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Return the features of images or latents of the training set's shape."""
        values = self._net.features(images.to(self._device))
        return Features((values * self._net.scale).cpu(), self._net.head(values).cpu())


class _Network(nn.Module):
    def __init__(self, channels: int, side: int, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        widths, side = list(_WIDTHS), min(side, _INPUT_SIDE)
        before, stride = channels, 1
        while True:
            width = widths.pop(0) if widths else before
            layers += [nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            side, before = side // stride, width
            if side <= _SMALLEST_SIDE and not widths:
                break
            stride = 2 if side > _SMALLEST_SIDE else 1
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(before, num_classes)
        self.scale = nn.Buffer(torch.ones(()))

    def features(self, images: Tensor) -> Tensor:
        maps: Tensor = self.body(_small(images))
        return maps.mean((2, 3))


def _small(images: Tensor) -> Tensor:
    """Average large images down to the side of the classifier's input."""
    return functional.adaptive_avg_pool2d(images, _INPUT_SIDE) if images.shape[-1] > _INPUT_SIDE else images


def _fit(net: _Network, images: Tensor, labels: Tensor, device: torch.device) -> None:
    """Train by AdamW with a one-cycle learning rate; the same weights on the same machine every time."""
    net.to(device).train()
    batch = min(_BATCH, len(images))
    optimizer = torch.optim.AdamW(net.parameters(), lr=_LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=_LR, total_steps=_STEPS)
    generator = torch.Generator().manual_seed(0)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(_STEPS):
        if len(order) < batch:
            order = torch.randperm(len(images), generator=generator)
        chosen, order = order[:batch], order[batch:]
        loss = functional.cross_entropy(
            net.head(net.features(images[chosen].to(device))), labels[chosen].to(device), label_smoothing=0.1
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()


@torch.no_grad()
def _standardise(net: _Network, images: Tensor, device: torch.device) -> None:
    net.eval()
    values = torch.cat([net.features(part.to(device)) for part in torch.split(images, _READ)])
    net.scale.copy_(1 / values.var(0).mean().sqrt())
    net.cpu()


def _in_memory(training: ImageSet) -> tuple[Tensor, Tensor]:
    parts = list(training.batches(_READ))
    images = torch.cat([_small(part) for part, _ in parts])
    return images, torch.cat([labels for _, labels in parts])


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
