"""Files of drawn images: a grid, arrays, a folder of PNGs, raw latents; each is put together from parts."""

import abc
import csv
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmask.files import atomic_write
from fastmask.generation.model import Batches
from fastmask.grid import save_pixels, to_pil, to_rgb

_IMAGES = "images"  # folder of PNGs among the parts


class Output(abc.ABC):
    """Where the images of a job go. A part is the images of one batch, in a file of the working folder.

    Args:
        out: the path to write.
        batches: the batches of the job.
        labels: label of each image, int64 (N,).
        class_names: names of the classes; empty if they have none.
        cycle: number of images after which the labels repeat.
    """

    decoded = (
        True  # whether it takes images (uint8, (n, H, W, C)), or samples as they are drawn (float32, (n, C, h, w))
    )

    def __init__(
        self, out: Path, batches: Batches, labels: NDArray[np.int64], class_names: Sequence[str], cycle: int
    ) -> None:
        self.out, self.batches, self.labels, self.class_names, self.cycle = out, batches, labels, class_names, cycle

    def part(self, folder: Path, batch: int) -> Path:
        """Return the file of a batch; it is there once the whole batch is."""
        return folder / f"part-{batch:06d}.npy"

    def write(self, folder: Path, batch: int, values: Tensor) -> None:
        """Write the part of a batch."""
        with atomic_write(self.part(folder, batch)) as partial, partial.open("wb") as file:
            np.save(file, values.numpy())

    @abc.abstractmethod
    def join(self, folder: Path) -> None:
        """Write the output from the parts of all batches."""

    def _parts(self, folder: Path) -> Iterator[NDArray[Any]]:
        for batch in range(self.batches.count):
            yield np.load(self.part(folder, batch), mmap_mode="r")


class Grid(Output):
    """A PNG with all images in rows of 8, or of 2 to 16 classes that come in turn, so that each is a column."""

    def join(self, folder: Path) -> None:
        """Write the grid."""
        pixels = torch.from_numpy(np.concatenate(list(self._parts(folder))))
        save_pixels(self.out, pixels, self.cycle if 1 < self.cycle <= 16 else 8)


class Arrays(Output):
    """An `.npz` as ADM's evaluator reads it: `arr_0` uint8 (N, H, W, 3), and `labels` int64 (N,)."""

    def join(self, folder: Path) -> None:
        """Write the file part by part, since 50,000 images need not fit in memory."""
        parts = (to_rgb(torch.from_numpy(np.array(part))).numpy() for part in self._parts(folder))
        write_npz(self.out, "arr_0", parts, len(self.labels), {"labels": self.labels})


class Latents(Output):
    """An `.npz` of samples as the network draws them: `latents` float32 (N, C, h, w), and `labels` int64 (N,)."""

    decoded = False

    def join(self, folder: Path) -> None:
        """Write the file."""
        write_npz(self.out, "latents", self._parts(folder), len(self.labels), {"labels": self.labels})


class Folder(Output):
    """A folder of PNGs, 000000.png .., and `labels.csv` with index, class id and class name."""

    def part(self, folder: Path, batch: int) -> Path:
        """Return an empty file that is written after the PNGs of a batch."""
        return folder / f"part-{batch:06d}.done"

    def write(self, folder: Path, batch: int, values: Tensor) -> None:
        """Write the PNGs of a batch."""
        for i, image in enumerate(to_pil(values), start=batch * self.batches.size):
            with atomic_write(folder / _IMAGES / f"{i:06d}.png") as partial:
                image.save(partial, format="PNG")
        with atomic_write(self.part(folder, batch)) as partial:
            partial.touch()

    def join(self, folder: Path) -> None:
        """Write the table, and give the folder of PNGs its name."""
        with atomic_write(folder / _IMAGES / "labels.csv") as partial, partial.open("w", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["index", "class id", "class name"])
            for i, label in enumerate(self.labels.tolist()):
                named = label < len(self.class_names)
                table.writerow([i, label, self.class_names[label] if named else ""])
        if self.out.exists():
            self.out.rmdir()  # empty, or it would have been refused
        (folder / _IMAGES).rename(self.out)


def write_npz(path: Path, name: str, parts: Iterator[NDArray[Any]], count: int, more: dict[str, NDArray[Any]]) -> None:
    """Write an `.npz` whose first array comes in parts along its first axis, without holding it in memory.

    Args:
        path: the file.
        name: name of the first array.
        parts: its parts, of one dtype.
        count: its length.
        more: further arrays, by name.
    """
    first = next(parts)
    header = {"descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False}
    with atomic_write(path) as partial, zipfile.ZipFile(partial, "w") as archive:
        with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, {**header, "shape": (count, *first.shape[1:])})
            file.write(first.tobytes())
            for part in parts:
                file.write(part.tobytes())
        for other, values in more.items():
            with archive.open(f"{other}.npy", "w") as file:
                np.lib.format.write_array(file, values)
