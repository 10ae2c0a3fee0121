"""Pages of `--help` for a command with groups of flags: a list of the groups, and a page for each group."""

import ast
import dataclasses
import inspect
import itertools
import shutil
import sys
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastmask.fields import unknown

_WIDEST = 100  # columns


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
    at = next((i for i, argument in enumerate(argv) if argument in ("-h", "--help")), None)
    if at is None:
        return False
    asked = argv[at + 1] if at + 1 < len(argv) and not argv[at + 1].startswith("-") else ""
    if asked and asked not in ("all", *groups):
        raise ValueError(unknown("group of --help", asked, ["all", *groups]))
    width = min(shutil.get_terminal_size().columns, _WIDEST)
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
            lines += [*_wrapped(_title(name, group), width, 0, 4), "", *_explained(group, width), ""]
    sys.stdout.write("\n".join(lines).rstrip() + "\n")
    return True


def _explained(group: Any, width: int) -> Iterator[str]:
    """Yield the flags of a group with their texts and defaults."""
    types, texts = typing.get_type_hints(type(group)), _texts(type(group))
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        yield f"  {_flag(field.name)}{_values(field.name, types[field.name])}"
        yield from _wrapped(f"{texts[field.name]} (default: {shown or 'empty'})", width, 6, 6)


def _texts(kind: type) -> dict[str, str]:
    """Return the docstring of each field of a dataclass, in one line."""
    definition = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(definition, ast.ClassDef)
    texts = {}
    for field, after in itertools.pairwise(definition.body):
        if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            texts[ast.unparse(field.target)] = " ".join(str(after.value.value).split())
    return texts


def _values(name: str, kind: Any) -> str:
    """Return what follows a flag: its choices or the type of its value."""
    if kind is bool:
        return f", {_flag('no_' + name)}"
    if typing.get_origin(kind) is tuple:
        first, *others = typing.get_args(kind)
        return " [" + first.__name__.upper() + " ...]" if others == [...] else f" {first.__name__.upper()}" * 2
    if typing.get_origin(kind) is typing.Literal:
        return " {" + ",".join(typing.get_args(kind)) + "}"
    return f" {kind.__name__.upper()}"


def _title(name: str, group: Any) -> str:
    return f"{name}: {(type(group).__doc__ or '').splitlines()[0]}"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _wrapped(text: str, width: int, first: int = 0, others: int = 0) -> list[str]:
    return textwrap.wrap(
        text, width, initial_indent=" " * first, subsequent_indent=" " * others, break_on_hyphens=False
    )
