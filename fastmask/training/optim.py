"""Optimizers (AdamW with fused EMA, torch, apex), gradient clipping, learning rate schedule."""

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from fastmask.fields import check_at_least, free
from fastmask.kernels import BackendUnavailableError, Impl, adamw_ema, backends
from fastmask.ranks import whole
from fastmask.training.ema import EMA

_APEX = "--optimizer apex needs NVIDIA's apex: build github.com/NVIDIA/apex with its CUDA extensions; PyPI has another"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW, its learning rates and gradient clipping."""

    lr: float = 1e-4
    """Learning rate."""
    warmup_steps: int = 0
    """Number of linear warm-up steps of the learning rate."""
    unmask_lr: float = 5e-5
    """Learning rate of the unmasked steps."""
    optimizer: Literal["auto", "adamw_ema", "torch", "apex"] = free("auto")
    """AdamW implementation; adamw_ema fuses the EMA update. auto: adamw_ema where it has a kernel, else torch."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's first and second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    grad_clip: float = 0.0
    """Maximum gradient norm; 0 disables clipping."""

    def check(self) -> None:
        """Raise a ValueError for the first invalid field."""
        check_at_least(self, warmup_steps=0, lr=0, unmask_lr=0, weight_decay=0, grad_clip=0)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), not {self.betas}")


class AdamWEMA(torch.optim.AdamW):
    """`torch.optim.AdamW` with EMAs of the parameters updated in the same pass over memory.

    The state is the same as for `torch.optim.AdamW`, and each loads the other's `state_dict`. The EMA tensors belong to
    the caller and are not part of the state. A step never waits for the device, with or without a GradScaler. It can be
    captured in a CUDA graph: replays see later calls of `set_decays`, and new values of ``lr`` if it is a tensor.

    For sharded parameters (DTensor, as made by `fully_shard`) each process updates its shard; moments and EMAs are
    sharded in the same way.

    Args:
        params: parameters or parameter groups, contiguous and all on one device.
        lr: learning rate, a number or a tensor on that device.
        betas: decay rates of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay, multiplied by the learning rate.
        averages: for each EMA its decay, and its tensors in the order of the parameters; EMAs of parameters without a
            gradient are updated too.
        impl: passed to `fastmask.kernels.adamw_ema`.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        averages: Sequence[tuple[float, Iterable[Tensor]]] = (),
        impl: Impl | None = None,
    ) -> None:
        # torch's fused form counts steps on the device, and GradScaler passes it grad_scale and found_inf.
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        self.impl = impl
        self.grad_factor: Tensor | None = None
        mine = [list(tensors) for _, tensors in averages]
        parameters = [p for group in self.param_groups for p in group["params"]]
        # On the device, so that replays of a CUDA graph read the current values.
        self.rates = torch.zeros(len(mine), dtype=torch.float32, device=parameters[0].device)
        self.set_decays([decay for decay, _ in averages])
        for k, tensors in enumerate(mine):
            if [t.shape for t in tensors] != [p.shape for p in parameters]:
                raise ValueError(f"averages[{k}] must have a tensor of the shape of each parameter")
        self._averages = {p: [tensors[i] for tensors in mine] for i, p in enumerate(parameters)}

    def set_decays(self, decays: Sequence[float]) -> None:
        """Set the decay of each EMA for the following steps."""
        if len(decays) != len(self.rates):
            raise ValueError(f"decays must have one value per average, {len(self.rates)}, not {len(decays)}")
        rates = torch.tensor([1 - decay for decay in decays], dtype=torch.float32, pin_memory=self.rates.is_cuda)
        self.rates.copy_(rates, non_blocking=True)

    def scale_gradients(self, factor: Tensor) -> None:
        """Let the next step multiply gradients by a one-element tensor, which clips their norm without another pass."""
        self.grad_factor = factor

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step, and return the result of ``closure``."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # GradScaler sets both attributes during the call.
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        factor, self.grad_factor = self.grad_factor, None
        if scale is not None:
            factor = scale.reciprocal() if factor is None else factor / scale
        for group in self.param_groups:
            with_grad = [p for p in group["params"] if p.grad is not None]
            if with_grad:
                self._step(group, with_grad, factor, found_inf)
            for p in group["params"]:
                if p.grad is None:
                    self._average(p, found_inf)
        return loss

    def _step(self, group: dict[str, Any], params: list[Tensor], factor: Tensor | None, found_inf: Any) -> None:
        states = [self._state_of(p) for p in params]
        steps = [state["step"] for state in states]
        # Skipped steps are not counted.
        torch._foreach_add_(steps, 1 if found_inf is None else (found_inf == 0).float())
        lr = group["lr"]
        if not isinstance(lr, Tensor):
            lr = torch.full((), lr, dtype=torch.float32, device=params[0].device)
        adamw_ema(
            [_local(p) for p in params],
            [_local(cast(Tensor, p.grad)) for p in params],
            [_local(state["exp_avg"]) for state in states],
            [_local(state["exp_avg_sq"]) for state in states],
            steps,
            lr=lr,
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            averages=[[_local(self._averages[p][k]) for p in params] for k in range(len(self.rates))],
            rates=self.rates,
            factor=factor,
            found_inf=found_inf,
            impl=self.impl,
        )

    def _state_of(self, p: Tensor) -> dict[str, Tensor]:
        state = cast(dict[str, Tensor], self.state[p])
        if not state:
            state["step"] = torch.zeros((), device=p.device)
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
        return state

    def _average(self, p: Tensor, found_inf: Tensor | None) -> None:
        rates = self.rates if found_inf is None else self.rates * (found_inf == 0)
        for average, rate in zip(self._averages[p], rates, strict=True):
            _local(average).lerp_(_local(p), rate)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class or of `torch.optim.AdamW`, without amsgrad and maximize."""
        for group in state_dict["param_groups"]:
            if group.get("amsgrad") or group.get("maximize"):
                raise ValueError(
                    "a state of AdamW with amsgrad or maximize cannot be continued here: use torch.optim.AdamW"
                )
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group["fused"], group["foreach"] = True, None
        for p, state in self.state.items():
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=p.device)


