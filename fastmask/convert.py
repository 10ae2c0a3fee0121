"""`python -m fastmask.convert`: reconstructs post-hoc EMA weights from the snapshots of a run."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
import tyro
from torch import Tensor

from fastmask.cli import parse, run_command
from fastmask.console import say
from fastmask.diffusion.weights import load_maskdit, save_weights, weights_for
from fastmask.files import atomic_write
from fastmask.ranks import require_one_process
from fastmask.rundir import listing, locate, snapshots, step_of
from fastmask.training.ema import gamma_of, posthoc_coefficients

_NOTABLE = 0.05  # relative residual of the reconstructed profile; above this, warn


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Arguments of the conversion."""

    run_dir: tyro.conf.Positional[str]
    """Folder of a run trained with --ema-widths; a path to a checkpoint or a snapshot also selects the step."""
    posthoc_ema: float
    """Relative width of the EMA to reconstruct from the snapshots, such as 0.05."""
    step: int = 0
    """Last step of the EMA. 0: the step of the given checkpoint or snapshot, or the newest snapshot."""
    out: str = ""
    """Output file. Empty: ema-WIDTH.safetensors in the run folder."""


def main(argv: Sequence[str]) -> None:
    """Parse the arguments, reconstruct the EMA and write it."""
    config = parse(ConvertConfig, argv, prog="python -m fastmask.convert", description="Convert weights of a run.")
    require_one_process("fastmask.convert")
    gamma = gamma_of(config.posthoc_ema)
    run_dir, named_step = run_and_step(config.run_dir)
    out = Path(config.out) if config.out else run_dir / f"ema-{config.posthoc_ema:g}.safetensors"
    if out.suffix != ".safetensors":
        raise ValueError(f"--out {out}: weights are written as .safetensors")
    found = snapshots(run_dir)
    if not found:
        raise ValueError(
            f"{run_dir} holds no snapshots but {listing(run_dir)}: train with --ema-widths 0.05 0.1 to keep some"
        )
    step = config.step or named_step or found[-1].step
    used = [snapshot for snapshot in found if snapshot.step <= step]
    if not used:
        raise ValueError(f"--step {step}: the first snapshot of {run_dir} is of step {found[0].step}")
    # Fit the target profile, then add up the snapshots one at a time.
    coefficients, missed = posthoc_coefficients([(gamma_of(s.width), s.step) for s in used], gamma, step)
    net = load_maskdit(used[-1].path)
    total: dict[str, Tensor] = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for snapshot, coefficient in zip(used, coefficients, strict=True):
        tensors, notes = weights_for(net, snapshot.path)
        if notes:
            raise ValueError(f"{notes[0]}, and the newest one is not")
        for name, sum_of_it in total.items():
            sum_of_it.add_(tensors[name].float(), alpha=coefficient)
    try:
        with atomic_write(out) as partial:
            save_weights(partial, net, {**net.state_dict(), **total})
    except OSError as error:
        raise OSError(f"--out {out} cannot be written: {error.__cause__ or error}") from error
    say(f"{out}: an average of relative width {config.posthoc_ema:g} at step {step}, from {len(used)} snapshots")
    if missed > _NOTABLE:
        say(f"the snapshots miss {missed:.0%} of its profile: more of them, or a width nearer to theirs, miss less")


def run_and_step(source: str) -> tuple[Path, int]:
    """Return the run folder of a path, and the step of its checkpoint or snapshot, or 0."""
    place = locate(source)
    if place.run is None:
        raise ValueError(f"{source} does not lie in the folder of a run, whose snapshots are needed: name that")
    if place.checkpoint:
        return place.run, step_of(place.checkpoint)
    steps = [snapshot.step for snapshot in snapshots(place.run) if place.file and snapshot.path.name == place.file.name]
    return place.run, steps[0] if steps else 0


if __name__ == "__main__":
    run_command("fastmask.convert", main)
