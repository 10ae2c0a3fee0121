"""Texts of a page: escaped, printable, without secrets."""

import html
from collections.abc import Iterable
from typing import Any

from fastmask.console import printable, without_secrets


def safe(value: Any) -> str:
    """Return a value as text for HTML, between tags or in a quoted attribute."""
    return html.escape(printable(without_secrets(str(value))))


def shown(value: Any) -> str:
    """Return a value that was read from JSON as text for HTML."""
    if value is None or value == "" or value == []:
        return '<span class="none">empty</span>'
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return safe(f"{value:.6g}")
    if isinstance(value, list):
        return " ".join(map(shown, value))
    return safe(value)


def flag(name: str) -> str:
    """Return the flag of a field of the configuration, for HTML."""
    return f"<code>--{safe(name).replace('_', '-')}</code>"


def table(head: Iterable[str], rows: Iterable[Iterable[str]], caption: str) -> str:
    """Return a table in a box of its own that scrolls.

    Args:
        head: texts of the columns, as HTML.
        rows: cells, as HTML; the first of a row is its heading.
        caption: its title for screen readers.
    """
    columns = "".join(f'<th scope="col">{each}</th>' for each in head)
    body = ""
    for first, *others in rows:
        body += f'<tr><th scope="row">{first}</th>{"".join(f"<td>{each}</td>" for each in others)}</tr>\n'
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{safe(caption)}"><table>'
        f"<thead><tr>{columns}</tr></thead><tbody>\n{body}</tbody></table></div>\n"
    )
