"""Pages of `--help`: of a command, or of one with groups of flags a list of the groups and a page for each group."""

import ast
import dataclasses
import inspect
import itertools
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastmask.fields import unknown

_WIDEST = 100  # columns
_ASKED = ("-h", "--help")


def show_page(argv: Sequence[str], kind: type, *, prog: str, description: str, default: Any = None) -> bool:
    """Print the one page of a command if `--help` asks for it, and return whether it does.

    Args:
        argv: the arguments of the command.
        kind: the dataclass that they are parsed into; its members that are dataclasses are explained as groups.
        prog: name of the command.
        description: what it does.
        default: instance with the default values; None takes those of the fields.
    """
    if not any(argument in _ASKED for argument in argv):
        return False
    width = _width()
    values = {field.name: getattr(default, field.name, _default(field)) for field in dataclasses.fields(kind)}
    groups = {name: value for name, value in values.items() if dataclasses.is_dataclass(value)}
    own = {name: value for name, value in values.items() if name not in groups}
    lines = [*_wrapped(usage_of(kind, prog), width, 0, 4), "", *_wrapped(description, width), ""]
    lines += _explained(kind, own, width)
    for name, group in groups.items():
        lines += ["", *_section(name, group, width)]
    sys.stdout.write("\n".join(lines) + "\n")
    return True


def usage_of(kind: type, prog: str) -> str:
    """Return how a command is called: its positional arguments and the flags without a default."""
    hints, plain = typing.get_type_hints(kind), positional(kind)
    words = [f"usage: {prog}"]
    for field in dataclasses.fields(kind):
        word, needed = _called(field.name, hints[field.name], field.name in plain), needs_value(field)
        if needed or field.name in plain:
            words.append(word if needed else f"[{word}]")
    return " ".join([*words, "[--FLAG VALUE ...]"])


def positional(kind: type) -> set[str]:
    """Return the names of the fields of a dataclass that are arguments without a flag (`tyro.conf.Positional`)."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {name for name, hint in hints.items() if typing.get_origin(hint) is typing.Annotated}


def needs_value(field: "dataclasses.Field[Any]") -> bool:
    """Return whether a field has no default."""
    return _default(field) is dataclasses.MISSING


def show_help(argv: Sequence[str], *, prog: str, description: Sequence[str], groups: Mapping[str, Any]) -> bool:
    """Print the page that `--help` or `--help GROUP` asks for, and return whether one was asked for.

    `--help` lists the groups with their flags, `--help GROUP` explains the flags of a group with their defaults, and
    `--help all` those of all groups.

    Args:
        argv: the arguments of the command.
        prog: name of the command.
        description: paragraphs at the start of the list of groups.
        groups: dataclass instances by the name of their group, whose values are the defaults; their docstrings describe
            the groups.

    Raises:
        ValueError: an unknown group; suggests similar ones.
    """
    at = next((i for i, argument in enumerate(argv) if argument in _ASKED), None)
    if at is None:
        return False
    asked = argv[at + 1] if at + 1 < len(argv) and not argv[at + 1].startswith("-") else ""
    if asked and asked not in ("all", *groups):
        raise ValueError(unknown("group of --help", asked, ["all", *groups]))
    width = _width()
    lines: list[str] = []
    if not asked:
        lines += [f"usage: {prog} [--FLAG VALUE ...]", ""]
        for paragraph in description:
            lines += [*_wrapped(paragraph, width), ""]
    for name, group in groups.items():
        if not asked:
            flags = " ".join(_flag(field.name) for field in dataclasses.fields(group))
            lines += [*_wrapped(_title(name, group), width, 0, 4), *_wrapped(flags, width, 4, 4)]
        elif asked in ("all", name):
            lines += [*_section(name, group, width), ""]
    sys.stdout.write("\n".join(lines).rstrip() + "\n")
    return True


def _explained(kind: type, values: Mapping[str, Any], width: int) -> Iterator[str]:
    """Yield the arguments of a dataclass with their texts and default values."""
    hints, texts, plain = typing.get_type_hints(kind), _texts(kind), positional(kind)
    for name, value in values.items():
        text = texts.get(name, "")
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else "" if value is None else str(value)
        if value is dataclasses.MISSING:
            text = f"{text} (required)"
        elif shown or "default:" not in text.lower():  # which says what the empty value means
            text = f"{text} (default: {shown or 'empty'})"
        yield f"  {_called(name, hints[name], name in plain)}"
        yield from _wrapped(text.strip(), width, 6, 6)


def _section(name: str, group: Any, width: int) -> list[str]:
    """Return a group's title and its flags."""
    values = {field.name: getattr(group, field.name) for field in dataclasses.fields(group)}
    return [*_wrapped(_title(name, group), width, 0, 4), "", *_explained(type(group), values, width)]


def _default(field: "dataclasses.Field[Any]") -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _width() -> int:
    return min(shutil.get_terminal_size().columns, _WIDEST)


def _texts(kind: type) -> dict[str, str]:
    """Return the docstring of each field of a dataclass, its bases' included, in one line."""
    texts = {}
    for each in filter(dataclasses.is_dataclass, reversed(kind.__mro__)):
        definition = ast.parse(textwrap.dedent(inspect.getsource(each))).body[0]
        assert isinstance(definition, ast.ClassDef)
        for field, after in itertools.pairwise(definition.body):
            if not (isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr)):
                continue
            if isinstance(after.value, ast.Constant):
                texts[ast.unparse(field.target)] = " ".join(str(after.value.value).split())
    return texts


def _called(name: str, kind: Any, plain: bool) -> str:
    """Return an argument as it is given: its flag with the choices or the type of its value, or the name of a value."""
    if plain:
        return name.upper() + (" ..." if typing.get_origin(kind) is tuple else "")
    return f"{_flag(name)}{_values(name, kind)}"


def _values(name: str, kind: Any) -> str:
    """Return what follows a flag: its choices or the type of its value."""
    if kind is bool:
        return f", {_flag('no_' + name)}"
    if typing.get_origin(kind) is tuple:
        first, *others = typing.get_args(kind)
        return " [" + first.__name__.upper() + " ...]" if others == [...] else f" {first.__name__.upper()}" * 2
    if typing.get_origin(kind) is typing.Literal:
        return " {" + ",".join(typing.get_args(kind)) + "}"
    if isinstance(kind, types.UnionType):  # of a type and None
        return _values(name, typing.get_args(kind)[0])
    return f" {kind.__name__.upper()}"


def _title(name: str, group: Any) -> str:
    return f"{name}: {(type(group).__doc__ or '').splitlines()[0]}"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _wrapped(text: str, width: int, first: int = 0, others: int = 0) -> list[str]:
    return textwrap.wrap(
        text, width, initial_indent=" " * first, subsequent_indent=" " * others, break_on_hyphens=False
    )
