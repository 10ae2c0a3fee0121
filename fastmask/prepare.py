"""`python -m fastmask.prepare`: prepares and verifies a store of images or latents; an interrupted run resumes."""

import collections
import contextlib
import dataclasses
import datetime
import functools
import itertools
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from fastmask.cli import parse, pick_device, run_command
from fastmask.console import printable, say
from fastmask.data.foreign.open import HalfRecords, Latents, open_latents
from fastmask.data.images.dali import JpegDecoder, pick_decoder
from fastmask.data.images.reader import Decoded, decoded, read_ahead, say_source
from fastmask.data.latents import ScaledBy, Scaling, number_or_list, sample_records, shown
from fastmask.data.prepare_features import prepare_features
from fastmask.data.sources.open import Source, open_source
from fastmask.data.sources.source import labels_sha256, names_sha256
from fastmask.data.store.check import FITTING, check_store
from fastmask.data.store.manifest import Manifest, read_manifest
from fastmask.data.store.remote import is_url, local_copy
from fastmask.data.store.writer import LOCK, StoreWriter
from fastmask.data.vae import Autoencoder
from fastmask.files import locked
from fastmask.grid import save_grid
from fastmask.ranks import Ranks, from_first, own_device, process_group
from fastmask.training.report import console

_IMAGE_SIZE = 256  # default for images of varying size
_VAE = "stabilityai/sd-vae-ft-mse"
_SHOWN = 64  # images of the contact sheet
_UNCOUNTED: dict[str, Any] = {"num_classes": 0, "class_names": [], "class_counts": [], "shards": []}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Flags of `python -m fastmask.prepare`."""

    source: tyro.conf.Positional[str] = ""
    """Images: a folder (class = sub-folder, or labels.json), WebDataset or ImageNet tars, parquet, IDX or .npz. Or
    latents to import: MaskDiT (LMDB or tars), fast-DiT (.npy), EDM2 and REPA (zip or folder), LightningDiT
    (safetensors) or an .npz of `moments`."""
    store: tyro.conf.Positional[str] = ""
    """Folder of the store; the same command resumes an interrupted run."""
    check: str = ""
    """Verify this store, draw a contact sheet of its decoded images and exit; a store at a URL is fetched first."""
    features: str = ""
    """Add the features of this teacher to a finished store, for --align-teacher cached: timm:NAME, transformers:NAME or
    MODULE:FUNCTION. Give STORE alone for pixels, and the images in front of a store of latents."""
    features_grid: int | None = None
    """Side of their grid: the network's input side over its patch size. Default: patches of 2 x 2 latents."""
    image_size: int | None = None
    """Side in pixels; images are resized and cropped. Default: their own side for arrays (IDX, .npz), else 256."""
    num_classes: int | None = None
    """Number of classes; default: as in the source. 0 omits the labels."""
    space: Literal["latent", "pixel"] = "latent"
    """Store the moments of a VAE's latents, or pixels."""
    vae: str = ""
    """Folder or name of a diffusers AutoencoderKL. Default: stabilityai/sd-vae-ft-mse, or the store's with --check."""
    flip: bool = True
    """Store latents of horizontally flipped images too."""
    latents: Literal["auto", "edm2", "repa"] = "auto"
    """Origin of imported latents in EDM2's layout, which REPA shares; auto: detected from their mean."""
    latent_scale: tuple[float, ...] = ()
    """Scale of imported latents, one number or one per channel; training uses (latent - shift) * scale."""
    latent_shift: tuple[float, ...] = ()
    """Shift of imported latents; required with --latent-scale, 0 for none."""
    batch_size: int = 32
    """Images per batch of decoding and encoding."""
    decoder: Literal["auto", "dali", "pil"] = "auto"
    """JPEG decoder: DALI (on the GPU if --device is one), or Pillow. auto: DALI if it is installed."""
    num_workers: int = 2
    """Worker processes that decode images (or read files for DALI), and DALI threads; 0 uses the main process."""
    on_bad: Literal["stop", "skip"] = "stop"
    """Damaged images: stop with an error, or skip the image and list it in the manifest."""
    shard_size: int = 16384
    """Images per shard."""
    device: str = "auto"
    """Device of the VAE and of DALI: cuda or cpu; auto: the GPU if there is one."""


