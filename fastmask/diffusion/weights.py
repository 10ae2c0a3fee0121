"""Weights with the published parameter names: loading, saving, building the network that they describe."""

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmask.console import say
from fastmask.described import from_json, to_json
from fastmask.diffusion import EDM, Denoiser, Origin, Process
from fastmask.diffusion.foreign import ForeignKind, read_file, read_source
from fastmask.diffusion.processes import PROCESSES
from fastmask.models.layers import sincos_position
from fastmask.models.maskdit import MaskDiT, MaskDiTConfig
from fastmask.models.networks import NETWORKS
from fastmask.models.stack import NetworkConfig
from fastmask.tensorfile import check_finite, save_tensors, with_checksum

Kind = Literal["ema", "raw"]

# Encoder heads of the published sizes S, B, L, XL and H, by width.
_PUBLISHED_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16, 1280: 16}
_MAX_NAMES_SHOWN = 6
_LABELS = "model.y_embedder.embedding_table.weight"
_POSITIONS = ("model.pos_embed", "model.decoder_pos_embed")
_SAME_POSITION = 1e-2  # above the error of rounding a sine to 16 bits
# Fields of a network that no shape of a tensor tells, and their values where a file states no network.
UNSEEN = {"frequency_shift": 0, "norm": "layer", "mlp": "gelu", "rope": False}


def load_maskdit(
    source: Mapping[str, Tensor] | str | os.PathLike[str],
    num_heads: int | None = None,
    decoder_num_heads: int = 16,
    *,
    sigma_data: float = 0.5,
    weights: Kind = "ema",
    kind: ForeignKind | None = None,
) -> Denoiser:
    """Build the network that weights with the published parameter names describe, on the CPU in fp32.

    Sizes are inferred from the shapes. Number of heads and process cannot be: they are read from files written by
    fastmask or diffusers, which record them, and are arguments otherwise. Weights of a DiT (with the process `VP`) or a
    SiT (with `RectifiedFlow`) become a network without a decoder.

    Args:
        source: a mapping of names to tensors; a run folder (its newest intact checkpoint); a checkpoint folder; a
            `.safetensors` or `.pt` file, also as ``dit:FILE`` or ``sit:FILE``; or a folder in diffusers' format, of a
            `DiTTransformer2DModel` or of `fastmask.convert`. Names can have prefixes of wrappers and of the
            preconditioner.
        num_heads: number of encoder heads; None is the number of the published model of the same width.
        decoder_num_heads: number of decoder heads.
        sigma_data: standard deviation of the data, for EDM.
        weights: "ema" or "raw", for a run or a training file that has both.
        kind: "dit" or "sit", for weights with DiT's names, which do not tell which of the two they are of.

    Returns:
        The denoiser in training mode, with gradients enabled.

    Raises:
        ValueError: a missing, unreadable or damaged file, weights that are not a MaskDiT's or not finite, or an unknown
            number of heads.
    """
    what, tensors, stated, notes = read_source(source, kind, average=weights == "ema")
    for note in notes:
        say(note)
    sizes = _read_sizes(tensors, what)
    _check_network(stated, sizes, what)
    num_heads = _heads(stated, "num_heads", what) or num_heads or _PUBLISHED_HEADS.get(sizes["width"])
    if num_heads is None:
        raise ValueError(
            f"{what}: no published size has width {sizes['width']}, so its heads are unknown: pass num_heads"
        )
    decoder_num_heads = _heads(stated, "decoder_num_heads", what) or decoder_num_heads
    try:
        with torch.device("meta"):
            if _is_maskdit(stated, what):
                sizes |= {"num_heads": num_heads, "decoder_num_heads": decoder_num_heads}
                model = MaskDiT(**sizes, **_unseen(stated, what))
            else:
                images = sizes["in_channels"], sizes["input_size"], sizes["num_classes"]
                model = _network(stated, what).build(*images)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
    process = _process(stated, what)
    if process is None:
        process = EDM(sigma_data=sigma_data)
        if not isinstance(source, Mapping):
            say(f"{what} states no diffusion process: it is read as {process}")
    net = Denoiser(model, process)
    net.origin = _origin(stated, what)
    found = {f"model.{name}": tensor for name, tensor in tensors.items()}
    check_same_shapes(net.state_dict(), found, what)
    found = {name: tensor.to("cpu", torch.float32, copy=True) for name, tensor in found.items()}
    check_finite(found, what)
    net.load_state_dict(found, assign=True)
    return net.requires_grad_()


