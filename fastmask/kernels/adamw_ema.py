"""Fused AdamW and EMA: one step in a single pass over a list of tensors.

With g = factor * grad and step number t, counted from 1:

    m = beta1 m + (1 - beta1) g
    v = beta2 v + (1 - beta2) g^2
    p = p - lr weight_decay p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
    average = average + rate (p - average), where rate = 1 - decay

AdamW: arXiv 1711.05101, in the form of `torch.optim.AdamW`. Every value is read once and written once: 36 bytes per
parameter with one EMA, plus 2 for a 16-bit copy of the weights. Separate AdamW and EMA updates move 40 bytes, and need
a third pass to scale the gradients.

The op takes rates instead of decays, since they are fp32 on the device: 1 - 0.9999 there would keep 11 of 24 bits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmask.kernels._dispatch import Impl, check_impl, define_op, public_op, resolve_impl

_COPY_DTYPES = (torch.bfloat16, torch.float16)


def adamw_ema_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    averages: Sequence[Sequence[Tensor]] = (),
    rates: Sequence[float] | Tensor = (),
    copies: Sequence[Tensor] = (),
    factor: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Reference for `adamw_ema` in plain PyTorch; same arguments, any floating dtype."""

    def put(target: Tensor, value: Tensor) -> None:
        target.copy_(value if found_inf is None else torch.where(found_inf == 0, value, target))

    beta1, beta2 = betas
    with torch.no_grad():
        for i, (p, grad, m, v, t) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True)):
            g = grad if factor is None else grad * factor
            # In float64, since 1 - beta2^t is a small difference.
            exact_lr, t = lr.double(), t.double()
            shrink, step_size = (exact_lr * weight_decay).to(p.dtype), (exact_lr / (1 - beta1**t)).to(p.dtype)
            correction = (1 - beta2**t).sqrt().to(p.dtype)
            new_m = beta1 * m + (1 - beta1) * g
            new_v = beta2 * v + (1 - beta2) * g.square()
            new_p = p - shrink * p - step_size * (new_m / (new_v.sqrt() / correction + eps))
            for average, rate in zip(averages, rates, strict=True):
                put(average[i], average[i] + rate * (new_p - average[i]))
            for target, value in ((p, new_p), (m, new_m), (v, new_v)):
                put(target, value)
            if copies:
                put(copies[i], new_p.to(copies[i].dtype))


_adamw_ema = define_op(
    "adamw_ema(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] averages, Tensor(e!)[] copies, Tensor[] steps, Tensor lr, Tensor rates, Tensor? factor, "
    "Tensor? found_inf, float beta1, float beta2, float eps, float weight_decay) -> ()",
    fake=lambda *_: None,
    launcher="adamw_ema:launch",
    native=lambda param: param.dtype == torch.float32,
)


