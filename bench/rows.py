"""Timing, and the storage of measured rows.

A row is a line of JSON in `bench/results/<device>.jsonl`: the key (`bench`, `case`, `variant`), the figures, and
machine, versions and commit. Variants that are compared are timed in turn in one run.
"""

import datetime
import functools
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
Row = dict[str, Any]


class Timing(NamedTuple):
    """Milliseconds per call: median, 20th and 80th percentile, and the number of rounds."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int


def measure(variants: dict[str, Callable[[], Any]], device: torch.device, **options: Any) -> dict[str, Timing]:
    """Return the timing of each variant; arguments as in `take`."""
    return {name: timing(times) for name, times in take(variants, device, **options).items()}


def take(
    variants: dict[Any, Callable[[], Any]],
    device: torch.device,
    *,
    rounds: int = 20,
    warmup: int = 3,
    before: Callable[[], None] = lambda: None,
    progress: Callable[[Any, int, int], None] = lambda name, number, rounds: None,
) -> dict[Any, list[float]]:
    """Time variants in turn, A B C A B C ..., so that a drift of the machine affects all of them.

    GPU times are measured between two events on the stream, after a write that flushes the L2 cache; CPU times are
    wall-clock times.

    Args:
        variants: the calls to compare.
        device: device of the calls.
        rounds: timed calls per variant.
        warmup: untimed calls per variant, also in turn.
        before: called before every call, untimed.
        progress: called before every call, untimed, with the variant, the round (0 is the warm-up), and ``rounds``.

    Returns:
        The milliseconds of each variant's calls.
    """
    for _ in range(warmup):
        for name, call in variants.items():
            progress(name, 0, rounds)
            before()
            call()
    taken: dict[Any, list[float]] = {name: [] for name in variants}
    clock = _gpu_clock(device) if device.type == "cuda" else _cpu_clock
    for number in range(1, rounds + 1):
        for name, call in variants.items():
            progress(name, number, rounds)
            before()
            taken[name].append(clock(call))
    return taken


def timing(times: list[float]) -> Timing:
    """Return median and spread of times in milliseconds."""
    if len(times) == 1:
        return Timing(times[0], times[0], times[0], 1)
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return Timing(statistics.median(times), deciles[1], deciles[7], len(times))


def copy_bandwidth(device: torch.device, size: int = 2**28) -> float:
    """Return the copy bandwidth of a device, bytes read and written per second, for ``size`` bytes."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    timing = measure({"copy": lambda: target.copy_(source)}, device, rounds=7)["copy"]
    return 2 * size / (timing.median_ms / 1e3)


def default_device() -> torch.device:
    """Return what is measured here: the GPU, or the CPU of a machine without one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine(device: torch.device) -> dict[str, Any]:
    """Describe the machine: device, versions, threads and, on a GPU, driver and clocks.

    The driver is queried once per process, since a query takes as long as measuring a kernel; the clocks are from that
    time.
    """
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device.type != "cuda":
        return {**found, "threads": torch.get_num_threads()}
    return {**found, **_driver(device.index or 0)}


@functools.cache
def commit() -> str:
    """Return the measured commit, "unknown" outside a checkout, and with "-dirty" if more than the results differ.

    Git is queried once per process, at the state of the imported code.
    """
    git = ["git", "-C", str(ROOT)]
    changed = [*git, "diff", "--quiet", "HEAD", "--", ".", ":(exclude)bench/results"]
    try:
        named = [*git, "rev-parse", "--short=12", "HEAD"]
        name = subprocess.run(named, capture_output=True, text=True, check=True).stdout.strip()
        return name + ("-dirty" if subprocess.run(changed, capture_output=True, check=False).returncode else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def results_file(device: torch.device) -> Path:
    """Return the file of a device's rows."""
    name = re.sub(r"[^a-z0-9]+", "-", machine(device)["device"].lower()).strip("-")
    return RESULTS / f"{name}.jsonl"


def append(row: Row, device: torch.device, path: Path | None = None) -> Row:
    """Append a row with date, commit and machine in a single write, and return it."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    row = {**row, "date": now, "commit": commit(), **machine(device)}
    path = path or results_file(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, (json.dumps(row) + "\n").encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return row


def read(path: Path) -> Iterator[Row]:
    """Yield the rows of a file; a ValueError names an invalid line."""
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is no row: {error}") from error
        yield row


def _cpu_clock(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _gpu_clock(device: torch.device) -> Callable[[Callable[[], Any]], float]:
    cache = torch.empty(2**28, dtype=torch.int8, device=device)  # larger than any L2

    def clock(call: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cache.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    return clock


@functools.cache
def _driver(index: int) -> dict[str, str]:
    fields = ("driver_version", "clocks.sm", "clocks.mem", "power.limit")
    query = ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # containers can lack it
        return dict.fromkeys(fields, "unknown")
    return dict(zip(fields, (value.strip() for value in answer.split(",")), strict=True))


@functools.cache
def _processor() -> str:
    try:
        named = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        named = None
    name = named[1] if named else platform.processor() or platform.machine()
    return f"{name} {os.cpu_count()} cores"
