"""Configuration of the training data."""

import dataclasses
from collections.abc import Collection
from typing import Literal

import torch

from fastmask.console import say
from fastmask.data.dataset import Dataset, open_data
from fastmask.data.images.dali import DecoderName
from fastmask.data.images.dataset import ImageDataset
from fastmask.data.in_memory import ImageArray
from fastmask.fields import check_at_least, fixed, free

_IMAGES = "the run has been trained on those images"
_SHAPE = "the checkpoint's weights are of that network"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Images and labels, and how they are read."""

    data: str = fixed("digits", _IMAGES)
    """Dataset: digits, synthetic, a store (fastmask.prepare) or its URL (s3://bucket/store), an .npz, or any source of
    fastmask.prepare: an image folder (class = sub-folder), tars, parquet."""
    data_source: Literal["auto", "images"] = fixed("auto", _IMAGES)
    """auto: train on the stored form, images as pixels; images: encode images with --vae on the fly."""
    vae: str = fixed("stabilityai/sd-vae-ft-mse", _IMAGES)
    """Folder or name of the diffusers AutoencoderKL that encodes images with --data-source images."""
    decoder: DecoderName = free("auto")
    """JPEG decoder: DALI (on the GPU when training on one) or Pillow. auto: DALI if it is installed."""
    on_bad: Literal["stop", "skip"] = free("stop")
    """Unreadable images: stop the run, with a checkpoint, or substitute another image, chosen by the seed and the same
    in every epoch."""
    image_size: int = fixed(8, _SHAPE)
    """Side of the images. Images are trained on as pixels, VAE moments as latents of side image_size / 8. Default for
    pixels of an .npz or IDX file: their own side."""
    num_classes: int = fixed(10, _SHAPE)
    """Number of classes; labels are below it, and 0 trains without labels. Default for your own --data: read from the
    dataset."""
    flip: bool = fixed(False, _IMAGES)
    """Random horizontal flip (p = 0.5)."""
    num_workers: int = free(0)
    """Number of processes that read and decode images, and of DALI threads; 0 reads in the training process."""

    def check(self) -> None:
        """Raise a ValueError for the first invalid field, apart from what depends on the dataset."""
        check_at_least(self, num_workers=0)

    def open(
        self,
        preset: "DataConfig",
        given: Collection[str] = (),
        *,
        seed: int,
        device: torch.device,
        fetch: bool = True,
    ) -> tuple["DataConfig", Dataset]:
        """Open the dataset, and return the configuration with its number of classes and side.

        Args:
            preset: the preset's configuration. A dataset other than the preset's sets the number of classes, and pixels
                of an array set the image size.
            given: fields set on the command line, which the dataset does not override.
            seed: the run's seed, by which an unreadable image is replaced.
            device: device of the VAE.
            fetch: whether to download a dataset at a URL, instead of reading its description only.

        Raises:
            ValueError: as `open_data` does.
        """
        own = self.data != preset.data and self.data not in ("digits", "synthetic")
        from_data = own and self.num_classes == preset.num_classes and "num_classes" not in given
        keep_side = own and "image_size" not in given
        dataset = open_data(
            self.data,
            image_size=self.image_size,
            num_classes=None if from_data else self.num_classes,
            flip=self.flip,
            decoder=self.decoder,
            vae=self.vae if self.data_source == "images" else "",
            skip_seed=seed if self.on_bad == "skip" else None,
            device=device,
            fetch=fetch,
            keep_side=keep_side,
        )
        if isinstance(dataset, ImageDataset):
            by = "DALI" if dataset.decoder == "dali" else "Pillow"
            say(f"{self.data}: JPEG files decoded by {by}")
        pixels = isinstance(dataset, ImageArray | ImageDataset) and self.data_source != "images"
        side = dataset.shape[1] if keep_side and pixels else self.image_size
        return dataclasses.replace(self, num_classes=dataset.num_classes, image_size=side), dataset
