"""The charts of a page: loss, loss by noise level, schedules, speed, evaluation over steps."""

import math
from collections.abc import Callable, Mapping, Sequence

from fastmask.reporting.chart import Line, XAxis, chart, level_style, style_of
from fastmask.reporting.load import RunRecord
from fastmask.reporting.scale import bins, time_unit, up_to
from fastmask.reporting.series import LIMIT, Point

NOISE, EVAL = "loss_at_log_snr/", "eval/"
AXES = {"steps": "steps", "images": "images seen", "time": "training time"}
_SCHEDULE = ("lr", "mask_ratio", "grad_norm", "update_ratio")
_SPEED = ("images_per_s", "data_wait", "mfu", "memory_gb", "bad_images")
_OWN = {"step", "loss", "train_s", *_SCHEDULE, *_SPEED}
_ACRONYMS = {"fid": "FID", "sfid": "sFID", "kid": "KID"}
_MAX_TICKS = 4  # intervals of an x axis, for the width of a phone


class Figures:
    """Draws charts of what several runs reported, on common x axes.

    Args:
        runs: the runs.
    """

    def __init__(self, runs: Sequence[RunRecord]) -> None:
        self._runs = runs
        self._places = [_places(run) for run in runs]
        self.keys = list(dict.fromkeys(key for run in runs for line in run.lines for key in line))
        self._axes = _axes(self._places)

    def loss(self) -> str:
        """Return the charts of the loss and its terms."""
        terms = [key for key in self.keys if key not in _OWN and "/" not in key]
        return self._chart("Loss", "loss", log=True, wide=True) + "".join(
            self._chart(_title(key), key, log=True) for key in terms
        )

    def noise(self) -> str:
        """Return the charts of the loss by noise level: at the last report of each run, and over the run."""
        levels = sorted((key for key in self.keys if key.startswith(NOISE)), key=_lower_edge)
        if not levels:
            return ""
        names = [_level(key) for key in levels]
        profiles = []
        for i, run in enumerate(self._runs):
            last = next((line for line in reversed(run.lines) if any(key in line for key in levels)), {})
            points = [(float(k), last[key]) for k, key in enumerate(levels) if key in last]
            profiles.append(Line(run.label, style_of(i), {"bins": points}))
        axis = XAxis("bins", "log-SNR, from noise to image", bins(names))
        found = chart("At the last report", profiles, [axis], log=True, wide=True, markers=True)
        for i, run in enumerate(self._runs):
            lines = [
                Line(name, level_style(k, len(levels)), self._points(i, key))
                for k, (key, name) in enumerate(zip(levels, names, strict=True))
            ]
            title = f"{run.label}, by log-SNR" if len(self._runs) > 1 else "By log-SNR"
            found += chart(title, lines, _axes([self._places[i]]), log=True, trend_only=True, wide=len(self._runs) == 1)
        return found

    def evaluation(self) -> str:
        """Return the charts of metrics that were evaluated while training."""
        metrics = [key for key in self.keys if key.startswith(EVAL)]
        return "".join(self._chart(_title(key.removeprefix(EVAL)), key, markers=True) for key in metrics)

    def schedule(self) -> str:
        """Return the charts of the learning rate, the mask ratio, the norms and what else was reported."""
        others = [key for key in self.keys if "/" in key and not key.startswith((NOISE, EVAL))]
        return "".join(
            (
                self._chart("Learning rate", "lr", from_zero=True),
                self._chart("Mask ratio", "mask_ratio", from_zero=True),
                self._chart("Gradient norm", "grad_norm", log=True),
                self._chart("Update norm / weight norm", "update_ratio", log=True),
                *(self._chart(key, key) for key in others),
            )
        )

    def speed(self) -> str:
        """Return the charts of throughput, waiting for data, MFU and memory."""
        return "".join(
            (
                self._chart("Throughput", "images_per_s", from_zero=True, unit="images/s"),
                self._chart("Waiting for data", "data_wait", from_zero=True, unit="% of the time", factor=100),
                self._chart("MFU", "mfu", from_zero=True, unit="% of the peak", factor=100),
                self._chart("Peak memory", "memory_gb", from_zero=True, unit="GB"),
                self._chart("Substituted images", "bad_images", from_zero=True),
            )
        )

    def _chart(
        self,
        title: str,
        key: str,
        *,
        log: bool = False,
        from_zero: bool = False,
        unit: str = "",
        wide: bool = False,
        markers: bool = False,
        factor: float = 1.0,
    ) -> str:
        """Return the chart of a key of the reports, empty if no run has it."""
        lines = []
        for i, run in enumerate(self._runs):
            points = self._points(i, key, factor)
            if any(points.values()):
                lines.append(Line(run.label, style_of(i), points))
        return chart(title, lines, self._axes, log=log, from_zero=from_zero, unit=unit, wide=wide, markers=markers)

    def _points(self, index: int, key: str, factor: float = 1.0) -> Mapping[str, Sequence[Point]]:
        """Return the points of a key of the reports of the index-th run, by x axis."""
        lines, places = self._runs[index].lines, self._places[index]
        return {
            axis: [
                (x, line[key] * factor)
                for x, line in zip(places[axis], lines, strict=True)
                if x is not None and key in line
            ]
            for axis in AXES
        }


def metric_name(key: str) -> str:
    """Return the name of a metric as it is written in text."""
    return "inception score" if key == "is" else " ".join(_ACRONYMS.get(word, word) for word in key.split("_"))


def _axes(places: Sequence[Mapping[str, Sequence[float | None]]]) -> list[XAxis]:
    """Return the x axes, which reach as far as the longest run."""
    placed = {key: [x for each in places for x in each[key] if x is not None and abs(x) < LIMIT] for key in AXES}
    highest = {key: max(xs, default=0.0) for key, xs in placed.items()}
    size, unit = time_unit(highest["time"])
    units = {key: (1.0, title) for key, title in AXES.items()} | {"time": (size, f"{AXES['time']}, {unit}")}
    return [XAxis(key, title, up_to(highest[key], size, _MAX_TICKS), size) for key, (size, title) in units.items()]


def _places(run: RunRecord) -> dict[str, list[float | None]]:
    """Return the place of each report on every x axis."""
    times: list[float | None] = []
    for line in run.lines:  # a report without a time has that of the one before
        times.append(line.get("train_s", times[-1] if times else None))
    steps = [int(line["step"]) for line in run.lines]
    images: Callable[[int], float | None] = run.images
    return {"steps": [float(step) for step in steps], "images": list(map(images, steps)), "time": times}


def _title(key: str) -> str:
    name = metric_name(key)
    return name[:1].upper() + name[1:] if name.islower() else name


def _lower_edge(key: str) -> float:
    try:
        return float(key.removeprefix(NOISE).split("..")[0])
    except ValueError:
        return math.inf


def _level(key: str) -> str:
    """Return a short text for a noise level, such as "-2 to 0" or "< -2"."""
    low, _, high = key.removeprefix(NOISE).partition("..")
    low, high = (edge.removesuffix(".0").replace("-", "\N{MINUS SIGN}") for edge in (low, high))
    if low == "\N{MINUS SIGN}inf":
        return f"< {high}"
    return f"> {low}" if high == "inf" else f"{low} to {high}"
