"""`python -m bench.campaign`: all GPU checks and measurements in nine minutes, each part stored when it is done.

Rows go to bench/results/DEVICE.jsonl and the table to DEVICE.md; the same command resumes with the missing parts.
Without a GPU, a miniature of every part runs as a test of the code, with its rows in a temporary folder.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple, NoReturn

from bench import rows
from bench.campaign import STARTED, device, digits, gate, kernels, steps, table, tune
from bench.campaign.clock import TimeUp, share, time_box
from bench.campaign.state import Campaign, DeviceLostError

_NAME = "python -m bench.campaign"
_RESERVE = 10.0  # seconds for the table, and for time boxes that overrun


class Part(NamedTuple):
    """A part of the campaign.

    Attributes:
        seconds: time budget out of nine minutes; unused time goes to the parts after it.
        what: description for the plan.
        todo: returns the outstanding items.
        run: runs the part.
    """

    seconds: float
    what: str
    todo: Callable[[Campaign], list[str]]
    run: Callable[[Campaign], None]


PARTS = {
    "device": Part(15, "name the device, measure a copy and a product", device.todo, device.run),
    "steps": Part(330, "training steps, ours and plain, compiled and eager", steps.todo, steps.run),
    "tests": Part(85, "every op against float64, then pytest -m gpu", gate.todo, gate.run),
    "kernels": Part(60, "kernels beside reference and compiler", kernels.todo, kernels.run),
    "tune": Part(20, "launch settings of the row kernels", tune.todo, tune.run),
    "digits": Part(20, "a real training run beside the CPU's", digits.todo, digits.run),
}


def main(argv: Sequence[str]) -> int:
    """Run the campaign and return the exit code: 1 if something failed, 2 for a wrong argument, 130 if interrupted."""
    # Options, device and the file of rows.
    options = parse(argv)
    where = rows.default_device()
    if options.record_digits:
        made = digits.record()
        sys.stdout.write(f"{digits.RECORD}: {made['means']}, {made['seconds']} s\n")
        return 0
    folder = options.out or (rows.RESULTS if where.type == "cuda" else None)
    if folder is None and not options.plan:
        folder = Path(tempfile.mkdtemp(prefix="campaign-"))
    committed = rows.results_file(where)
    path = (folder or rows.RESULTS) / committed.name
    earlier = (committed,) if where.type == "cuda" else ()
    try:
        campaign = Campaign(where, path, earlier, options.run)
    except (ValueError, OSError) as error:
        return _complain(str(error))
    kind = "a miniature, as there is no GPU" if campaign.miniature else "one GPU"
    campaign.say(f"{campaign.machine['device']}: {kind}; rows go to {path if folder else 'a temporary folder'}")
    chosen = {name: PARTS[name] for name in PARTS if name in options.parts}
    if options.plan:
        print_plan(campaign, chosen, options.minutes)
        return 0
    # Run the parts; if the process loses the device, continue in a new one.
    until = options.until or STARTED + 60 * options.minutes - _RESERVE
    signal.signal(signal.SIGTERM, _interrupt)
    code = 0
    try:
        names = list(chosen)
        left = names[names.index(options.from_part) :] if options.from_part else names
        run_parts(campaign, {name: chosen[name] for name in left}, until)
    except KeyboardInterrupt:
        code = 130
        campaign.say(f"interrupted: the {campaign.stored()} rows of this call are in {path}; the same command resumes")
    except DeviceLostError as error:
        campaign.say(f"this process can measure no more ({error}): a new one continues with {error.part}")
        again = [*argv, "--run", campaign.run, "--until", str(until), "--from-part", error.part]
        os.execv(sys.executable, [sys.executable, "-m", "bench.campaign", *again])
    # Write the table and summarise.
    campaign.say("\n" + table.write(campaign.rows, path.with_suffix(".md")))
    missing = {name: len(part.todo(campaign)) for name, part in chosen.items()}
    if any(missing.values()):
        said = ", ".join(f"{name} {count}" for name, count in missing.items() if count)
        campaign.say(f"not measured ({said}): the same command resumes")
    failed = sum(row["run"] == campaign.run for row in campaign.find("failure"))
    campaign.say(f"{campaign.stored()} rows in {time.monotonic() - STARTED:.0f} s, {failed} failures: {path}")
    return code or min(1, failed)


def run_parts(campaign: Campaign, chosen: dict[str, Part], until: float) -> None:
    """Run the parts in order, each in its share of the remaining time.

    A DeviceLostError carries the part from which a new process has to continue.
    """
    names = list(chosen)
    for i, name in enumerate(names):
        left = max(0.0, until - time.monotonic())
        box = share(left, [chosen[later].seconds for later in names[i:]])
        campaign.say(f"{name}: {chosen[name].what}, at most {box:.0f} s")
        campaign.until = time.monotonic() + box
        try:
            over = run_part(campaign, name, chosen[name], box)
        except DeviceLostError as error:
            error.part = name
            raise
        if over:
            campaign.say(f"  the {box:.0f} s are over")
        try:
            campaign.recover(f"at the end of {name}")
        except DeviceLostError as error:
            if name == names[-1]:
                return  # nothing is left to measure
            error.part = names[i + 1]
            raise


def run_part(campaign: Campaign, name: str, part: Part, box: float) -> bool:
    """Run a part, and return whether its time ran out."""
    if campaign.failed_now("part", part=name):
        return False  # it crashed the previous process
    try:
        with time_box(box), campaign.attempt("part", part=name):
            part.run(campaign)
    except TimeUp:
        return True
    return False


def print_plan(campaign: Campaign, chosen: dict[str, Part], minutes: float) -> None:
    """Print the parts in order, with their time and outstanding items."""
    whole = sum(part.seconds for part in chosen.values())
    for name, part in chosen.items():
        box = (60 * minutes - _RESERVE) * part.seconds / whole
        left = part.todo(campaign)
        campaign.say(f"{name:<8} {box:4.0f} s  {part.what}: {len(left)} to do")
        for item in left:
            campaign.say(f"             {item}")
    campaign.say("A part that needs less leaves the rest to those after it; what does not fit waits for the next call.")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments; an invalid one exits with one line and code 2."""
    parser = argparse.ArgumentParser(prog=_NAME, description=__doc__.splitlines()[0].partition(": ")[2])
    parser.add_argument("--plan", action="store_true", help="print the parts with their time and exit")
    parser.add_argument("--minutes", type=float, default=9.0, help="total time (default 9)")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS), help=",".join(PARTS))
    parser.add_argument("--out", type=Path, help="folder of the rows and the table")
    parser.add_argument("--record-digits", action="store_true", help="record the reference curve of `digits`")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # these three: for a process that continues another
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--from-part", help=argparse.SUPPRESS)
    parser.error = _error  # type: ignore[method-assign]
    options = parser.parse_args(argv)
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        _error(f"--parts: there is no {unknown[0]!r}; there are {', '.join(PARTS)}")
    if not 0 < options.minutes < float("inf"):
        _error(f"--minutes must be above 0, not {options.minutes}")
    if options.out and options.out.exists() and not options.out.is_dir():
        _error(f"--out {options.out} is a file: name a folder")
    return options


def _error(message: str) -> NoReturn:
    raise SystemExit(_complain(message))


def _complain(message: str) -> int:
    sys.stderr.write(f"{_NAME}: {message}\n")
    return 2


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