def weights_for(net: Denoiser, path: Path, kind: ForeignKind | None = None) -> tuple[dict[str, Tensor], list[str]]:
    """Read the weights of a file that fit a network, by its parameter names, on the CPU, and notes on what differs.

    The label table is omitted for another number of classes, and the fixed position tables for another image size; the
    network keeps its own. Learned position tables are interpolated.

    Args:
        net: the denoiser.
        path: the file.
        kind: as in `load_maskdit`.

    Raises:
        ValueError: an unreadable or damaged file, weights that are not finite, or weights of another network (lists the
            differing names).
    """
    what, tensors, stated, said = read_file(path, kind)
    _read_sizes(tensors, what)
    for field, value in _unseen(stated, what).items():
        if value != (wanted := getattr(net.model.config, field, UNSEEN[field])):
            raise ValueError(f"{what} is of another network: its {field} is {value} instead of {wanted}")
    found, own = {f"model.{name}": tensor for name, tensor in tensors.items()}, net.state_dict()
    left, notes = _other_labels(own, found, what)
    others, tables, note = _other_positions(net, found, what)
    left, notes = left | others, [*said, *notes, *note]
    found = _without({**found, **tables}, left)
    check_same_shapes(_without(own, left), found, what)
    for name in ("num_heads", "decoder_num_heads", "mixer_num_heads"):
        heads, ours = _heads(stated, name, what), getattr(net.model.config, name, 0)
        if heads and ours and heads != ours and (name != "decoder_num_heads" or net.model.decoder_blocks):
            raise ValueError(f"{what} is of another network: its {name} is {heads} instead of {ours}")
    # A file that states no process is EDM's, as published weights are.
    process = _process(stated, what) or (net.process if isinstance(net.process, EDM) else EDM())
    if process != net.process:
        notes.append(f"{what} was trained with {process}, and continues with {net.process}")
    found = {name: tensor.float() for name, tensor in found.items()}
    check_finite(found, what)
    return found, notes


def save_weights(
    path: Path,
    net: Denoiser,
    weights: Mapping[str, Tensor] | None = None,
    *,
    checksum: bool = True,
    stated: Mapping[str, str] | None = None,
) -> None:
    """Write weights to a file that `load_maskdit` can read without further arguments.

    Args:
        path: a `.safetensors` file.
        net: the denoiser.
        weights: weights with the same names; None is the network's own.
        checksum: whether to store a checksum in the file; checkpoints have a separate checksum file.
        stated: further metadata.

    Raises:
        OSError: the file cannot be written.
    """
    stated = {**(stated or {}), "network": to_json(net.model.config), "process": to_json(net.process)}
    if net.origin is not None:
        stated["origin"] = net.origin.to_json()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in (weights or net.state_dict()).items()}
    save_tensors(path, tensors, with_checksum(tensors, stated) if checksum else stated)


def check_stated(stated: Mapping[str, str], net: Denoiser, what: str) -> None:
    """Raise a ValueError unless the metadata of a checkpoint state the network and the process of a resumed run.

    Fields of the process that a resumed run may change are not compared, and metadata of earlier versions state less.

    Args:
        stated: the metadata.
        net: the denoiser of the run.
        what: the file, for messages.
    """
    process, network = _process(stated, what), _network(stated, what) if "network" in stated else None
    for there, here in ((process, net.process), (network, net.model.config)):
        if there is not None and _lasting(there) != _lasting(here):
            raise ValueError(f"{what} was written for {there}, and this run trains {here}: it is not of this run")


def _lasting(value: Process | NetworkConfig) -> tuple[str, dict[str, Any]]:
    """Return the name and those fields that cannot change when a run is resumed."""
    fields = [field.name for field in dataclasses.fields(value) if "recorded" not in field.metadata]
    return value.name, {name: getattr(value, name) for name in fields}


def check_same_shapes(expected: Mapping[str, Tensor], got: Mapping[str, Tensor], what: str) -> None:
    """Raise a ValueError that lists the differing names and shapes of two sets of tensors, if any."""
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


def _other_labels(own: Mapping[str, Tensor], found: Mapping[str, Tensor], what: str) -> tuple[set[str], list[str]]:
    """Return the name of the label table and a note, if it is for another number of classes."""
    there, here = (weights[_LABELS].shape if _LABELS in weights else None for weights in (found, own))
    if there == here or (there and here and there[:1] != here[:1]):
        return set(), []
    known = f"{what} is for {there[1] if there else 0} classes"
    if here is None:
        return {_LABELS}, [f"{known}: its label table is left out"]
    return {_LABELS}, [f"{known}: the label table for {here[1]} is freshly initialized"]


