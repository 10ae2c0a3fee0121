"""The manifest of a store, see docs/store.md for the format."""

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
DATA_OFFSET = 128  # byte offset of the values in a shard's files, after the .npy header
MAX_CLASSES = 1_000_000  # each has a name in the manifest and a row in the network's label embedding
MAX_BYTES = 1 << 28  # limit for a manifest; ImageNet's has 50 kB

_CANONICAL: dict[str, Any] = {"sort_keys": True, "separators": (",", ":")}
_DTYPES = {"pixels": "uint8", "moments": "float16", "latents": "float16"}


@dataclasses.dataclass(frozen=True)
class StoredFile:
    """A file of a shard: name, size in bytes and SHA-256."""

    name: str
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Features:
    """A teacher's features of the images of a store, one for each patch.

    Attributes:
        teacher: name of the teacher.
        sha256: SHA-256 of its weights.
        precision: precision and device of the teacher, "bfloat16 on cuda" or "float32 on cpu".
        grid: side of the grid of patches.
        width: number of values of a feature, float16.
    """

    teacher: str
    sha256: str
    precision: str
    grid: int
    width: int

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the features of an image, (patches, width), patches in row-major order."""
        return self.grid * self.grid, self.width


@dataclasses.dataclass(frozen=True)
class Shard:
    """A shard: number of records, its files, and names of source items that could not be read.

    The file of features is None in a store without them.
    """

    count: int
    records: StoredFile
    labels: StoredFile
    skipped: list[str]
    features: StoredFile | None = None

    @property
    def files(self) -> tuple[StoredFile, ...]:
        """The files of the shard."""
        own = (self.records, self.labels)
        return own if self.features is None else (*own, self.features)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of a store.

    Attributes:
        kind: "pixels" (uint8), "moments" of a VAE's latents (means, then log-variances), or "latents" sampled from
            them.
        dtype: dtype of the values, "uint8" or "float16".
        shape: shape of a record, (copies, channels, height, width); the second copy is of the flipped image.
        image_size: side of the images in pixels.
        crop: crop method.
        decoder: JPEG decoder, "pillow", "dali on cpu" or "dali on cuda"; "" if unknown.
        num_classes: number of classes; 0: no labels.
        class_names: one name per class.
        class_counts: records per class.
        vae: name or folder of the VAE, "" for pixels.
        vae_sha256: SHA-256 of the VAE's weights.
        encoder: precision and device of encoding, "bfloat16 on cuda" or "float32 on cpu"; "" if unknown.
        scale: scale for training, (latent - shift) * scale; one number for all channels or one for each.
        shift: see scale.
        source: description of the source.
        shards: the shards, in the order of the records' ids.
        features: a teacher's features of the images; None if the store has none.
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
    features: Features | None = None

    @property
    def count(self) -> int:
        """Number of records in all shards."""
        return sum(shard.count for shard in self.shards)

    @property
    def record_bytes(self) -> int:
        """Size of a record in bytes."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    def to_fields(self) -> dict[str, Any]:
        """Return the fields of the manifest file, except the checksum."""
        fields = dataclasses.asdict(self, dict_factory=lambda pairs: {k: v for k, v in pairs if v is not None})
        return {"format": FORMAT, "version": VERSION, "count": self.count, **fields}

    def to_json(self) -> str:
        """Return the content of the manifest file."""
        fields = self.to_fields()
        return json.dumps({**fields, "checksum": checksum_of(fields)}, indent=1, allow_nan=False) + "\n"


def checksum_of(fields: dict[str, Any]) -> str:
    """Return the checksum of a manifest: SHA-256 of its fields as JSON, sorted, without white space."""
    content = json.dumps({name: value for name, value in fields.items() if name != "checksum"}, **_CANONICAL)
    return hashlib.sha256(content.encode()).hexdigest()


def read_manifest(store: Path) -> Manifest:
    """Read a store's manifest, and check that all files exist with the right size.

    Raises:
        ValueError: the path is not a store, or the store is unfinished, of a newer version, damaged, or has truncated
            files.
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
    """Parse and validate a manifest, without access to other files.

    Args:
        content: content of the file.
        where: path or URL of the file, for messages.

    Raises:
        ValueError: the content is not a manifest, of a newer version, damaged, or has invalid file names.
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
    """Parse a JSON object; a ValueError for anything else, including too deep nesting and too long numbers."""
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is damaged ({type(error).__name__}: {error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{where} is damaged (it holds no JSON object)")
    return fields


def check_length(store: Path, shard: Shard, manifest: Manifest) -> None:
    """Raise a ValueError if a file of a shard is missing, or its size does not match the manifest."""
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
    """Parse the record of a finished shard in an unfinished store; a ValueError if it is damaged."""
    schema = importlib.import_module("fastmask.data.store.schema")
    return _shard(schema.convert(parse_object(content, where), schema.ShardFields))


def first_few(names: list[str]) -> str:
    """Format the first three of some names, for a message."""
    return ", ".join(map(printable, names[:3])) + (", ..." if names[3:] else "")


def npy_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """Return the first `DATA_OFFSET` bytes of an .npy of version 1.0."""
    said = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': {tuple(map(int, shape))}, }}"
    text = said.ljust(DATA_OFFSET - 11).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def _shard(found: Any) -> Shard:
    files = (found.records, found.labels, found.features)
    records, labels, features = (file and StoredFile(file.name, file.bytes, file.sha256) for file in files)
    return Shard(found.count, records, labels, found.skipped, features)


def _lengths(shard: Shard, manifest: Manifest) -> tuple[tuple[StoredFile, int], ...]:
    """Return the files of a shard, each with its expected size in bytes."""
    sizes = [manifest.record_bytes, 4]
    if manifest.features:
        sizes.append(int(np.prod(manifest.features.shape)) * 2)
    return tuple((file, DATA_OFFSET + shard.count * size) for file, size in zip(shard.files, sizes, strict=True))


def _from_fields(fields: dict[str, Any]) -> Manifest:
    schema = importlib.import_module(
        "fastmask.data.store.schema"
    )  # late import: msgspec is needed only to read a store
    found = schema.convert(fields, schema.ManifestFields)
    known = {field.name: getattr(found, field.name) for field in dataclasses.fields(Manifest)}
    about = found.features
    features = about and Features(**{field.name: getattr(about, field.name) for field in dataclasses.fields(Features)})
    manifest = Manifest(**{**known, "shards": [_shard(shard) for shard in found.shards], "features": features})
    if any((shard.features is None) != (features is None) for shard in manifest.shards):
        raise ValueError("features are of all shards, and are described, or of none")
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
    """Raise a ValueError if shape or scale do not fit the kind of record."""
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
