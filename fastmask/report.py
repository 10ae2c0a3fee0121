"""What a run says of itself: `stats.jsonl`, TensorBoard events, sample grids, and the dry run's table."""

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
from rich.table import Table
from torch import Tensor

from fastmask.config import TrainConfig
from fastmask.console import get_console, say
from fastmask.cost import ASSUMED, GPUS, RESERVE, memory_of, predict_run
from fastmask.counts import forward_macs, trainable_parameters
from fastmask.files import named, whole_file
from fastmask.masking import kept_count
from fastmask.model import MaskDiT

console = get_console()


class Report:
    """Writes a run's figures to its folder and shows its progress. A context manager.

    Args:
        run_dir: the run's folder.
        first_step: steps done so far; figures of later steps, from a run that was killed, are dropped.
        max_steps: steps of the whole run.
        speaks: whether this process is the one of several that writes and shows; the others do nothing here.
    """

    def __init__(self, run_dir: Path, first_step: int, max_steps: int, speaks: bool = True) -> None:
        self._path, self._speaks = run_dir / "stats.jsonl", speaks
        kept = read_stats(run_dir, first_step) if speaks else []
        self._train_s = kept[-1]["train_s"] if kept else 0.0
        if speaks and self._path.exists():
            with whole_file(self._path) as partial:
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
                if error is None:  # else that one is to be seen
                    raise

    def advance(self, step: int) -> None:
        """Move the bar to a number of steps done."""
        self._progress.update(self._task, completed=step)

    def show(self, step: int, text: str) -> None:
        """Show a line of a step that is not stored."""
        if self._speaks:
            say(f"step {step:>7}/{self._max_steps}  {text}")

    def write(self, step: int, figures: dict[str, float], *, images: int, since: float) -> None:
        """Store and show the figures of the steps up to ``step``, and how fast they were.

        Args:
            step: steps done.
            figures: loss, mask ratio and so on.
            images: how many were trained on since the last call.
            since: when that began, in `time.perf_counter`'s seconds.
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
        if figures.get("bad_images"):
            shown += f"  {figures['bad_images']:,} bad images"
        stage = "masked" if figures["mask_ratio"] > 0 else "unmasked"
        self._progress.update(self._task, completed=step, stage=stage, figures=shown)
        if not console.is_terminal:
            left = self._train_s / step * (self._max_steps - step)
            say(f"step {step:>7}/{self._max_steps}  {stage:<8}  {shown}  {left:.0f} s left")

    def picture(self, step: int, path: Path, images: Tensor, columns: int) -> None:
        """Draw a grid of images as a PNG and show it in TensorBoard."""
        if not self._speaks:
            return
        grid = save_grid(path, images, columns)
        if self._events:
            self._events.add_image(grid, step)


class Events:
    """Writes TensorBoard's events; what its thread runs into is raised here, as an OSError that names the folder.

    Args:
        folder: where they go.
        first_step: steps done so far; TensorBoard drops events of later ones.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  (optional, and slow to import)

        self._folder, self._hook = folder, threading.excepthook
        threading.excepthook = self._hide_its_own
        self._writer: Any = SummaryWriter(str(folder), purge_step=first_step + 1)

    def add_scalars(self, figures: dict[str, float], step: int) -> None:
        """Write figures of a step."""
        with self._named():
            for name, value in figures.items():
                self._writer.add_scalar(name, value, step)

    def add_image(self, pixels: "np.ndarray[Any, np.dtype[np.uint8]]", step: int) -> None:
        """Write a grid of samples, (height, width, 3)."""
        with self._named():
            self._writer.add_image("samples", pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Write what is left."""
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
        """Print the traceback of a thread that fails, unless it is that of TensorBoard, which hands its error over."""
        handed_over = args.thread is not None and type(args.thread).__module__.startswith("tensorboard.")
        if not (handed_over and issubclass(args.exc_type, OSError)):
            self._hook(args)


def read_stats(run_dir: Path, last_step: int) -> list[dict[str, float]]:
    """Return the figures that a run reported up to a step, oldest first; a damaged line is said and left out."""
    path = run_dir / "stats.jsonl"
    if not path.exists():
        return []
    # A line that was being written when the run was killed does not end in a line break.
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


def save_grid(path: Path, images: Tensor, columns: int) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """Write images as one PNG, row by row, and return its pixels.

    Args:
        path: the file.
        images: shape (N, C, H, W) in [-1, 1]; one channel is grey, three are colours, of any other number (latents)
            the first three are shown at a third of their contrast.
        columns: images per row.

    Returns:
        uint8, shape (rows * H, columns * W, 3), enlarged where the images are small.
    """
    if not importlib.util.find_spec("PIL"):
        raise ValueError("drawing images needs pillow: pip install pillow (--sample-every 0 trains without)")
    from PIL import Image  # noqa: PLC0415  (optional)

    count, channels, height, width = images.shape
    if channels == 2:
        images = torch.cat([images, torch.zeros_like(images[:, :1])], 1)
    shown = images.expand(-1, 3, -1, -1) if channels in (1, 3) else images[:, :3] / 3
    pixels = ((shown.float().cpu() + 1) * 127.5).round().clamp(0, 255).byte()
    rows = -(-count // columns)
    canvas = torch.zeros(rows * columns, 3, height, width, dtype=torch.uint8)
    canvas[:count] = pixels
    grid = (
        canvas.view(rows, columns, 3, height, width).permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, 3)
    )
    zoom = max(1, 32 // height)
    array = grid.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1).numpy()
    with whole_file(path) as partial:
        Image.fromarray(array).save(partial, format="PNG")
    return array


def versions() -> dict[str, str]:
    """Return what a run's figures depend on: versions, machine and, in a checkout, the commit."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    here = Path(__file__).parent
    if (here.parent / ".git").exists() and shutil.which("git"):
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
        found["commit"] = git.stdout.strip() or "unknown"
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def print_plan(config: TrainConfig, model: MaskDiT) -> None:
    """Print what a run would be: its configuration, and the counts of its network.

    Args:
        config: the resolved configuration.
        model: the network; its tensors may be on the meta device.
    """
    fields = Table(title=f"configuration of {config.preset}", show_header=False)
    names = [f"{name} = {value}" for name, value in config.recorded().items()]
    half = -(-len(names) // 2)
    for i in range(half):
        fields.add_row(names[i], names[half + i] if half + i < len(names) else "")
    console.print(fields)

    parameters = trainable_parameters(model)
    kept = kept_count(model.length, config.mask_ratio)
    full, masked = forward_macs(model), forward_macs(model, kept)
    counts = Table(title="counts", show_header=False)
    for _ in range(2):
        counts.add_column(no_wrap=True)
    counts.add_row("input", f"{model.in_channels} x {model.input_size} x {model.input_size}, {model.length} patches")
    counts.add_row("trainable parameters", f"{parameters / 1e6:.1f}M")
    if kept < model.length:
        counts.add_row(f"forward, {kept} of {model.length} patches kept", f"{masked / 1e9:.2f} GMAC per image")
    counts.add_row("forward, unmasked", f"{full / 1e9:.2f} GMAC per image")
    counts.add_row("training, 6 FLOP per forward MAC", f"{6 * masked / 1e9:.1f} GFLOP per image")
    precision = "bf16" if config.precision == "fp32" and config.device == "cpu" else config.precision
    _add_memory(counts, config, model, precision)
    images = config.max_steps * config.batch_size
    counts.add_row(f"images seen, {config.max_steps:,} steps x {config.batch_size}", f"{images:,}")
    counts.add_row("training in all", f"{_mean_macs(config, model) * 6 * images:.3g} FLOP")
    _add_prediction(counts, config, model, precision)
    console.print(counts)
    say("Memory is an estimate for one process; more micro-batches per step or another optimizer take no more.")
    say(f"The prediction was not measured; {ASSUMED}.")


def _add_memory(counts: Table, config: TrainConfig, model: MaskDiT, precision: str) -> None:
    """Add what is in memory at most, by part, at the run's lowest mask ratio, and the batches that fit."""
    ratio = min(config.ratio_at(step) for step in (0, config.max_steps - 1))  # it rises or falls all the way
    again, averages = config.activation_checkpointing == "block", 1 + len(config.ema_widths)
    memory = memory_of(model, ratio, precision, averages=averages, checkpoint_blocks=again)
    counts.add_row("weights / gradients, fp32", f"{memory.weights / 1e9:.2f} GB each")
    counts.add_row("AdamW's two moments, fp32", f"{memory.moments / 1e9:.2f} GB")
    counts.add_row("EMA, fp32" if averages == 1 else f"{averages} EMAs, fp32", f"{memory.ema / 1e9:.2f} GB")
    if memory.copy:
        counts.add_row(f"copy of the weights, {precision}", f"{memory.copy / 1e9:.2f} GB")
    counts.add_row(f"kept for backward, {precision}", f"{memory.activations / 1e6:.1f} MB per image")
    if memory.recomputed:
        counts.add_row("one block computed again, at most", f"{memory.recomputed / 1e6:.1f} MB per image")
    counts.add_row("held for a moment in backward", f"{memory.working / 1e6:.1f} MB per image")
    micro = config.micro_batch
    counts.add_row(f"at once, micro-batches of {micro}", f"{memory.high_water(micro) / 1e9:.2f} GB")
    on_gpu = config.device.startswith("cuda")
    here = [torch.cuda.get_device_properties(config.device).total_memory / 1e9] if on_gpu else []
    for size in here or (24, 40, 80, 141):
        largest = memory.largest_batch(size * 1e9)
        shown = f"{largest}" if largest else "none"
        counts.add_row(f"largest batch in {size:.0f} GB, {RESERVE:.0%} free", shown)


def _add_prediction(counts: Table, config: TrainConfig, model: MaskDiT, precision: str) -> None:
    """Add what one H100 would take. On a CPU fp32 stands for "auto", which is bf16 there."""
    gpu = GPUS["h100"]
    try:
        run = predict_run(config, model, gpu, precision)
    except ValueError as error:
        counts.add_row(f"prediction, one {gpu.name}, {precision}", str(error))
        return
    shown = f"{run.images_per_s:,.0f} images/s, {run.gpu_hours:,.1f} hours"
    counts.add_row(f"prediction, one {gpu.name}, {precision}", shown)


def _mean_macs(config: TrainConfig, model: MaskDiT) -> float:
    """Return the forward MACs per image, averaged over the run."""
    stages = config.stages(model.length)
    ends = [*(stage.first_step for stage in stages[1:]), config.max_steps]
    steps = [end - stage.first_step for stage, end in zip(stages, ends, strict=True)]
    return sum(n * forward_macs(model, stage.keep) for n, stage in zip(steps, stages, strict=True)) / config.max_steps
