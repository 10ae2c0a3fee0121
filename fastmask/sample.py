"""`python -m fastmask.sample`: draws images with the weights of a run or a published checkpoint."""

import dataclasses
import importlib.util
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor

from fastmask.cli import check_out, parse, pick_device, run_command
from fastmask.console import get_console, say
from fastmask.diffusion import Sampling
from fastmask.diffusion.weights import Kind
from fastmask.generation.classes import class_ids
from fastmask.generation.model import Batches, Compile, Model, Precision, fit_guidance, load
from fastmask.generation.outputs import Arrays, Folder, Grid, Latents, Output
from fastmask.generation.parts import run_job, working_folder
from fastmask.generation.strip import ROWS, draw_strip
from fastmask.grid import to_uint8
from fastmask.ranks import Ranks, own_device, process_group, signal_if_torchrun_dies


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Arguments of sampling."""

    source: tyro.conf.Positional[str]
    """Weights: a run folder (its newest intact checkpoint), one of its checkpoints/step-N, a .pt or .safetensors file
    with the published parameter names, of a DiT or a SiT as dit:FILE or sit:FILE, or a folder in diffusers' format."""
    out: str = "samples.png"
    """Output: a .png grid; an .npz with `arr_0` (N, H, W, 3) uint8 and `labels`, as ADM's evaluator reads it; or a
    folder (a name without suffix) of PNGs and labels.csv. A killed command resumes from OUT.parts."""
    latents: bool = False
    """Write the latents instead of images, to an .npz with `latents` (N, C, h, w) float32 and `labels`."""
    strip: str = ""
    """Also draw the denoising of the first four samples to this .png, a row each."""
    weights: Kind = "ema"
    """Weights to sample with: the averaged weights (ema) or the trained ones (raw)."""
    num_samples: int = 64
    """Number of samples."""
    classes: tuple[str, ...] = ()
    """Classes by number or name, used cyclically. Default: all classes."""
    unconditional: bool = False
    """Sample without labels and without guidance by them."""
    sampling: Sampling = Sampling()  # noqa: RUF009  (immutable)
    """Solver and guidance."""
    guide: str = ""
    """Weights of a weaker model (a smaller network, or an earlier checkpoint) that guides in place of the network
    without a label: autoguidance. Paths as for the source."""
    vae: str = ""
    """Folder or name of a diffusers AutoencoderKL that decodes latents. Default: the VAE that the run recorded."""
    batch_size: int = 256
    """Largest number of samples computed at a time by a process; all batches are of one size."""
    seed: int = 0
    """Seed of the noise; sample i depends on the seed and i only."""
    device: str = "auto"
    """Device: cuda or cpu. auto: the GPU if there is one."""
    precision: Precision = "auto"
    """Compute precision of the network: fp32 or bf16 (autocast). auto: bf16 on GPUs that have it."""
    compile: Compile = "auto"
    """Compile the blocks of the network, or nothing. auto: block on a GPU."""
    num_heads: int = 0
    """Number of encoder heads, for a file that does not record it. 0: as in the published model of that width."""


def main(argv: Sequence[str]) -> None:
    """Parse the arguments, draw the samples and write them."""
    ranks = Ranks.from_environment()
    signal_if_torchrun_dies(signal.SIGTERM)
    get_console().quiet = ranks.rank > 0
    config = parse(SampleConfig, argv, prog="python -m fastmask.sample", description="Draw samples.")
    check(config)
    device = own_device(pick_device(config.device), ranks)
    with process_group(ranks, device):
        draw(config, device, ranks, given="--cfg-scale" in {word.split("=")[0] for word in argv})


