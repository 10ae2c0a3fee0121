"""Run folders: checkpoints, snapshots, checksums, and resolution of paths to weights."""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastmask.tensorfile import read_tensors

PARTS = ("model", "ema", "optimizer")
FILES = (*(f"{part}.safetensors" for part in (*PARTS, "profiles")), "state.json")
SUMS = "SHA256SUMS"
FORMAT = 2  # format 1, not recorded in `state.json`, had no checksums

# Names of weights in a folder of diffusers, or in `transformer/` of its pipelines.
DIFFUSERS_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
_WEIGHTS = (".safetensors", ".pt", ".pth", ".pth.tar", ".ckpt", ".bin")
_SOURCES = "a run folder, one of its checkpoints/step-N, or a .safetensors or .pt file of weights"
_MOST_SHOWN = 6
_NOTABLE = 0.1  # share of the initial weights in an EMA; above this, warn


class Snapshot(NamedTuple):
    """EMA snapshot of a run at a step, a file that `load_maskdit` reads."""

    step: int
    width: float
    path: Path


class Place(NamedTuple):
    """A resolved path to weights.

    Attributes:
        run: the run folder, if the path is one or is inside one.
        checkpoint: the checkpoint, if the path is one or is inside one.
        file: the file, if the path is one.
    """

    run: Path | None = None
    checkpoint: Path | None = None
    file: Path | None = None


