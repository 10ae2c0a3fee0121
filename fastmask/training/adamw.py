"""AdamW with EMAs of the parameters, in one pass over memory, as an optimizer."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fastmask.kernels import Impl, adamw_ema


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
            gradient are updated too. Parameters of the last groups may have none.
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
            if [t.shape for t in tensors] != [p.shape for p in parameters[: len(mine[0])]]:
                raise ValueError(f"averages[{k}] must have a tensor of the shape of each parameter")
        ends = itertools.accumulate(len(group["params"]) for group in self.param_groups)
        if mine and len(mine[0]) not in ends:
            raise ValueError("averages must have a tensor for each parameter of a group, or for none of them")
        self._averages = {p: [tensors[i] for tensors in mine if i < len(tensors)] for i, p in enumerate(parameters)}

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
        count = len(self._averages[params[0]])
        adamw_ema(
            [local_part(p) for p in params],
            [local_part(cast(Tensor, p.grad)) for p in params],
            [local_part(state["exp_avg"]) for state in states],
            [local_part(state["exp_avg_sq"]) for state in states],
            steps,
            lr=lr,
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            averages=[[local_part(self._averages[p][k]) for p in params] for k in range(count)],
            rates=self.rates[:count],
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
        for average, rate in zip(self._averages[p], rates, strict=False):  # none for a parameter without EMAs
            local_part(average).lerp_(local_part(p), rate)

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


def local_part(tensor: Tensor) -> Tensor:
    """Return the local shard of a DTensor, or the tensor itself."""
    return cast(Tensor, tensor.to_local()) if hasattr(tensor, "to_local") else tensor
