"""Profiler: breakdown of a training step, in which each instant is counted once.

The breakdown counts kernel time on a GPU, and the self time of operators on a CPU. Where several events overlap, an
instant belongs to the one that started last; data copies and communication count only when nothing else runs. The
remainder is CPU-bound time: Python, launches, waiting.
"""

import collections
import heapq
import importlib
import itertools
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from fastmask.console import get_console, say
from fastmask.files import atomic_write

PRODUCTS, ATTENTION, OPTIMIZER, DATA = "matmuls", "attention", "optimizer", "data"
COMMUNICATION, OTHER, GAPS = "communication", "other", "CPU-bound time"
_OURS = "fastmask"

# Categories by the names of operators and kernels; the first match counts.
_KINDS = [
    (kind, re.compile(pattern))
    for kind, pattern in [
        (DATA, r"enumerate\(DataLoader\)|Memcpy HtoD"),
        (COMMUNICATION, r"nccl|gloo|c10d::|_c10d_functional::"),
        (OPTIMIZER, r"adamw_ema|multi_tensor_apply|FusedAdam|^Optimizer\."),
        (_OURS, r"^fastmask::|^_\w+_kernel"),
        (ATTENTION, r"scaled_dot_product|flash|fmha|sdpa|efficient_attention|cudnn_attention"),
        (PRODUCTS, r"aten::(b?mm|addb?mm|baddbmm|_addmm_activation|\w*convolution\w*)$"),
        (PRODUCTS, r"gemm|gemv|cutlass|nvjet|xmma|splitK|triton_tem_"),
    ]
]
_WARMUP = 4  # steps before the trace; the second captures graphs, the last is timed
_AVOIDABLE = 0.1  # share of a step from which a wait is reported even if it is not the largest part
_WINDOW = "fastmask: profiled steps"


class Profile(NamedTuple):
    """Mean time of a step, by part.

    Attributes:
        step_s: seconds per step under the profiler.
        unprofiled_s: seconds of a step without the profiler.
        parts: seconds by category of this module, or by op for this library's ops; they sum up to ``step_s``.
        flops_per_step: FLOP of matmuls and attention.
        peak_flops: peak FLOP/s of the device, None if unknown.
    """

    step_s: float
    unprofiled_s: float
    parts: dict[str, float]
    flops_per_step: float
    peak_flops: float | None = None

    def share(self, *names: str) -> float:
        """Return the fraction of a step taken by the given parts."""
        return sum(self.parts.get(name, 0.0) for name in names) / self.step_s


class _Interval(NamedTuple):
    start: float
    end: float
    name: str


def profile_steps(
    run_step: Callable[[], None],
    count: int,
    run_dir: Path,
    device: torch.device,
    *,
    data_wait_s: Callable[[], float],
    flops_per_step: float,
    peak_flops: float | None = None,
    rank: int = 0,
) -> Profile:
    """Run steps under PyTorch's profiler, print a breakdown, and store the trace.

    The trace is `profile/trace.json.gz` in the run folder, for chrome://tracing or Perfetto.

    Args:
        run_step: does one training step.
        count: number of steps to profile, after a few warm-up steps.
        run_dir: the run folder.
        device: device of the steps.
        data_wait_s: returns the seconds that the host has waited for data so far.
        flops_per_step: FLOP of matmuls and attention on this device.
        peak_flops: peak FLOP/s of the device, if known.
        rank: rank of this process; only rank 0 stores and prints.

    Raises:
        ValueError: ``count`` below 1.
    """
    if count < 1:
        raise ValueError(f"there must be at least 1 step to profile, not {count}")
    # Warm up, and time the last step without the profiler.
    for _ in range(_WARMUP):
        _synchronize(device)
        began = time.perf_counter()
        run_step()
    _synchronize(device)
    unprofiled_s = time.perf_counter() - began
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        run_step()  # not counted: the first step under the profiler is slow
        _synchronize(device)
        waited = data_wait_s()
        with record_function(_WINDOW):
            for _ in range(count):
                run_step()
            _synchronize(device)
        waited = data_wait_s() - waited
    step_s, parts = _parts_of(profiler.events(), device, waited, count)
    found = Profile(step_s, unprofiled_s, parts, flops_per_step, peak_flops)
    if rank == 0:
        path = run_dir / "profile" / "trace.json.gz"
        with atomic_write(path) as partial:
            profiler.export_chrome_trace(str(partial))
        _print(found, count, device)
        say(f"trace of {count + 1} steps: {path}")
        say(bound_of(found, device))
    return found


