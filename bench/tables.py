"""Markdown tables, as every report here prints them."""

from collections.abc import Iterable


def line(cells: Iterable[str]) -> str:
    """Return a row."""
    return "| " + " | ".join(cells) + " |"


def header(columns: list[str]) -> list[str]:
    """Return the two lines above the rows."""
    return [line(columns), "|" + " --- |" * len(columns)]
