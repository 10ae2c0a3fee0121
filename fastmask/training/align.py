"""Alignment of a run: the source of the teacher's features, and the term with its projector."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastmask.console import printable, say
from fastmask.data import Dataset
from fastmask.data.config import DataConfig
from fastmask.data.store.features import StoredFeatures
from fastmask.data.store.reader import StoreDataset
from fastmask.data.teacher import FeatureSource, Teacher
from fastmask.diffusion.alignment import CACHED, AlignConfig, Alignment
from fastmask.models.maskdit import MaskDiT
from fastmask.models.networks import AnyNetwork
from fastmask.models.stack import Stack


def open_features(
    config: AlignConfig, data: DataConfig, network: AnyNetwork, dataset: Dataset, device: torch.device
) -> FeatureSource | None:
    """Return the source of the teacher's features; None for a run without alignment.

    Args:
        config: configuration of the alignment.
        data: configuration of the data.
        network: the sizes of the network.
        dataset: the training data.
        device: device of the teacher.

    Raises:
        ValueError: the dataset has no features, or those of another grid; or a teacher cannot be run on it.
    """
    if not config.on:
        return None
    grid = dataset.shape[1] // network.patch_size
    source: FeatureSource
    if config.align_teacher == CACHED:
        if not isinstance(dataset, StoreDataset):
            raise ValueError(f"--align-teacher {CACHED} reads the features in a store, and --data {data.data} is none")
        source = StoredFeatures(dataset, data.flip)
        if source.grid != grid:
            raise ValueError(
                f"{dataset.path} holds features of {source.grid} x {source.grid} patches, and the network has {grid} x "
                f"{grid}: prepare them with --features-grid {grid}"
            )
    elif dataset.latents is not None:
        raise ValueError(
            f"--align-teacher {config.align_teacher} is run on images, and --data {data.data} is trained on as "
            f"latents: add the features to a store by python -m fastmask.prepare IMAGES STORE --features "
            f"{config.align_teacher}, and give --align-teacher {CACHED}"
        )
    elif dataset.shape[0] not in (1, 3):
        raise ValueError(f"a teacher is run on images of 1 or 3 channels, not {dataset.shape[0]}")
    else:
        source = Teacher(config.align_teacher, grid, device)
    say(f"block {config.block(network)} is aligned with {source.width} features of {printable(source.name)}")
    return source


def stack_of(model: MaskDiT, block: int) -> Stack:
    """Return the stack with a block, by its number in `blocks`, counted from 1."""
    wanted = model.blocks[block - 1]
    return next(stack for stack in model.stacks if any(each is wanted for each in stack.blocks))


class Aligned:
    """The alignment of a run, which can be off.

    Args:
        config: configuration of the alignment.
        features: source of the teacher's features, from `open_features`; None without alignment.
        model: the network; its tensors can be on the meta device, and so are the projector's then.

    Attributes:
        features: as above.
        term: the term, with a freshly initialised projector; None without alignment.
    """

    def __init__(self, config: AlignConfig, features: FeatureSource | None, model: MaskDiT) -> None:
        self._config, self._model, self.features = config, model, features
        self.term: Alignment | None = None
        if features is not None:
            block = config.block(model.config)
            width = stack_of(model, block).width
            device = model.pos_embed.device
            with torch.device("meta" if device.type == "meta" else "cpu"):  # the same values for every device
                term = Alignment(config.align_coef, block, width, config.align_hidden, features.width)
            self.term = term.to(device)

    @property
    def projector(self) -> nn.Module | None:
        """What is trained with the network, and no part of it."""
        return self.term.projector if self.term else None

    @property
    def reader(self) -> Callable[[NDArray[np.int64]], Tensor] | None:
        """Reads stored features, see `FeatureSource`."""
        return self.features.reader if self.features else None

    @property
    def identity(self) -> str:
        """Hash of what the features depend on, which a checkpoint states; empty without alignment."""
        return self.features.identity if self.features else ""

    def check_same(self, state: Mapping[str, Any], folder: Path) -> None:
        """Raise a ValueError unless the checkpoint of this state was aligned with the same features."""
        if self.features and state.get("features") != self.identity:
            raise ValueError(f"{folder} was aligned with other features of {self.features.name} than are there now")

    def steps_left(self, step: int) -> int:
        """Return the number of steps with the term, from a step on, counted from 0."""
        return self._config.align_until - step if self._config.align_until else sys.maxsize

    def macs(self, keep: int, step: int) -> int:
        """Return the MACs of the projector for one image in a step, whose network keeps ``keep`` patches."""
        if self.term is None or not self._config.active_at(step):
            return 0
        return self.term.macs(stack_of(self._model, self.term.block).tokens_of(self._model.length, keep))