def make_optimizer(net: nn.Module, config: OptimConfig, emas: Sequence[EMA] = ()) -> torch.optim.Optimizer:
    """Return AdamW over all parameters, in the implementation chosen by ``config.optimizer``.

    Args:
        net: the network, on its device.
        config: the optimizer's configuration.
        emas: EMAs updated with each step.

    Raises:
        ValueError: the implementation does not run here; the message suggests another.
    """
    device = next(net.parameters()).device
    name = resolve_optimizer(config.optimizer, device)
    options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay}
    if name == "adamw_ema":
        averages = [(ema.decay, ema.weights.values()) for ema in emas]
        options["lr"] = torch.full((), config.lr, device=device)  # CUDA graphs read it at each replay
        return AdamWEMA(net.parameters(), **options, averages=averages, impl="fused")
    optimizer: torch.optim.Optimizer
    if name == "apex":
        optimizer = _fused_adam()(net.parameters(), **options)
        optimizer.register_step_pre_hook(_take_count)
        optimizer.register_step_post_hook(_leave_count)
    else:
        optimizer = torch.optim.AdamW(net.parameters(), **options, fused=True)
    for ema in emas:
        optimizer.register_step_post_hook(lambda *_, ema=ema: ema.update(net))
    return optimizer


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


def resolve_optimizer(name: str, device: torch.device) -> Literal["adamw_ema", "torch", "apex"]:
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
    return cast(Literal["adamw_ema", "torch", "apex"], name)


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


def _local(tensor: Tensor) -> Tensor:
    """Return the local shard of a DTensor, or the tensor itself."""
    return cast(Tensor, tensor.to_local()) if hasattr(tensor, "to_local") else tensor


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
