"""Writing and reading the checkpoints of a run.

A checkpoint is a folder `step-00001000` with `model.safetensors`, `ema.safetensors`, `optimizer.safetensors` and
`state.json`. It is written under a temporary name and renamed when complete, so every folder of that name is whole.
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fastmask.diffusion import EDMPrecond
from fastmask.ema import PowerEMA
from fastmask.files import whole_file
from fastmask.weights import bare_name, check_same_shapes, read_weights, save_weights


def save_checkpoint(
    run_dir: Path,
    step: int,
    net: EDMPrecond,
    ema: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    keep: int,
    profiles: Sequence[PowerEMA] = (),
) -> Path:
    """Write the checkpoint of a step and delete all but the newest ``keep``.

    Args:
        run_dir: the run's folder.
        step: optimizer steps done.
        net: the denoiser.
        ema: averaged weights, by the names of ``net``'s parameters.
        optimizer: its state tensors are stored by parameter name.
        state: JSON values, stored beside ``step``.
        keep: how many checkpoints stay.
        profiles: averages that snapshots are taken of.

    Returns:
        The folder written.

    Raises:
        OSError: the disk is full or the folder cannot be written; earlier checkpoints are untouched.
    """
    root = run_dir / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    final, partial = root / f"step-{step:08d}", root / f".partial-{step:08d}"
    for left in root.glob(".partial-*"):  # by a run that was killed
        shutil.rmtree(left)
    partial.mkdir()
    try:
        save_weights(partial / "model.safetensors", net)
        save_weights(partial / "ema.safetensors", net, {**net.state_dict(), **ema})
        safetensors.torch.save_file(_optimizer_tensors(net, optimizer), partial / "optimizer.safetensors")
        if profiles:
            averages = {f"{p.width:g}/{name}": t.cpu() for p in profiles for name, t in p.weights.items()}
            safetensors.torch.save_file(averages, partial / "profiles.safetensors")
        (partial / "state.json").write_text(json.dumps({"step": step, **state}, indent=2) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    except SafetensorError as error:  # how safetensors reports a failed write
        raise OSError(str(error)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for old in checkpoints(run_dir)[:-keep]:
        shutil.rmtree(old)
    return final


def load_checkpoint(
    folder: Path,
    net: EDMPrecond,
    ema: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    profiles: Sequence[PowerEMA] = (),
) -> dict[str, Any]:
    """Copy a checkpoint into a network, its averages and its optimizer, and return what ``state.json`` holds.

    Raises:
        ValueError: a damaged checkpoint, or one of another network (lists the differing names); nothing was copied.
    """
    state = read_state(folder)
    try:
        names = ("model", "ema", "optimizer")
        weights, averaged, stored = (read_weights(folder / f"{name}.safetensors")[0] for name in names)
        kept = read_weights(folder / "profiles.safetensors")[0] if profiles else {}
    except ValueError as error:
        raise _damaged(folder, str(error)) from error
    for tensors in (weights, averaged):
        check_same_shapes(net.state_dict(), tensors, str(folder))
    own = {f"{p.width:g}/{name}": tensor for p in profiles for name, tensor in p.weights.items()}
    check_same_shapes(own, kept, f"{folder / 'profiles.safetensors'}")
    net.load_state_dict(weights)
    for name, tensor in ema.items():
        tensor.copy_(averaged[name])
    for name, tensor in own.items():
        tensor.copy_(kept[name])
    device = next(net.parameters()).device
    for name, parameter in net.named_parameters():
        prefix = f"{name}/"
        mine = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
        if mine:
            # torch's AdamW keeps the step count of its fused form beside the parameter.
            optimizer.state[parameter] = {key: value.to(device) for key, value in mine.items()}
    return state


class Snapshot(NamedTuple):
    """An average of a run at a step: a file of weights that `load_maskdit` reads."""

    step: int
    width: float
    path: Path


def save_snapshots(run_dir: Path, step: int, net: EDMPrecond, profiles: Sequence[PowerEMA]) -> None:
    """Write averages to `snapshots/step-00001000-0.05.safetensors`, in fp16, the position tables in fp32."""
    for profile in profiles:
        with whole_file(run_dir / "snapshots" / f"step-{step:08d}-{profile.width:g}.safetensors") as partial:
            halves = {name: tensor.half() for name, tensor in profile.weights.items()}
            save_weights(partial, net, {**net.state_dict(), **halves})


def snapshots(run_dir: Path) -> list[Snapshot]:
    """Return the snapshots of a run, oldest first."""
    found = []
    for path in (run_dir / "snapshots").glob("step-*.safetensors"):
        named = re.fullmatch(r"step-(\d{8,})-(\d.*)", path.stem)
        if named:
            found.append(Snapshot(int(named[1]), float(named[2]), path))
    return sorted(found)


def read_state(folder: Path) -> dict[str, Any]:
    """Return what the ``state.json`` of a checkpoint holds; a ValueError if it cannot be read."""
    try:
        state: dict[str, Any] = json.loads((folder / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise _damaged(folder, f"state.json: {error}") from error
    return state


def load_initial(init: str, net: EDMPrecond, ema: Mapping[str, Tensor]) -> None:
    """Copy weights from elsewhere into a network and its EMA.

    Args:
        init: a run folder, whose newest weights and EMA both go on, or a `.pt` or `.safetensors` file for both.
        net: the denoiser.
        ema: averaged weights, by the names of ``net``'s parameters.

    Raises:
        ValueError: nothing to read there, or the weights of another network (lists the differing names).
    """
    source = Path(init)
    weights_file = average_file = source
    if source.is_dir() or not source.suffix:
        found = checkpoints(source)
        if not found:
            raise ValueError(f"--init {init}: there is no checkpoint of a run; train one there, or name a weights file")
        weights_file, average_file = found[-1] / "model.safetensors", found[-1] / "ema.safetensors"
    weights, average = (
        {f"model.{bare_name(name)}": tensor for name, tensor in read_weights(file)[0].items()}
        for file in (weights_file, average_file)
    )
    check_same_shapes(net.state_dict(), weights, f"--init {weights_file}")
    net.load_state_dict(weights)
    for name, tensor in ema.items():
        tensor.copy_(average[name])


def checkpoints(run_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    named = (run_dir / "checkpoints").glob("step-*")
    # A copy that a user has put aside beside them is not one of them.
    return sorted((path for path in named if path.name.removeprefix("step-").isdecimal()), key=step_of)


def step_of(folder: Path) -> int:
    """Return how many steps had been done at a checkpoint."""
    return int(folder.name.removeprefix("step-"))


def _damaged(folder: Path, why: str) -> ValueError:
    return ValueError(f"{folder} is damaged ({why}): delete it to go on from the checkpoint before it")


def _optimizer_tensors(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value.detach().cpu().contiguous()
        for name, parameter in net.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
