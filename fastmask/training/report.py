"""Logging: stats.jsonl, TensorBoard, progress lines, sample grids."""

import contextlib
import importlib.util
import json
import platform
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from fastmask.console import get_console, say
from fastmask.files import atomic_write, named
from fastmask.grid import save_grid

console = get_console()


class Report:
    """Writes training metrics to the run folder and shows progress. A context manager.

    Args:
        run_dir: the run folder.
        first_step: steps done so far; metrics of later steps, left by a killed run, are dropped.
        max_steps: total number of steps.
        speaks: whether this rank logs; the calls of other ranks do nothing.
    """

    def __init__(self, run_dir: Path, first_step: int, max_steps: int, speaks: bool = True) -> None:
        self._path, self._speaks = run_dir / "stats.jsonl", speaks
        kept = read_stats(run_dir, first_step) if speaks else []
        self._train_s = kept[-1]["train_s"] if kept else 0.0
        if speaks and self._path.exists():
            with atomic_write(self._path) as partial:
                partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._events: Events | None = None
        if speaks and importlib.util.find_spec("tensorboard"):
            self._events = Events(run_dir / "tensorboard", first_step)
        elif speaks:
            say("no TensorBoard events: tensorboard is not installed (pip install tensorboard)")
        self._progress = Progress(
            TextColumn("{task.fields[stage]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not (speaks and console.is_terminal),
        )
        self._task = self._progress.add_task("", total=max_steps, completed=first_step, stage="training", figures="")
        self._max_steps = max_steps

    def __enter__(self) -> "Report":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        if self._events:
            try:
                self._events.close()
            except OSError:
                if error is None:  # do not hide the original error
                    raise

    def advance(self, step: int) -> None:
        """Update the progress bar."""
        self._progress.update(self._task, completed=step)

    def show(self, step: int, text: str) -> None:
        """Print a line that is not stored."""
        if self._speaks:
            say(f"step {step:>7}/{self._max_steps}  {text}")

    def write(self, step: int, figures: dict[str, float], *, images: int, since: float) -> None:
        """Store and print metrics, with the throughput and the total training time added.

        Args:
            step: steps done.
            figures: metrics by name: loss, mask_ratio, ..
            images: number of images trained on since the last call.
            since: start of that interval, in seconds of `time.perf_counter`.
        """
        if not self._speaks:
            return
        seconds = time.perf_counter() - since
        self._train_s += seconds
        figures = {**figures, "images_per_s": images / seconds, "train_s": self._train_s}
        with named(self._path), self._path.open("a") as file:
            file.write(json.dumps({"step": step, **figures}) + "\n")
        if self._events:
            self._events.add_scalars(figures, step)
        shown = f"loss {figures['loss']:.4f}  {figures['images_per_s']:,.0f} images/s"
        if "eval/frechet" in figures:
            shown += f"  Frechet distance {figures['eval/frechet']:.3g}"
        if figures.get("bad_images"):
            shown += f"  {figures['bad_images']:,} bad images"
        stage = "masked" if figures["mask_ratio"] > 0 else "unmasked"
        self._progress.update(self._task, completed=step, stage=stage, figures=shown)
        if not console.is_terminal:
            left = self._train_s / step * (self._max_steps - step)
            say(f"step {step:>7}/{self._max_steps}  {stage:<8}  {shown}  {left:.0f} s left")

    def picture(self, step: int, path: Path, images: Tensor, columns: int) -> None:
        """Write a grid of images as a PNG and to TensorBoard."""
        if not self._speaks:
            return
        grid = save_grid(path, images, columns)
        if self._events:
            self._events.add_image(grid, step)


class Events:
    """Writes TensorBoard events; errors of its writer thread are raised here, as an OSError with the folder.

    Args:
        folder: folder of the event files.
        first_step: steps done so far; TensorBoard drops the events of later steps.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  (optional, and slow to import)

        self._folder, self._hook = folder, threading.excepthook
        threading.excepthook = self._hide_its_own
        self._writer: Any = SummaryWriter(str(folder), purge_step=first_step + 1)

    def add_scalars(self, figures: dict[str, float], step: int) -> None:
        """Write the metrics of a step."""
        with self._named():
            for name, value in figures.items():
                self._writer.add_scalar(name, value, step)

    def add_image(self, pixels: "np.ndarray[Any, np.dtype[np.uint8]]", step: int) -> None:
        """Write a grid of samples, (height, width, 3)."""
        with self._named():
            self._writer.add_image("samples", pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close the writer."""
        try:
            with self._named():
                self._writer.close()
        finally:
            threading.excepthook = self._hook

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror or str(error), str(self._folder)) from error

    def _hide_its_own(self, args: threading.ExceptHookArgs) -> None:
        """Print the traceback of a failed thread, except for TensorBoard's, whose error is raised by its next call."""
        handed_over = args.thread is not None and type(args.thread).__module__.startswith("tensorboard.")
        if not (handed_over and issubclass(args.exc_type, OSError)):
            self._hook(args)


def read_stats(run_dir: Path, last_step: int) -> list[dict[str, float]]:
    """Return the metrics reported up to a step, oldest first; damaged lines are skipped with a warning."""
    path = run_dir / "stats.jsonl"
    if not path.exists():
        return []
    # A line without a newline was being written when the run was killed.
    lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    found: list[dict[str, float]] = []
    for number, line in enumerate(lines, start=1):
        try:
            figures = json.loads(line)
            is_good = isinstance(figures["step"], int) and all(type(v) in (int, float) for v in figures.values())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            is_good = False
        if not is_good:
            say(f"{path}:{number} is damaged: left out")
        elif figures["step"] <= last_step:
            found.append(figures)
    return found


def versions() -> dict[str, str]:
    """Return what determines a run's results: library versions, the GPU and, in a git checkout, the commit."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    here = Path(__file__).parents[1]
    if (here.parent / ".git").exists() and shutil.which("git"):
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
        found["commit"] = git.stdout.strip() or "unknown"
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found
