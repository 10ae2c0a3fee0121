"""The manifest of a store: what its shards hold. docs/store.md describes the format."""

import dataclasses
import hashlib
import importlib
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastmask.console import printable
from fastmask.files import open_regular, read_regular

FORMAT = "fastmask-store"
VERSION = 1
MANIFEST = "manifest.json"
UNFINISHED = "unfinished.json"
DATA_OFFSET = 128  # of the values in a shard's files, behind the header of an .npy
MAX_CLASSES = 1_000_000  # each is a name here and a row of the network's label embedding
MAX_BYTES = 1 << 28  # of a manifest; that of ImageNet has 50 kB

_CANONICAL: dict[str, Any] = {"sort_keys": True, "separators": (",", ":")}
_DTYPES = {"pixels": "uint8", "moments": "float16", "latents": "float16"}


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
        shape: of a record: (copies, channels, height, width); the second copy is of the flipped image.
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

    def to_fields(self) -> dict[str, Any]:
        """Return what the manifest's file holds, but for the checksum."""
        return {"format": FORMAT, "version": VERSION, "count": self.count, **dataclasses.asdict(self)}

    def to_json(self) -> str:
        """Return the manifest as a file holds it."""
        fields = self.to_fields()
        return json.dumps({**fields, "checksum": checksum_of(fields)}, indent=1, allow_nan=False) + "\n"


def checksum_of(fields: dict[str, Any]) -> str:
    """Return the checksum that a manifest of these fields carries: SHA-256 of them, sorted, with no white space."""
    content = json.dumps({name: value for name, value in fields.items() if name != "checksum"}, **_CANONICAL)
    return hashlib.sha256(content.encode()).hexdigest()


def read_manifest(store: Path) -> Manifest:
    """Return the manifest of a store whose files are all there and as long as it says.

    Raises:
        ValueError: no store, one that is not finished, of a newer version, damaged, or with files cut off.
    """
    path = store / MANIFEST
    if not path.exists() and (store / UNFINISHED).exists():
        raise ValueError(f"{store} is a store that is not finished: the command that began it resumes it")
    if not path.exists():
        raise ValueError(f"{store} is not a store: it holds no {MANIFEST}")
    manifest = parse_manifest(read_regular(path, MAX_BYTES), path)
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
    fields = parse_object(content, where)
    if fields.get("format") != FORMAT:
        raise ValueError(f"{where} is not the manifest of a fastmask store")
    version = fields.get("version")
    if type(version) is int and version > VERSION:
        raise ValueError(
            f"{where} is of version {version} of the format, newer than this fastmask reads ({VERSION}): update "
            f"fastmask"
        )
    try:
        intact = fields.get("checksum", "") in ("", checksum_of(fields))
    except RecursionError as error:
        raise ValueError(f"{where} is damaged (its fields are nested too deep)") from error
    if not intact:
        raise ValueError(
            f"{where} is damaged, or was edited: its checksum is not that of its content (one that is edited on "
            f"purpose must lose its `checksum`)"
        )
    try:
        return _from_fields(fields)
    except ValueError as error:
        raise ValueError(f"{where} is damaged ({error})") from error


