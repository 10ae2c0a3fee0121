"""Long sampling jobs: batches shared among processes, and a working folder from which a killed job resumes."""

import contextlib
import importlib.util
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastmask.console import get_console, say
from fastmask.files import atomic_write, locked
from fastmask.generation.outputs import Output
from fastmask.ranks import Ranks, barrier, from_first

_SETTINGS = "settings.json"
_EVERY = 30.0  # seconds between lines where the output is not a terminal


def working_folder(out: Path) -> Path:
    """Return the folder of the parts of an output, beside it."""
    return out.with_name(f"{out.name}.parts")


def run_job(output: Output, settings: Mapping[str, Any], ranks: Ranks, draw: Callable[[int], Any]) -> None:
    """Draw all batches that a job still lacks, and write its output.

    The batches are shared among the ranks. A finished batch is a file in the working folder, which is removed at the
    end; until then the same call resumes.

    Args:
        output: where the images go.
        settings: JSON values that decide the images; parts of a job with others are refused.
        ranks: rank and world size; every rank must call this function.
        draw: returns the values of a batch, as the output takes them.

    Raises:
        ValueError: the working folder holds the parts of a job with other settings, or another job works in it.
    """
    folder, batches = working_folder(output.out), output.batches
    wait = barrier(ranks)
    with contextlib.ExitStack() as held:
        missing = from_first(ranks, lambda: _begin(held, folder, output, settings))
        with _progress(output, folder, len(missing)) as advance:
            for batch in missing[ranks.rank :: ranks.count]:
                output.write(folder, batch, draw(batch)[: batches.kept(batch)])
                advance()
            wait()
        from_first(ranks, lambda: _end(folder, output))


def _begin(held: contextlib.ExitStack, folder: Path, output: Output, settings: Mapping[str, Any]) -> list[int]:
    """Lock the folder, check or write its settings, and return the batches whose parts are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    if importlib.util.find_spec("fcntl"):  # without it, on Windows, nothing keeps two jobs apart
        held.enter_context(locked(folder / ".lock"))
    path, wanted = folder / _SETTINGS, json.loads(json.dumps(settings))
    if path.exists():
        try:
            before = json.loads(path.read_text())
            differing = [name for name in sorted(wanted.keys() | before.keys()) if wanted.get(name) != before.get(name)]
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path} cannot be read ({error}): delete {folder} to start over") from error
        if differing:
            raise ValueError(
                f"{folder} holds parts that were drawn with other settings ({', '.join(differing)}): give the same "
                f"to resume, name another --out, or delete that folder"
            )
    else:
        with atomic_write(path) as partial:
            partial.write_text(json.dumps(wanted, indent=2) + "\n")
    missing = [batch for batch in range(output.batches.count) if not output.part(folder, batch).exists()]
    done = output.batches.count - len(missing)
    if done:
        say(f"{folder}: {done} of {output.batches.count} batches are drawn already")
    return missing


def _end(folder: Path, output: Output) -> None:
    output.join(folder)
    shutil.rmtree(folder)


@contextlib.contextmanager
def _progress(output: Output, folder: Path, missing: int) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each batch; it shows the images of all ranks, their rate and the time left."""
    console, batches = get_console(), output.batches
    began = shown = time.monotonic()
    bar = Progress(
        TextColumn("sampling"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    before = (batches.count - missing) * batches.size
    task = bar.add_task("", total=batches.total, completed=min(before, batches.total), rate="")

    def advance() -> None:
        nonlocal shown
        if console.quiet:  # another rank than the first
            return
        # Parts of all ranks, of which none but this folder knows.
        parts = sum(output.part(folder, batch).exists() for batch in range(batches.count))
        images, now = min(parts * batches.size, batches.total), time.monotonic()
        rate = (parts * batches.size - before) / max(now - began, 1e-9)
        bar.update(task, completed=images, rate=f"{rate:,.1f} images/s")
        if not console.is_terminal and now - shown >= _EVERY and parts < batches.count:
            shown = now
            left = (batches.total - images) / max(rate, 1e-9)
            say(f"{images:,} of {batches.total:,} images  {rate:,.1f} images/s  {left:,.0f} s left")

    with bar:
        yield advance
