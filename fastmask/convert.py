"""`python -m fastmask.convert`: weights of another kind from those that a run has left."""

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

# Share of the wanted profile that a sum of snapshots may miss before it is worth a word.
_NOTABLE = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """What to make."""

    run_dir: tyro.conf.Positional[str]
    """Folder of a run that was trained with --ema-widths; a checkpoint or a snapshot of it also says the step."""
    posthoc_ema: float
    """Relative width of the average to put together from the run's snapshots, such as 0.05."""
    step: int = 0
    """Step that the average ends at; 0 is that of the checkpoint or snapshot that is named, or of the newest."""
    out: str = ""
    """File to write; empty: ema-WIDTH.safetensors in the run's folder."""


def main(argv: Sequence[str]) -> None:
    """Write the weights that the arguments describe."""
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
    """Return the run folder that a path lies in, and the step of the checkpoint or snapshot that it names, or 0."""
    place = locate(source)
    if place.run is None:
        raise ValueError(f"{source} does not lie in the folder of a run, whose snapshots are needed: name that")
    if place.checkpoint:
        return place.run, step_of(place.checkpoint)
    steps = [snapshot.step for snapshot in snapshots(place.run) if place.file and snapshot.path.name == place.file.name]
    return place.run, steps[0] if steps else 0


if __name__ == "__main__":
    run_command("fastmask.convert", main)
