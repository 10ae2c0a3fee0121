"""`python -m fastmask.convert`: converts weights between formats, and reconstructs post-hoc EMA weights of a run."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from fastmask.cli import parse, run_command
from fastmask.console import say
from fastmask.diffusion import Denoiser
from fastmask.diffusion.foreign import split_kind
from fastmask.diffusion.weights import Kind, load_maskdit, save_weights, weights_for
from fastmask.exchange.folder import push, save_published, write_folder
from fastmask.files import atomic_write
from fastmask.ranks import require_one_process
from fastmask.rundir import find_weights, listing, locate, snapshots, step_of
from fastmask.training.ema import gamma_of, posthoc_coefficients

_NOTABLE = 0.05  # relative residual of the reconstructed profile; above this, warn


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Arguments of the conversion."""

    source: tyro.conf.Positional[str]
    """Weights: a run folder, one of its checkpoints, a .pt or .safetensors file, or a folder in diffusers' format. With
    --posthoc-ema a run trained with --ema-widths; a path to a checkpoint or a snapshot also selects the step."""
    out: str = ""
    """Output: a .safetensors or .pt file with the published parameter names, or a folder (a name without suffix) that
    diffusers loads. Default, with --posthoc-ema: ema-WIDTH.safetensors in the run folder."""
    kind: Literal["auto", "dit", "sit"] = "auto"
    """What the weights are of, if their names are DiT's, which are also SiT's."""
    num_heads: int = 0
    """Number of encoder heads, for a file that does not record it. 0: as in the published model of that width."""
    weights: Kind = "ema"
    """Weights to convert: the averaged weights (ema) or the trained ones (raw)."""
    posthoc_ema: float = 0.0
    """Relative width of the EMA to reconstruct from the snapshots, such as 0.05. 0: none."""
    step: int = 0
    """Last step of that EMA. 0: the step of the given checkpoint or snapshot, or the newest snapshot."""
    vae: str = ""
    """For a folder: folder of a diffusers VAE, which is copied, or the name of one, which is recorded. Default: the
    name that the run recorded."""
    license: str = "unknown"
    """For a folder: licence of the weights in the model card."""
    push_to_hub: str = ""
    """For a folder: also upload it to this model of the Hugging Face hub, such as NAME or OWNER/NAME."""


def main(argv: Sequence[str]) -> None:
    """Parse the arguments, read or reconstruct the weights and write them."""
    config = parse(ConvertConfig, argv, prog="python -m fastmask.convert", description="Convert weights.")
    require_one_process("fastmask.convert")
    out = _checked_out(config)
    if config.posthoc_ema:
        net, line = reconstruct(config)
        path, _ = run_and_step(config.source)
        out = out or path / f"ema-{config.posthoc_ema:g}.safetensors"
    else:
        assert out
        named, source = split_kind(config.source)
        path = find_weights(source, config.weights == "ema", say)
        kind = None if config.kind == "auto" else config.kind
        full = f"{named}:{path}" if named else path
        net = load_maskdit(full, config.num_heads or None, weights=config.weights, kind=kind)
        line = f"the weights of {path}, with {net.process}"
    write(net, out, path, config)
    say(f"{out}: {line}")
    if config.push_to_hub:
        say(f"uploaded: {push(out, config.push_to_hub)}")


def _checked_out(config: ConvertConfig) -> Path | None:
    """Return the output, None for the default; a ValueError for arguments that do not fit together."""
    suffix = Path(config.out).suffix
    if not config.out and not config.posthoc_ema:
        raise ValueError(
            "name the output: --out X.safetensors, X.pt, or a folder for diffusers (a name without suffix)"
        )
    if suffix and suffix not in (".safetensors", ".pt") and not config.out.endswith("/"):
        raise ValueError(
            f"--out {config.out}: weights are written as .safetensors or .pt, or into a folder (a name without suffix)"
        )
    if not config.out or suffix in (".safetensors", ".pt"):
        for flag, value in (("--vae", config.vae), ("--push-to-hub", config.push_to_hub)):
            if value:
                raise ValueError(f"{flag} belongs to a folder for diffusers: give --out a name without suffix")
    if config.posthoc_ema and (config.kind != "auto" or config.weights != "ema"):
        raise ValueError("--posthoc-ema reconstructs an average from a run's snapshots: leave --kind and --weights out")
    if config.step and not config.posthoc_ema:
        raise ValueError("--step belongs to --posthoc-ema: name the checkpoint of that step instead")
    return Path(config.out) if config.out else None


def reconstruct(config: ConvertConfig) -> tuple[Denoiser, str]:
    """Return a network with the post-hoc EMA of a run, and a line that describes it."""
    gamma = gamma_of(config.posthoc_ema)
    run_dir, named_step = run_and_step(config.source)
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
    net.load_state_dict({**net.state_dict(), **total})
    if missed > _NOTABLE:
        say(f"the snapshots miss {missed:.0%} of its profile: more of them, or a width nearer to theirs, miss less")
    return net, f"an average of relative width {config.posthoc_ema:g} at step {step}, from {len(used)} snapshots"


def write(net: Denoiser, out: Path, source: Path, config: ConvertConfig) -> None:
    """Write the weights to a file, or a folder for diffusers.

    Raises:
        OSError: the output cannot be written; names it.
    """
    try:
        if out.suffix == ".safetensors":
            with atomic_write(out) as partial:
                save_weights(partial, net)
        elif out.suffix == ".pt":
            with atomic_write(out) as partial:
                save_published(partial, net)
        else:
            write_folder(net, out, vae=config.vae, licence=config.license, facts=facts_of(source))
    except (OSError, RuntimeError) as error:  # torch.save reports a failed write as a RuntimeError
        raise OSError(f"--out {out} cannot be written: {error.__cause__ or error}") from error


def facts_of(source: Path) -> dict[str, Any]:
    """Return what the run folder of a file or a folder says of its training and evaluation, for the model card."""
    place = locate(source)
    if place.run is None:
        return {}
    facts: dict[str, Any] = {}
    for name, keys in (("run.json", ("config", "versions")), ("evaluation.json", ())):
        try:
            content = json.loads((place.run / name).read_text())
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{place.run / name} cannot be read: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{place.run / name} holds no mapping")
        facts |= {key: content[key] for key in keys if isinstance(content.get(key), dict)} if keys else {}
        facts |= {} if keys else {"evaluation": content}
    return facts | ({"step": step_of(place.checkpoint)} if place.checkpoint else {})


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
