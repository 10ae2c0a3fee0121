"""Reads weights of fastmask, DiT, SiT and diffusers, all with the metadata that fastmask's own files have."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from fastmask.console import say
from fastmask.described import to_json
from fastmask.diffusion.flow import RectifiedFlow
from fastmask.diffusion.process import Process
from fastmask.diffusion.vp import VP
from fastmask.files import read_regular
from fastmask.models.foreign.diffusers import FIRST, from_diffusers
from fastmask.models.foreign.dit import from_dit, signs_of_dit
from fastmask.models.foreign.sit import from_sit
from fastmask.rundir import find_weights
from fastmask.tensorfile import choose_weights, read_weights

ForeignKind = Literal["dit", "sit"]

_KINDS: dict[str, tuple[Any, Process]] = {"dit": (from_dit, VP()), "sit": (from_sit, RectifiedFlow(t_uniform=True))}
_MOST_BYTES = 1 << 20  # of a config.json
# What the process of a DiT is in diffusers' scheduler_config.json.
_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
}


class Found(NamedTuple):
    """Weights of a `MaskDiT`.

    Attributes:
        what: their source, for messages.
        tensors: by name, without prefixes.
        stated: metadata as in fastmask's own files, see `fastmask.diffusion.weights.save_weights`.
        notes: lines that say what was left out.
    """

    what: str
    tensors: dict[str, Tensor]
    stated: dict[str, str]
    notes: tuple[str, ...] = ()


def split_kind(source: str | os.PathLike[str]) -> tuple[ForeignKind | None, str | os.PathLike[str]]:
    """Split a path such as ``dit:DiT-XL-2-256x256.pt`` into the kind that it names and the path itself."""
    named = re.fullmatch(r"(dit|sit):(.+)", os.fspath(source), re.DOTALL)
    return (named[1], named[2]) if named else (None, source)  # type: ignore[return-value]


def read_source(
    source: Mapping[str, Tensor] | str | os.PathLike[str], kind: ForeignKind | None = None, *, average: bool = True
) -> Found:
    """Read weights, and rearrange those of another network for a `MaskDiT` without a decoder.

    Args:
        source: a mapping of names to tensors, or a path as in `fastmask.diffusion.weights.load_maskdit`.
        kind: what the weights are of, if their names are DiT's; a path can name it instead.
        average: whether to prefer averaged or raw weights, if there are both.

    Raises:
        ValueError: an unknown kind; a missing, unreadable or damaged file; weights of a DiT or a SiT without a kind; or
            what no such network has.
    """
    if kind is not None and kind not in _KINDS:
        raise ValueError(f"the kind of weights {kind!r} is unknown: it is {' or '.join(_KINDS)}")
    if isinstance(source, Mapping):
        return adopt(Found("the given mapping", choose_weights(source, "the given mapping", average), {}), kind)
    named, place = split_kind(source)
    if named and kind and named != kind:
        raise ValueError(f"{os.fspath(source)} names another kind of weights than {kind}")
    return read_file(find_weights(place, average, say), kind or named, average=average)


def read_file(path: Path, kind: ForeignKind | None = None, *, average: bool = True) -> Found:
    """Read a file of weights; arguments and errors as in `read_source`."""
    tensors, stated = read_weights(path, average)
    config = path.parent / "config.json" if FIRST in tensors else None
    return adopt(Found(str(path), tensors, stated), kind, config)


def adopt(found: Found, kind: ForeignKind | None, config: Path | None = None) -> Found:
    """Return weights under the names and in the layout of a `MaskDiT`, with the metadata that these lack.

    Args:
        found: weights as they were read.
        kind: as in `read_source`.
        config: the `config.json` beside weights of diffusers' names.

    Raises:
        ValueError: as in `read_source`.
    """
    what, tensors, stated, _ = found
    try:
        if FIRST in tensors:
            return _from_diffusers(found, kind, config)
        if (
            "network" in stated
            or "x_embedder.proj.weight" not in tensors
            or tensors["x_embedder.proj.weight"].ndim != 4
        ):
            if kind:
                raise ValueError("it states its network or is no DiT at all: leave the kind of weights out")
            return found
        signs = signs_of_dit(tensors)
        if kind is None and not signs:
            return found
        if kind is None:
            raise ValueError(
                f"it is a DiT or a SiT ({', '.join(signs)}), whose files look alike: name it as dit:{what} or "
                f"sit:{what} (in Python kind='dit' or 'sit')"
            )
        convert, process = _KINDS[kind]
        converted, notes = convert(tensors)
    except ValueError as error:
        as_kind = f" cannot be read as weights of a {kind.upper()[0]}i{kind.upper()[2]}" if kind else ""
        raise ValueError(f"{what}{as_kind}: {error}") from error
    return Found(what, converted, {**stated, "process": to_json(process)}, tuple(f"{what}: {note}" for note in notes))


def _from_diffusers(found: Found, kind: ForeignKind | None, path: Path | None) -> Found:
    if kind == "sit":
        raise ValueError("diffusers has no SiT: its DiTTransformer2DModel is a DiT")
    if path is None or not path.is_file():
        raise ValueError("the weights are of diffusers' names, and the config.json that belongs beside them is missing")
    scheduler = path.parent.parent / "scheduler" / "scheduler_config.json"
    if path.parent.name == "transformer" and scheduler.is_file():
        schedule = _read_json(scheduler)
        for name, value in _SCHEDULE.items():
            if schedule.get(name, value) != value:
                raise ValueError(f"{name} of {scheduler} is {schedule[name]!r}, and {value!r} is what is read")
    converted, sizes, notes = from_diffusers(found.tensors, _read_json(path))
    stated = {"network": to_json(sizes), "process": to_json(VP())}
    return Found(found.what, converted, stated, tuple(f"{found.what}: {note}" for note in notes))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_regular(path, _MOST_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no mapping")
    return content
