"""Feature extractors: Inception v3 for FID, DINOv2; `classifier.py` has one for any labelled dataset."""

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from fastmask.data.store.manifest import sha256_of
from fastmask.grid import to_rgb, to_uint8

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
_INCEPTION_FILE = INCEPTION_URL.rpartition("/")[2]
_INCEPTION_SHA256 = "6726825d"  # first digits, part of the published file's name
_SPATIAL = 7  # channels of sFID
DINOV2 = "vit_large_patch14_dinov2.lvd142m"
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Features(NamedTuple):
    """What an extractor sees in N images, float32 on the CPU.

    Attributes:
        values: features that are compared, shape (N, D).
        logits: of classes, shape (N, classes); None without a classifier.
        spatial: features with positions, for sFID, shape (N, S); None if the extractor has none.
    """

    values: Tensor
    logits: Tensor | None = None
    spatial: Tensor | None = None


class Extractor(Protocol):
    """A function of images, float32 (B, C, H, W) in [-1, 1], to their features.

    Attributes:
        name: name and version, for the protocol of an evaluation.
        sha256: hash of its weights.
        names: name of the metric by role: frechet, kernel and, where they exist, spatial and score.
    """

    name: str
    sha256: str
    names: dict[str, str]

    def __call__(self, images: Tensor) -> Features:
        """Return the features of a batch."""
        ...


def features_of(extractor: Extractor, batches: Iterable[Tensor]) -> Features:
    """Return the features of all batches of images."""
    parts = [extractor(images) for images in batches]

    def joined(column: Sequence[Tensor | None]) -> Tensor | None:
        there = [part for part in column if part is not None]
        return torch.cat(there) if there else None

    return Features(
        torch.cat([part.values for part in parts]),
        joined([part.logits for part in parts]),
        joined([part.spatial for part in parts]),
    )


class Inception:
    """Inception v3 with the weights and the resizing of the original FID, by torch-fidelity.

    `values` is the last pooling layer (2048), `logits` have no bias, `spatial` are the first seven channels of the
    layer `mixed_6/conv` (7 x 17 x 17), as in the evaluation of ADM (arXiv 2105.05233).

    Args:
        weights: path of the weights; empty is torch's cache.
        device: compute device.

    Raises:
        ValueError: torch-fidelity or the weights are missing, or are no weights of Inception v3.
    """

    names = {"frechet": "fid", "kernel": "kid", "spatial": "sfid", "score": "is"}  # noqa: RUF012  (a constant)

    def __init__(self, weights: str = "", device: torch.device | None = None) -> None:
        module = _imported("torch_fidelity.feature_extractor_inceptionv3", "FID needs torch-fidelity")
        path = Path(weights) if weights else Path(torch.hub.get_dir()) / "checkpoints" / _INCEPTION_FILE
        if not path.is_file():
            raise ValueError(
                f"{path} does not exist, and FID needs these weights of Inception v3: download {INCEPTION_URL} to "
                f"there, or name your copy by --extractor-weights"
            )
        self.sha256 = sha256_of(path)
        version = importlib.metadata.version("torch-fidelity")
        known = self.sha256.startswith(_INCEPTION_SHA256)
        self.name = f"Inception v3 by torch-fidelity {version}" + ("" if known else ", not with the weights of FID")
        try:
            torch.load(path, weights_only=True)  # torch-fidelity itself would run code of the file
            self._net = module.FeatureExtractorInceptionV3("fid", ["2048", "logits_unbiased"], str(path))
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(f"{path} holds no weights of Inception v3: {reason}") from error
        self._device = device or torch.device("cpu")
        self._net.to(self._device)
        self._seen: list[Tensor] = []
        self._net.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, _module: Any, _inputs: Any, output: Tensor) -> None:
        self._seen = [output[:, :_SPATIAL].flatten(1)]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Return the features of images, which are rounded to 8 bits first."""
        pixels = _rgb(images).to(self._device)
        values, logits = self._net(pixels)
        return Features(values.cpu(), logits.cpu(), self._seen[0].float().cpu())


class Dinov2:
    """DINOv2 ViT-L/14 at 224 x 224 by timm: `values` is the class token (1024), as proposed in arXiv 2306.04675.

    Args:
        weights: path of the weights, `.safetensors` or `.pth`; empty is the cache of the Hugging Face hub.
        device: compute device.

    Raises:
        ValueError: timm or the weights are missing, or do not fit.
    """

    names = {"frechet": "fd_dinov2", "kernel": "kd_dinov2"}  # noqa: RUF012  (a constant)

    def __init__(self, weights: str = "", device: torch.device | None = None) -> None:
        timm = _imported("timm", "features of DINOv2 need timm")
        path = Path(weights) if weights else _cached_dinov2()
        if not path.is_file():
            raise ValueError(f"--extractor-weights {path} does not exist")
        self.sha256 = sha256_of(path)
        self.name = f"{DINOV2} by timm {timm.__version__}"
        try:
            self._net = timm.create_model(DINOV2, pretrained=False, img_size=224, num_classes=0)
            timm.models.load_checkpoint(self._net, str(path), weights_only=True)
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(f"{path} holds no weights of {DINOV2}: {reason}") from error
        self._device = device or torch.device("cpu")
        self._net.eval().requires_grad_(False).to(self._device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Return the features of images, which are rounded to 8 bits first."""
        pixels = _rgb(images).to(self._device).float() / 255
        pixels = functional.interpolate(pixels, size=(224, 224), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (torch.tensor(of, device=pixels.device)[:, None, None] for of in (_IMAGENET_MEAN, _IMAGENET_STD))
        tokens = self._net.forward_features((pixels - mean) / std)
        return Features(tokens[:, 0].float().cpu())


def _imported(name: str, need: str) -> Any:
    """Import an optional package; a ValueError that says what needs it, or why the installed one does not load."""
    package = name.split(".")[0]
    if not importlib.util.find_spec(package):
        raise ValueError(f"{need}: pip install {package.replace('_', '-')}")
    try:
        return importlib.import_module(name)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{need}, and the installed one does not load: {reason}") from error


def _cached_dinov2() -> Path:
    repository = f"timm/{DINOV2}"
    hub = importlib.import_module("huggingface_hub")
    found = hub.try_to_load_from_cache(repository, "model.safetensors")
    if not isinstance(found, str):
        raise ValueError(
            f"the weights of {DINOV2} are not in the cache of the hub: fetch them by `hf download {repository} "
            f"model.safetensors`, or name your copy by --extractor-weights"
        )
    return Path(found)


def _rgb(images: Tensor) -> Tensor:
    """Return images in [-1, 1] as uint8 (N, 3, H, W)."""
    if images.shape[1] not in (1, 3):
        raise ValueError(f"these are latents of {images.shape[1]} channels, and this extractor takes images")
    return to_rgb(to_uint8(images)).permute(0, 3, 1, 2)
