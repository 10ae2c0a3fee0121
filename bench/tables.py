"""Tables, as every report here prints them: in Markdown, and in aligned columns for a terminal."""

from collections.abc import Iterable, Sequence
from typing import Any

Measured = Sequence[tuple[dict[str, Any], str, dict[str, Any]]]  # case, variant and figures, as rows have them


def line(cells: Iterable[str]) -> str:
    """Return a row."""
    return "| " + " | ".join(cells) + " |"


def header(columns: list[str]) -> list[str]:
    """Return the two lines above the rows."""
    return [line(columns), "|" + " --- |" * len(columns)]


def aligned(rows: Sequence[Sequence[str] | str], gap: int = 2) -> list[str]:
    """Return the lines of a table for a terminal, its first column flush left and the others flush right.

    Args:
        rows: cells, as many in each row; or the text of a line of its own, by which no column is widened.
        gap: spaces between columns.
    """
    cells = [row for row in rows if not isinstance(row, str)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def spaced(row: Sequence[str]) -> str:
        first, *others = row
        return (" " * gap).join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]).rstrip()

    return [row if isinstance(row, str) else spaced(row) for row in rows]


def digits(value: float) -> str:
    """Return a number with three digits, or all before the point."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"


def times(figures: dict[str, Any], calls: int = 1) -> str:
    """Return the median and the 20th and 80th percentile, in ms, of one of so many calls that were timed together."""
    median, low, high = (digits(figures[name] / calls) for name in ("median_ms", "p20_ms", "p80_ms"))
    return f"{median} [{low}, {high}]"


def kernels(measured: Measured) -> list[str]:
    """Return the lines of a bench session's kernels: one for each case, and below it one for each variant."""
    table: list[Sequence[str] | str] = [
        ("", "", "against", "", "of a", ""),
        ("", "ms [p20, p80]", "reference", "GB/s", "copy", "TFLOP/s"),
    ]
    references = {_kernel(case): found["median_ms"] for case, variant, found in measured if variant == "reference"}
    for case, variant, found in measured:
        name = _kernel(case)
        if name not in table:
            table.append(name)
        is_compared = name in references and variant != "reference"
        gain = f"{references[name] / found['median_ms']:.2f}x" if is_compared else ""
        rates = [digits(found["gb_per_s"]), f"{found['copy_percent']:.1f}%"]
        rates.append(digits(found["tflop_per_s"]) if "flops" in found else "")
        table.append((f"  {variant}", times(found), gain, *rates))
    return aligned(table) if measured else []


def loaders(measured: Measured) -> list[str]:
    """Return the lines of a bench session's loaders: one for each case, and below it one for each reader."""
    table: list[Sequence[str] | str] = [("", "images/s", "ms [p20, p80]", "MiB", "growth")]
    for case, variant, found in measured:
        name = f"{case['data']}, batch {case['batch']}, num_workers {case['num_workers']}"
        if name not in table:
            table.append(name)
        memory = (f"{found['own_mib']:,.0f}", f"{found['grown_mib']:+.1f}") if "own_mib" in found else ("", "")
        table.append((f"  {variant}", f"{found['images_per_s']:,.0f}", times(found, case["batches"]), *memory))
    if not any("own_mib" in found for _, _, found in measured):
        table = [row if isinstance(row, str) else row[:3] for row in table]
    return aligned(table) if measured else []


def _kernel(case: dict[str, Any]) -> str:
    return f"{case['op']} {case['direction']}, {case['shape']}, {case['dtype']}"
