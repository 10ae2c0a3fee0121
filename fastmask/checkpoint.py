"""Reading published weights, and writing and reading the checkpoints of a run.

A checkpoint is a folder `step-00001000` with `model.safetensors`, `ema.safetensors`, `optimizer.safetensors` and
`state.json`. It is written under a temporary name and renamed when complete, so every folder of that name is whole.
"""

import argparse
import json
import math
import os
import pickle
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fastmask.diffusion import EDMPrecond
from fastmask.ema import PowerEMA
from fastmask.files import whole_file
from fastmask.model import MaskDiT

# Encoder heads of the published sizes S, B, L, XL and H, by width.
_PUBLISHED_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16, 1280: 16}
_MAX_NAMES_SHOWN = 6


def load_maskdit(
    source: Mapping[str, Tensor] | str | os.PathLike[str],
    num_heads: int | None = None,
    decoder_num_heads: int = 16,
    *,
    sigma_data: float = 0.5,
) -> EDMPrecond:
    """Return the network that a set of weights in the published names describes, on the CPU in fp32.

    Sizes are read from the shapes. Heads leave no trace there: a file written by fastmask states its own (and its
    sigma_data), which then hold; for others they are arguments.

    Args:
        source: a mapping of names to tensors, or a `.pt` or `.safetensors` file of one. Names may carry the
            preconditioner's prefix `model.`. Of a published training file (`model`, `ema`, `opt`) the EMA is read.
        num_heads: encoder heads; None takes those of the published size of the same width.
        decoder_num_heads: decoder heads.
        sigma_data: standard deviation of the data.

    Returns:
        The denoiser in training mode, with gradients enabled.

    Raises:
        ValueError: a missing or unreadable file, weights that are not a MaskDiT's, or heads that cannot be told.
    """
    stated: dict[str, str] = {}
    if isinstance(source, Mapping):
        what, tensors = "the given mapping", source
    else:
        what = str(source)
        tensors, stated = _read_weights(Path(source))
    weights = {_bare(name): tensor for name, tensor in tensors.items()}
    sizes = _read_sizes(weights, what)
    num_heads = int(stated.get("num_heads", 0)) or num_heads or _PUBLISHED_HEADS.get(sizes["width"])
    if num_heads is None:
        raise ValueError(
            f"{what}: no published size has width {sizes['width']}, so its heads are unknown: pass num_heads"
        )
    decoder_num_heads = int(stated.get("decoder_num_heads", decoder_num_heads))
    with torch.device("meta"):
        model = MaskDiT(**sizes, num_heads=num_heads, decoder_num_heads=decoder_num_heads)
    net = EDMPrecond(model, float(stated.get("sigma_data", sigma_data)))
    weights = {f"model.{name}": tensor.to("cpu", torch.float32, copy=True) for name, tensor in weights.items()}
    check_same_shapes(net.state_dict(), weights, what)
    net.load_state_dict(weights, assign=True)
    return net.requires_grad_()


def save_weights(path: Path, net: EDMPrecond, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write weights (the network's own, or others of the same names) so that `load_maskdit` reads them alone."""
    metadata = {
        "num_heads": str(net.model.num_heads),
        "decoder_num_heads": str(net.model.decoder_num_heads),
        "sigma_data": str(net.sigma_data),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in (weights or net.state_dict()).items()}
    safetensors.torch.save_file(tensors, path, metadata)


def check_same_shapes(expected: Mapping[str, Tensor], got: Mapping[str, Tensor], what: str) -> None:
    """Raise a ValueError that lists the names in which two sets of tensors differ, if any do."""
    differing = [f"{name} is missing" for name in expected.keys() - got.keys()]
    differing += [f"{name} is not part of the network" for name in got.keys() - expected.keys()]
    differing += [
        f"{name} has shape {tuple(got[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected.keys() & got.keys()
        if expected[name].shape != got[name].shape
    ]
    if differing:
        more = f", and {len(differing) - _MAX_NAMES_SHOWN} more" if len(differing) > _MAX_NAMES_SHOWN else ""
        raise ValueError(f"{what} is of another network: {', '.join(sorted(differing)[:_MAX_NAMES_SHOWN])}{more}")


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
        weights, averaged, stored = (_read_weights(folder / f"{name}.safetensors")[0] for name in names)
        kept = _read_weights(folder / "profiles.safetensors")[0] if profiles else {}
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


def read_snapshot(snapshot: Snapshot) -> Mapping[str, Tensor]:
    """Return the tensors of a snapshot by name; a ValueError if the file is damaged."""
    return _read_weights(snapshot.path)[0]


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
        {f"model.{_bare(name)}": tensor for name, tensor in _read_weights(file)[0].items()}
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


def _read_weights(path: Path) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    """Return the tensors of a file and what it states beside them."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist, or is not a file: name a .pt or .safetensors file of weights")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        if path.suffix in (".pt", ".pth"):
            # The published training files keep their arguments as a Namespace.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
            for key in ("ema", "model"):
                if isinstance(content, dict) and isinstance(content.get(key), Mapping):
                    content = content[key]
            if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
                raise ValueError(f"{path} holds no mapping of names to tensors")
            return content, {}
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = (str(error).splitlines() or ["it ends too early"])[0]
        raise ValueError(f"{path} cannot be read as weights: {reason}") from error
    raise ValueError(f"{path}: weights are read from .pt and .safetensors files")


def _bare(name: str) -> str:
    """Return a parameter's name without what wrappers put before it."""
    return name.replace("_orig_mod.", "").removeprefix("module.").removeprefix("model.")


def _read_sizes(weights: Mapping[str, Tensor], what: str) -> dict[str, Any]:
    try:
        width, in_channels, patch_size, _ = weights["x_embedder.proj.weight"].shape
        length = weights["pos_embed"].shape[1]
        num_classes, decoder_width = 0, 512
        if "y_embedder.embedding_table.weight" in weights:
            num_classes = weights["y_embedder.embedding_table.weight"].shape[1]
        if "mask_token" in weights:
            decoder_width = weights["mask_token"].shape[2]
    except (KeyError, ValueError, IndexError):
        raise ValueError(
            f"{what} is no MaskDiT: it lacks a usable x_embedder.proj.weight, pos_embed, mask_token or label table"
        ) from None
    return {
        "input_size": math.isqrt(length) * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "width": width,
        "depth": _count_blocks(weights, "blocks."),
        "num_classes": num_classes,
        "decoder_width": decoder_width,
        "decoder_depth": _count_blocks(weights, "decoder_blocks."),
    }


def _count_blocks(weights: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix)})
