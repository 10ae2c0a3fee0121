"""The `Dataset` protocol, and `open_data`, which opens a dataset by name, path or URL."""

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmask.console import say
from fastmask.data.foreign.open import layout_of
from fastmask.data.images.dali import DecoderName, pick_decoder
from fastmask.data.images.dataset import ImageDataset
from fastmask.data.images.reader import say_source
from fastmask.data.in_memory import Digits, ImageArray, Moments, Synthetic
from fastmask.data.sources.npz import read_npz
from fastmask.data.sources.open import open_source
from fastmask.data.store.manifest import MANIFEST, UNFINISHED
from fastmask.data.store.reader import StoreDataset
from fastmask.data.store.remote import RemoteStore, is_url
from fastmask.data.vae import Autoencoder
from fastmask.diffusion.origin import LatentSpace, Origin

_CPU = torch.device("cpu")


class Dataset(Protocol):
    """Samples by id.

    Attributes:
        shape: (C, H, W) of the network's input.
        num_classes: number of classes; 0: no labels.
        class_names: one name per class.
    """

    shape: tuple[int, int, int]
    num_classes: int
    class_names: list[str]

    @property
    def latents(self) -> LatentSpace | None:
        """The latents that the network's input is of; None for pixels."""
        ...

    def __len__(self) -> int: ...

    def read(self, ids: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return the stored form of the samples (B, ...), and their labels (B,) int64."""
        ...

    def fingerprint(self) -> str:
        """Return a hash of the content, independent of its path; see `fastmask.data.fingerprint`."""
        ...

    def to_images(self, stored: Tensor, seed: int, sample: Tensor) -> Tensor:
        """Convert a batch to the network's input, on the device of ``stored``.

        Args:
            stored: samples as returned by `read`.
            seed: the run's seed.
            sample: global index of each sample in the run, int64 (B,); all randomness is a function of it
                and the seed.

        Returns:
            float32, shape (B, C, H, W).
        """
        ...


def origin_of(dataset: Dataset) -> Origin:
    """Return what is recorded of a dataset with the weights that are trained on it."""
    names = tuple(dataset.class_names)
    numbers = all(name == str(label) for label, name in enumerate(names))
    return Origin(latents=dataset.latents, class_names=() if numbers else names)


def open_data(
    data: str,
    *,
    image_size: int,
    num_classes: int | None,
    flip: bool,
    decoder: DecoderName = "auto",
    vae: str = "",
    skip_seed: int | None = None,
    device: torch.device = _CPU,
    fetch: bool = True,
    keep_side: bool = False,
) -> Dataset:
    """Open a dataset by name, path or URL.

    Args:
        data: "digits", "synthetic" (random latents), a store (docs/store.md) or its URL, an `.npz` with `images`
            (pixels) or `moments` (of the VAE's latents) and optional `labels`, or images in any format that
            `fastmask.prepare` reads.
        image_size: side of the images in pixels.
        num_classes: number of classes; labels must be below it. None takes it from the data, 0 omits the labels.
        flip: random horizontal flip (p = 0.5).
        decoder: JPEG decoder; "auto" is DALI if it is installed.
        vae: name of a VAE that encodes images to latents at each visit.
        skip_seed: seed for choosing replacements of images that cannot be read; None raises an error instead.
        device: device of the VAE.
        fetch: fetch a store at a URL. If False, only its manifest is read, and `read` fails.
        keep_side: keep the resolution of an `.npz` or IDX file, regardless of ``image_size``.

    Raises:
        ValueError: ``data`` does not exist, is damaged, or does not fit the arguments; the message names the file.
    """
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1, not {image_size}")
    if num_classes is not None and num_classes < 0:
        raise ValueError(f"num_classes must be at least 0, not {num_classes}")
    # Detect the kind of dataset, and reject flags that do not apply to it.
    path = Path(data)
    is_store = is_url(data) or (path / MANIFEST).exists() or (path / UNFINISHED).exists()
    if vae and (is_store or data in ("digits", "synthetic")):
        raise ValueError(f"--data-source images encodes images as they come: --data {data} does not name their files")
    is_array = path.suffix == ".npz" and path.is_file() and not vae
    if skip_seed is not None and (is_store or is_array or data in ("digits", "synthetic")):
        raise ValueError(
            f"--on-bad skip is for images that are decoded at each visit, and --data {data} holds none: leave it out"
        )
    if is_url(data):
        remote = RemoteStore(data)
        # Checks the configuration before anything is fetched.
        store = StoreDataset(remote.folder, image_size, num_classes, flip, remote.manifest)
        if fetch:
            remote.fetch()
        else:
            say(f"{remote.url}: {remote.plan()}")
        say(f"{remote.url}: {store.describe()}")
        return store
    # Built-in datasets and local files.
    if data == "digits":
        return Digits(image_size, num_classes, flip)
    if data == "synthetic":
        return Synthetic(image_size, num_classes or 0)
    if is_store:
        store = StoreDataset(path, image_size, num_classes, flip)
        say(f"{data}: {store.describe()}")
        return store
    if is_array:
        arrays = read_npz(path, num_classes)
        if "moments" in arrays:
            moments = Moments(path, arrays, image_size, flip)
            say(f"{data}: {moments.describe()}")
            return moments
        images = ImageArray(path, arrays, None if keep_side else image_size, flip)
        say(f"{data}: {images.describe()}")
        return images
    if layout := layout_of(path):
        raise ValueError(
            f"--data {data} holds latents ({layout}): make a store of them by python -m fastmask.prepare {data} STORE, "
            f"and give that"
        )
    if path.exists():
        source, chosen = open_source(path, labelled=num_classes != 0), pick_decoder(decoder)
        image_size = source.side if keep_side and source.side and not vae else image_size
        say_source(data, source, image_size)
        encoder = Autoencoder(vae, device) if vae else None
        return ImageDataset(source, image_size, num_classes, flip, chosen, encoder, skip_seed)
    raise ValueError(
        f"--data {data} does not exist: `python -m fastmask.prepare IMAGES {data} --image-size {image_size}` makes "
        f"such a store of latents; an image folder or an .npz is taken as well, and --data synthetic is random latents"
    )
