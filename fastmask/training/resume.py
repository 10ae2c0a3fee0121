"""Configuration changes on resume: allowed fields, and the record of changes."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from fastmask.console import without_secrets
from fastmask.training.config import TrainConfig

# Fields that do not affect what is learned: they can change freely, and changes are not recorded.
FREE = frozenset(
    {
        "run_dir",
        "device",
        "optimizer",
        "activation_checkpointing",
        "parallel",
        "compile",
        "cuda_graphs",
        "micro_batch_size",
        "on_bad",
        "on_divergence",
        "divergence_factor",
        "loss_limit",
        "num_workers",
        "decoder",
        "report_every",
        "checkpoint_every",
        "keep_checkpoints",
        "snapshot_every",
        "sample_every",
        "sample_steps",
        "cfg_scale",
    }
)

_RENAMED = {"mirror": "flip"}  # field names of earlier versions

_SHAPE = "the checkpoint's weights are of that network"
_DATA = "the run has been trained on those images"

# Fields that cannot change, and why. All others can, and each change is recorded with its step.
FIXED = {
    **dict.fromkeys(("patch_size", "width", "depth", "num_heads", "qk_norm", "num_classes", "image_size"), _SHAPE),
    **dict.fromkeys(("decoder_width", "decoder_depth", "decoder_num_heads"), _SHAPE),
    **dict.fromkeys(("data", "data_source", "vae", "flip"), _DATA),
    "process": "the checkpoint's weights were trained with it",
    "network": _SHAPE,
    "seed": "it decides which samples come next",
    "init": "the weights come from the checkpoint",
    "ema_widths": "these averages began with the run",
}


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
    of_process = {field.name: field.metadata.get("fixed") for field in dataclasses.fields(config.process)}
    for member, value in (("process", config.process), ("network", config.network)):
        if member in changed:  # fields of two kinds are not comparable
            own = {field.name for field in dataclasses.fields(value)}
            changed = {name: pair for name, pair in changed.items() if name not in own}
    reasons = {**FIXED, **{name: why for name, why in of_process.items() if why}}
    fixed = [
        f"{name} {before[name]} -> {changed[name][1]} ({reasons[name]})"
        for name in changed
        if name in reasons and not (name == "data" and same_data)
    ]
    if fixed:
        raise ValueError(
            f"{run_dir} holds a run that cannot be resumed with {', '.join(fixed)}: give the old values, or another "
            f"--run-dir, with --init {run_dir} to start from its weights"
        )
    return {name: pair for name, pair in changed.items() if name not in FREE}
