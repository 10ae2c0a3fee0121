"""Reading and writing weights in the published names."""

import argparse
import math
import os
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastmask.diffusion import EDMPrecond
from fastmask.model import MaskDiT

# Encoder heads of the published sizes S, B, L, XL and H, by width.
_PUBLISHED_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16, 1280: 16}
_MAX_NAMES_SHOWN = 6
# What reading a file that is damaged or of something else ends in.
_UNREADABLE = (SafetensorError, pickle.UnpicklingError, struct.error, LookupError, RuntimeError, EOFError, OSError)


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
        tensors, stated = read_weights(Path(source))
    weights = {bare_name(name): tensor for name, tensor in tensors.items()}
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


def read_weights(path: Path) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    """Return the tensors of a file, on the CPU, and what it states beside them.

    Args:
        path: a `.pt` or `.safetensors` file. Of a published training file (`model`, `ema`, `opt`) the EMA is read.

    Raises:
        ValueError: a missing or unreadable file, or one that holds no mapping of names to tensors.
    """
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
    except _UNREADABLE as error:
        reason = (str(error).splitlines() or ["it ends too early"])[0]
        raise ValueError(f"{path} cannot be read as weights: {reason}") from error
    raise ValueError(f"{path}: weights are read from .pt and .safetensors files")


def bare_name(name: str) -> str:
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
        "qk_norm": "blocks.0.attn.q_norm.weight" in weights,
    }


def _count_blocks(weights: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix)})
