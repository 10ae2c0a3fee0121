import json

import numpy as np
import pytest

from fastmask.data.sources.labels import in_order, label_of_text, parse_label_file, to_numbers
from fastmask.data.store.manifest import MAX_CLASSES


def parsed(given, **options):
    return parse_label_file(json.dumps(given).encode(), "labels.json", bare=True, **options)


def test_order_of_names():
    assert in_order(map(str, range(12))) == [str(number) for number in range(12)]
    assert in_order(["10", "9", "009", "9"]) == ["009", "9", "10"]
    assert in_order(["10", "9", "b"]) == ["10", "9", "b"]
    assert in_order(["10", "\u00b2"]) == ["10", "\u00b2"]  # a digit to Python, and no number


def test_names_become_numbers_in_order():
    labels, names = to_numbers(["dog", "cat", None, "dog"], "here")
    assert (labels.dtype, labels.tolist(), names) == (np.int32, [1, 0, -1, 1], ["cat", "dog"])
    assert to_numbers(["11", "2"], "here")[1] == ["2", "11"]


def test_numbers_stay():
    labels, names = to_numbers([2, None, 0, -1], "here")
    assert (labels.tolist(), names) == ([2, -1, 0, -1], ["0", "1", "2"])
    assert to_numbers([None, None], "here") == (None, [])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["cat", 7], r"here mixes labels that are names \(cat\) with labels that are numbers \(7\)"),
        ([-1, None, -1], "here: label -1 is below 0, as in a test split"),
        ([0, MAX_CLASSES], f"here: label {MAX_CLASSES} is above {MAX_CLASSES - 1}, the highest there may be"),
        ([0, 2**31], "here: label 2147483648 is above"),
        ([0, 2**40], "here: label 1099511627776 is above"),
        ([10**30], "here: label 1000000000000000000000000000000 is above"),
    ],
)
def test_what_cannot_be_labels_names_the_flag_that_decides(given, message):
    with pytest.raises(ValueError, match=rf"{message}.*--num-classes 0 takes the images without labels"):
        to_numbers(given, "here")


def test_the_highest_label_that_there_may_be():
    labels, names = to_numbers([MAX_CLASSES - 1], "here")
    assert (labels.tolist(), len(names)) == ([MAX_CLASSES - 1], MAX_CLASSES)


def test_forms_of_a_label_file():
    assert parsed({"a.png": 1, "b.png": "x"}) == {"a.png": 1, "b.png": "x"}
    assert parsed({"labels": [["00000/img00000000.png", 6]]}) == {"00000/img00000000.png": 6}
    assert parsed({"labels": None}) is None
    assert parsed({"a.png": 3.0, "b.png": 0.0}) == {"a.png": 3, "b.png": 0}
    assert parse_label_file(b'{"name": "photos"}', "dataset.json", bare=False) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "cannot be read: Expecting"),
        (b"\xff\xfe", "cannot be read: "),
        (b"", "cannot be read: "),
        (b"[]", "cannot be read: expected a JSON object"),
        (b'{"a": ' * 100_000, "cannot be read: maximum recursion depth exceeded"),
        (b"[" * 100_000, "cannot be read: maximum recursion depth exceeded"),
        (
            b'{"labels": [["a", ' + b"[" * 200 + b"]" * 200 + b"]]}",
            r"the label of a must be a number or a name, not \[\[\[",
        ),
        (b'{"labels": [["a"]]}', r"cannot be read: expected \[FILE, LABEL\], not \['a'\]"),
        (b'{"labels": [[1, 2]]}', r"cannot be read: expected \[FILE, LABEL\], not \[1, 2\]"),
        (b'{"labels": [["a", 1], ["a", 2]]}', "cannot be read: it names a twice"),
        (b'{"a": 1, "a": 2}', "cannot be read: it names a twice"),
        (b'{"a": 1.5}', r"the label of a must be a number or a name, not 1\.5"),
        (b'{"a": true}', "the label of a must be a number or a name, not True"),
        (b'{"a": NaN}', "the label of a must be a number or a name, not nan"),
        (b'{"a": [0, 1]}', r"the label of a must be a number or a name, not \[0, 1\]"),
        (b'{"a": ' + b"9" * 5000 + b"}", "cannot be read: Exceeds the limit"),
        (b'{"labels": [["x/../../y.png", 1]]}', r"names x/\.\./\.\./y\.png, which leads out of the folder"),
        (b'{"/etc/x.png": 1}', "names /etc/x.png, which leads out of the folder"),
        (b'{"x\\u001b[2J": null}', r"the label of x\\x1b\[2J must be"),
    ],
)
def test_label_files_that_cannot_be(content, message):
    with pytest.raises(ValueError, match=f"^labels.json:? {message}"):
        parse_label_file(content, "labels.json", bare=True)


@pytest.mark.parametrize(
    ("text", "label"),
    [("7", 7), (" 7\n", 7), ("-1", -1), ("cat", "cat"), ("", None), (" \n", None), (7, 7), (7.0, 7), (None, None)],
)
def test_a_label_that_a_sample_carries(text, label):
    assert label_of_text(text, "x.cls") == label


@pytest.mark.parametrize("text", [7.5, True, [1], {"a": 1}, float("nan")])
def test_what_a_sample_cannot_carry(text):
    with pytest.raises(ValueError, match=r"x\.json: a label must be a number or a name, not .*--num-classes 0"):
        label_of_text(text, "x.json")
