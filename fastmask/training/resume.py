"""Opening a run folder: which changes of the configuration are allowed, and the record of changes in `run.json`.

Which field may change is declared with the field, see `fastmask.fields`.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastmask.console import say, without_secrets
from fastmask.diffusion import Origin
from fastmask.files import atomic_write
from fastmask.ranks import Ranks
from fastmask.training.checkpoint import read_state, step_of
from fastmask.training.config import TrainConfig
from fastmask.training.report import versions

_RENAMED = {"mirror": "flip"}  # field names of earlier versions


def changes_of(
    stored: Mapping[str, Any], config: TrainConfig, run_dir: str, *, same_data: bool = False
) -> dict[str, tuple[Any, Any]]:
    """Return the changed fields to record, each with its old and new value.

    Args:
        stored: the stored configuration, as read from JSON.
        config: the new configuration.
        run_dir: the run folder, for the error message.
        same_data: whether the dataset at the new path has the fingerprint of the old one.

    Raises:
        ValueError: a field that cannot change differs; the message lists each with the reason.
    """
    now, defaults = (json.loads(json.dumps(some.recorded())) for some in (config, TrainConfig()))
    # Fields that the stored version did not have take their defaults.
    before = {**defaults, **{_RENAMED.get(name, name): value for name, value in stored.items()}}
    before["data"] = without_secrets(str(before["data"]))  # earlier versions stored it unredacted
    changed = {name: (before.get(name), value) for name, value in now.items() if before.get(name) != value}
    for kind in config.kinds():
        if kind in changed:  # fields of two kinds are not comparable
            own = {field.name for field in dataclasses.fields(getattr(config, kind))}
            changed = {name: pair for name, pair in changed.items() if name not in own}
    rules = config.on_resume()
    for name, (old, new) in changed.items():
        for rule, within in (("within", {"free": True}), ("recorded_within", {})):
            if rule in rules[name]:
                kind_of, reason = rules[name][rule]
                rules[name] = within if kind_of(old) == kind_of(new) else {"fixed": reason}
    fixed = [
        f"{name} {before[name]} -> {value} ({rules[name]['fixed']})"
        for name, (_, value) in changed.items()
        if "fixed" in rules[name] and not (name == "data" and same_data)
    ]
    if fixed:
        raise ValueError(
            f"{run_dir} holds a run that cannot be resumed with {', '.join(fixed)}: give the old values, or another "
            f"--run-dir, with --init {run_dir} to start from its weights"
        )
    return {name: pair for name, pair in changed.items() if "free" not in rules[name]}


def open_run(
    config: TrainConfig, newest: Path | None, ranks: Ranks, fingerprint: str, origin: Origin
) -> list[dict[str, Any]]:
    """Create the run folder, write `run.json`, and return the list of changes since the run began.

    Args:
        config: the resolved configuration.
        newest: the checkpoint to resume from, if there is one.
        ranks: rank and world size; rank 0 writes.
        fingerprint: hash of the dataset's content, which identifies it at any path.
        origin: the dataset's VAE and names of classes.

    Raises:
        ValueError: the folder holds another run.
    """
    run_dir = Path(config.run_dir)
    state = read_state(newest) if newest else _begun(run_dir)
    if state and not newest:
        state["config"]["init"] = config.init  # without a checkpoint, --init can still change
    trained_on = state.get("fingerprint")  # absent in earlier versions, which compared paths
    if trained_on not in (None, fingerprint):
        raise ValueError(
            f"{config.run_dir} holds a run on other images than {config.data.data} has now (were some added, removed "
            f"or changed?): bring those back, or give another --run-dir, with --init {config.run_dir} "
            f"to start from its weights"
        )
    same_data = trained_on == fingerprint
    changed = changes_of(state["config"], config, config.run_dir, same_data=same_data) if state else {}
    changes: list[dict[str, Any]] = list(state.get("changes", [])) if newest else []
    step = step_of(newest) if newest else 0
    if newest and step < config.max_steps:
        for name, (before, value) in changed.items():
            say(f"changed from step {step + 1} on: {name} {before} -> {value}")
            changes.append({"step": step, "field": name, "from": before, "to": value})
    if not ranks.rank and step < config.max_steps:
        said = {
            "config": config.recorded(),
            "fingerprint": fingerprint,
            "origin": dataclasses.asdict(origin),
            "world_size": ranks.count,
            "changes": changes,
            "versions": versions(),
            "command": [without_secrets(argument) for argument in sys.argv],
        }
        with atomic_write(run_dir / "run.json") as partial:
            partial.write_text(json.dumps(said, indent=2) + "\n")
    return changes


def _begun(run_dir: Path) -> dict[str, Any]:
    """Return the content of `run.json`, for a run without a checkpoint; empty if it is missing or damaged."""
    try:
        found = json.loads((run_dir / "run.json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    is_run = isinstance(found, dict) and isinstance(found.get("config"), dict)
    return found if is_run else {}
