"""The processes that a configuration may name. To add one, write its file and its name here."""

import dataclasses
import json
from typing import TypeAlias

from fastmask.diffusion.edm import EDM
from fastmask.diffusion.flow import RectifiedFlow
from fastmask.diffusion.process import Process

AnyProcess: TypeAlias = EDM | RectifiedFlow
PROCESSES: dict[str, type[Process]] = {kind.name: kind for kind in (EDM, RectifiedFlow)}


def to_json(process: Process) -> str:
    """Return a process as JSON: its name and its fields."""
    return json.dumps({"name": process.name, **dataclasses.asdict(process)})


def from_json(text: str) -> Process:
    """Return the process of a JSON text; a ValueError says what is wrong with it."""
    stored = json.loads(text)
    name = stored.pop("name", None) if isinstance(stored, dict) else None
    kind = PROCESSES.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(f"it names none of the processes {', '.join(PROCESSES)}")
    names = {field.name for field in dataclasses.fields(kind)}
    bad = [name for name, value in stored.items() if name not in names or type(value) not in (int, float)]
    if bad:
        raise ValueError(f"{bad[0]} is no number of process {kind.name}")
    try:
        return kind(**{name: float(value) for name, value in stored.items()})
    except OverflowError as error:
        raise ValueError(f"a number of process {kind.name} is too large") from error
