"""`python -m bench.study`: trains and evaluates every recipe of the study, and writes docs/study.md from the rows.

A run that is stored is not done again, and a stopped one resumes, so the command can be stopped and repeated. Several
may work at the same time on different runs (`--only`). Step times are measured by `--time`, on a machine with nothing
else to do, and the report by `--report`.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import rows
from bench.study.recipes import DATASETS, Job, jobs
from bench.study.runs import do, missing
from fastmask.console import say

_NAME = "python -m bench.study"


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code: 2 for a wrong argument or missing data, 130 if interrupted."""
    options = parse(argv)
    try:
        try:
            chosen = [job for job in jobs() if re.search(options.only, job.name)]
        except re.error as error:
            raise ValueError(f"--only {options.only!r} is no regular expression: {error}") from error
        if not chosen:
            raise ValueError(f"--only {options.only!r} matches no run: the first of them is {next(jobs()).name}")
        if options.time:
            from bench.study.timing import measure  # noqa: PLC0415

            measure(chosen, options.runs, options.out)
        elif options.report:
            from bench.study.report import write  # noqa: PLC0415  (matplotlib is slow to import)

            write(options.out, rows.ROOT / "docs")
        else:
            run(chosen, options.runs, options.out, plan=options.plan)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{_NAME}: error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(f"{_NAME}: interrupted: the same command resumes\n")
        return 130
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments."""
    parser = argparse.ArgumentParser(prog=_NAME, description=__doc__, usage=argparse.SUPPRESS)
    parser.add_argument("--only", default="", help="regular expression of the runs, such as digits/edm/dense/0")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=rows.RESULTS, help="folder of the rows")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--plan", action="store_true", help="print the runs that are left, and exit")
    kind.add_argument("--time", action="store_true", help="measure the step time of every recipe, in turn")
    kind.add_argument("--report", action="store_true", help="write docs/study.md and its plots from the rows")
    return parser.parse_args(argv)


def run(chosen: list[Job], runs: Path, out: Path, *, plan: bool) -> None:
    """Do the runs that are left, or print them; a ValueError if their dataset is missing."""
    left = missing(chosen, out)
    say(f"{len(chosen) - len(left)} of {len(chosen)} runs are done")
    if plan:
        for job in left:
            say(job.name)
        return
    for name in {job.dataset for job in left}:
        path = DATASETS[name].path
        if name == "fashion" and not Path(path).exists():
            raise ValueError(
                f"there is no {path}: make it from Fashion-MNIST's train-images-idx3-ubyte.gz and its labels by "
                f"python -m fastmask.prepare train-images-idx3-ubyte.gz {path} --space pixel"
            )
    for number, (job, steps) in enumerate(left.items(), start=1):
        say(f"run {number} of {len(left)}: {job.name}")
        do(job, steps, runs, out)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
