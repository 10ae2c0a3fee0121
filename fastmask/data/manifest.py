"""The manifest of a store: what its shards hold. docs/store.md describes the format."""

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np

FORMAT = "fastmask-store"
VERSION = 1
MANIFEST = "manifest.json"
UNFINISHED = "unfinished.json"
DATA_OFFSET = 128  # of the values in a shard's files, behind the header of an .npy

_PLAIN_NAME = re.compile(r"[^./\\\0][^/\\\0]*")


@dataclasses.dataclass(frozen=True)
class StoredFile:
    """A file of a shard: name, length and SHA-256 of all of it."""

    name: str
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Shard:
    """So many records and their labels, and the names of the source's items that could not be read."""

    count: int
    records: StoredFile
    labels: StoredFile
    skipped: list[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a store holds.

    Attributes:
        kind: "pixels" (uint8), "moments" of a VAE's latents (means, then log-variances), or "latents" drawn from them.
        dtype: of the values: "uint8" or "float16".
        shape: of a record: (copies, channels, height, width); the second copy is of the mirrored image.
        image_size: side of the images in pixels.
        crop: how they were cropped.
        decoder: what decoded the JPEG files among them: "pillow" or "dali on cpu" or "dali on cuda"; "" if unknown.
        num_classes: labels are below it; 0: there are none.
        class_names: one per class.
        class_counts: records per class.
        vae: name or folder of the VAE, "" for pixels.
        vae_sha256: of its weights.
        encoder: what it encoded in: "bfloat16 on cuda" or "float32 on cpu"; "" if unknown.
        scale: latents are trained on as (latent - shift) * scale, one number for all channels or one for each.
        shift: see scale.
        source: what the store was made of.
        shards: in the order of the records' ids.
    """

    kind: Literal["pixels", "moments", "latents"]
    dtype: str
    shape: tuple[int, int, int, int]
    image_size: int
    crop: str
    decoder: str = ""
    num_classes: int
    class_names: list[str]
    class_counts: list[int]
    vae: str = ""
    vae_sha256: str = ""
    encoder: str = ""
    scale: float | list[float] = 1.0
    shift: float | list[float] = 0.0
    source: dict[str, Any]
    shards: list[Shard]

    @property
    def count(self) -> int:
        """Records of all shards."""
        return sum(shard.count for shard in self.shards)

    @property
    def record_bytes(self) -> int:
        """Length of a record."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    def to_json(self) -> str:
        """Return the manifest as a file holds it."""
        fields = {"format": FORMAT, "version": VERSION, "count": self.count, **dataclasses.asdict(self)}
        return json.dumps(fields, indent=1) + "\n"


def read_manifest(store: Path) -> Manifest:
    """Return the manifest of a store whose files are all there and as long as it says.

    Raises:
        ValueError: no store, one that is not finished, of a newer version, damaged, or with files cut off.
    """
    path = store / MANIFEST
    if not path.exists() and (store / UNFINISHED).exists():
        raise ValueError(f"{store} is a store that is not finished: the command that began it goes on with it")
    if not path.exists():
        raise ValueError(f"{store} is not a store: it holds no {MANIFEST}")
    manifest = parse_manifest(path.read_bytes(), path)
    for shard in manifest.shards:
        check_length(store, shard, manifest)
    return manifest


def parse_manifest(content: bytes, where: str | Path) -> Manifest:
    """Return the manifest that a file holds; nothing is looked at but its content.

    Args:
        content: of the file.
        where: its path or URL, for messages.

    Raises:
        ValueError: no manifest, of a newer version, damaged, or naming files that a store cannot have.
    """
    try:
        fields = json.loads(content)
        if fields.get("format") != FORMAT:
            raise ValueError(f"{where} is not the manifest of a fastmask store")
        if fields["version"] > VERSION:
            raise ValueError(
                f"{where} is of version {fields['version']} of the format, newer than this fastmask reads ({VERSION}): "
                f"update fastmask"
            )
        manifest = _from_fields(fields)
        if fields["count"] != manifest.count or sum(manifest.class_counts) not in (0, manifest.count):
            raise ValueError(f"{where} is damaged: its counts do not add up")
    except (AttributeError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{where} is damaged ({type(error).__name__}: {error})") from error
    return manifest


def check_length(store: Path, shard: Shard, manifest: Manifest) -> None:
    """Raise a ValueError if a file of a shard is missing, or not as long as its records."""
    for file, length in _lengths(shard, manifest):
        path = store / file.name
        if not path.is_file():
            raise ValueError(f"{path} is missing from the store")
        there = path.stat().st_size
        if not there == file.bytes == length:
            raise ValueError(
                f"{path} has {there:,} bytes instead of {length:,}: it is cut off or of another store; copy it again, "
                f"or prepare the store anew"
            )


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, as `sha256sum` does."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def shard_from_fields(fields: dict[str, Any]) -> Shard:
    """Return a shard as JSON describes it."""
    records, labels = (_stored_file(fields[name]) for name in ("records", "labels"))
    return Shard(fields["count"], records, labels, fields["skipped"])


def _stored_file(fields: dict[str, Any]) -> StoredFile:
    file = StoredFile(**fields)
    # A manifest may come from anywhere: it must not lead out of the store's folder, nor to what is kept beside.
    if not _PLAIN_NAME.fullmatch(file.name):
        raise TypeError(f"{file.name!r} does not name a file in the store's own folder")
    return file


def _lengths(shard: Shard, manifest: Manifest) -> tuple[tuple[StoredFile, int], ...]:
    """Return the files of a shard, each with the length that so many records or labels have."""
    sizes = (shard.records, manifest.record_bytes), (shard.labels, 4)
    return tuple((file, DATA_OFFSET + shard.count * size) for file, size in sizes)


def _from_fields(fields: dict[str, Any]) -> Manifest:
    fields = {"decoder": "", "encoder": "", **fields}  # which the first stores did not name
    known = {field.name: fields[field.name] for field in dataclasses.fields(Manifest)}
    known["shape"] = tuple(known["shape"])
    known["shards"] = [shard_from_fields(shard) for shard in fields["shards"]]
    manifest = Manifest(**known)
    fits = {"pixels": "uint8", "moments": "float16", "latents": "float16"}.get(manifest.kind) == manifest.dtype
    if not fits or len(manifest.shape) != 4 or len(manifest.class_names) != manifest.num_classes:
        raise TypeError(f"{manifest.kind} in {manifest.dtype} of shape {manifest.shape}")
    names = {MANIFEST}
    for shard in manifest.shards:
        for file, length in _lengths(shard, manifest):
            if file.bytes != length or shard.count < 0:
                raise TypeError(f"{file.name} of {file.bytes} bytes cannot hold {shard.count} records")
            if file.name in names:
                raise TypeError(f"{file.name} is named twice")
            names.add(file.name)
    return manifest
