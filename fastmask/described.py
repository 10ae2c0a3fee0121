"""Values that are stored as JSON by a name and their fields: frozen dataclasses, such as processes and networks."""

import dataclasses
import json
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, TypeVar


class Described(Protocol):
    """A frozen dataclass whose fields are numbers or choices of `Literal` words."""

    name: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Any]]


T = TypeVar("T", bound=Described)


def to_json(value: Described) -> str:
    """Return a value as JSON: its name and its fields."""
    return json.dumps({"name": value.name, **dataclasses.asdict(value)})


def from_json(text: str, kinds: Mapping[str, type[T]], what: str) -> T:
    """Return the value of a JSON text.

    Args:
        text: the JSON.
        kinds: the dataclasses, by name.
        what: a word for these, for messages.

    Raises:
        ValueError: the text is no JSON of one of these; says what is wrong.
    """
    stored = json.loads(text)
    name = stored.pop("name", None) if isinstance(stored, dict) else None
    kind = kinds.get(name) if isinstance(name, str) else None
    if kind is None:
        wrong = f"the {what} {name!r} is unknown" if isinstance(name, str) else f"the name of a {what} is missing"
        raise ValueError(f"{wrong}; this version knows {', '.join(kinds)}")
    types: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(kind)}
    for field, given in stored.items():
        expected = types.get(field)
        if typing.get_args(expected):
            if not isinstance(given, str) or given not in typing.get_args(expected):
                raise ValueError(f"{given!r} is no {field} of {what} {kind.name}")
        elif type(given) is not expected and not (expected is float and type(given) is int):
            raise ValueError(f"{field} is no number of {what} {kind.name}")
    try:
        return kind(**{name: float(value) if types[name] is float else value for name, value in stored.items()})
    except OverflowError as error:
        raise ValueError(f"a number of {what} {kind.name} is too large") from error
