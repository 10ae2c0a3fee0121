import numpy as np
import pytest

from fastmask.data.sources.source import Source, some
from fastmask.data.store.manifest import MAX_CLASSES


class Three(Source):
    kind = "three"

    def __init__(self, labels=None, names=(), labelled=True):
        super().__init__(labelled)
        if labels is not None:
            self.labels, self.class_names, self.labelled_by = np.array(labels, np.int32), list(names), "guess"

    def __len__(self):
        return 3

    def name(self, item):
        return f"image {item}"

    def content(self, item):
        return b"%d" % item

    def fingerprint(self):
        return "three"


def test_reading():
    source = Three([1, 0, -1], "ab")
    assert source.read(0) == (b"0", 1)
    with pytest.raises(ValueError, match=r"image 2 has no label, as others have \(--num-classes 0 takes"):
        source.read(2)
    assert Three().read(2) == (b"2", 0)
    assert (source.known_labels(), Three().known_labels()) == ([1, 0, -1], [])


def test_what_is_said():
    source = Three([4, 0, -1], [str(number) for number in range(5)])
    source.notes.append("a note")
    for name in ("x\x1b.txt", "b", "c", "d"):
        source.leave_out("no images", name)
    assert source.lines() == [
        "three, 3 images, 5 classes by guess: 0, 1, 2, ..., 4",
        "a note",
        "1 images have no label, as the others have (--num-classes 0 takes the images without labels)",
        "3 of the classes have no image",
        r"left out, no images: 4 (x\x1b.txt, b, c, ...)",
    ]
    assert Three().lines() == ["three, 3 images, no classes"]
    assert Three(labelled=False).lines() == ["three, 3 images, no classes (--num-classes 0)"]
    assert Three([0, 0, 0], ["cat"]).lines() == ["three, 3 images, 1 class by guess: cat"]


def test_some_of_many_names():
    assert some(["a", "b", "c"]) == "a, b, c"
    assert some(["a", "b", "c", "d"]) == "a, b, c, ..."
    assert some(["a", "b", "c", "d"], last=True) == "a, b, c, d"
    assert some([str(number) for number in range(12)], last=True) == "0, 1, 2, ..., 11"


def test_names_of_classes():
    source = Three([1, 0, 1], ["cat", "dog"])
    assert source.names_of(None) == ["cat", "dog"]
    assert source.names_of(4) == ["cat", "dog", "2", "3"]
    assert source.names_of(0) == []
    with pytest.raises(ValueError, match="the images have 2 classes, more than num_classes 1"):
        source.names_of(1)
    with pytest.raises(ValueError, match="image 0 and the others have no labels, but num_classes is 4"):
        Three().names_of(4)
    with pytest.raises(ValueError, match=f"num_classes must be at most {MAX_CLASSES}, not {2**40}"):
        source.names_of(2**40)
