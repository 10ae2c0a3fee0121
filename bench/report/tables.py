"""Formatting of tables, as Markdown and as aligned columns for a terminal."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastmask.files import atomic_write

Measured = Sequence[tuple[dict[str, Any], str, dict[str, Any]]]  # case, variant and figures, as in rows


def line(cells: Iterable[str]) -> str:
    """Format a row."""
    return "| " + " | ".join(cells) + " |"


def header(columns: list[str]) -> list[str]:
    """Return the two header lines of a table."""
    return [line(columns), "|" + " --- |" * len(columns)]


def write_table(path: Path, head: str, lines: Iterable[str]) -> None:
    """Write a line that says what a table is, and the table, to a file atomically."""
    with atomic_write(path) as partial:
        partial.write_text("\n".join([head, "", *lines]) + "\n")


def aligned(rows: Sequence[Sequence[str] | str], gap: int = 2) -> list[str]:
    """Return the lines of a table for a terminal, with the first column left-aligned and the others right-aligned.

    Args:
        rows: cells, the same number in each row; or the text of a full line, which does not affect column widths.
        gap: spaces between columns.
    """
    cells = [row for row in rows if not isinstance(row, str)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def spaced(row: Sequence[str]) -> str:
        first, *others = row
        return (" " * gap).join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]).rstrip()

    return [row if isinstance(row, str) else spaced(row) for row in rows]


def digits(value: float) -> str:
    """Format a number with three significant digits, or all digits before the decimal point."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"


def times(figures: dict[str, Any], calls: int = 1) -> str:
    """Format median, 20th and 80th percentile in ms per call, of ``calls`` calls that were timed together."""
    median, low, high = (digits(figures[name] / calls) for name in ("median_ms", "p20_ms", "p80_ms"))
    return f"{median} [{low}, {high}]"


def kernels(measured: Measured) -> list[str]:
    """Return the kernel table of a session: a line per case, followed by a line per variant."""
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
    """Return the loader table of a session: a line per case, followed by a line per reader."""
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


def sampling(measured: Measured) -> list[str]:
    """Return the sampling table of a session: a line per case, followed by a line per sampler."""
    table: list[Sequence[str] | str] = [("", "images/s", "ms [p20, p80]", "against plain")]
    plain = {str(case): found["median_ms"] for case, variant, found in measured if variant == "plain"}
    for case, variant, found in measured:
        name = f"{case['size']} at {case['image_size']}, batch {case['batch']}, {case['sample_steps']} steps"
        if name not in table:
            table.append(name)
        gain = "" if variant == "plain" else f"{plain[str(case)] / found['median_ms']:.2f}x"
        table.append((f"  {variant}", digits(found["images_per_s"]), times(found), gain))
    return aligned(table) if measured else []


def _kernel(case: dict[str, Any]) -> str:
    return f"{case['op']} {case['direction']}, {case['shape']}, {case['dtype']}"
