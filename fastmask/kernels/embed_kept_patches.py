"""Patch embedding of the kept patches only (arXiv 2306.09305, section 3.2), and optionally the first adaLN norm.

    token[b, k] = weight . (image_scale[b] * patch[b, ids_keep[b, k]]) + bias + position[ids_keep[b, k]]
    h = norm(token) * (1 + scale) + shift                                          as in `modulate_norm`, on request

The published code embeds all L positions and then drops some; here dropped patches are never read. With the token
gradient g (including the path through h) and the scaled patch s = image_scale[b] * patch, backward is

    grad_weight = sum of g s^T,   grad_bias = sum of g                             over all kept tokens
    grad_patch  = image_scale[b] * (weight^T g)                                    zero for a dropped patch

Matmul operands (s, weight, g) are rounded to the dtype of the weight, or autocast's if enabled, and accumulated in
fp32. Memory traffic per token: P values read and D written, 2 D with h. Backward keeps no patches; it reads the pixels
again.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastmask.kernels._asked import only_asked
from fastmask.kernels._dispatch import Impl, define_op, public_op, resolve_impl
from fastmask.kernels._layout import (
    MAX_WIDTH,
    check_bounds,
    check_cu_seqlens,
    check_devices,
    check_dtype,
    check_index_range,
    check_tensors,
    native_rows,
    needs_gradient,
    position_table,
    sample_of_row,
)
from fastmask.kernels._matmul import product_dtype
from fastmask.kernels.modulate_norm import Norm, check_norm, modulate_norm_reference, norm_gradients, norm_kept
from fastmask.kernels.patches import patchify


def embed_kept_patches_reference(
    images: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    ids_keep: Tensor | None,
    *,
    patch_size: int,
    image_scale: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    norm: Norm = "layer",
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """Reference for `embed_kept_patches` in plain PyTorch; same arguments, any floating dtype and width.

    Also differentiable in position and image_scale. On the CPU, an index outside [0, L) raises an IndexError.
    """
    position = position_table(position)
    patches = patchify(images, patch_size)  # (B, L, P)
    sample = torch.arange(images.shape[0], device=images.device)[:, None]  # (B, 1), or (N,) if packed
    if ids_keep is not None:
        if cu_seqlens is not None:
            sample = sample_of_row(cu_seqlens, ids_keep.shape[0])
        position = position.index_select(0, ids_keep.flatten()).view(*ids_keep.shape, position.shape[1])
        patches = patches[sample, ids_keep.long()]  # (B, K, P) or (N, P)
    if image_scale is not None:
        patches = patches.to(torch.promote_types(patches.dtype, torch.float32)) * image_scale[sample][..., None]
    rows = weight.permute(0, 2, 3, 1).flatten(1)  # (D, P), in the order of the patches
    tokens = F.linear(patches.to(weight.dtype), rows, bias.to(weight.dtype)) + position
    if shift is None or scale is None:
        return tokens
    return tokens, modulate_norm_reference(tokens, shift, scale, norm=norm, eps=eps, cu_seqlens=cu_seqlens)


def _fwd_fake(
    images: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    ids_keep: Tensor | None,
    image_scale: Tensor | None,
    cu_seqlens: Tensor | None,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    shift: Tensor | None,
    scale: Tensor | None,
    rms: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = images.shape[0] * position.shape[0] if ids_keep is None else ids_keep.numel()
    tokens = images.new_empty((rows, weight.shape[0]), dtype=out_dtype)
    if shift is None:
        return tokens, tokens.new_empty(0), tokens.new_empty(0, dtype=torch.float32)
    return tokens, torch.empty_like(tokens), tokens.new_empty((2, rows), dtype=torch.float32)


def _bwd_fake(grad: Tensor, images: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight), weight.new_empty(weight.shape[0], dtype=others[-1])


def _bwd_images_fake(grad: Tensor, images: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(images)


def _native(position: Tensor, image_scale: Tensor | None, *others: Tensor | None) -> bool:
    return native_rows(position, image_scale, *others) and not needs_gradient(position, image_scale)


embed_kept_patches_fwd = define_op(
    "embed_kept_patches_fwd(Tensor images, Tensor weight, Tensor bias, Tensor position, Tensor? ids_keep, "
    "Tensor? image_scale, Tensor? cu_seqlens, ScalarType dtype, ScalarType out_dtype, Tensor? shift, "
    "Tensor? scale, bool rms, float eps) -> (Tensor, Tensor, Tensor)",
    fake=_fwd_fake,
    launcher="embed_kept_patches:launch_fwd",
    native=_native,
)
embed_kept_patches_bwd = define_op(
    "embed_kept_patches_bwd(Tensor grad, Tensor images, Tensor weight, Tensor? ids_keep, Tensor? image_scale, "
    "Tensor? cu_seqlens, ScalarType dtype, ScalarType bias_dtype) -> (Tensor, Tensor)",
    fake=_bwd_fake,
    launcher="embed_kept_patches:launch_bwd",
)
embed_kept_patches_bwd_images = define_op(
    "embed_kept_patches_bwd_images(Tensor grad, Tensor images, Tensor weight, Tensor? ids_keep, Tensor? image_scale, "
    "Tensor? cu_seqlens, ScalarType dtype) -> Tensor",
    fake=_bwd_images_fake,
    launcher="embed_kept_patches:launch_bwd_images",
)


class _EmbedKeptPatches(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        weight: Tensor,
        bias: Tensor,
        shift: Tensor | None,
        scale: Tensor | None,
        position: Tensor,
        ids_keep: Tensor | None,
        image_scale: Tensor | None,
        cu_seqlens: Tensor | None,
        dtype: torch.dtype,
        rms: bool,
        eps: float,
    ) -> Any:
        kept = ids_keep, image_scale, cu_seqlens
        tokens, h, stats = embed_kept_patches_fwd(
            images, weight, bias, position, *kept, dtype, torch.promote_types(dtype, position.dtype),
            shift, scale, rms, eps,
        )  # fmt: skip
        ctx.dtype, ctx.rms, ctx.dtypes = dtype, rms, (images.dtype, weight.dtype, bias.dtype)
        ctx.shapes = images.shape, weight.shape
        of_images, of_weight, of_bias, of_shift, of_scale = ctx.needs_input_grad[:5]
        read = images if of_weight else None, weight if of_images else None
        kept = kept if of_images or of_weight else (None, None, None)
        if shift is None or scale is None:
            ctx.save_for_backward(*read, *kept)
            return tokens
        asked = of_images or of_weight or of_bias, of_shift, of_scale
        ctx.save_for_backward(*read, *kept, *norm_kept(tokens, stats, shift, scale, cu_seqlens, asked))
        if not asked[0]:
            ctx.mark_non_differentiable(tokens)
        return tokens, h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *grad_h: Tensor) -> tuple[Tensor | None, ...]:
        images, weight, *kept = ctx.saved_tensors[:5]
        of_images, of_weight, of_bias = ctx.needs_input_grad[:3]
        grad_images = grad_weight = grad_bias = grad_shift = grad_scale = None
        grad = grad.contiguous()
        if grad_h:
            through_h, grad_shift, grad_scale, _ = norm_gradients(grad_h[0], ctx.saved_tensors[5:], ctx.rms)
            if of_images or of_weight or of_bias:
                grad = grad + through_h
        images_dtype, weight_dtype, bias_dtype = ctx.dtypes
        if of_weight:
            like = grad.new_empty(ctx.shapes[1], dtype=weight_dtype)  # not read
            grad_weight, grad_bias = embed_kept_patches_bwd(grad, images, like, *kept, ctx.dtype, bias_dtype)
        elif of_bias:
            grad_bias = grad.sum(0, dtype=torch.float32).to(bias_dtype)
        if of_images:
            like = grad.new_empty(ctx.shapes[0], dtype=images_dtype)  # not read
            grad_images = embed_kept_patches_bwd_images(grad, like, weight, *kept, ctx.dtype)
        grads = only_asked(ctx.needs_input_grad[:5], (grad_images, grad_weight, grad_bias, grad_shift, grad_scale))
        return *grads, *[None] * 7


@public_op("embed_kept_patches_fwd", "embed_kept_patches_bwd", "embed_kept_patches_bwd_images", "modulate_norm_bwd")
def embed_kept_patches(
    images: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    ids_keep: Tensor | None,
    *,
    patch_size: int,
    image_scale: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    norm: Norm = "layer",
    eps: float = 1e-6,
    impl: Impl | None = None,
) -> Any:
    """Return the embedded tokens of the kept positions with the position table added, and optionally their norm.

    Equivalent PyTorch: ``gather(conv2d(image_scale * images, weight, bias, stride=p) + position, ids_keep)``.
    Accumulates in fp32. As in ``F.linear``, autocast sets the dtype of the matmul. Differentiable in images, weight,
    bias, shift and scale; the reference also in position and image_scale. Each gradient has its input's dtype.
    Deterministic.

    Args:
        images: shape (B, C, h * p, w * p); copied first if not contiguous, as are the other tensors.
        weight: weight of the patch convolution, shape (D, C, p, p).
        bias: shape (D,).
        position: shape (L, D), or (1, L, D), L = h * w, row-major.
        ids_keep: int32 or int64, kept positions of each sample, shape (B, K), or (N,) with ``cu_seqlens``; distinct and
            in [0, L), which is not checked on a GPU. None keeps all in order.
        patch_size: p.
        image_scale: scale of each image (EDM's c_in), shape (B,); None is 1.
        cu_seqlens: int32 or int64, shape (B + 1,), non-decreasing from 0 to N: boundaries of packed samples. Values
            are checked on a CPU, outside torch.compile.
        shift: shape (B, D); with ``scale``, the modulated norm of the tokens is returned too.
        scale: like ``shift``.
        norm: "layer" or "rms".
        eps: added to the variance (to the mean square for "rms").
        impl: "fused" (float32, bfloat16, float16; D a multiple of 8 up to 8192), "reference", or None for the device's
            default.

    Returns:
        Tokens, shape (B, K, D) or (N, D), in the promoted dtype of the matmul and ``position``; with a modulation
        (tokens, h), both with that shape and dtype.

    Raises:
        ValueError: shapes that do not fit, or inputs that the fused kernels do not support.
        BackendUnavailableError: no fused kernel on this device.
    """
    check_norm(norm, eps)
    check_tensors(images=images)
    others = {"bias": bias, "position": position, "image_scale": image_scale, "shift": shift, "scale": scale}
    check_devices(images.device, weight=weight, **others, ids_keep=ids_keep, cu_seqlens=cu_seqlens)
    _check_shapes(images, weight, others, patch_size)
    position = position_table(position)
    _check_indices(ids_keep, cu_seqlens, images, position.shape[0])
    tensors = position, image_scale, images, weight, bias, shift, scale
    if resolve_impl(impl, "embed_kept_patches_fwd", images.device, *tensors) == "reference":
        return embed_kept_patches_reference(
            images, weight, bias, position, ids_keep, patch_size=patch_size, image_scale=image_scale,
            cu_seqlens=cu_seqlens, shift=shift, scale=scale, norm=norm, eps=eps,
        )  # fmt: skip
    if ids_keep is not None:
        check_index_range("ids_keep", ids_keep, position.shape[0], "embed_kept_patches_fwd")
    _check_fused({"images": images, "weight": weight, **others}, weight.shape[0])
    if shift is not None and scale is not None:
        shift, scale = (t if t.stride(-1) == 1 else t.contiguous() for t in (shift, scale))
    ids_keep, image_scale = (None if t is None else t.contiguous() for t in (ids_keep, image_scale))
    out = _EmbedKeptPatches.apply(  # type: ignore[no-untyped-call]
        *(t.contiguous() for t in (images, weight, bias)), shift, scale, position.contiguous(), ids_keep, image_scale,
        None if cu_seqlens is None else cu_seqlens.int().contiguous(), product_dtype(images.device, weight),
        norm == "rms", float(eps),
    )  # fmt: skip
    shape = (images.shape[0], *position.shape) if ids_keep is None else (*ids_keep.shape, position.shape[1])
    return out.view(shape) if shift is None else (out[0].view(shape), out[1].view(shape))


def _check_shapes(images: Tensor, weight: Tensor, others: dict[str, Tensor | None], patch_size: int) -> None:
    if images.ndim != 4:
        raise ValueError(f"images must have shape (B, C, h * p, w * p), not {tuple(images.shape)}")
    batch, channels, height, width = images.shape
    p = patch_size
    if p < 1 or height % p or width % p:
        raise ValueError(f"images of {height}x{width} do not divide into patches of {p}x{p}")
    if weight.ndim != 4 or weight.shape[1:] != (channels, p, p):
        raise ValueError(
            f"weight must have shape (D, {channels}, {p}, {p}) for images of shape {tuple(images.shape)}, not "
            f"{tuple(weight.shape)}"
        )
    embedded = weight.shape[0]
    modulation = (batch, embedded)
    table = ((height // p) * (width // p), embedded)
    expected: dict[str, list[tuple[int, ...]]] = {"bias": [(embedded,)], "position": [table, (1, *table)]}
    expected |= {"image_scale": [(batch,)], "shift": [modulation], "scale": [modulation]}
    for name, tensor in others.items():
        if tensor is not None and tensor.shape not in expected[name]:
            raise ValueError(
                f"{name} must have shape {' or '.join(map(str, expected[name]))} for images of shape "
                f"{tuple(images.shape)} and weight of shape {tuple(weight.shape)}, not {tuple(tensor.shape)}"
            )
    if (others["shift"] is None) != (others["scale"] is None):
        missing = "shift" if others["shift"] is None else "scale"
        raise ValueError(f"shift and scale belong together, and {missing} is missing")


def _check_indices(ids_keep: Tensor | None, cu_seqlens: Tensor | None, images: Tensor, length: int) -> None:
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens)
        if cu_seqlens.shape[0] != images.shape[0] + 1:
            raise ValueError(
                f"cu_seqlens must have shape ({images.shape[0] + 1},) for images of shape {tuple(images.shape)}, not "
                f"{tuple(cu_seqlens.shape)}"
            )
        if ids_keep is None or ids_keep.ndim != 1:
            given = None if ids_keep is None else tuple(ids_keep.shape)
            raise ValueError(f"ids_keep must have shape (N,) with cu_seqlens, not {given}")
        check_bounds(cu_seqlens, ids_keep.shape[0], "entries of ids_keep", length)
    elif ids_keep is not None and (ids_keep.ndim != 2 or ids_keep.shape[0] != images.shape[0]):
        raise ValueError(f"ids_keep must have shape ({images.shape[0]}, K), not {tuple(ids_keep.shape)}")
    elif ids_keep is not None and ids_keep.shape[1] > length:
        raise ValueError(f"ids_keep of shape {tuple(ids_keep.shape)} keeps more than the {length} positions of images")
    if ids_keep is not None and ids_keep.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ids_keep must be int32 or int64, not {ids_keep.dtype} of shape {tuple(ids_keep.shape)}")


def _check_fused(tensors: dict[str, Tensor | None], width: int) -> None:
    if width % 8 or not 8 <= width <= MAX_WIDTH:
        raise ValueError(
            f"the fused kernels take a width D that is a multiple of 8 up to {MAX_WIDTH}, not {width}; "
            f'impl="reference" takes any'
        )
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        check_dtype(name, tensor)
        if name in ("position", "image_scale") and needs_gradient(tensor):
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)} must not require a gradient in the fused kernels: "
                f'impl="reference" gives one'
            )
