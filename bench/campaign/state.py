"""The state of a campaign: device, rows, remaining time, failures."""

import gc
import hashlib
import importlib.metadata
import sys
import time
import traceback
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from bench import rows
from bench.instruments.graph import CaptureFailedError
from fastmask.gpus import gpu_named


class DeviceLostError(RuntimeError):
    """The GPU is unusable in this process, after an illegal access or a failed capture; a new process can continue.

    Attributes:
        part: the part of the campaign from which the new process continues.
    """

    part = ""


def peak_tflops(device_name: str) -> int | None:
    """Return the dense bf16 matmul peak of a device in TFLOP/s, None if unknown."""
    gpu = gpu_named(device_name)
    return None if gpu is None else round(gpu.bf16 / 1e12)


def code_hash() -> str:
    """Return a hash of the measured and the measuring code; rows of other code do not count as done."""
    digest = hashlib.sha256()
    folders = ("fastmask", "bench/ops", "bench/train", "bench/baselines")
    paths = [path for folder in folders for path in (rows.ROOT / folder).rglob("*.py")]
    paths += [rows.ROOT / "bench" / name for name in ("rows.py", "instruments/cases.py", "instruments/graph.py")]
    for path in sorted(paths):
        digest.update(path.relative_to(rows.ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


class Campaign:
    """The state of a campaign.

    Args:
        device: device of all measurements.
        path: file of rows.
        earlier: other files whose rows count as done.
        run: id of this call; None creates one.
    """

    def __init__(self, device: torch.device, path: Path, earlier: tuple[Path, ...] = (), run: str | None = None):
        self.device, self.path = device, path
        self.miniature = device.type != "cuda"
        self.run = run or uuid.uuid4().hex[:12]
        self.machine = rows.machine(device)
        self.triton = _version("triton")
        self.code = code_hash()
        self.until = time.monotonic()
        files = dict.fromkeys(file.resolve() for file in (*earlier, path) if file.exists())
        self.rows = [row for file in files for row in rows.read(file)]

    def left(self) -> float:
        """Return the seconds left for the current part."""
        return self.until - time.monotonic()

    def say(self, text: str) -> None:
        """Print a line and flush."""
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def store(self, bench: str, case: dict[str, Any], variant: str, figures: dict[str, Any]) -> None:
        """Append a row to the file."""
        row = {"bench": bench, "case": case, "variant": variant, **figures}
        row |= {"triton": self.triton, "run": self.run, "code": self.code}
        if self.miniature:
            row["miniature"] = True  # meaningless shapes, to test this code
        self.rows.append(rows.append(row, self.device, self.path))

    def stored(self) -> int:
        """Return the number of rows stored by this call, in this process and the ones it continues."""
        return sum(row.get("run") == self.run for row in self.rows)

    def find(self, bench: str, variant: str | None = None, **said: Any) -> list[rows.Row]:
        """Return the rows of this device and code with these fields, in their case or next to it, oldest first."""
        return [
            row
            for row in self.rows
            if row["bench"] == bench
            and variant in (None, row["variant"])
            and row.get("code") == self.code
            and row["device"] == self.machine["device"]
            and said.items() <= {name: v for name, v in (row | row["case"]).items() if name in said}.items()
        ]

    def is_done(self, bench: str, variant: str | None = None, **case: Any) -> bool:
        """Return whether there is a row, a recorded reason why there is none, or a failure in this call."""
        if self.find(bench, variant, **case) or self.find("absent", variant, bench_of=bench, **case):
            return True
        return any(row["variant"] in (variant or "all", "all") for row in self.failed_now(bench, **case))

    def failed_now(self, bench: str, **case: Any) -> list[rows.Row]:
        """Return the failures of this call, in this process and the ones it continues."""
        return self.find("failure", bench_of=bench, run=self.run, **case)

    def recover(self, what: str) -> None:
        """Free memory after an error; a DeviceLostError if the device is unusable in this process.

        Compiled code is kept, since other variants being measured would have to compile again.

        Args:
            what: the error, for the message.
        """
        try:
            free()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except RuntimeError as lost:
            raise DeviceLostError(what) from lost
        if self.device.type == "cuda" and capture_failed(self.device):
            raise DeviceLostError(f"a capture failed: {what}")

    def attempt(self, bench: str, variant: str = "all", **case: Any) -> "Attempt":
        """Return a context that reports and stores an error instead of ending the campaign."""
        return Attempt(self, bench, variant, case)


class Attempt:
    """One case: an error is printed and stored as a row, which determines the exit code, and the next case runs."""

    def __init__(self, campaign: Campaign, bench: str, variant: str, case: dict[str, Any]):
        self.campaign, self.bench, self.variant, self.case = campaign, bench, variant, case

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception) or isinstance(error, (DeviceLostError, CaptureFailedError)):
            return False
        said = (str(error).strip().splitlines() or [""])[0][:300]
        at = traceback.extract_tb(where)[-1]
        line = f"{type(error).__name__}: {said} ({Path(at.filename).name}:{at.lineno})"
        name = " ".join(str(value) for value in self.case.values())
        self.campaign.say(f"  failed: {self.bench} {name}: {line}")
        self.campaign.store("failure", {"bench_of": self.bench, **self.case}, self.variant, {"error": line})
        self.campaign.recover(line)
        return True


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def capture_failed(device: torch.device) -> bool:
    """Return whether a CUDA graph capture failed, in which case its stream is still the current one.

    PyTorch before 2.12 does not recover from that: memory is not freed, and random number generation can fail.
    """
    return torch.cuda.current_stream(device) != torch.cuda.default_stream(device)


def release() -> None:
    """Free memory and compiled code."""
    if "torch._dynamo" in sys.modules:  # its import takes seconds
        torch._dynamo.reset()
    free()


def free() -> None:
    """Free unreferenced memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def latest(all_rows: list[rows.Row]) -> Iterator[rows.Row]:
    """Yield the last row of each bench, case and variant, in the order of their first appearance."""
    kept: dict[str, rows.Row] = {}
    for row in all_rows:
        kept[repr((row["bench"], sorted(row["case"].items()), row["variant"]))] = row
    yield from kept.values()
