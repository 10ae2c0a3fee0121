import dataclasses
import json
from typing import ClassVar, Literal

import pytest

from fastmask.described import from_json, to_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    name: ClassVar[str] = "sizes"

    width: int = 4
    scale: float = 0.5
    norm: bool = False
    kind: Literal["round", "square"] = "round"


KINDS = {"sizes": Sizes}


def test_there_and_back():
    value = Sizes(width=8, scale=2.0, norm=True, kind="square")
    assert json.loads(to_json(value)) == {"name": "sizes", "width": 8, "scale": 2.0, "norm": True, "kind": "square"}
    assert from_json(to_json(value), KINDS, "shape") == value
    assert from_json('{"name": "sizes"}', KINDS, "shape") == Sizes()
    assert from_json('{"name": "sizes", "scale": 2}', KINDS, "shape") == Sizes(scale=2.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"name": "others"}', "the shape 'others' is unknown; this version knows sizes"),
        ('{"name": ["sizes"]}', "the name of a shape is missing; this version knows sizes"),
        ('["sizes"]', "the name of a shape is missing; this version knows sizes"),
        ('{"name": "sizes", "depth": 1}', "depth is no number of shape sizes"),
        ('{"name": "sizes", "width": 1.0}', "width is no number of shape sizes"),
        ('{"name": "sizes", "width": true}', "width is no number of shape sizes"),
        ('{"name": "sizes", "norm": 1}', "norm is no number of shape sizes"),
        ('{"name": "sizes", "scale": "1"}', "scale is no number of shape sizes"),
        ('{"name": "sizes", "kind": "oval"}', "'oval' is no kind of shape sizes"),
        ('{"name": "sizes", "kind": ["round"]}', r"\['round'\] is no kind of shape sizes"),
        ('{"name": "sizes", "kind": 1}', "1 is no kind of shape sizes"),
        (f'{{"name": "sizes", "scale": 1{"0" * 400}}}', "a number of shape sizes is too large"),
        ("sizes", "Expecting value"),
    ],
)
def test_what_is_none(text, message):
    with pytest.raises(ValueError, match=message):
        from_json(text, KINDS, "shape")
