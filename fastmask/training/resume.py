"""What may change when a run is resumed from a checkpoint, and how a change is recorded."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from fastmask.console import without_secrets
from fastmask.training.config import TrainConfig

# Fields that do not change what is learned: they may differ, and are not recorded.
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

_RENAMED = {"mirror": "flip"}  # fields of earlier versions

_SHAPE = "the checkpoint's weights are of that network"
_DATA = "the run has been trained on those images"

# Fields that cannot change, and why. All others may, and each change is recorded with its step.
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
    """Return the fields that a resumed run changes and that are to be recorded: the value before, and the new one.

    Args:
        stored: the configuration that the run has had so far, as JSON read it.
        config: the one asked for now.
        run_dir: the run's folder, for the message.
        same_data: the data at the new place were found to be those of the run.

    Raises:
        ValueError: a field differs that cannot change; names each, and why.
    """
    now, defaults = (json.loads(json.dumps(some.recorded())) for some in (config, TrainConfig()))
    before = {
        **defaults,
        **{_RENAMED.get(name, name): value for name, value in stored.items()},
    }  # later fields: defaults
    before["data"] = without_secrets(str(before["data"]))  # which earlier versions stored as given
    changed = {name: (before.get(name), value) for name, value in now.items() if before.get(name) != value}
    of_process = {field.name: field.metadata.get("fixed") for field in dataclasses.fields(config.process)}
    for member, value in (("process", config.process), ("network", config.network)):
        if member in changed:  # whose fields are of another one
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