def _other_positions(
    net: Denoiser, found: Mapping[str, Tensor], what: str
) -> tuple[set[str], dict[str, Tensor], list[str]]:
    """Return the names of fixed position tables for another image size, learned ones interpolated to it, and notes."""
    own, fixed, side = net.state_dict(), set(), 0
    learned: dict[str, Tensor] = {}
    now = net.model.input_size
    for name in sorted(own.keys() & found.keys() & set(_POSITIONS)):
        if found[name].shape == own[name].shape or found[name].ndim != 3:
            continue
        side = math.isqrt(found[name].shape[1])
        table = sincos_position(side, side, own[name].shape[2])
        if found[name].shape != table.shape:
            continue  # another network: reported by the comparison of all shapes
        if (found[name].float() - table).abs().max() <= _SAME_POSITION:
            fixed.add(name)
        else:
            learned[name] = _interpolated(found[name].float(), side, now // net.model.patch_size)
    notes, sized = [], f"{what} is for images of {side * net.model.patch_size} x {side * net.model.patch_size}"
    if fixed:
        notes.append(f"{sized}: the position tables for {now} x {now} are recomputed")
    if learned:
        names = ", ".join(name.removeprefix("model.") for name in learned)
        notes.append(f"{sized}: {names}, which is no fixed table of sines, is interpolated to {now} x {now}")
    return fixed, learned, notes


def _interpolated(table: Tensor, before: int, now: int) -> Tensor:
    """Return a position table (1, before^2, width) at the grid points of another size, by bicubic interpolation."""
    grid = table.view(1, before, before, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(grid, (now, now), mode="bicubic", antialias=True)
    return resized.permute(0, 2, 3, 1).reshape(1, now * now, -1)


def _without(weights: Mapping[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights.items() if name not in names}


def _heads(stated: Mapping[str, str], name: str, what: str) -> int:
    """Return a number of heads that a file states, 0 if it states none; files of earlier versions state these alone."""
    if "network" in stated:
        heads: int = getattr(_network(stated, what), name, 0)
        return heads
    text = stated.get(name, "")
    if text and not re.fullmatch(r"[1-9]\d{0,4}", text):
        raise ValueError(f"{what} states {name} {text!r}, which is no number of heads")
    return int(text or 0)


def _unseen(stated: Mapping[str, str], what: str) -> dict[str, Any]:
    """Return what a file states of the fields of `UNSEEN`."""
    config = _network(stated, what) if "network" in stated else None
    return {name: getattr(config, name, default) for name, default in UNSEEN.items()}


def _check_network(stated: Mapping[str, str], sizes: Mapping[str, Any], what: str) -> None:
    """Raise a ValueError if the network that a file states is not the network of its tensors."""
    if "network" not in stated:
        return
    config = _network(stated, what)
    names = [name for name in sizes if hasattr(config, name) and (name != "decoder_width" or sizes["decoder_depth"])]
    differing = [f"{name} {getattr(config, name)}" for name in names if getattr(config, name) != sizes[name]]
    if differing:
        raise ValueError(f"{what} states another network than its tensors are of: {', '.join(differing)}")


def _is_maskdit(stated: Mapping[str, str], what: str) -> bool:
    """Return whether a file is of a MaskDiT, as all that state no network are."""
    return "network" not in stated or _network(stated, what).name == MaskDiTConfig.name


def _network(stated: Mapping[str, str], what: str) -> NetworkConfig:
    try:
        return from_json(stated["network"], NETWORKS, "network")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what}: the network that its metadata state cannot be built: {error}") from error


def _process(stated: Mapping[str, str], what: str) -> Process | None:
    """Return the process recorded in a file, None if there is none; earlier versions recorded ``sigma_data`` only."""
    try:
        if "process" in stated:
            return from_json(stated["process"], PROCESSES, "process")
        return EDM(sigma_data=float(stated["sigma_data"])) if "sigma_data" in stated else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what}: the process that its metadata state cannot be built: {error}") from error


def _origin(stated: Mapping[str, str], what: str) -> Origin | None:
    try:
        return Origin.from_json(stated["origin"]) if "origin" in stated else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} states no data that it was trained on: {error}") from error


def _read_sizes(weights: Mapping[str, Tensor], what: str) -> dict[str, Any]:
    try:
        _, in_channels, patch_size, _ = weights["x_embedder.proj.weight"].shape
        width = weights["t_embedder.mlp.2.weight"].shape[0]  # patches may be embedded in a mixer's width
        length = weights["pos_embed"].shape[1]
        num_classes, decoder_width = 0, 512
        if "y_embedder.embedding_table.weight" in weights:
            num_classes = weights["y_embedder.embedding_table.weight"].shape[1]
        if "mask_token" in weights:
            decoder_width = weights["mask_token"].shape[2]
    except (KeyError, ValueError, IndexError):
        raise ValueError(
            f"{what} is no MaskDiT: it lacks a usable x_embedder.proj.weight, t_embedder.mlp.2.weight, pos_embed, "
            f"mask_token or label table"
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
        "qk_norm": "blocks.0.attn.q_norm.weight" in weights,
    }


def _count_blocks(weights: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix)})
