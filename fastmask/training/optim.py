"""Optimizers (AdamW with fused EMA, torch, apex; Muon), gradient clipping, learning rate schedule."""

import dataclasses
import importlib
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from fastmask.fields import check_at_least, free_within
from fastmask.kernels import BackendUnavailableError, backends
from fastmask.models.stack import Stack
from fastmask.ranks import whole
from fastmask.training.adamw import AdamWEMA
from fastmask.training.ema import EMA
from fastmask.training.muon import MuonAdamW, block_matrices

_Name = Literal["adamw_ema", "torch", "apex", "muon"]
_APEX = "--optimizer apex needs NVIDIA's apex: build github.com/NVIDIA/apex with its CUDA extensions; PyPI has another"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """Optimizer, its learning rates and gradient clipping."""

    lr: float = 1e-4
    """Learning rate."""
    warmup_steps: int = 0
    """Number of linear warm-up steps of the learning rate."""
    unmask_lr: float = 5e-5
    """Learning rate of the unmasked steps."""
    optimizer: Literal["auto", "adamw_ema", "torch", "apex", "muon"] = free_within(
        "auto", lambda name: name == "muon", "AdamW and Muon keep another state in the checkpoint"
    )
    """AdamW implementation, where adamw_ema fuses the EMA update; or muon: Muon for the weight matrices of the blocks,
    AdamW for all other parameters. auto: adamw_ema where it has a kernel, else torch."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's first and second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    grad_clip: float = 0.0
    """Maximum gradient norm; 0 disables clipping."""

    def check(self) -> None:
        """Raise a ValueError for the first invalid field."""
        check_at_least(self, warmup_steps=0, lr=0, unmask_lr=0, weight_decay=0, grad_clip=0)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), not {self.betas}")


def make_optimizer(
    net: nn.Module,
    config: OptimConfig,
    emas: Sequence[EMA] = (),
    more: nn.Module | None = None,
    *,
    precision: str = "fp32",
) -> torch.optim.Optimizer:
    """Return the optimizer of all parameters that ``config.optimizer`` names.

    Args:
        net: the network, on its device; for Muon a `Denoiser`.
        config: the optimizer's configuration.
        emas: EMAs updated with each step.
        more: module with further parameters for AdamW, of which no EMA is kept; on the same device.
        precision: precision of the run's matmuls; Muon's are in bf16 for "bf16", else in fp32.

    Raises:
        ValueError: the implementation does not run here; the message suggests another.
    """
    device = next(net.parameters()).device
    name = resolve_optimizer(config.optimizer, device)
    groups: Any = net.parameters() if more is None else [{"params": [*some.parameters()]} for some in (net, more)]
    options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay}
    if name in ("adamw_ema", "muon"):
        options["lr"] = torch.full((), config.lr, device=device)  # CUDA graphs read it at each replay
    if name == "muon":
        return _muon(net, emas, more, torch.bfloat16 if precision == "bf16" else torch.float32, options)
    if name == "adamw_ema":
        averages = [(ema.decay, ema.weights.values()) for ema in emas]
        return AdamWEMA(groups, **options, averages=averages, impl="fused")
    optimizer: torch.optim.Optimizer
    if name == "apex":
        optimizer = _fused_adam()(groups, **options)
        optimizer.register_step_pre_hook(_take_count)
        optimizer.register_step_post_hook(_leave_count)
    else:
        optimizer = torch.optim.AdamW(groups, **options, fused=True)
    for ema in emas:
        optimizer.register_step_post_hook(lambda *_, ema=ema: ema.update(net))
    return optimizer


def _muon(
    net: nn.Module, emas: Sequence[EMA], more: nn.Module | None, dtype: torch.dtype, options: dict[str, Any]
) -> MuonAdamW:
    named = dict(net.named_parameters())
    inside = {id(p) for p in block_matrices(cast(Sequence[Stack], cast(Any, net).model.stacks))}
    matrices = [name for name, p in named.items() if id(p) in inside]
    others = [name for name in named if name not in matrices]
    averages = [(ema.decay, [ema.weights[name] for name in (*matrices, *others)]) for ema in emas]
    has_kernel = resolve_optimizer("auto", next(iter(named.values())).device) == "adamw_ema"
    parts = [[named[name] for name in names] for names in (matrices, others)]
    parts += [list(more.parameters())] if more else []
    return MuonAdamW(*parts, dtype=dtype, averages=averages, impl="fused" if has_kernel else "reference", **options)


def begin_step(optimizer: torch.optim.Optimizer, emas: Sequence[EMA], lr: float, step: int) -> None:
    """Set the learning rate and EMA decays of a step, counted from 0; tensors are updated in place."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
    for ema in emas:
        ema.begin_step(step + 1)
    if isinstance(optimizer, AdamWEMA):
        optimizer.set_decays([ema.decay for ema in emas])


def resolve_optimizer(name: str, device: torch.device) -> _Name:
    """Return the optimizer to use; "auto" is "adamw_ema" where it has a kernel for the device, else "torch".

    Raises:
        ValueError: the requested optimizer does not run here; the message says why.
    """
    row = next((row for row in backends() if row.op == "adamw_ema" and row.device == device.type), None)
    if name == "auto":
        own = {"cuda": "triton", "cpu": "native"}.get(device.type)  # not the Triton interpreter
        return "adamw_ema" if row is not None and row.kernel == own else "torch"
    if name == "adamw_ema" and (row is None or row.kernel == "none"):
        reason = row.reason if row else "only on cuda and cpu"
        raise BackendUnavailableError(f"--optimizer adamw_ema has no kernel on {device.type} ({reason}): take torch")
    if name == "apex":
        _fused_adam()
        if device.type != "cuda":
            raise ValueError(f"--optimizer apex runs on a GPU, not on {device.type}: take torch")
    return cast(_Name, name)


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float) -> None:
    """Clip the global gradient norm to ``max_norm`` for the next step."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not isinstance(optimizer, AdamWEMA):
        nn.utils.clip_grad_norm_(parameters, max_norm)
        return
    norm = whole(nn.utils.get_total_norm([p.grad for p in parameters]))
    optimizer.scale_gradients((max_norm / (norm + 1e-6)).clamp(max=1))


def learning_rate(config: OptimConfig, step: int, masked_steps: int) -> float:
    """Return the learning rate of a step, counted from 0: linear warm-up, constant, then ``unmask_lr``.

    Args:
        config: the optimizer's configuration.
        step: the step.
        masked_steps: number of steps before the unmasked stage.
    """
    if step >= masked_steps:
        return config.unmask_lr
    return config.lr * min(1.0, (step + 1) / max(1, config.warmup_steps))


def _fused_adam() -> Any:
    try:
        return importlib.import_module("apex.optimizers").FusedAdam
    except (ImportError, AttributeError) as error:  # PyPI has another package named apex
        raise ValueError(f"{_APEX} ({error})") from None


def _take_count(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Set the step count of each group of apex's FusedAdam from the per-parameter state."""
    for group in optimizer.param_groups:
        counts = [int(optimizer.state[p]["step"]) for p in group["params"] if "step" in optimizer.state[p]]
        if counts:
            group["step"] = max(counts)


def _leave_count(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Store the step count per parameter, as torch does and checkpoints expect."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if optimizer.state[p]:
                optimizer.state[p]["step"] = torch.tensor(float(group["step"]))