def main(argv: Sequence[str]) -> None:
    """Prepare or check a store, as the arguments request."""
    config = parse(PrepareConfig, argv, prog="python -m fastmask.prepare", description="Prepare a store of images.")
    ranks = Ranks.from_environment()
    device = own_device(pick_device(config.device), ranks)
    if config.check:
        if config.source:
            raise ValueError(f"--check {config.check} takes no source ({config.source})")
        if ranks.count > 1:
            raise ValueError("--check runs in one process, without torchrun")
        check(local_copy(config.check) if is_url(config.check) else Path(config.check), config.vae, device)
        return
    # Validate the arguments before anything is opened.
    if config.features and not config.store:
        config = dataclasses.replace(config, source="", store=config.source)
    if not config.store:
        raise ValueError("name a source and the store to make of it, or --check STORE")
    if is_url(config.store):
        raise ValueError(f"{config.store}: a store is written to a folder; copy it to the URL when it is finished")
    if config.features_grid is not None and not config.features:
        raise ValueError("--features-grid is the grid of --features, which are missing")
    for name in ("image_size", "batch_size", "shard_size", "features_grid"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    for name in ("num_workers", "num_classes"):
        if (getattr(config, name) or 0) < 0:
            raise ValueError(f"{name} must be at least 0, not {getattr(config, name)}")
    if config.features:
        _add_features(config, device, ranks)
        return
    # The source holds latents of a known layout, or images.
    with _one_speaks(ranks):
        latents = open_latents(Path(config.source), None if config.latents == "auto" else config.latents)
        if latents is None:
            if config.latent_scale or config.latent_shift:
                raise ValueError(
                    f"--latent-scale and --latent-shift are of imported latents: {config.source} holds none"
                )
            job = _encode(config, open_source(Path(config.source), labelled=config.num_classes != 0), device)
        else:
            job = _import(config, latents)
    # Every rank writes its shards; rank 0 writes the manifest.
    with (
        process_group(ranks, device),
        StoreWriter(
            Path(config.store), job.manifest, job.items, config.shard_size, ranks, num_classes=len(job.class_names)
        ) as writer,
    ):
        fill(writer, config, job, ranks)
        manifest = writer.finish(job.class_names)
    skipped = sum(len(shard.skipped) for shard in manifest.shards)
    with _one_speaks(ranks):
        say(f"{config.store}: {manifest.count:,} records, {manifest.num_classes} classes, {skipped} images left out")


def _add_features(config: PrepareConfig, device: torch.device, ranks: Ranks) -> None:
    """Add a teacher's features to a finished store."""
    store = Path(config.store)
    read_manifest(store)
    with process_group(ranks, device), contextlib.ExitStack() as held:
        from_first(ranks, lambda: held.enter_context(locked(store / LOCK)))
        prepare_features(
            store,
            config.source,
            config.features,
            config.features_grid,
            device=device,
            ranks=ranks,
            batch_size=config.batch_size,
            num_workers=config.num_workers,
            decoder=config.decoder,
            num_classes=config.num_classes,
        )


@contextlib.contextmanager
def _one_speaks(ranks: Ranks) -> Iterator[None]:
    """Print from rank 0 only inside the block."""
    quiet = console.quiet
    console.quiet = quiet or ranks.rank > 0
    try:
        yield
    finally:
        console.quiet = quiet


class Job(NamedTuple):
    """The content of a store to write, and the functions that produce it.

    Attributes:
        manifest: the store's manifest, without shards and counts.
        items: number of items in the source.
        class_names: names of the classes, as far as they are known.
        read: yields each part of the source, read, in order.
        record: converts values that were read to records, (n, copies, channels, height, width).
        name: returns the name of an item.
    """

    manifest: Manifest
    items: int
    class_names: list[str]
    read: Callable[[list[range]], Generator[Decoded]]
    record: Callable[[Any], NDArray[Any]]
    name: Callable[[int], str]


def _encode(config: PrepareConfig, source: Source, device: torch.device) -> Job:
    """Return the job that stores a source's images as pixels, or as moments of a VAE."""
    names = source.names_of(config.num_classes)
    decoder = pick_decoder(config.decoder)
    decoded_by = "Pillow" if decoder == "pil" else f"DALI on {device.type}"
    say(f"JPEG files are decoded by {decoded_by}, others by Pillow")
    size = config.image_size or source.side or _IMAGE_SIZE
    say_source(config.source, source, size)
    # The manifest identifies the source by names and labels, so that a resumed run cannot mix two sources.
    origin = _origin(config, source.kind, len(source), source.name)
    if source.labels is not None:
        origin["labels_sha256"] = labels_sha256(names, source.labels)
    about: dict[str, Any] = {
        "image_size": size,
        "crop": "adm",
        "decoder": decoded_by.lower(),
        **_UNCOUNTED,
        "source": origin,
    }
    dali = None
    if decoder == "dali":
        dali = JpegDecoder(size, config.batch_size, device, max(1, config.num_workers))
    read = functools.partial(decoded, source, size, num_workers=config.num_workers, dali=dali)
    if config.space == "pixel":
        shape = (1, source.channels, size, size)
        manifest = Manifest(kind="pixels", dtype="uint8", shape=shape, **about)
        return Job(manifest, len(source), names, read, _as_records, source.name)
    # Otherwise store moments of the VAE.
    name = config.vae or _VAE
    encoder = Autoencoder(name, device)
    side = encoder.side(size)
    scaled_by = ScaledBy(encoder.scale, encoder.shift, "its configuration")
    say(f"VAE {name}: latents of {encoder.channels} channels, a downsampling of {encoder.downsampling}, {scaled_by}")
    manifest = Manifest(
        kind="moments",
        dtype="float16",
        shape=(1 + config.flip, 2 * encoder.channels, side, side),
        vae=name,
        vae_sha256=encoder.sha256,
        encoder=encoder.precision,
        scale=encoder.scale,
        shift=encoder.shift,
        **about,
    )
    record = functools.partial(encoder.moments, flip=config.flip)
    return Job(manifest, len(source), names, read, record, source.name)


def _import(config: PrepareConfig, latents: Latents) -> Job:
    """Return the job that imports latents of another project."""
    if config.num_classes is not None:
        raise ValueError(f"{config.source} holds latents, whose labels are imported: leave --num-classes out")
    if not len(latents):
        raise ValueError(f"{config.source} holds no latents")
    if config.space == "pixel":
        raise ValueError(f"{config.source} holds latents ({latents.kind}), of which --space pixel cannot be made")
    # The most common shape of a sample is the store's; records of another shape count as damaged.
    records = [record for record, _ in sample_records(latents.read, len(latents), config.source)]
    shape = collections.Counter(record.shape for record in records).most_common(1)[0][0]
    copies, channels, side, width = shape
    kept = copies if config.flip else 1
    flips = "with" if copies == 2 else "without"
    lines = [f"{latents.kind}, {len(latents):,} {latents.holds} {shape[1:]} {flips} flipped images", *latents.notes]
    if kept < copies:
        lines.append("left out: the latents of flipped images (--no-flip)")
    for line in lines:
        say(f"{config.source}: {line}")
    if side != width or (latents.holds == "moments" and channels % 2):
        raise ValueError(f"{config.source}: {latents.holds} of shape {shape[1:]} are not those of square images")
    scaled_by = _scaled_by(config, latents, channels // 2 if latents.holds == "moments" else channels)
    say(f"{config.source}: {scaled_by}")
    _say_statistics(config, latents, scaled_by, [record for record in records if record.shape == shape])
    manifest = Manifest(
        kind=latents.holds,
        dtype="float16",
        shape=(kept, channels, side, side),
        image_size=_imported_size(config, latents, side),
        crop="imported",
        **_UNCOUNTED,
        vae=config.vae or latents.vae,
        scale=scaled_by.scale,
        shift=scaled_by.shift,
        source=_origin(config, latents.kind, len(latents), latents.name),
    )
    read = HalfRecords(latents, shape, kept)
    ahead = functools.partial(read_ahead, read, latents.name, num_workers=config.num_workers)
    return Job(manifest, len(latents), [], ahead, np.asarray, latents.name)


def _scaled_by(config: PrepareConfig, latents: Latents, channels: int) -> ScaledBy:
    """Return scale and shift of imported latents, from the flags or else from the layout."""
    given = [list(config.latent_scale), list(config.latent_shift)]
    if not any(given):
        if latents.scaled_by is None:
            raise ValueError(f"{config.source}: {latents.unscaled}: give --latent-scale and --latent-shift")
        return latents.scaled_by
    if any(len(values) not in (1, channels) for values in given):
        raise ValueError(
            f"--latent-scale and --latent-shift go together (0 is no shift), one number or one for each of {channels} "
            f"channels: they have {len(given[0])} and {len(given[1])}"
        )
    return ScaledBy(number_or_list(given[0]), number_or_list(given[1]), "--latent-scale and --latent-shift")


def _imported_size(config: PrepareConfig, latents: Latents, side: int) -> int:
    """Return the side in pixels of the images behind latents of a given side."""
    known = side * latents.downsampling if latents.downsampling else 0
    size = config.image_size or known
    if known and size != known:
        raise ValueError(f"{config.source} holds latents of images of side {known}: give --image-size {known}")
    if not size or size % side:
        raise ValueError(
            f"{config.source} holds latents of side {side}, and does not say of what images: give their side, "
            f"--image-size {side} times the downsampling of the VAE"
        )
    say(f"{config.source}: latents of side {side} of images of side {size}, a downsampling of {size // side}")
    return size


def _say_statistics(config: PrepareConfig, latents: Latents, scaled_by: ScaledBy, records: list[NDArray[Any]]) -> None:
    """Print mean and standard deviation of a sample of scaled latents, which reveal a wrong scale."""
    alike = torch.from_numpy(np.stack([record[0] for record in records])).float()
    means = alike.chunk(2, dim=1)[0] if latents.holds == "moments" else alike
    scaled = Scaling(scaled_by.scale, scaled_by.shift).apply(means)
    mean, std = (shown(values.tolist()) for values in (scaled.mean((0, 2, 3)), scaled.std((0, 2, 3))))
    say(f"{config.source}: as trained on, of {len(scaled)} latents: mean {mean}, standard deviation {std} per channel")
    low, high = FITTING
    if not low <= float(scaled.std()) <= high:
        say(
            f"warning: {config.source}: the standard deviation is not near 1 as trained on: are scale and shift those "
            f"of these latents?"
        )


def _origin(config: PrepareConfig, kind: str, count: int, name: Callable[[int], str]) -> dict[str, Any]:
    sha256 = names_sha256(config.source, count, name)
    return {"kind": kind, "path": printable(config.source), "items": count, "sha256": sha256}


def _as_records(pixels: NDArray[Any] | torch.Tensor) -> NDArray[np.uint8]:
    records: NDArray[np.uint8] = torch.as_tensor(pixels).cpu().numpy()[:, None]
    return records


def fill(writer: StoreWriter, config: PrepareConfig, job: Job, ranks: Ranks) -> None:
    """Write this rank's shards; rank 0 prints the progress of all ranks."""
    with _one_speaks(ranks):
        if writer.before:
            say(f"{writer.before:,} of {job.items:,} images are done already")
        if ranks.count > len(writer.numbers()):
            say(f"{len(writer.numbers())} shards for {ranks.count} processes: a smaller --shard-size gives each one")
    parts = {number: _split(writer.items_of(number), config.batch_size) for number in writer.todo}
    batches, own = job.read([part for some in parts.values() for part in some]), 0
    with contextlib.closing(batches), _Progress(job.items, writer.before, ranks) as progress:
        elsewhere = writer.before
        for number in writer.todo:
            with writer.shard(number) as shard:
                for part, batch in zip(parts[number], itertools.islice(batches, len(parts[number])), strict=True):
                    for name, line in batch.bad:
                        if config.on_bad == "stop":
                            raise ValueError(f"{line} (--on-bad skip leaves such images out)")
                        say(f"left out: {line}")
                        shard.skipped.append(name)
                    if len(batch.labels):
                        shard.add(job.record(batch.values), batch.labels, functools.partial(_name, job, part, batch))
                    own += len(part)
                    progress.update(elsewhere + own)
            elsewhere = writer.items_elsewhere()
            progress.update(elsewhere + own)
            progress.print_line()
    with _one_speaks(ranks):
        if ranks.count > 1 and progress.done < job.items:
            say("this process's shards are done; waiting for the others")


def _name(job: Job, part: range, batch: Decoded, index: int) -> str:
    """Return the name of a record by its index among the readable items of a batch."""
    bad = {name for name, _ in batch.bad}
    return [name for name in map(job.name, part) if name not in bad][index]


def check(store: Path, vae: str, device: torch.device) -> None:
    """Verify a store, print its content, and draw a contact sheet; a ValueError if it is damaged.

    Args:
        store: the store's folder.
        vae: name of the VAE that decodes latents for the sheet; "" is the store's own. If that cannot be loaded, the
            sheet shows the latents.
        device: where to decode.
    """
    found = check_store(store)
    for line in [*found.lines, *(f"warning: {line}" for line in found.warnings), *found.damaged]:
        say(line)
    if found.damaged:
        raise ValueError(
            f"{store} is damaged: {len(found.damaged)} of its files; delete them and copy or fetch them again, or "
            f"prepare it again"
        )
    say(f"{store} is intact")
    images = found.images[:: -(-len(found.images) // _SHOWN)]
    if found.manifest.kind != "pixels":
        images = _decoded(images, found.manifest, vae, device)
    sheet = store / "sheet.png"
    try:
        save_grid(sheet, images, columns=8)
    except (OSError, ValueError) as error:
        say(f"warning: {sheet} cannot be drawn: {error}")
        return
    say(f"{len(images)} images: {sheet}")


def _decoded(latents: torch.Tensor, manifest: Manifest, vae: str, device: torch.device) -> torch.Tensor:
    """Return the decoded images of scaled latents; without a VAE, three channels of the latents."""
    name = vae or manifest.vae
    try:
        decoder = Autoencoder(name, device)
    except ValueError as error:
        if vae:
            raise
        say(f"the sheet shows latents as they are: {error} (give --vae)")
        return latents[:, :3] / 3  # most values are below 3
    if decoder.channels != latents.shape[1]:
        raise ValueError(f"--vae {name} decodes latents of {decoder.channels} channels, not {latents.shape[1]}")
    if manifest.vae_sha256 not in ("", decoder.sha256):
        say(f"warning: {name} has other weights than the VAE that encoded the images")
    own = manifest.kind == "moments" and manifest.crop != "imported"
    if own and (decoder.scale, decoder.shift) != (manifest.scale, manifest.shift):
        theirs = ScaledBy(decoder.scale, decoder.shift, "its configuration")
        mine = ScaledBy(manifest.scale, manifest.shift, "the manifest")
        say(f"warning: {name} has {theirs}, and the store {mine}")
    say(f"decoding {len(latents)} latents on {device.type}")
    # Imported latents (not moments) are stored already scaled, by the configuration of their VAE.
    said = decoder if manifest.kind == "latents" else manifest
    raw = Scaling(said.scale, said.shift).undo(latents)
    images = torch.cat([decoder.decode(some).cpu() for some in torch.split(raw, 8)])
    return 2 * images - 1 if manifest.source.get("kind") == "edm2" else images  # EDM2 encodes images in [0, 1]


def _split(items: range, size: int) -> list[range]:
    return [items[first : first + size] for first in range(0, len(items), size)]


class _Progress:
    """Progress of writing a store: a bar in a terminal, lines elsewhere. A context manager.

    Args:
        items: number of items in the source.
        before: number of items finished in earlier runs.
        ranks: the processes; rank 0 prints.

    Attributes:
        done: number of finished items.
    """

    def __init__(self, items: int, before: int, ranks: Ranks) -> None:
        self.done, self._items, self._before, self._start = before, items, before, time.monotonic()
        self._shown = ranks.rank == 0
        figures = TextColumn("{task.fields[figures]}")
        self._bar = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            figures,
            console=console,
            disable=not (self._shown and console.is_terminal),
        )
        self._task = self._bar.add_task("", total=items, completed=before, figures="")

    def __enter__(self) -> "_Progress":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def update(self, done: int) -> None:
        """Record the number of finished items."""
        self.done = done
        self._bar.update(self._task, completed=done, figures=self._figures())

    def print_line(self) -> None:
        """Print a progress line, unless there is a bar."""
        if self._shown and not console.is_terminal:
            say(f"{self.done:>9,}/{self._items:,} images  {self._figures()}")

    def _figures(self) -> str:
        rate = (self.done - self._before) / (time.monotonic() - self._start)
        left = f"{datetime.timedelta(seconds=round((self._items - self.done) / rate))} left" if rate else ""
        return f"{rate:,.0f} images/s  {left}"


if __name__ == "__main__":
    run_command("fastmask.prepare", main)
