"""modulate_norm between two blocks: "layer" as in this network, from fp32 tokens to the matmul dtype.

"rms" as in networks with 16-bit tokens, with all tensors in one dtype, as Liger's kernel requires. The launches at
other widths are those of `norm_linear`.
"""

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from bench.ops._description import Description, Op, Shapes, absent
from fastmask.kernels import modulate_norm
from fastmask.kernels.modulate_norm import modulate_norm_reference

EPS = 1e-6
LIGER = "pip install liger-kernel"
APEX = "build github.com/NVIDIA/apex with APEX_CUDA_EXT=1"


def op(shapes: Shapes, norm: str) -> Op:
    x_dtype = torch.float32 if norm == "layer" else shapes.dtype
    shift, scale = (shapes.normal(shapes.batch, shapes.width) for _ in range(2))
    return Op(
        name="modulate_norm",
        shape=f"B={shapes.batch} K={shapes.keep} D={shapes.width} {norm}",
        inputs={
            "x": shapes.normal(shapes.batch, shapes.keep, shapes.width, dtype=x_dtype),
            "shift": shift,
            "scale": scale,
        },
        leaves=("x", "shift", "scale"),
        again=("x", "scale"),
        reference=modulate_norm_reference,
        fused=functools.partial(modulate_norm, impl="fused"),
        kernel="modulate_norm",
        options={"norm": norm, "eps": EPS, "out_dtype": shapes.dtype},
        others={"apex": apex(shapes.device)} if norm == "layer" else {"liger": liger(shapes.device)},
        statistics=8 * shapes.batch * shapes.keep,
        unread=("shift",),
        compile_on_cpu=True,
    )


def apex(device: torch.device) -> Any:
    """Return apex's norm with modulation in PyTorch, or the reason why it is missing."""
    missing = absent("fused_layer_norm_cuda", APEX, device) or absent("apex", APEX, device)
    if missing:
        return missing
    fused = importlib.import_module("apex.normalization.fused_layer_norm").fused_layer_norm

    def modulated(x: Tensor, shift: Tensor, scale: Tensor, out_dtype: torch.dtype, **_: Any) -> Tensor:
        normed = fused(x, x.shape[-1:], EPS)
        return (normed * (1 + scale.to(normed.dtype)[:, None]) + shift.to(normed.dtype)[:, None]).to(out_dtype)

    return modulated


def liger(device: torch.device) -> Any:
    """Return Liger's kernel, or the reason why it is missing.

    "gemma" computes in fp32; in-place mode would overwrite the gradient.
    """
    missing = absent("liger_kernel", LIGER, device)
    if missing:
        return missing
    function = importlib.import_module("liger_kernel.ops.modulated_rms_norm").LigerModulatedRMSNormFunction
    return lambda x, shift, scale, **_: function.apply(x, None, scale, shift, EPS, 0.0, "gemma", False)


DESCRIPTION = Description(
    forms={norm: functools.partial(op, norm=norm) for norm in ("layer", "rms")},
    counted=functools.partial(op, norm="layer"),
    narrow={"_modulate_norm_fwd_kernel": 0, "_modulate_norm_bwd_kernel": 2},  # the statistics of a row
)
