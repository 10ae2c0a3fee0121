"""`python -m bench.report`: tables and plots of the committed rows of `bench/results/*.jsonl`."""

import argparse
import subprocess
import sys
from pathlib import Path

from bench.report.compare import checked
from bench.report.derived import Rows
from bench.report.sections import report, summary
from bench.rows import RESULTS, ROOT, Row
from fastmask.files import atomic_write

README_MARKS = ("<!-- measured: python -m bench.report --readme README.md -->", "<!-- end of measured -->")


def committed(folder: Path) -> tuple[list[Row], list[str]]:
    """Return the committed rows of a folder (all rows outside git), and a note for each file with uncommitted rows."""
    rows, notes = [], []
    if not folder.is_dir() and folder != RESULTS:
        raise ValueError(f"{folder} is no folder")
    for path in sorted(folder.glob("*.jsonl")):
        found = checked(path)
        git = ["git", "-C", str(folder)]
        inside = subprocess.run([*git, "rev-parse"], capture_output=True, check=False).returncode == 0
        if inside:
            shown = subprocess.run([*git, "show", f"HEAD:./{path.name}"], capture_output=True, text=True, check=False)
            known = set(shown.stdout.splitlines())
            lines = path.read_text().splitlines()
            found = [row for row, stored in zip(found, lines, strict=True) if stored in known]
            if len(found) < len(lines):
                notes.append(f"{path.name}: {len(lines) - len(found)} of {len(lines)} rows are not committed, left out")
        rows += found
    return rows, notes


def write_readme(path: Path, rows: Rows) -> None:
    """Replace the text between the marks in a README; a ValueError if it has none."""
    text = path.read_text()
    start, end = (text.find(mark) for mark in README_MARKS)
    if start < 0 or end < start:
        raise ValueError(f"{path} has no lines {README_MARKS[0]} and {README_MARKS[1]}")
    middle = "\n".join([README_MARKS[0], *summary(rows), "", ""])
    with atomic_write(path) as partial:
        partial.write_text(text[:start] + middle + text[end:])


def main() -> int:
    """Print or write the report, and draw the plots that have rows."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__.splitlines()[0], usage=argparse.SUPPRESS
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder with the rows")
    parser.add_argument("--out", type=Path, help="write the Markdown to this file instead of printing it")
    parser.add_argument("--readme", type=Path, help="insert the summary between the marks of this file")
    parser.add_argument("--plots", type=Path, default=ROOT / "docs", help="folder of the plots")
    parser.add_argument("--no-plots", action="store_true")
    options = parser.parse_args()
    try:
        found, notes = committed(options.results)
        rows = Rows(found)
        text = "\n".join(report(rows)) + "\n"
        if options.readme:
            write_readme(options.readme, rows)
        if options.out:
            with atomic_write(options.out) as partial:
                partial.write_text(text)
        else:
            sys.stdout.write(text)
        if not options.no_plots:
            from bench.report.plots import draw  # noqa: PLC0415  (matplotlib is slow to import)

            notes += draw(rows, options.plots)
    except (ValueError, OSError, KeyError) as error:
        said = f"a row has no {error}" if isinstance(error, KeyError) else error
        sys.stderr.write(f"bench.report: error: {said}\n")
        return 2
    except ImportError as error:
        notes.append(f"no plots: {error}")
    sys.stderr.writelines(f"bench.report: {note}\n" for note in notes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
