"""`python -m bench.report.compare A.jsonl B.jsonl`: compares two sets of measured rows, and marks what differs.

Or two commits of one file: `python -m bench.report.compare FILE --commit-a X --commit-b Y`. Rows are joined by bench,
case and variant; the last row of each counts. A difference is significant if the intervals from the 20th to the 80th
percentile do not overlap. Rows of different devices or thread counts are marked and get no verdict.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from bench.report.tables import header, line
from bench.rows import Row, read

Key = tuple[str, str, str, bool]


class Set(NamedTuple):
    """Rows by key, and the number of rows without a time."""

    rows: dict[Key, Row]
    untimed: int


def key(row: Row) -> Key:
    """Return the key of a row: bench, case, variant, and whether the optimizer is included."""
    case = json.dumps(row["case"], sort_keys=True)
    return row["bench"], case, row["variant"], row.get("optimizer", False)


def machine_of(row: Row) -> str:
    """Return device and threads, which must match for times to be comparable."""
    threads = row.get("threads")
    return row["device"] + (f", {threads} threads" if threads else "")


def latest(rows: Iterable[Row]) -> Set:
    """Return the last row of each key."""
    found, untimed = {}, 0
    for row in rows:
        if "median_ms" in row:
            found[key(row)] = row
        else:
            untimed += 1
    return Set(found, untimed)


def of_commit(rows: list[Row], commit: str) -> list[Row]:
    """Return the rows of a commit, given in full or by a prefix; a ValueError if it is unknown or ambiguous."""
    known = sorted({row["commit"] for row in rows})
    meant = [name for name in known if name == commit] or [name for name in known if name.startswith(commit)]
    if len(meant) != 1:
        raise ValueError(f"commit {commit!r} names {' and '.join(meant) or 'no rows'}; there are {', '.join(known)}")
    return [row for row in rows if row["commit"] == meant[0]]


def verdict(a: Row, b: Row) -> str:
    """Return whether the difference between two rows is significant."""
    if machine_of(a) != machine_of(b):
        return "other machine"
    if min(a["rounds"], b["rounds"]) < 2:
        return "unknown: one round has no spread"
    if a["p80_ms"] < b["p20_ms"]:
        return "B slower"
    if b["p80_ms"] < a["p20_ms"]:
        return "B faster"
    return "within noise"


def table(a: Set, b: Set) -> list[str]:
    """Return the lines of the comparison; a ValueError if no key is in both."""
    both = [k for k in a.rows if k in b.rows]
    if not both:
        raise ValueError(f"nothing was measured in both: {len(a.rows)} rows in A, {len(b.rows)} in B")
    pairs = [(k, a.rows[k], b.rows[k]) for k in both]
    lines = [f"{name}: {_sources(rows)}" for name, rows in (("A", [p[1] for p in pairs]), ("B", [p[2] for p in pairs]))]
    if any(machine_of(x) != machine_of(y) for _, x, y in pairs):
        lines.append("DIFFERENT MACHINES: where it says so the ratio is between machines, not between versions")
    if {x["torch"] for _, x, _ in pairs} != {y["torch"] for _, _, y in pairs}:
        lines.append("the versions of torch differ")
    columns = ["bench", "case", "variant", "A ms (p20 to p80)", "B ms (p20 to p80)", "A / B", "difference"]
    lines += ["", *header(columns)]
    for (bench, _, variant, optimizer), x, y in pairs:
        said = " ".join(str(value) for value in x["case"].values()) + (" + optimizer" if optimizer else "")
        cells = [bench, said, variant, time_of(x), time_of(y), f"{x['median_ms'] / y['median_ms']:.3f}", verdict(x, y)]
        lines.append(line(cells))
    lines.append("")
    lines += [
        f"only in {name}: {', '.join(f'{k[0]} {k[1]} {k[2]}' for k in alone)}"
        for name, alone in (
            ("A", [k for k in a.rows if k not in b.rows]),
            ("B", [k for k in b.rows if k not in a.rows]),
        )
        if alone
    ]
    if a.untimed + b.untimed:
        lines.append(f"rows without a time, left out: {a.untimed} in A, {b.untimed} in B")
    return lines


def time_of(row: Row) -> str:
    """Format median and spread of a row."""
    median, low, high = (_digits(row[name]) for name in ("median_ms", "p20_ms", "p80_ms"))
    return f"{median} ({low} to {high})"


def _digits(value: float) -> str:
    """Format a number with four significant digits, or all digits before the decimal point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def checked(path: Path) -> list[Row]:
    """Read the rows of a file; a ValueError names the first row without a required field."""
    rows = list(read(path))
    for number, row in enumerate(rows, start=1):
        needed = ["bench", "case", "variant", "device", "torch", "commit", "date"]
        if isinstance(row, dict) and "median_ms" in row:
            needed += ["p20_ms", "p80_ms", "rounds"]
        missing = [name for name in needed if not isinstance(row, dict) or name not in row]
        if missing:
            raise ValueError(f"{path}:{number} is no row: it has no {', '.join(missing)}")
    return rows


def main() -> int:
    """Print the comparison as Markdown."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.report.compare", description=__doc__.splitlines()[0], usage=argparse.SUPPRESS
    )
    parser.add_argument("a", type=Path, help="file of rows")
    parser.add_argument("b", type=Path, nargs="?", help="rows to compare with; default: two commits of the first file")
    parser.add_argument("--commit-a", help="use only rows of this commit in A")
    parser.add_argument("--commit-b", help="use only rows of this commit in B")
    options = parser.parse_args()
    if options.b is None and not (options.commit_a and options.commit_b):
        parser.error("give a second file, or --commit-a and --commit-b")
    try:
        a, b = checked(options.a), checked(options.b or options.a)
        a = of_commit(a, options.commit_a) if options.commit_a else a
        b = of_commit(b, options.commit_b) if options.commit_b else b
        lines = table(latest(a), latest(b))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"bench.report.compare: error: {error}\n")
        return 2
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _sources(rows: list[Row]) -> str:
    commits, machines = ({f(row) for row in rows} for f in (lambda row: row["commit"], machine_of))
    return f"commit {', '.join(sorted(commits))} on {' and '.join(sorted(machines))}"


if __name__ == "__main__":
    sys.exit(main())
