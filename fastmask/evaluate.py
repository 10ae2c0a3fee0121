"""`python -m fastmask.evaluate RUN`: evaluates the generated digits of a run against real ones, with figures."""

import dataclasses
import json
from collections.abc import Sequence

import numpy as np
import torch
import tyro

from fastmask.cli import fail, parse, run_command
from fastmask.console import say
from fastmask.data.in_memory import load_digits
from fastmask.diffusion import Sampling, draw_samples
from fastmask.diffusion.weights import load_maskdit
from fastmask.files import atomic_write
from fastmask.ranks import require_one_process
from fastmask.rundir import find_checkpoint, locate, step_of
from fastmask.training.report import read_stats

try:
    from fastmask.evaluation.digits import draw_digits, draw_loss, judge, rows_of
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    fail("fastmask.evaluate", f"{error.name} is not installed: pip install matplotlib scipy scikit-learn")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Arguments of the evaluation."""

    run_dir: tyro.conf.Positional[str]
    """Folder of a run on the digits dataset, or one of its checkpoints/step-N."""
    cfg_scale: float = 2.0
    """Classifier-free guidance scale; 1 disables guidance."""
    num_steps: int = 18
    """Number of steps of the solver."""
    seed: int = 0
    """Seed of the noise."""


def main(argv: Sequence[str]) -> None:
    """Evaluate a run, and write `summary.json`, `digits.png` and `loss.png` to its folder."""
    description = "Evaluate a run on the digits dataset."
    config = parse(EvaluateConfig, argv, prog="python -m fastmask.evaluate", description=description)
    require_one_process("fastmask.evaluate")
    place = locate(config.run_dir)
    if place.run is None or place.file:
        raise ValueError(f"{config.run_dir} is not the folder of a run: name the --run-dir that it was trained with")
    run_dir, checkpoint = place.run, find_checkpoint(place, ("ema.safetensors", "state.json"), say)
    net = load_maskdit(checkpoint).eval()
    model = net.model
    if (model.in_channels, model.input_size, model.num_classes) != (1, 8, 10):
        raise ValueError(
            f"{run_dir} was not trained on the digits and their labels: this command knows no other data yet"
        )
    step = step_of(checkpoint)
    stats = read_stats(run_dir, step)
    if not stats:
        raise ValueError(f"{run_dir} reported nothing up to its checkpoint of step {step}: train on to its next report")
    # Sample as many digits as there are held-out scans, and compare them.
    real = load_digits()
    labels = torch.arange(len(real.held_out_labels)) % 10
    sampling = Sampling(sample_steps=config.num_steps, cfg_scale=config.cfg_scale)
    samples = draw_samples(net, labels, sampling, seed=config.seed).clamp(-1, 1)
    summary = {
        **judge(rows_of(samples), labels.numpy(), real),
        "images_per_s": round(float(np.median([line["images_per_s"] for line in stats])), 1),
        "train_s": round(stats[-1]["train_s"], 1),
        "cfg_scale": config.cfg_scale,
        "num_steps": config.num_steps,
        "step": step,
    }
    # Write and print the results.
    with atomic_write(run_dir / "summary.json") as partial:
        partial.write_text(json.dumps(summary, indent=2) + "\n")
    draw_digits(run_dir / "digits.png", samples.numpy(), labels.numpy(), real)
    draw_loss(run_dir / "loss.png", stats)
    say(
        f"agreement {summary['agreement']:.1%} (the classifier reads {summary['classifier_accuracy']:.1%} of held-out "
        f"scans)  |  distance ratio {summary['distance_ratio']:.2f} (1: as far from the training scans as held-out "
        f"ones)  |  {summary['images_per_s']:,.0f} images/s in training",
    )
    say(
        f"Frechet distance to the held-out scans {summary['frechet']:.2f} (of as many training scans: "
        f"{summary['frechet_held_out']:.2f})  |  trained {summary['train_s']:.0f} s",
    )
    for name in ("summary.json", "digits.png", "loss.png"):
        say(f"wrote {run_dir / name}")


if __name__ == "__main__":
    run_command("fastmask.evaluate", main)