def draw(config: SampleConfig, device: torch.device, ranks: Ranks, *, given: bool) -> None:
    """Draw the samples of this rank; rank 0 writes the output.

    Args:
        config: the checked arguments.
        device: device of this rank.
        ranks: rank and world size.
        given: whether the guidance scale is the user's choice.
    """
    options: dict[str, Any] = {"device": device, "precision": config.precision, "compile": config.compile}
    model = load(config.source, weights=config.weights, vae=config.vae, num_heads=config.num_heads or None, **options)
    guide = load(config.guide, weights=config.weights, **options) if config.guide else None
    ids = ids_of(config, model)
    sampling = fit_guidance(config.sampling, ids != [model.num_classes], guide is not None, given)
    # What may be missing is missed before the work, on every rank.
    if not config.latents or config.strip:
        model.decoder.load(device)
    elif not model.decoder.from_latents:
        raise ValueError(f"--latents: {config.source} draws pixels, not latents: leave it out")
    batches = Batches.of(config.num_samples, config.batch_size)
    output = output_of(config, batches, ids, model)

    def values_of(batch: int) -> Tensor:
        drawn = model.draw(ids, batch * batches.size, batches.size, sampling, seed=config.seed, guide=guide)
        return to_uint8(model.decoder(drawn)) if output.decoded else drawn.cpu()

    run_job(output, settings_of(config, sampling, ids, batches, model, guide), ranks, values_of)
    say(f"{config.num_samples:,} samples: {config.out}")
    if config.strip and not ranks.rank:
        rows = min(ROWS, config.num_samples)
        draw_strip(Path(config.strip), model, ids, rows, sampling, seed=config.seed, guide=guide)
        say(f"denoising of {rows}: {config.strip}")


def check(config: SampleConfig) -> None:
    """Raise a ValueError for the first invalid argument, before the weights are read."""
    out, suffix = Path(config.out), Path(config.out).suffix
    is_folder = not suffix or config.out.endswith("/") or out.is_dir()
    if suffix not in (".png", ".npz") and not is_folder:
        raise ValueError(
            f"--out {config.out}: samples are written as .png, .npz, or into a folder (a name without suffix)"
        )
    if config.latents and suffix != ".npz":
        raise ValueError(f"--latents: latents are written as .npz, and --out is {config.out}")
    if is_folder and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {config.out} exists already: name another folder, or delete it")
    if config.strip and Path(config.strip).suffix != ".png":
        raise ValueError(f"--strip {config.strip}: the denoising is drawn as .png")
    check_out("--out", working_folder(out) / "part")
    if config.strip:
        check_out("--strip", Path(config.strip))
    if (suffix != ".npz" or config.strip) and not importlib.util.find_spec("PIL"):
        raise ValueError(f"--out {config.out}: drawing images needs pillow: pip install pillow, or name an .npz")
    if config.num_samples < 1 or config.batch_size < 1:
        raise ValueError("--num-samples and --batch-size must be at least 1")
    config.sampling.check()
    if config.seed < 0:
        raise ValueError(f"--seed must be at least 0, not {config.seed}")
    if config.unconditional and config.classes:
        raise ValueError("--unconditional draws without labels: leave --classes out")


def ids_of(config: SampleConfig, model: Model) -> list[int]:
    """Return the classes that samples have in turn; the number of classes alone means no label."""
    if config.classes:
        return class_ids(config.classes, model.class_names, model.num_classes, config.source)
    return [model.num_classes] if config.unconditional or not model.num_classes else list(range(model.num_classes))


def output_of(config: SampleConfig, batches: Batches, ids: Sequence[int], model: Model) -> Output:
    """Return the output that the arguments name."""
    kinds = {".png": Grid, ".npz": Latents if config.latents else Arrays}
    out = Path(config.out)
    kind = Folder if out.is_dir() or config.out.endswith("/") else kinds.get(out.suffix, Folder)
    labels = np.resize(np.array(ids, np.int64), batches.total)
    return kind(out, batches, labels, model.class_names, len(ids))


def settings_of(
    config: SampleConfig, sampling: Sampling, ids: Sequence[int], batches: Batches, model: Model, guide: Model | None
) -> dict[str, Any]:
    """Return what decides the images of a job, bit for bit on the same kind of device."""
    return {
        "out": Path(config.out).suffix,
        "latents": config.latents,
        "weights": model.digest(),
        "guide": guide.digest() if guide else "",
        "vae": "" if config.latents else model.decoder.digest,
        "classes": list(ids),
        "num_samples": config.num_samples,
        "batch_size": batches.size,
        "seed": config.seed,
        "device": model.device.type,
        "precision": config.precision,
        "compile": config.compile,
        **dataclasses.asdict(sampling),
    }


if __name__ == "__main__":
    run_command("fastmask.sample", main, "--batch-size or --num-samples")
