"""Weights of diffusers' `DiTTransformer2DModel`, under DiT's names."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastmask.models.foreign.dit import from_dit
from fastmask.models.layers import sincos_position
from fastmask.models.maskdit import MaskDiTConfig

FIRST = "pos_embed.proj.weight"  # every such file has this parameter
_CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")  # the latter is the name of before version 0.28
_REQUIRED = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
}
_MOST_SAMPLE = 4096
_LARGEST_EPS = 1e-5  # of a norm of tokens whose variance is about 1
# Names outside of the blocks, and in a block.
_OUTER = {"pos_embed.proj": "x_embedder.proj", "proj_out_1": "final_layer.adaLN_modulation.1"}
_OUTER["proj_out_2"] = "final_layer.linear"
_INNER = {"attn1.to_out.0": "attn.proj", "ff.net.0.proj": "mlp.fc1", "ff.net.2": "mlp.fc2"}
_INNER["norm1.linear"] = "adaLN_modulation.1"
_EMBEDDERS = {
    "timestep_embedder.linear_1": "t_embedder.mlp.0",
    "timestep_embedder.linear_2": "t_embedder.mlp.2",
    "class_embedder.embedding_table": "y_embedder.embedding_table",
}


def from_diffusers(
    weights: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], MaskDiTConfig, list[str]]:
    """Return the weights and the sizes of a `MaskDiT` without a decoder that computes the same, and notes.

    diffusers keeps a copy of the timestep and class embedders in every block; the copies must be equal. Its time
    embedding has the frequencies 10000^(-i / 127), where DiT's own code has 10000^(-i / 128).

    Args:
        weights: weights by diffusers' names, without prefixes of wrappers.
        config: the content of its `config.json`.

    Raises:
        ValueError: another class or configuration, differing copies, or tensors that are missing.
    """
    heads, patch = _check(config)
    found: dict[str, Tensor] = {}
    blocks: dict[int, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        inner = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", name)
        if inner:
            blocks.setdefault(int(inner[1]), {})[inner[2]] = tensor
        elif name != "pos_embed.pos_embed":  # a fixed table, which newer versions do not store
            stem, _, kind = name.rpartition(".")
            found[f"{_OUTER.get(stem, stem)}.{kind}"] = tensor
    for index in sorted(blocks):
        found |= _block(index, blocks[index], blocks[min(blocks)])
    if found["x_embedder.proj.weight"].ndim != 4:
        raise ValueError(f"{FIRST} has shape {tuple(found['x_embedder.proj.weight'].shape)}")
    width, side = found["x_embedder.proj.weight"].shape[0], int(config["sample_size"]) // patch
    found["pos_embed"] = sincos_position(side, side, width)
    converted, notes = from_dit(found)
    sizes = MaskDiTConfig(
        patch_size=patch,
        width=width,
        depth=len(blocks),
        num_heads=heads,
        decoder_depth=0,
        frequency_shift=1,
    )
    return converted, sizes, notes


def _check(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the number of heads and the patch size of a configuration that can be read."""
    if config.get("_class_name") not in _CLASSES:
        raise ValueError(f"it is a {config.get('_class_name')}, and of diffusers' networks {_CLASSES[0]} is read")
    for name, value in _REQUIRED.items():
        if config.get(name, value) != value:
            raise ValueError(f"its {name} is {config[name]!r}, and {value!r} is what is read")
    if config.get("norm_eps", 0) > _LARGEST_EPS:
        raise ValueError(f"its norm_eps is {config['norm_eps']}, and at most {_LARGEST_EPS} is read")
    numbers = [config.get(name) for name in ("num_attention_heads", "patch_size", "sample_size")]
    if not all(type(number) is int and number > 0 for number in numbers):
        raise ValueError("its config.json lacks a usable num_attention_heads, patch_size or sample_size")
    if config["sample_size"] > _MOST_SAMPLE or config["sample_size"] % config["patch_size"]:
        raise ValueError(f"its sample_size is {config['sample_size']}, and its patch_size {config['patch_size']}")
    return numbers[0], numbers[1]  # type: ignore[return-value]


def _block(index: int, block: Mapping[str, Tensor], first: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a block's weights under DiT's names; those of the embedders are in the first block's."""
    found: dict[str, Tensor] = {}
    missing = [name for name in first if name.startswith("norm1.emb.") and name not in block]
    if missing:
        raise ValueError(f"transformer_blocks.{index}.{missing[0]} is missing")
    for name, tensor in block.items():
        stem, _, kind = name.rpartition(".")
        embedder = _EMBEDDERS.get(stem.removeprefix("norm1.emb."))
        if embedder:
            copy = first.get(name, tensor.new_empty(0))
            if tensor.dtype != copy.dtype or not torch.equal(tensor, copy):
                raise ValueError(f"transformer_blocks.{index}.{name} differs from the copy in the first block")
            found[f"{embedder}.{kind}"] = tensor
        elif not stem.startswith("attn1.to_") or stem == "attn1.to_out.0":
            found[f"blocks.{index}.{_INNER.get(stem, stem)}.{kind}"] = tensor
    for kind in ("weight", "bias"):
        parts = [block.get(f"attn1.to_{part}.{kind}") for part in "qkv"]
        joined = [part for part in parts if part is not None and part.ndim]
        if len({part.shape for part in joined}) != 1 or len(joined) != len(parts):
            raise ValueError(
                f"transformer_blocks.{index} lacks a {kind} of attn1.to_q, to_k or to_v, or they differ in shape"
            )
        found[f"blocks.{index}.attn.qkv.{kind}"] = torch.cat(joined)
    return found