@public_op("adamw_ema")
def adamw_ema(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    averages: Sequence[Sequence[Tensor]] = (),
    rates: Sequence[float] | Tensor = (),
    copies: Sequence[Tensor] = (),
    factor: Tensor | None = None,
    found_inf: Tensor | None = None,
    impl: Impl | None = None,
) -> None:
    """Update parameters, moments and EMAs in place with one AdamW step.

    No host sync: step-dependent values are tensors, so that a CUDA graph can capture the call. The op does not detect
    non-finite gradients, since some parameters would already be updated; to skip non-finite steps, check beforehand (as
    GradScaler does) and pass ``found_inf``.

    Args:
        params: list of T parameters; all tensors must be contiguous.
        grads: gradients, one per parameter.
        exp_avgs: first moments m, one per parameter.
        exp_avg_sqs: second moments v, one per parameter.
        steps: step numbers t, one per parameter, each an fp32 tensor of one element.
        lr: learning rate, an fp32 tensor of one element.
        betas: decay rates of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay, multiplied by the learning rate.
        averages: one list like ``params`` per EMA.
        rates: 1 - decay of each EMA, fp32 of shape (n,) for n EMAs; or numbers, which are copied to the device at
            every call.
        copies: bfloat16 or float16 copies of the parameters to update, one per parameter; or empty.
        factor: scale of the gradients (unscaling, clipping, or both), an fp32 tensor of one element.
        found_inf: an fp32 tensor of one element; the step is skipped unless it is 0.
        impl: "fused" (float32), "reference", or None for the device's default.

    Raises:
        ValueError: tensors that do not fit, or inputs that the fused kernels do not support.
        BackendUnavailableError: no fused kernel on this device.
    """
    # Checks of both forms.
    _check(params, {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs})
    _check(params, {f"averages[{k}]": average for k, average in enumerate(averages)})
    if copies:
        _check(params, {"copies": copies})
    if isinstance(rates, Tensor) and rates.ndim != 1:
        raise ValueError(f"rates must have one dimension, not shape {tuple(rates.shape)}")
    if len(averages) != len(rates):
        raise ValueError(f"rates must have one value per average, {len(averages)}, not {len(rates)}")
    if len(steps) != len(params):
        raise ValueError(f"steps must have one tensor per parameter, {len(params)}, not {len(steps)}")
    named = {"lr": lr, "factor": factor, "found_inf": found_inf, **{f"steps[{i}]": t for i, t in enumerate(steps)}}
    for name, tensor in named.items():
        if tensor is not None and tensor.numel() != 1:
            raise ValueError(f"{name} must hold one value, not {tensor.numel()}")
    check_impl(impl)
    if not params:
        return
    if resolve_impl(impl, "adamw_ema", params[0].device, params[0]) == "reference":
        adamw_ema_reference(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            steps,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            averages=averages,
            rates=rates,
            copies=copies,
            factor=factor,
            found_inf=found_inf,
        )
        return
    # Checks of the fused form.
    flat = [tensor for average in averages for tensor in average]
    if isinstance(rates, Tensor):
        rates = rates.contiguous()
    else:
        rates = torch.tensor(rates, dtype=torch.float32, device=lr.device)
    scalars = [*steps, rates, *(tensor for tensor in (lr, factor, found_inf) if tensor is not None)]
    everything = [*params, *grads, *exp_avgs, *exp_avg_sqs, *flat, *scalars]
    for dtype in {t.dtype for t in everything} - {torch.float32}:
        raise ValueError(f'the fused kernels take float32, not {dtype}: impl="reference" takes any')
    for device in {t.device for t in everything} - {lr.device}:
        raise ValueError(f"everything must be on {lr.device}, like lr, not on {device}")
    if copies and (copies[0].dtype not in _COPY_DTYPES or any(copy.dtype != copies[0].dtype for copy in copies)):
        raise ValueError(f"copies must all be bfloat16, or all float16, not {copies[0].dtype}")
    # The op is not differentiable; the in-place changes are still visible to autograd's version counters.
    with torch.no_grad():
        _adamw_ema(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            flat,
            copies,
            steps,
            lr,
            rates,
            factor,
            found_inf,
            *betas,
            eps,
            weight_decay,
        )
    torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs, *flat, *copies])


def _check(params: Sequence[Tensor], others: dict[str, Sequence[Tensor]]) -> None:
    """Raise a ValueError for the first tensor that is not contiguous or differs in shape or device."""
    shapes = [p.shape for p in params]
    devices = [p.device for p in params]
    for name, tensors in {"params": params, **others}.items():
        if len(tensors) != len(params):
            raise ValueError(f"{name} must have one tensor per parameter, {len(params)}, not {len(tensors)}")
        if [t.shape for t in tensors] != shapes:
            i = next(i for i, t in enumerate(tensors) if t.shape != shapes[i])
            raise ValueError(f"{name}[{i}] must have shape {tuple(shapes[i])}, not {tuple(tensors[i].shape)}")
        if [t.device for t in tensors] != devices:
            i = next(i for i, t in enumerate(tensors) if t.device != devices[i])
            raise ValueError(f"{name}[{i}] must be on {devices[i]}, like its parameter, not on {tensors[i].device}")
        if not all(map(Tensor.is_contiguous, tensors)):
            i = next(i for i, t in enumerate(tensors) if not t.is_contiguous())
            raise ValueError(f"{name}[{i}] of shape {tuple(shapes[i])} must be contiguous")
