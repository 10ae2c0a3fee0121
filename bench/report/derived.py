"""Quantities derived from rows: rates, ratios and bounds, for tables and plots."""

from collections.abc import Sequence
from typing import Any

from bench.report.compare import key, machine_of
from bench.rows import Row
from fastmask.gpus import gpu_named

SIZES = ("s2", "b2", "l2", "xl2", "h2")
RECIPES = ("tread-0.5", "sprint-0.75", "deferred-0.75")  # other networks, of which there is no plain baseline
FORMS = ("dense", "masked-0.5", "masked-0.75", *RECIPES)
PLAIN = ("plain eager", "plain compiled")
STACKS = (*PLAIN, "ours", "ours compiled")
MORE_STACKS = ("ours packed", "ours graphs")  # shown where they were measured


class Rows:
    """The measured rows, oldest first, without miniatures (which only test code) and rows without a time."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = [row for row in rows if "median_ms" in row and not row.get("miniature")]

    def of(self, bench: str) -> list[Row]:
        """Return the last row of each key and machine."""
        return list({(machine_of(row), key(row)): row for row in self.rows if row["bench"] == bench}.values())

    def beside(self, row: Row, variant: str, **case: Any) -> Row | None:
        """Return the row of another variant, or of a case with other fields, that is comparable with ``row``."""
        wanted = (machine_of(row), key({**row, "variant": variant, "case": {**row["case"], **case}}))
        same = [other for other in self.rows if (machine_of(other), key(other)) == wanted]
        one_run = [other for other in same if "run" in row and other.get("run") == row["run"]]
        one_code = [other for other in same if code_of(other) == code_of(row) != "unknown"]
        return (one_run or one_code or [None])[-1]


def rate(row: Row) -> float:
    return row["case"]["batch"] / row["median_ms"] * 1e3


def against(row: Row, other: Row) -> float:
    return other["median_ms"] / row["median_ms"]


def faster(row: Row, other: Row) -> float:
    return rate(row) / rate(other)


def bound(row: Row, dense: Row) -> float:
    return dense["forward_gmac"] / row["forward_gmac"]


def mfu(row: Row) -> float:
    gpu = gpu_named(machine_of(row))
    assert gpu is not None
    return 6e9 * row["forward_gmac"] * rate(row) / gpu.peak(row["case"]["precision"])


def dense_of(rows: Rows, row: Row) -> Row | None:
    """Return the row of the dense DiT on the same stack."""
    size_and_data = "-".join(row["case"]["preset"].split("-")[-2:])
    return rows.beside(row, row["variant"], preset=f"dit-{size_and_data}", form="dense")


def size_of(row: Row) -> str:
    """Return the encoder size of a step: "s2", "xl2"; its preset is SIZE-DATA or RECIPE-SIZE-DATA."""
    size: str = row["case"]["preset"].split("-")[-2]
    return size


def is_beside_packed_alone(rows: Rows, row: Row) -> bool:
    """Return whether a step was measured only for comparison with packed samples."""
    others = (*PLAIN, "ours compiled")
    return rows.beside(row, "ours packed") is not None and not any(rows.beside(row, other) for other in others)


def moved(row: Row) -> float:
    return row["least_bytes"] / row["median_ms"] / 1e6


def of_copy(row: Row) -> float:
    return 1e9 * moved(row) / row["copy_bandwidth"] if "copy_bandwidth" in row else row["copy_percent"] / 100


def code_of(row: Row) -> str:
    """Return the version of the measured code: its hash if the row has one, else its commit."""
    return str(row.get("code") or row["commit"])
