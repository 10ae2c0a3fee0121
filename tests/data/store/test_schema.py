"""Every field of a manifest is tried in test_manifest.py."""

import pytest

from fastmask.data.store.manifest import FORMAT, MAX_CLASSES, VERSION
from fastmask.data.store.schema import FileFields, ManifestFields, convert

FILE = {"name": "00000.npy", "bytes": 200, "sha256": "0" * 64}
MANIFEST = {
    "format": FORMAT,
    "version": VERSION,
    "count": 0,
    "kind": "pixels",
    "dtype": "uint8",
    "shape": [1, 3, 8, 8],
    "image_size": 8,
    "crop": "adm",
    "num_classes": 0,
    "class_names": [],
    "class_counts": [],
    "source": {},
    "shards": [],
}


def test_fields_of_the_right_type_and_range():
    found = convert({**FILE, "later": 3}, FileFields)
    assert (found.name, found.bytes, found.sha256) == ("00000.npy", 200, "0" * 64)
    found = convert({**MANIFEST, "scale": [1, 2.5, 3], "num_classes": MAX_CLASSES}, ManifestFields)
    assert (found.scale, found.shift, found.shape) == ([1.0, 2.5, 3.0], 0.0, (1, 3, 8, 8))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({**FILE, "bytes": True}, "^Expected int, got bool at bytes$"),
        ({**FILE, "bytes": -1}, "^Expected int >= 0 at bytes$"),
        ({"name": "a.npy"}, "^Object missing required field bytes$"),
        ({**FILE, "name": "../a.npy"}, r"^Expected the name of an \.npy in the store's own folder at name$"),
        ({**FILE, "sha256": "0"}, "^Expected a SHA-256 at sha256$"),
        ([], "^Expected object, got array$"),
        ("text", "^Expected object, got str$"),
    ],
)
def test_what_is_wrong_is_one_line(fields, message):
    with pytest.raises(ValueError, match=message):
        convert(fields, FileFields)


def test_there_are_no_more_classes_than_a_store_takes():
    with pytest.raises(ValueError, match=f"^Expected int <= {MAX_CLASSES} at num_classes$"):
        convert({**MANIFEST, "num_classes": MAX_CLASSES + 1}, ManifestFields)
