"""`python -m fastmask.report`: writes an HTML page about one or several training runs."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import tyro

from fastmask.cli import parse, run_command
from fastmask.console import say
from fastmask.files import atomic_write
from fastmask.ranks import require_one_process
from fastmask.reporting.load import load_runs
from fastmask.reporting.page import page_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Arguments of the report."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run folders."""
    out: str = "report.html"
    """Output file, .html: one page with its charts and images, which needs no network."""
    price_per_hour: float = 0.0
    """Price of an hour of one device, in any currency; 0 shows no cost."""


def main(argv: Sequence[str]) -> None:
    """Parse the arguments, read the runs and write the page."""
    description = "Write an HTML page about one or several training runs."
    config = parse(ReportConfig, argv, prog="python -m fastmask.report", description=description)
    require_one_process("fastmask.report")
    out, price = Path(config.out), config.price_per_hour
    if not config.runs:
        raise ValueError("no run is given: name the --run-dir of one or several runs")
    if out.suffix != ".html":
        raise ValueError(f"--out {config.out}: the page is written as .html")
    if not 0 <= price < math.inf:
        raise ValueError(f"--price-per-hour must be a number of at least 0, not {price}")
    page = page_of(load_runs(config.runs), price)
    try:
        with atomic_write(out) as partial:
            partial.write_text(page, encoding="utf-8")
    except OSError as error:
        raise OSError(f"--out {out} cannot be written: {error}") from error
    say(f"{len(config.runs)} {'run' if len(config.runs) == 1 else 'runs'}, {len(page) / 1e6:.1f} MB: {out}")


if __name__ == "__main__":
    run_command("fastmask.report", main)
