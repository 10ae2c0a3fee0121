"""Types and ranges of the fields in a store's JSON files; see `fastmask.data.store.manifest` for their meaning."""

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from fastmask.data.store.manifest import MAX_CLASSES

T = TypeVar("T")

_Count = Annotated[int, Meta(ge=0, le=2**48)]
_Side = Annotated[int, Meta(ge=1, le=2**16)]
_Text = Annotated[str, Meta(max_length=2**16)]
_Sha256 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
_Sha256OrNone = Annotated[str, Meta(pattern=r"\A(?:[0-9a-f]{64})?\Z")]
# The range also excludes NaN and infinity.
_Scale = Annotated[float, Meta(gt=0, le=1e6)]
_Shift = Annotated[float, Meta(ge=-1e6, le=1e6)]
# Manifests are untrusted: a name must be a shard's file in the store's own folder.
_FileName = Annotated[str, Meta(pattern=r"\A[^./\\\x00-\x1f][^/\\\x00-\x1f]*\.npy\Z", max_length=255)]


class FileFields(msgspec.Struct):
    """A file of a shard."""

    name: _FileName
    bytes: _Count
    sha256: _Sha256


class ShardFields(msgspec.Struct):
    """A shard."""

    count: _Count
    records: FileFields
    labels: FileFields
    skipped: list[_Text]
    features: FileFields | None = None


class FeaturesFields(msgspec.Struct):
    """A teacher's features."""

    teacher: _Text
    sha256: _Sha256
    precision: _Text
    grid: Annotated[int, Meta(ge=1, le=2**12)]
    width: Annotated[int, Meta(ge=1, le=2**16)]


class ManifestFields(msgspec.Struct, kw_only=True):
    """A manifest. Unknown fields, of later versions of the package, are ignored."""

    format: Literal["fastmask-store"]
    version: Literal[1]
    checksum: _Sha256 | None = None
    count: _Count
    kind: Literal["pixels", "moments", "latents"]
    dtype: Literal["uint8", "float16"]
    shape: tuple[Annotated[int, Meta(ge=1, le=2)], Annotated[int, Meta(ge=1, le=2**12)], _Side, _Side]
    image_size: _Side
    crop: _Text
    decoder: _Text = ""
    num_classes: Annotated[int, Meta(ge=0, le=MAX_CLASSES)]
    class_names: list[_Text]
    class_counts: list[_Count]
    vae: _Text = ""
    vae_sha256: _Sha256OrNone = ""
    encoder: _Text = ""
    scale: _Scale | list[_Scale] = 1.0
    shift: _Shift | list[_Shift] = 0.0
    source: dict[str, Any]
    shards: list[ShardFields]
    features: FeaturesFields | None = None


def convert(fields: Any, kind: type[T]) -> T:
    """Convert parsed JSON to one of the classes of this module.

    Raises:
        ValueError: a field is missing, or has a wrong type or range; the message names it in one line.
    """
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        said = str(error).replace("`", "").replace(" - at $.", " at ").replace(" - at $", "")
        if "matching regex" in said:
            place = said.rpartition(" at ")[2]
            form = "the name of an .npy in the store's own folder" if place.split(".")[-1] == "name" else "a SHA-256"
            said = f"Expected {form} at {place}"
        raise ValueError(said) from error
