import pytest

from fastmask.generation.classes import class_ids

NAMES = ["tench, Tinca tinca", "goldfish, Carassius auratus", "crane", "Crane", "tabby, tabby cat", "7"]


def ids(*classes, names=NAMES, num_classes=6):
    return class_ids(classes, names, num_classes, "runs/a")


def test_numbers_and_names():
    assert ids(4, "0", "goldfish", "TINCA tinca", " tabby cat ", "goldfish, Carassius auratus", 1, 1) == [
        *(4, 0, 1, 0, 4, 1, 1, 1)
    ]
    assert ids("2", names=[]) == [2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("goldfisch", "--classes goldfisch: runs/a knows no such class: did you mean goldfish, Carassius auratus[?]"),
        ("cat", "did you mean tabby, tabby cat[?]"),
        ("zebra", r"the classes are tench, Tinca tinca, goldfish, Carassius auratus, crane, \.\., 0 \.\. 5"),
        ("crane", "--classes crane: classes 2, 3 have that name: give a number"),
        (6, r"--classes 6: the classes are 0 \.\. 5, and --unconditional draws without any"),
        ("7", r"--classes 7: the classes are 0 \.\. 5"),  # a number, though a class has that name
        (-1, r"--classes -1: the classes are 0 \.\. 5"),
    ],
)
def test_what_is_no_class(given, message):
    with pytest.raises(ValueError, match=message):
        ids(given)


def test_without_names_or_classes():
    with pytest.raises(
        ValueError, match=r"--classes goldfish: runs/a records no names of classes: give numbers, 0 \.\. 5"
    ):
        ids("goldfish", names=[])
    with pytest.raises(ValueError, match="runs/a was trained without labels: leave --classes out"):
        ids(0, num_classes=0)
