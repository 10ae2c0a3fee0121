"""A small valid call of every public op, by the names of its arguments."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastmask.kernels import sample_mask

BATCH, LENGTH, WIDTH = 3, 4, 8
CU_SEQLENS = torch.tensor([0, 4, 6, 9], dtype=torch.int32)

Arguments = dict[str, Any]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape)


def _norm(packed: bool, *modulations: str) -> Arguments:
    x = normal(9, WIDTH) if packed else normal(BATCH, LENGTH, WIDTH)
    given = {"x": x, **{name: normal(BATCH, WIDTH) for name in modulations}}
    return given | ({"cu_seqlens": CU_SEQLENS.clone()} if packed else {})


def _gated(packed: bool) -> Arguments:
    given = _norm(packed, "gate", "shift", "scale")
    return given | {"branch": torch.randn_like(given["x"])}


def _linear() -> Arguments:
    return {"weight": normal(5, WIDTH), "bias": normal(5)}


def _mask(packed: bool) -> Any:
    keep = CU_SEQLENS.diff() if packed else 2
    return sample_mask(BATCH, LENGTH, keep, total=9 if packed else None, seed=0, device="cpu", impl="reference")


def _sample_mask(packed: bool) -> Arguments:
    keep = {"keep": CU_SEQLENS.diff(), "total": 9} if packed else {"keep": 2}
    return {"batch": BATCH, "length": LENGTH, **keep, "seed": 5, "offset": 2, "device": "cpu"}


def _embed(packed: bool) -> Arguments:
    mask = _mask(packed)
    given = {"images": normal(BATCH, 2, 4, 4), "weight": normal(WIDTH, 2, 2, 2), "bias": normal(WIDTH)}
    given |= {"position": normal(LENGTH, WIDTH), "ids_keep": mask.ids_keep, "image_scale": torch.rand(BATCH)}
    given |= {"shift": normal(BATCH, WIDTH), "scale": normal(BATCH, WIDTH), "patch_size": 2}
    return given | ({"cu_seqlens": mask.cu_seqlens} if packed else {})


def _gather(packed: bool) -> Arguments:
    mask = _mask(packed)
    given = {"x": normal(BATCH, LENGTH, WIDTH), "ids_keep": mask.ids_keep}
    return given | ({"cu_seqlens": mask.cu_seqlens} if packed else {})


def _restore(packed: bool) -> Arguments:
    mask = _mask(packed)
    given = {"x": normal(*mask.ids_keep.shape, WIDTH), "mask_token": normal(WIDTH), "position": normal(LENGTH, WIDTH)}
    given |= {"ids_restore": mask.ids_restore, "shift": normal(BATCH, WIDTH), "scale": normal(BATCH, WIDTH)}
    return given | ({"cu_seqlens": mask.cu_seqlens} if packed else {})


def _loss(packed: bool) -> Arguments:
    images = normal(BATCH, 2, 4, 4)
    given = {"raw": normal(BATCH, LENGTH, WIDTH), "images": images, "noised": torch.randn_like(images)}
    given |= {name: torch.rand(BATCH) + 0.5 for name in ("c_skip", "c_out", "weight")}
    return given | {"mask": _mask(packed), "patch_size": 2}


def _attention(packed: bool) -> Arguments:
    shape = (9, 2, 4) if packed else (BATCH, LENGTH, 2, 4)
    return {name: normal(*shape) for name in "qkv"} | ({"cu_seqlens": CU_SEQLENS.clone()} if packed else {})


def _adamw_ema() -> Arguments:
    shapes = [(3, 5), (7,)]
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs")
    given: Arguments = {name: [torch.rand(shape) for shape in shapes] for name in names}
    given |= {"steps": [torch.tensor(2.0), torch.tensor(3.0)], "lr": torch.tensor(1e-3), "weight_decay": 0.1}
    given |= {"averages": [[torch.rand(shape) for shape in shapes]], "rates": torch.tensor([0.1])}
    given |= {"copies": [torch.zeros(shape, dtype=torch.bfloat16) for shape in shapes]}
    return given | {"factor": torch.tensor(0.5), "found_inf": torch.tensor(0.0)}


def _random(packed: bool) -> Arguments:
    return {"seed": 3, "sample": torch.arange(BATCH), "count": 5, "stream": 9}


# Of each op: takes whether its tokens are packed, where it knows packed ones.
CALLS: dict[str, Callable[[bool], Arguments]] = {
    "adamw_ema": lambda packed: _adamw_ema(),
    "add_gated_linear": lambda packed: _gated(packed) | _linear(),
    "add_gated_norm": _gated,
    "attention": _attention,
    "embed_kept_patches": _embed,
    "gather_tokens": _gather,
    "gelu_linear": lambda packed: _norm(False) | _linear(),
    "masked_loss": _loss,
    "modulate_norm": lambda packed: _norm(packed, "shift", "scale"),
    "modulated_linear": lambda packed: _norm(packed, "shift", "scale") | _linear(),
    "patchify": lambda packed: {"images": normal(BATCH, 2, 4, 4), "patch_size": 2},
    "random_normal": _random,
    "random_uniform": _random,
    "restore_tokens": _restore,
    "sample_mask": _sample_mask,
    "silu_linear": lambda packed: {"x": normal(BATCH, WIDTH)} | _linear(),
    "unpatchify": lambda packed: {"tokens": normal(BATCH, LENGTH, 8), "patch_size": 2, "height": 4, "width": 4},
}
