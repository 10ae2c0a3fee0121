"""The terminal table of a session's training steps.

The figures come from the session's rows, and comparisons from the functions of `bench.report`. Missing figures are "-",
with the reason below the table.
"""

import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from bench.report.derived import (
    FORMS,
    MORE_STACKS,
    PLAIN,
    RECIPES,
    STACKS,
    Rows,
    bound,
    dense_of,
    faster,
    rate,
    size_of,
)
from bench.report.tables import aligned, digits, times
from bench.rows import Row

PRODUCTS = "products"  # name in rows for the matmuls and attention of a step, timed alone
_WIDTH = 79
_ORDER = (*STACKS, *MORE_STACKS, PRODUCTS)
_HEADS = (
    ("", "", "", "over", "plain", "plain", "FLOP", "step /"),
    ("", "ms [p20, p80]", "img/s", "dense", "eager", "compiled", "bound", "matmuls"),
)
_LEGEND = (
    "ms: of a whole step, the median and the 20th and 80th percentile.",
    "over dense: images/s over those of the dense DiT on the same stack.",
    "plain eager, plain compiled: images/s over those of the plain baseline in the same form.",
    "FLOP bound: the share of the bound that the gain over dense reaches. The bound is the MACs of dense over those of "
    "the form, in a forward pass.",
    "step / matmuls: the time of the step over that of its matmuls and attention alone, which bounds any stack.",
)


class Name(NamedTuple):
    """A case without the stack."""

    size: str
    side: int
    batch: int
    precision: str
    form: str


def name_of(case: dict[str, Any]) -> Name:
    """Return the name of a row's case."""
    return Name(size_of({"case": case}), *(case[field] for field in ("image_size", "batch", "precision", "form")))


def shown(stack: str) -> str:
    """Return the display name of a stack."""
    return "matmuls alone" if stack == PRODUCTS else stack


class Table:
    """The table of a session.

    Attributes:
        left_out: reasons why a stack of a case was not timed.
    """

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self.left_out: dict[tuple[Name, str], str] = {}
        self._compared = Rows([])
        self._absent: dict[str, dict[Name, list[str]]] = {}  # missing stacks, by reason and case
        self._is_apart = False  # whether a figure compares times that were not taken in turn

    def add(self, row: Row, turn: str) -> None:
        """Add the row of a whole step, from this machine and code; ``turn`` names the group that was timed in turn."""
        here = {"device": "here", "code": "this"}
        self._rows.append({**row, **here, "turn": turn})

    def lines(self) -> Iterator[str]:
        """Yield the lines; none without rows."""
        if not self._rows:
            return
        self._compared, self._absent, self._is_apart = Rows(self._rows), {}, False
        blocks: dict[Name, list[Row]] = {}
        for row in self._compared.of("step"):
            blocks.setdefault(name_of(row["case"])._replace(form=""), []).append(row)
        for block, rows in blocks.items():
            yield from (*self._block(block, rows), "")
        for text in (*_LEGEND, *self._notes()):
            yield from textwrap.wrap(text, _WIDTH, subsequent_indent="  ")

    def _block(self, block: Name, rows: list[Row]) -> Iterator[str]:
        """Yield the table of a size, image size, batch and precision."""
        yield f"{block.size} at {block.side}x{block.side}, batch {block.batch}, {block.precision}"
        stacks = sorted({row["variant"] for row in rows}, key=_ORDER.index)
        forms = sorted({row["case"]["form"] for row in rows}, key=FORMS.index)
        dense = next((row for row in rows if row["case"]["form"] == "dense"), None)
        table: list[Sequence[str] | str] = [*_HEADS]
        for form in forms:
            mine = {row["variant"]: row for row in rows if row["case"]["form"] == form}
            row = next(iter(mine.values()))
            gain = "" if dense in (None, row) or form == "dense" else f", FLOP bound {bound(row, dense):.2f}x"
            table.append(f"{form}, {row['rounds']} rounds{gain}")
            for stack in stacks:
                if stack in mine:
                    table.append((f" {shown(stack)}", *self._cells(mine[stack])))
                elif stack not in MORE_STACKS and (form not in RECIPES or stack in ("ours", PRODUCTS)):
                    table.append((f" {shown(stack)}", "-", "-", *[""] * 5))
                    self._miss(block._replace(form=form), stack)
            if {"ours", "ours packed"} <= mine.keys():
                table.append(f" ours packed is {faster(mine['ours packed'], mine['ours']):.2f}x as fast as ours")
        yield from aligned(table, gap=1)

    def _cells(self, row: Row) -> list[str]:
        """Return the cells of a row; empty without a row to compare with."""
        name, stack = name_of(row["case"]), row["variant"]
        cells = [times(row), digits(rate(row))]
        gain = share = ""
        if name.form != "dense" and stack != "ours packed":  # whole images have no packed form
            dense, missing = dense_of(self._compared, row), (name._replace(form="dense"), stack)
            gain = self._cell("{:.2f}x", faster, row, dense, missing)
            share = self._cell("{:.0%}", lambda a, b: faster(a, b) / bound(a, b), row, dense, missing)
        plain = ["", ""]
        if stack not in (PRODUCTS, "plain eager") and name.form not in RECIPES:
            plain = [self._beside("{:.2f}x", faster, row, other) if other != stack else "" for other in PLAIN]
        matmuls = ""
        if stack not in (*PLAIN, PRODUCTS):
            matmuls = self._beside("{:.2f}x", lambda a, b: a["median_ms"] / b["median_ms"], row, PRODUCTS)
        return [*cells, gain, *plain, share, matmuls]

    def _beside(self, form: str, value: Callable[[Row, Row], float], row: Row, stack: str) -> str:
        return self._cell(form, value, row, self._compared.beside(row, stack), (name_of(row["case"]), stack))

    def _cell(
        self, form: str, value: Callable[[Row, Row], float], row: Row, other: Row | None, missing: tuple[Name, str]
    ) -> str:
        """Format a figure of two rows, marked if they were not timed in turn; "-" if the other row is missing."""
        if other is None:
            self._miss(*missing)
            return "-"
        is_apart = row["turn"] != other["turn"]
        self._is_apart |= is_apart
        return form.format(value(row, other)) + "*" * is_apart

    def _miss(self, name: Name, stack: str) -> None:
        reason = self.left_out.get((name, stack), "not timed in this session")
        stacks = self._absent.setdefault(reason, {}).setdefault(name, [])
        if stack not in stacks:
            stacks.append(stack)

    def _notes(self) -> Iterator[str]:
        """Yield the reasons for missing figures, and notes on others."""
        if self._is_apart:
            yield "* not timed in turn, so that a drift of the machine is part of the ratio."
        for reason, cases in self._absent.items():
            forms: dict[tuple[str, ...], list[str]] = {}
            for name, stacks in cases.items():
                said = f"{name.size} {name.form}, batch {name.batch}"
                forms.setdefault(tuple(sorted(stacks, key=_ORDER.index)), []).append(said)
            names = [f"{', '.join(map(shown, stacks))} ({'; '.join(said)})" for stacks, said in forms.items()]
            yield f"- {', '.join(names)}: {reason}."
