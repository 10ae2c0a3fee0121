"""Small stores for tests."""

import json

import numpy as np

from fastmask.data.store.manifest import Manifest, checksum_of
from fastmask.data.store.writer import StoreWriter


def manifest(kind="moments", copies=2, **fields):
    """Return the manifest of a store to be, of latents 4x4 or of pixels 8x8."""
    moments = kind != "pixels"
    known = {
        "kind": kind,
        "dtype": "float16" if moments else "uint8",
        "shape": (copies, 8, 4, 4) if moments else (1, 3, 8, 8),
        "image_size": 32 if moments else 8,
        "crop": "adm",
        "num_classes": 0,
        "class_names": [],
        "class_counts": [],
        "scale": 0.5 if moments else 1.0,
        "shift": 0.25 if moments else 0.0,
        "source": {"kind": "test"},
        "shards": [],
    }
    return Manifest(**{**known, **fields})


def records_of(about, count):
    """Return records that all differ, and labels 0 .. 2."""
    random = np.random.default_rng(0)
    shape = (count, *about.shape)
    if about.kind == "pixels":
        return random.integers(0, 256, shape, dtype=np.uint8), np.arange(count) % 3
    return random.standard_normal(shape).astype(np.float16), np.arange(count) % 3


def write(path, about=None, count=10, shard_size=4, skip=(), class_names=("a", "b", "c")):
    """Write a store in shards, leaving some items out, and return its manifest."""
    about = about or manifest()
    records, labels = records_of(about, count)
    with StoreWriter(path, about, count, shard_size) as writer:
        for number in writer.numbers():
            if writer.finished(number):
                continue
            with writer.shard(number) as shard:
                for item in writer.items_of(number):
                    if item in skip:
                        shard.skipped.append(f"item {item}")
                    else:
                        shard.add(records[item : item + 1], labels[item : item + 1])
        return writer.finish(list(class_names))


def edit_manifest(store, edit, signed=True):
    """Change the fields of a store's manifest by a function, with the checksum of what comes of it or without one."""
    path = store / "manifest.json"
    fields = json.loads(path.read_text())
    edit(fields)
    fields.pop("checksum", None)
    if signed:
        fields["checksum"] = checksum_of(fields)
    path.write_text(json.dumps(fields))
