"""What several test files share: the published implementation's numbers and a small network."""

import contextlib
import functools
import json
import math
import multiprocessing
import resource
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmask import EDM, EDMPrecond, MaskDiT
from fastmask.models.condition import ClassConditional

GOLDEN = Path(__file__).parent / "golden"

# Half the distance between neighbouring numbers, relative: the most that one rounding to bfloat16 can change a value.
BF16_ROUNDING = 2.0**-8

SMALL_SIZES = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 3,
    "width": 16,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 5,
    "decoder_width": 12,
    "decoder_depth": 2,
    "decoder_num_heads": 3,
}


class Golden(NamedTuple):
    """Inputs and outputs of the published implementation for a small network.

    Attributes:
        arrays: the npz file's arrays, by name.
        info: the json file.
        weights: the network's weights under the published names, prefix `model.` included.
    """

    arrays: dict[str, Tensor]
    info: dict
    weights: dict[str, Tensor]


@functools.cache
def golden() -> Golden:
    """Return the golden data; the weights are made from their names, but for the two position tables."""
    with np.load(GOLDEN / "maskdit_small.npz") as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    info = json.loads((GOLDEN / "maskdit_small.json").read_text())
    weights = {}
    for name, shape in info["parameters"].items():
        if name.endswith("pos_embed"):
            weights[name] = arrays[name.removeprefix("model.")]
            continue
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        values = rng.standard_normal(shape).astype(np.float32)
        values *= math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.5 * 50**-0.5
        weights[name] = torch.from_numpy(values)
    return Golden(arrays, info, weights)


def small_net(*, sigma_data: float = 0.5, seed: int = 0, **sizes: int) -> EDMPrecond:
    """Return a tiny denoiser, the same for the same arguments, in which no weight is zero.

    A fresh network is zero in its gates, its bridge and its head, which would hide whatever goes wrong before them.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = EDMPrecond(MaskDiT(**{**SMALL_SIZES, **sizes}), sigma_data)
        with torch.no_grad():
            for parameter in net.parameters():
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 10
                parameter.normal_(std=fan_in**-0.5)
    return net


def batch_of(net, batch=3, dtype=torch.float32):
    """Images, labels (the last of them none), times and unit noise."""
    model = net.model
    images = torch.randn(batch, model.in_channels, model.input_size, model.input_size, dtype=dtype) * 0.5
    labels = torch.arange(batch)
    labels[-1] = model.num_classes
    return images, labels, torch.linspace(0.1, 3.0, batch, dtype=dtype), torch.randn_like(images)


class _Classes(ClassConditional):
    """What sampling asks of a network."""


class GaussianDenoiser:
    """The exact denoiser of N(mean[label], deviation^2) data; keeps what it was asked."""

    def __init__(self, deviation=0.5, mean=(0.0, 0.0), num_classes=0, process=EDM()):  # noqa: B008  (immutable)
        self.variance, self.mean, self.process = deviation**2, torch.tensor(mean), process
        self.model = _Classes()
        self.model.num_classes, self.model.pos_embed = num_classes, torch.empty(0)
        self.asked = []

    def __call__(self, x, t, labels):
        self.asked.append((x.dtype, t, labels))
        a, b = (factor[:, None, None, None] for factor in self.process.mix(t.double()))
        mean = self.mean[labels][:, None, None, None]
        return mean + a * self.variance / (a**2 * self.variance + b**2) * (x.double() - a * mean)


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let no file grow beyond some bytes: this stands for a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def run_ranks(function: Callable[..., None], *arguments: Any, processes: int) -> None:
    """Call a function in processes, with the number of each first; they are forked from one that has imported torch."""
    multiprocessing.set_forkserver_preload(
        ["torch.distributed.fsdp", "fastmask.training.checkpoint", "fastmask.training.optim"]
    )
    torch.multiprocessing.start_processes(function, arguments, processes, start_method="forkserver")
