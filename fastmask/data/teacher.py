"""Teachers: frozen image networks whose patch features hidden states are aligned with."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastmask.data.fingerprint import of_weights

_FORMS = (
    "timm:NAME, such as timm:vit_base_patch14_dinov2.lvd142m; transformers:NAME, such as "
    "transformers:facebook/dinov2-base; or MODULE:FUNCTION"
)


class FeatureSource(Protocol):
    """Where the features of a run's images come from.

    Attributes:
        name: name of the teacher.
        identity: hash of what the features depend on, besides the images.
        grid: side of the grid of patches.
        width: width W of a feature.
    """

    name: str
    identity: str
    grid: int
    width: int

    @property
    def reader(self) -> Callable[[NDArray[np.int64]], Tensor] | None:
        """Reads the stored features of some ids, (B, L, W); None if features are computed from the images."""
        ...

    def targets(self, images: Tensor, stored: Tensor | None, seed: int, sample: Tensor) -> Tensor:
        """Return the features of a batch, (B, L, W), patches in row-major order.

        Args:
            images: clean images as the network is trained on them, flips included.
            stored: what ``reader`` returned for them.
            seed: the run's seed.
            sample: global index of each sample, int64 (B,), as in `Dataset.to_images`.
        """
        ...


class Backbone(NamedTuple):
    """An image network that returns patch features.

    Attributes:
        module: the network.
        features: maps normalised images (B, 3, S, S) to features, (B, prefix + patches, W), by the network.
        patch_size: side of its patches in pixels.
        mean: mean of its inputs per channel, of values in [0, 1].
        std: standard deviation of its inputs.
    """

    module: nn.Module
    features: Callable[[Tensor], Tensor]
    patch_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Teacher:
    """A frozen image network as a source of features, which are computed from the images.

    Images are resized so that the network has a grid of ``grid`` x ``grid`` patches (to 224 x 224 for patches of 14 and
    a grid of 16, arXiv 2410.06940), and normalised as in the training of the network. Grey images are repeated to three
    channels.

    Args:
        name: timm:NAME, where timm:local-dir:FOLDER is a local one; transformers:NAME, or a folder; or MODULE:FUNCTION,
            a function that returns a network: a module from normalised images (B, 3, S, S) to features (B, patches, W),
            with attributes ``patch_size``, ``mean`` and ``std`` as in `Backbone`.
        grid: side of the grid of patches.
        device: compute device; bfloat16 on a GPU, float32 on a CPU.

    Attributes:
        sha256: SHA-256 of its weights.
        precision: "bfloat16 on cuda" or "float32 on cpu".
        module: the network.
        side: side of the images that it sees.

    Raises:
        ValueError: the package or the weights are missing, or the network has no such grid of patches.
    """

    reader = None

    def __init__(self, name: str, grid: int, device: torch.device) -> None:
        kind, _, rest = name.partition(":")
        if not kind or not rest:
            raise ValueError(f"--align-teacher {name} names no teacher: give {_FORMS}")
        opened = {"timm": _timm, "transformers": _transformers}.get(kind)
        try:
            with torch.random.fork_rng(devices=[]):  # initial weights are drawn first, and then replaced
                self._backbone = opened(rest, grid) if opened else _function(kind, rest)
            self.name, self.grid, self._device = name, grid, device
            self.module = self._backbone.module.eval().requires_grad_(False)
            self.sha256 = self.identity = of_weights(self.module)
            self.module.to(device)
            self.side = grid * self._backbone.patch_size
            features = self(torch.zeros(1, 3, self.side, self.side, device=device))
            self.width = features.shape[2]
            if not features.isfinite().all():
                raise ValueError("its features of a grey image are not finite")
        except Exception as error:
            raise ValueError(f"teacher {name} cannot be used: {_reason(error)}") from error
        self.precision = f"{'bfloat16' if device.type == 'cuda' else 'float32'} on {device.type}"

    def targets(self, images: Tensor, stored: Tensor | None, seed: int, sample: Tensor) -> Tensor:
        """Return the features of images; see `FeatureSource`."""
        return self(images)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the features (B, L, W), fp32, of images (B, 3 or 1, H, W) in [-1, 1], L = grid * grid."""
        pixels = images.expand(-1, 3, -1, -1).float().add(1).div(2)
        if pixels.shape[2:] != (self.side, self.side):
            size = (self.side, self.side)
            pixels = functional.interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        # torch.full avoids the host sync of copying a list to the device.
        mean, std = (
            torch.stack([torch.full((), value, device=pixels.device) for value in values])[:, None, None]
            for values in (self._backbone.mean, self._backbone.std)
        )
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=pixels.device.type == "cuda"):
            tokens = self._backbone.features((pixels - mean) / std)
        length = self.grid * self.grid
        others = tokens.shape[1] - length  # class and register tokens, which come first
        if tokens.ndim != 3 or not 0 <= others <= 2 * self.grid:  # a larger grid has at least 2 grid + 1 more
            raise ValueError(f"it returns {tuple(tokens.shape)} for a grid of {self.grid} x {self.grid} patches")
        return tokens[:, others:].float()

    def macs(self) -> int:
        """Return the MACs of one image, counted as it is run."""
        image = torch.zeros(1, 3, self.side, self.side, device=self._device)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the others are not counted
            self(image)
        return int(counter.get_total_flops()) // 2


def _timm(name: str, grid: int) -> Backbone:
    timm = _imported("timm")
    size = timm.create_model(name, pretrained=False, num_classes=0).patch_embed.patch_size
    patch = size[0] if isinstance(size, tuple) else int(size)
    net = timm.create_model(name, pretrained=True, num_classes=0, img_size=grid * patch)
    about = net.pretrained_cfg
    return Backbone(net, net.forward_features, patch, tuple(about["mean"]), tuple(about["std"]))


def _transformers(name: str, grid: int) -> Backbone:
    transformers = _imported("transformers")
    net = transformers.AutoModel.from_pretrained(name)
    net = getattr(net, "vision_model", net)
    about = transformers.AutoImageProcessor.from_pretrained(name)

    def features(pixels: Tensor) -> Tensor:
        tokens: Tensor = net(pixel_values=pixels).last_hidden_state
        return tokens

    return Backbone(net, features, int(net.config.patch_size), tuple(about.image_mean), tuple(about.image_std))


def _function(module: str, attribute: str) -> Backbone:
    net = getattr(importlib.import_module(module), attribute)()
    return Backbone(net, net, int(net.patch_size), tuple(net.mean), tuple(net.std))


def _imported(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ValueError(f"it needs {package}: pip install {package}") from error


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