def bound_of(found: Profile, device: torch.device) -> str:
    """Return one line with the bottleneck of a run and its avoidable waits."""
    advice = {
        DATA: ("waits for data {}", "--num-workers"),
        COMMUNICATION: ("waits for other processes {}", "a larger --batch-size, or --micro-batch-size"),
        GAPS: ("CPU-bound: the GPU idles {}", "--cuda-graphs on, or --compile block")
        if device.type == "cuda"
        else ("Python and operator overhead take {}", "a larger --micro-batch-size, or --compile block"),
    }
    shares = {name: found.share(name) for name in (*advice, OPTIMIZER)}
    shares[PRODUCTS] = found.share(PRODUCTS, ATTENTION)
    shares[OTHER] = 1 - sum(shares.values())
    largest = max(shares, key=shares.__getitem__)
    avoidable = [name for name in advice if name == largest or shares[name] >= _AVOIDABLE]
    said = [": ".join(advice[name]).format(f"{shares[name]:.0%}") for name in avoidable]
    if largest not in advice:
        said.insert(0, _busy(found, largest, shares[largest]))
    return "; ".join(said)


def _busy(found: Profile, largest: str, share: float) -> str:
    if largest == OPTIMIZER:
        return f"the optimizer takes {share:.0%}: the run is bound by it; a larger --batch-size reduces its share"
    if largest == OTHER:
        return f"operators other than matmuls and attention take {share:.0%}: the run is bound by memory or launches"
    rate = found.flops_per_step / (found.parts.get(PRODUCTS, 0.0) + found.parts.get(ATTENTION, 0.0))
    unit, name = (1e12, "TFLOP/s") if rate >= 1e12 else (1e9, "GFLOP/s")
    peak = f" of {found.peak_flops / unit:,.0f}" if found.peak_flops else ""
    return f"matmuls and attention take {share:.0%}: the run is bound by them, at {rate / unit:,.1f}{peak} {name}"


def _print(found: Profile, count: int, device: torch.device) -> None:
    how = "device time" if device.type == "cuda" else "time of operators"
    table = importlib.import_module("rich.table").Table(title=f"step breakdown, mean of {count} steps: {how}")
    table.add_column("part")
    table.add_column("ms", justify="right")
    table.add_column("%", justify="right")
    kinds = (PRODUCTS, ATTENTION)
    last = (OTHER, OPTIMIZER, DATA, COMMUNICATION, GAPS)
    ours = sorted(found.parts.keys() - {*kinds, *last}, key=lambda name: -found.parts[name])
    for name in (*kinds, *ours, *last):
        seconds = found.parts.get(name, 0.0)
        table.add_row(name, f"{seconds * 1e3:.2f}", f"{seconds / found.step_s:.1%}")
    table.add_section()
    table.add_row("a step", f"{found.step_s * 1e3:.2f}", "100.0%")
    table.add_row("a step without the profiler", f"{found.unprofiled_s * 1e3:.2f}", "")
    get_console().print(table)


def _parts_of(events: Any, device: torch.device, waited: float, count: int) -> tuple[float, dict[str, float]]:
    """Return the seconds per step and by part, from the events of ``count`` steps and the wait for data."""
    window = next(event.time_range for event in events if event.name == _WINDOW and event.device_type == DeviceType.CPU)
    parts = _swept(sorted(_intervals(events, device)), window.start, window.end)
    wall = (window.end - window.start) * 1e-6
    gaps = max(0.0, wall - sum(parts.values()))
    if device.type != "cuda":
        waited -= parts.get(DATA, 0.0)  # the wait includes the DataLoader's operators
    waited = min(max(0.0, waited), gaps)  # a wait that overlaps device work costs nothing
    parts[DATA] = parts.get(DATA, 0.0) + waited
    parts[GAPS] = gaps - waited
    return wall / count, {name: seconds / count for name, seconds in parts.items()}


def _intervals(events: Any, device: torch.device) -> Iterator[_Interval]:
    """Yield kernels on a GPU, operators on a CPU, each with the name of its part."""
    wanted = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    for event in events:
        if event.device_type != wanted or event.name == _WINDOW:
            continue
        name = _part_of(event)
        if event.is_user_annotation and (name == OTHER or wanted == DeviceType.CUDA):
            continue  # an annotated range, not work
        yield _Interval(event.time_range.start, event.time_range.end, name)


def _part_of(event: Any) -> str:
    """Return the part of an event, by its own name or the nearest parent that matches."""
    while event is not None:
        for kind, pattern in _KINDS:
            if pattern.search(event.name):
                return str(event.name) if kind == _OURS else kind
        event = event.cpu_parent
    return OTHER


def _swept(intervals: list[_Interval], begin: float, end: float) -> dict[str, float]:
    """Return seconds by name of sorted intervals in microseconds, in a sweep that gives each instant one owner."""
    seconds: dict[str, float] = collections.defaultdict(float)
    edges = sorted({edge for interval in intervals for edge in interval[:2] if begin < edge < end} | {begin, end})
    running: list[tuple[bool, float, float, str]] = []
    following = 0
    for now, until in itertools.pairwise(edges):
        while following < len(intervals) and intervals[following].start <= now:
            start, stop, name = intervals[following]
            # The owner is the innermost interval: the latest start, then the earliest end.
            heapq.heappush(running, (name in (COMMUNICATION, DATA), -start, stop, name))
            following += 1
        while running and running[0][2] <= now:
            heapq.heappop(running)
        if running:
            seconds[running[0][3]] += (until - now) * 1e-6
    return dict(seconds)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
