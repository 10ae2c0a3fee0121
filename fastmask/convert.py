"""`python -m fastmask.convert`: weights of another kind from those that a run has left."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
import tyro
from torch import Tensor

from fastmask.checkpoint import snapshots
from fastmask.cli import parse, run_command
from fastmask.console import say
from fastmask.ema import gamma_of, posthoc_coefficients
from fastmask.files import whole_file
from fastmask.weights import check_same_shapes, load_maskdit, read_weights, save_weights

# Share of the wanted profile that a sum of snapshots may miss before it is worth a word.
_NOTABLE = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """What to make."""

    run_dir: tyro.conf.Positional[str]
    """Folder of a run that was trained with --ema-widths."""
    posthoc_ema: float
    """Relative width of the average to put together from the run's snapshots, such as 0.05."""
    step: int = 0
    """Step that the average ends at; 0 is that of the newest snapshot."""
    out: str = ""
    """File to write; empty: ema-WIDTH.safetensors in the run's folder."""


def main(argv: Sequence[str]) -> None:
    """Write the weights that the arguments describe."""
    config = parse(ConvertConfig, argv, prog="python -m fastmask.convert", description="Convert weights of a run.")
    gamma, run_dir = gamma_of(config.posthoc_ema), Path(config.run_dir)
    out = Path(config.out) if config.out else run_dir / f"ema-{config.posthoc_ema:g}.safetensors"
    if out.suffix != ".safetensors":
        raise ValueError(f"--out {out}: weights are written as .safetensors")
    found = snapshots(run_dir)
    if not found:
        raise ValueError(f"{run_dir} holds no snapshots: train with --ema-widths 0.05 0.1 to keep some")
    step = config.step or found[-1].step
    used = [snapshot for snapshot in found if snapshot.step <= step]
    if not used:
        raise ValueError(f"--step {step}: the first snapshot of {run_dir} is of step {found[0].step}")
    coefficients, missed = posthoc_coefficients([(gamma_of(s.width), s.step) for s in used], gamma, step)
    net = load_maskdit(used[-1].path)
    total: dict[str, Tensor] = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for snapshot, coefficient in zip(used, coefficients, strict=True):
        tensors, _ = read_weights(snapshot.path)
        check_same_shapes(net.state_dict(), tensors, str(snapshot.path))
        for name, sum_of_it in total.items():
            sum_of_it.add_(tensors[name].float(), alpha=coefficient)
    with whole_file(out) as partial:
        save_weights(partial, net, {**net.state_dict(), **total})
    say(f"{out}: an average of relative width {config.posthoc_ema:g} at step {step}, from {len(used)} snapshots")
    if missed > _NOTABLE:
        say(f"the snapshots miss {missed:.0%} of its profile: more of them, or a width nearer to theirs, miss less")


if __name__ == "__main__":
    run_command("fastmask.convert", main)