def checkpoints(run_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    named = (run_dir / "checkpoints").glob("step-*")
    # Ignore other names, such as copies made by a user.
    return sorted((path for path in named if path.name.removeprefix("step-").isdecimal()), key=step_of)


def step_of(folder: Path) -> int:
    """Return the step of a checkpoint."""
    return int(folder.name.removeprefix("step-"))


def snapshots(run_dir: Path) -> list[Snapshot]:
    """Return the snapshots of a run, oldest first."""
    found = []
    for path in (run_dir / "snapshots").glob("step-*.safetensors"):
        named = re.fullmatch(r"step-(\d{8,})-(\d+(?:\.\d+)?(?:e-\d+)?)", path.stem)
        if named:
            found.append(Snapshot(int(named[1]), float(named[2]), path))
    return sorted(found)


def read_state(folder: Path) -> dict[str, Any]:
    """Return the content of the ``state.json`` of a checkpoint; a ValueError if it cannot be read."""
    try:
        state = json.loads((folder / "state.json").read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder / 'state.json'} cannot be read: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{folder / 'state.json'} holds no mapping")
    if state.get("format", FORMAT) != FORMAT:
        raise ValueError(
            f"{folder / 'state.json'} is of format {state['format']}, and this version reads {FORMAT}: another "
            f"version of fastmask wrote it"
        )
    return state


def is_source(source: str | os.PathLike[str]) -> bool:
    """Return whether a path looks like a run folder, a checkpoint or a file of weights, and not like images."""
    path = Path(source)
    if path.is_dir():
        named = (*FILES, SUMS, "checkpoints", "snapshots", "run.json")
        is_run = path.name in ("checkpoints", "snapshots") or any((path / name).exists() for name in named)
        return is_run or _diffusers_weights(path) is not None
    return path.name.endswith(_WEIGHTS) or not path.exists()


def locate(source: str | os.PathLike[str]) -> Place:
    """Resolve a path to weights.

    Args:
        source: a run folder, a checkpoint of one (`checkpoints/step-N`), the folder that holds these, a folder in
            diffusers' format, which means its file of weights, or a file.

    Raises:
        ValueError: none of these; the message lists what was found.
    """
    path = Path(source)
    full = Path(os.path.abspath(path))  # so that "." has a name and parents
    if path.is_dir():
        if full.name in ("checkpoints", "snapshots"):
            return Place(run=_shown(full.parent, path))
        if any((path / name).exists() for name in (*FILES, SUMS)):
            return Place(_run_of(full, path), path)
        if any((path / name).exists() for name in ("checkpoints", "snapshots", "run.json")):
            return Place(run=path)
        weights = _diffusers_weights(path)
        if weights:
            return Place(file=weights)
        held = f"no weights but {listing(path)}" if any(path.iterdir()) else "nothing"
        raise ValueError(f"{path} holds {held}: name {_SOURCES}")
    if path.exists():
        if path.name in FILES and (full.parent / SUMS).exists():
            return Place(_run_of(full.parent, path), _shown(full.parent, path), path)
        is_snapshot = full.parent.name == "snapshots"
        return Place(run=_shown(full.parents[1], path) if is_snapshot else None, file=path)
    above = next(folder for folder in full.parents if folder.is_dir())
    raise ValueError(f"{path} does not exist, and {_shown(above, path)} holds {listing(above)}: name {_SOURCES}")


def find_checkpoint(place: Place, names: Sequence[str], warn: Callable[[str], None]) -> Path:
    """Return the checkpoint of a resolved path, or the newest one of the run in which the given files are intact.

    Args:
        place: the resolved path.
        names: the required files.
        warn: called with a line for each damaged checkpoint that is skipped.

    Raises:
        ValueError: the given checkpoint is damaged, or the run has no intact checkpoint.
    """
    if place.checkpoint:
        damage = fault(place.checkpoint, names)
        if damage:
            other = f": name {place.run} for the newest that is whole" if place.run else ""
            raise ValueError(f"{place.checkpoint} is damaged ({damage}){other}")
        return place.checkpoint
    assert place.run
    newest = newest_whole(place.run, names, warn, "taking")
    if newest is None:
        wait = "wait for its first one (--checkpoint-every), or " if (place.run / "run.json").exists() else ""
        raise ValueError(f"{place.run} holds no checkpoint of a run, but {listing(place.run)}: {wait}name {_SOURCES}")
    return newest


def find_weights(source: str | os.PathLike[str], average: bool, warn: Callable[[str], None]) -> Path:
    """Return the file of weights for a path; a file of a checkpoint has been checked against its checksum.

    Args:
        source: as in `locate`; a run folder means its newest intact checkpoint.
        average: whether to use the EMA weights of a checkpoint, or the trained ones.
        warn: called with a line for each damaged checkpoint, and if the EMA still holds much of the initial weights.

    Raises:
        ValueError: there is no such file, or it is damaged.
    """
    place = locate(source)
    if place.file and not place.checkpoint:
        return place.file
    name = place.file.name if place.file else f"{'ema' if average else 'model'}.safetensors"
    folder = find_checkpoint(place, (name,) if place.file else (name, "state.json"), warn)
    if name == "ema.safetensors" and (folder / "state.json").exists():
        warn_of_start(folder, warn)
    return folder / name


def newest_whole(
    run_dir: Path, names: Sequence[str] | None, warn: Callable[[str], None], then: str = "resuming from"
) -> Path | None:
    """Return the newest intact checkpoint of a run, or None if there is no checkpoint.

    Args:
        run_dir: the run folder.
        names: the required files; None is all.
        warn: called with a line for each newer checkpoint that is damaged.
        then: the action that this line reports, such as "resuming from".

    Raises:
        ValueError: all checkpoints are damaged.
    """
    faults: list[tuple[Path, str]] = []
    for folder in reversed(checkpoints(run_dir)):
        damage = fault(folder, names)
        if not damage:
            for newer, found in faults:
                warn(f"{newer} is damaged ({found}): {then} {folder}")
            return folder
        faults.append((folder, damage))
    if not faults:
        return None
    listed = ", ".join(f"{folder.name} ({found})" for folder, found in faults)
    raise ValueError(f"no checkpoint in {run_dir / 'checkpoints'} is whole: {listed}")


def fault(folder: Path, names: Sequence[str] | None = None) -> str:
    """Return why a checkpoint is damaged; an empty string if it is intact.

    Args:
        folder: the checkpoint.
        names: the required files; None is all files with checksums.
    """
    try:
        if not (folder / SUMS).exists() and "format" not in read_state(folder):  # format 1
            for name in names or [f"{part}.safetensors" for part in PARTS]:
                if name != "state.json":
                    read_tensors(folder / name)
            return ""
        stored = (folder / SUMS).read_bytes().decode(errors="replace")
        lines = sums(folder, names or FILES)
    except (OSError, ValueError) as error:
        return str(error).replace(f"{folder}{os.sep}", "")
    missing = [name for name in names or FILES if name not in lines and (names or name in stored)]
    differing = [name for name, line in lines.items() if line not in stored]
    if missing:
        return f"{', '.join(missing)} is missing"
    if differing:
        return f"{', '.join(differing)} differs from its checksum in {SUMS}"
    return "" if names or stored == "".join(lines.values()) else f"{SUMS} is not as it was written"


def sums(folder: Path, names: Sequence[str] = FILES) -> dict[str, str]:
    """Return the checksum lines of the existing files of a checkpoint, by name."""
    lines = {}
    for name in sorted(names):
        if (folder / name).exists():
            digest = hashlib.sha256()
            with (folder / name).open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
            lines[name] = f"{digest.hexdigest()}  {name}\n"
    return lines


def warn_of_start(folder: Path, warn: Callable[[str], None]) -> None:
    """Warn if the EMA of a checkpoint still holds much of the initial weights."""
    share = share_of_start(read_state(folder))
    if share > _NOTABLE:
        warn(
            f"{folder / 'ema.safetensors'} still holds {share:.0%} of the weights that the run began with: the raw "
            f"ones, of model.safetensors, may be better (fastmask.sample --weights raw)"
        )


def share_of_start(state: Mapping[str, Any]) -> float:
    """Return the share of the initial weights in the EMA of a run, 0 with warm-up.

    Args:
        state: the state of a checkpoint.
    """
    decay, done = state.get("config", {}).get("ema_decay", 0.0), state.get("step", 0)
    if state.get("ema_warmup") or not decay:
        return 0.0
    exponent = 0.0
    for change in reversed(state.get("changes", [])):
        if change["field"] == "ema_decay":
            exponent += (done - change["step"]) * math.log(max(decay, 1e-300))
            done, decay = change["step"], change["from"]
    return math.exp(exponent + done * math.log(max(decay, 1e-300)))


def listing(folder: Path) -> str:
    """Return the first few names in a folder, for a message."""
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    more = f" and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
    return f"{', '.join(names[:_MOST_SHOWN])}{more}" if names else "nothing"


def _diffusers_weights(path: Path) -> Path | None:
    """Return the weights of the transformer in a folder of diffusers, None if there are none."""
    files = (folder / name for folder in (path / "transformer", path) for name in DIFFUSERS_WEIGHTS)
    return next((file for file in files if file.is_file()), None)


def _run_of(checkpoint: Path, path: Path) -> Path | None:
    """Return the run folder of a checkpoint, None if it is not inside one."""
    named = checkpoint.parent.name == "checkpoints" and re.fullmatch(r"step-\d+", checkpoint.name)
    return _shown(checkpoint.parents[1], path) if named else None


def _shown(full: Path, path: Path) -> Path:
    """Return an absolute path, made relative if the user's ``path`` is relative."""
    return full if path.is_absolute() else Path(os.path.relpath(full))
