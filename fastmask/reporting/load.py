"""What a run folder says about its run: configuration, reports, sample grids, evaluation."""

import dataclasses
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fastmask.console import printable, say
from fastmask.rundir import checkpoints, listing
from fastmask.training.report import read_stats

_ANY_STEP = 1 << 62
_MARKS = ("run.json", "stats.jsonl", "checkpoints")  # a run folder has at least one of these


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a run folder holds. Everything but the reports can be missing, as in folders of earlier versions.

    Attributes:
        folder: the run folder.
        label: a name that no other run of the page has.
        said: content of `run.json`.
        lines: the reports, by increasing step; those undone by a rollback are left out.
        undone: number of reports left out.
        parameters: number of parameters, from the newest checkpoint.
        pictures: sample grids, by increasing step.
        evaluation: content of `evaluation.json`.
        reported: time of the last report, in seconds since the epoch.
    """

    folder: Path
    label: str
    lines: Sequence[Mapping[str, float]]
    reported: float
    said: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    undone: int = 0
    parameters: int | None = None
    pictures: Sequence[tuple[int, Path]] = ()
    evaluation: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def config(self) -> Mapping[str, Any]:
        """Configuration by flag name, as of the last start."""
        return _mapping(self.said.get("config"))

    @property
    def versions(self) -> Mapping[str, Any]:
        """Versions of the libraries, the commit and the GPU, as of the last start."""
        return _mapping(self.said.get("versions"))

    @property
    def changes(self) -> list[Mapping[str, Any]]:
        """Changes of the configuration on resume: step, field, from, to."""
        found = self.said.get("changes")
        entries = found if isinstance(found, list) else []
        return [each for each in entries if isinstance(each, dict) and is_count(each.get("step"))]

    @property
    def world_size(self) -> int | None:
        """Number of processes as of the last start, each with one device; None if it was not recorded."""
        count = self.said.get("world_size")
        return count if is_count(count) and count else None

    @property
    def step(self) -> int:
        """Step of the last report."""
        return int(self.lines[-1]["step"])

    @property
    def train_s(self) -> float | None:
        """Seconds of training, without checkpoints and sampling."""
        return next((line["train_s"] for line in reversed(self.lines) if "train_s" in line), None)

    @property
    def device_hours(self) -> float | None:
        """Training time times the number of devices, in hours; None if either is unknown."""
        return self.train_s * self.world_size / 3600 if self.train_s is not None and self.world_size else None

    @property
    def on_gpu(self) -> bool:
        """Whether the run trained on a GPU."""
        return str(self.config.get("device", "")).startswith("cuda") or "gpu" in self.versions

    def images(self, step: int) -> int | None:
        """Return the number of images of the first ``step`` steps, None if a batch size is unknown."""
        changed = [each for each in self.changes if each.get("field") == "batch_size" and each["step"] < step]
        sizes = [*(each.get("from") for each in changed), changed[-1].get("to") if changed else self._first_batch()]
        ends = [*(each["step"] for each in changed), step]
        total = 0
        for (first, end), size in zip(itertools.pairwise([0, *ends]), sizes, strict=True):
            if not is_count(size):
                return None
            total += (end - first) * size
        return total

    def _first_batch(self) -> Any:
        changed = [each.get("from") for each in self.changes if each.get("field") == "batch_size"]
        return changed[0] if changed else self.config.get("batch_size")


def load_runs(sources: Sequence[str]) -> list[RunRecord]:
    """Return what run folders hold, each with a label of its own.

    Args:
        sources: the folders.

    Raises:
        ValueError: no run folder, a folder that is given twice, or a run that has reported nothing yet.
    """
    folders = [Path(source) for source in sources]
    labels = distinct_labels(folders)
    return [_load(folder, label) for folder, label in zip(folders, labels, strict=True)]


def distinct_labels(folders: Sequence[Path]) -> list[str]:
    """Return the folders' names, with as many parent folders as it takes to tell them apart.

    Raises:
        ValueError: a folder is given twice.
    """
    full = [Path(os.path.abspath(folder)) for folder in folders]
    resolved = [folder.resolve() for folder in folders]
    for i, folder in enumerate(resolved):
        if folder in resolved[:i]:
            raise ValueError(f"{folders[i]} is given twice: name every run once")
    labels = []
    for path in full:
        parts = 1
        while sum(other.parts[-parts:] == path.parts[-parts:] for other in full) > 1:
            parts += 1
        labels.append(printable("/".join(path.parts[-parts:])))
    return labels


def is_count(value: Any) -> bool:
    """Return whether a value read from JSON is a whole number of at least 0."""
    return type(value) is int and value >= 0


def read_json(path: Path) -> dict[str, Any]:
    """Return the mapping in a JSON file; an empty one, with a line, if the file is damaged, and without if missing."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        say(f"{path} is damaged: left out")
        return {}
    return found


def _load(folder: Path, label: str) -> RunRecord:
    if not folder.is_dir():
        wrong = "is a file" if folder.exists() else "does not exist"
        raise ValueError(f"{folder} {wrong}: name the --run-dir of a run of fastmask.train")
    if not any((folder / name).exists() for name in _MARKS):
        raise ValueError(f"{folder} is no run folder, and holds {listing(folder)}: name the --run-dir of a run")
    reports = read_stats(folder, _ANY_STEP)
    if not reports:
        raise ValueError(f"{folder} has reported nothing yet: train to its first report (--report-every)")
    lines = _without_undone(reports)
    if not (folder / "run.json").exists():
        say(f"{folder} has no run.json: its configuration is not shown")
    return RunRecord(
        folder=folder,
        label=label,
        said=read_json(folder / "run.json"),
        lines=lines,
        undone=len(reports) - len(lines),
        parameters=_count_parameters(folder),
        pictures=_pictures(folder),
        evaluation=read_json(folder / "evaluation.json"),
        reported=(folder / "stats.jsonl").stat().st_mtime,
    )


def _without_undone(reports: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """Return the reports without those of steps that a rollback undid, which are reported again."""
    kept: list[dict[str, float]] = []
    for line in reports:
        while kept and kept[-1]["step"] > line["step"]:
            kept.pop()
        if kept and kept[-1]["step"] == line["step"]:  # an evaluation can have a line of its own
            line = {**kept.pop(), **line}
        kept.append(line)
    return kept


def _count_parameters(folder: Path) -> int | None:
    """Return the number of parameters by the header of the newest checkpoint; None if there is none to read."""
    stored = checkpoints(folder)
    if not stored:
        return None
    try:
        with safe_open(stored[-1] / "model.safetensors", framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  (no mapping)
    except (OSError, SafetensorError) as error:
        say(f"{stored[-1] / 'model.safetensors'} cannot be read: {error}; the number of parameters is not shown")
        return None
    total = 0
    for name, shape in shapes.items():
        if not name.endswith("pos_embed"):  # tables that are not trained
            size = 1
            for length in shape:
                size *= length
            total += size
    return total


def _pictures(folder: Path) -> list[tuple[int, Path]]:
    named = ((path.stem.removeprefix("step-"), path) for path in (folder / "samples").glob("step-*.png"))
    return sorted((int(step), path) for step, path in named if step.isdecimal())


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
