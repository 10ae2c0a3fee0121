"""`python -m fastmask.prepare`: makes a store of any images, checked; goes on where it stopped."""

import contextlib
import dataclasses
import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastmask.cli import parse, pick_device, run_command
from fastmask.data.autoencoder import Autoencoder
from fastmask.data.check import check_store
from fastmask.data.decoding import decoded
from fastmask.data.manifest import Manifest
from fastmask.data.sources import Source, open_source
from fastmask.data.writer import StoreWriter
from fastmask.report import console, save_grid, say

_SHOWN = 64  # images of the contact sheet


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What to make of what."""

    source: tyro.conf.Positional[str] = ""
    """A folder of images (class = sub-folder, or labels.json), WebDataset or ImageNet tars, parquet, IDX or .npz."""
    store: tyro.conf.Positional[str] = ""
    """Folder of the store; the same command goes on where it stopped."""
    check: str = ""
    """Instead verify the store of this name, and draw a sheet of its images."""
    image_size: int = 256
    """Side in pixels; larger images are shrunk and cropped, smaller ones enlarged."""
    space: Literal["latent", "pixel"] = "latent"
    """Store moments of a VAE's latents, or the pixels."""
    vae: str = "stabilityai/sd-vae-ft-mse"
    """Folder or name of an AutoencoderKL of diffusers."""
    mirror: bool = True
    """Store latents of mirrored images too."""
    batch_size: int = 32
    """Images decoded, and encoded, at a time."""
    num_workers: int = 2
    """Processes that decode; 0 decodes in this one."""
    on_bad: Literal["stop", "skip"] = "stop"
    """What a damaged image does: stop, or be left out and listed in the manifest."""
    shard_size: int = 16384
    """Images per shard."""
    device: str = "auto"
    """Where to encode: cuda, cpu; auto is the GPU if there is one."""


def main(argv: Sequence[str]) -> None:
    """Prepare or check a store as the arguments say."""
    config = parse(PrepareConfig, argv, prog="python -m fastmask.prepare", description="Prepare a store of images.")
    if config.check:
        if config.source:
            raise ValueError(f"--check {config.check} takes no source ({config.source})")
        check(Path(config.check))
        return
    if not config.store:
        raise ValueError("name a source and the store to make of it, or --check STORE")
    for name in ("image_size", "batch_size", "shard_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, not {getattr(config, name)}")
    if config.num_workers < 0:
        raise ValueError(f"num_workers must be at least 0, not {config.num_workers}")
    source = open_source(Path(config.source))
    encoder = Autoencoder(config.vae, pick_device(config.device)) if config.space == "latent" else None
    manifest = plan(config, source, encoder)
    say(f"{config.source}: {source.kind}, {len(source):,} images, {len(source.class_names) or 'no known'} classes")
    if source.ignored:
        say(f"{len(source.ignored):,} files are no images by their names and left out: {source.ignored[0]}, ...")
    with StoreWriter(Path(config.store), manifest, len(source), config.shard_size) as writer:
        fill(writer, config, source, encoder)
        manifest = writer.finish(source.class_names)
    skipped = sum(len(shard.skipped) for shard in manifest.shards)
    say(f"{config.store}: {manifest.count:,} records, {manifest.num_classes} classes, {skipped} images left out")


def plan(config: PrepareConfig, source: Source, encoder: Autoencoder | None) -> Manifest:
    """Return the manifest of the store to be, with no shards and counts yet."""
    names = hashlib.sha256()
    for item in range(len(source)):
        names.update(source.name(item).removeprefix(config.source).encode(errors="surrogateescape") + b"\n")
    about: dict[str, Any] = {
        "image_size": config.image_size,
        "crop": "adm",
        "num_classes": 0,
        "class_names": [],
        "class_counts": [],
        "source": {"kind": source.kind, "path": config.source, "items": len(source), "sha256": names.hexdigest()},
        "shards": [],
    }
    if encoder is None:
        shape = (1, source.channels, config.image_size, config.image_size)
        return Manifest(kind="pixels", dtype="uint8", shape=shape, **about)
    side, rest = divmod(config.image_size, encoder.downsampling)
    if rest:
        raise ValueError(
            f"image_size must be a multiple of {encoder.downsampling} for this VAE, not {config.image_size}"
        )
    return Manifest(
        kind="moments",
        dtype="float16",
        shape=(1 + config.mirror, 2 * encoder.channels, side, side),
        vae=config.vae,
        vae_sha256=encoder.sha256,
        scale=encoder.scale,
        shift=encoder.shift,
        **about,
    )


def fill(writer: StoreWriter, config: PrepareConfig, source: Source, encoder: Autoencoder | None) -> None:
    """Write the shards that are not finished yet."""
    todo = [number for number in writer.numbers() if not writer.finished(number)]
    left = sum(len(writer.items_of(number)) for number in todo)
    if left < len(source):
        say(f"{len(source) - left:,} of {len(source):,} images were done before")
    parts = {number: _split(writer.items_of(number), config.batch_size) for number in todo}
    images = decoded(source, config.image_size, [part for some in parts.values() for part in some], config.num_workers)
    with contextlib.closing(images), _progress() as progress:
        task = progress.add_task("", total=len(source), completed=len(source) - left, rate=0.0)
        for number in todo:
            with writer.shard(number) as shard:
                for part, batch in zip(parts[number], itertools.islice(images, len(parts[number])), strict=True):
                    for name, line in batch.bad:
                        if config.on_bad == "stop":
                            raise ValueError(f"{line} (--on-bad skip leaves such images out)")
                        say(f"left out: {line}")
                        shard.skipped.append(name)
                    if len(batch.labels):
                        pixels = batch.pixels
                        records = encoder.moments(pixels, config.mirror) if encoder else pixels[:, None]
                        shard.add(records, batch.labels)
                    progress.advance(task, len(part))
                    progress.update(task, rate=progress.tasks[0].speed or 0.0)
            if not console.is_terminal:
                speed = progress.tasks[0].speed or 0.0
                done = int(progress.tasks[0].completed)
                left_s = (len(source) - done) / speed if speed else 0.0
                say(f"{done:>9,}/{len(source):,} images  {speed:,.0f} images/s  {left_s:.0f} s left")


def check(store: Path) -> None:
    """Verify a store, print what it holds, and draw a sheet of its images; a ValueError if it is damaged."""
    found = check_store(store)
    for line in found.lines:
        say(line)
    sheet = store / "sheet.png"
    save_grid(sheet, found.images[:_SHOWN], columns=8)
    say(f"{min(_SHOWN, len(found.images))} images: {sheet}")
    for line in found.warnings:
        say(f"warning: {line}")
    for line in found.damaged:
        say(line)
    if found.damaged:
        raise ValueError(f"{store} is damaged: {len(found.damaged)} of its files; copy it again, or prepare it anew")
    say(f"{store} is whole")


def _split(items: range, size: int) -> list[range]:
    return [items[first : first + size] for first in range(0, len(items), size)]


def _progress() -> Progress:
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:,.0f} images/s"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


if __name__ == "__main__":
    run_command("fastmask.prepare", main)