def parse_object(content: bytes, where: str | Path) -> dict[str, Any]:
    """Return a JSON object; a ValueError for anything else, for nesting too deep and for numbers too long."""
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is damaged ({type(error).__name__}: {error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{where} is damaged (it holds no JSON object)")
    return fields


def check_length(store: Path, shard: Shard, manifest: Manifest) -> None:
    """Raise a ValueError if a file of a shard is missing, or not as long as its records."""
    for file, length in _lengths(shard, manifest):
        path = store / file.name
        if not path.exists():
            raise ValueError(f"{path} is missing from the store")
        if not path.is_file():
            raise ValueError(f"{path} is not a regular file")
        there = path.stat().st_size
        if not there == file.bytes == length:
            raise ValueError(
                f"{path} has {there:,} bytes instead of {length:,}: it is cut off or of another store; copy it again, "
                f"or prepare the store again"
            )


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, as `sha256sum` does."""
    digest = hashlib.sha256()
    with open(open_regular(path), "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def parse_shard(content: bytes, where: str | Path) -> Shard:
    """Return the shard that a file of an unfinished store describes; a ValueError if it is damaged."""
    schema = importlib.import_module("fastmask.data.store.schema")
    return _shard(schema.convert(parse_object(content, where), schema.ShardFields))


def first_few(names: list[str]) -> str:
    """Return the first three of some names, for a line."""
    return ", ".join(map(printable, names[:3])) + (", ..." if names[3:] else "")


def npy_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """Return the first `DATA_OFFSET` bytes of an .npy of version 1.0."""
    said = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': {tuple(map(int, shape))}, }}"
    text = said.ljust(DATA_OFFSET - 11).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def _shard(found: Any) -> Shard:
    records, labels = (StoredFile(file.name, file.bytes, file.sha256) for file in (found.records, found.labels))
    return Shard(found.count, records, labels, found.skipped)


def _lengths(shard: Shard, manifest: Manifest) -> tuple[tuple[StoredFile, int], ...]:
    """Return the files of a shard, each with the length that so many records or labels have."""
    sizes = (shard.records, manifest.record_bytes), (shard.labels, 4)
    return tuple((file, DATA_OFFSET + shard.count * size) for file, size in sizes)


def _from_fields(fields: dict[str, Any]) -> Manifest:
    schema = importlib.import_module(
        "fastmask.data.store.schema"
    )  # late: what reads no store needs torch and numpy alone
    found = schema.convert(fields, schema.ManifestFields)
    known = {field.name: getattr(found, field.name) for field in dataclasses.fields(Manifest)}
    manifest = Manifest(**{**known, "shards": [_shard(shard) for shard in found.shards]})
    _check_shape(manifest)
    _check_classes(manifest)
    if found.count != manifest.count:
        raise ValueError(f"its counts do not add up: {found.count} records, and {manifest.count} in its shards")
    names: set[str] = set()
    for shard in manifest.shards:
        for file, length in _lengths(shard, manifest):
            if file.bytes != length:
                raise ValueError(f"{file.name} of {file.bytes} bytes cannot hold {shard.count} records")
            if file.name in names:
                raise ValueError(f"{file.name} is named twice")
            names.add(file.name)
    return manifest


def _check_shape(manifest: Manifest) -> None:
    """Raise a ValueError for a shape that records of this kind cannot have, and for scales that do not fit it."""
    copies, channels, height, width = manifest.shape
    size, side = manifest.image_size, height
    fits = {
        "pixels": copies == 1 and channels in (1, 3) and side == size,
        "moments": channels % 2 == 0 and size % side == 0,
        "latents": size % side == 0,
    }[manifest.kind]
    if manifest.dtype != _DTYPES[manifest.kind] or not fits or height != width:
        raise ValueError(
            f"{manifest.kind} of images of side {size} cannot be {manifest.dtype} of shape {manifest.shape}"
        )
    latent_channels = channels // 2 if manifest.kind == "moments" else channels
    for name, values in (("scale", manifest.scale), ("shift", manifest.shift)):
        if isinstance(values, list) and len(values) != latent_channels:
            raise ValueError(f"{name} has {len(values)} values for {latent_channels} channels")


def _check_classes(manifest: Manifest) -> None:
    names, counts = len(manifest.class_names), len(manifest.class_counts)
    if not names == counts == manifest.num_classes:
        raise ValueError(f"{manifest.num_classes} classes with {names} names and {counts} counts")
    if manifest.num_classes and sum(manifest.class_counts) != manifest.count:
        raise ValueError(
            f"its counts do not add up: {manifest.count} records, and {sum(manifest.class_counts)} in its classes"
        )
