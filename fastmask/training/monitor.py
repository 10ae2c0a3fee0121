"""Training monitors, on the device so that no step waits: loss by noise level, norms, loss spikes."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from fastmask.ranks import Ranks, all_sum, whole

# Logarithms of the signal-to-noise ratio at which one bucket of times ends and the next begins. EDM's training draws
# them around 2.4 +- 2.4, rectified flow's around 0 +- 2.
EDGES = (-2.0, 0.0, 2.0, 4.0, 6.0)
_LEVELS = [f"{low}..{high}" for low, high in zip(("-inf", *EDGES), (*EDGES, "inf"), strict=True)]


class DivergedError(ValueError):
    """The loss is not finite, or far above what it was."""


class Tally:
    """Sums up losses on the device, as a whole and by noise level.

    All is changed in place, so that a CUDA graph may hold `add`.

    Args:
        device: where the losses are.
        names: of the losses, their weighted sum first.
    """

    def __init__(self, device: torch.device, names: Sequence[str]) -> None:
        self._names = tuple(names)
        # Rows: the losses, then per bucket of noise the sum of the total loss, and at the end the samples there.
        self._sums = torch.zeros(len(self._names) + 2 * len(_LEVELS), device=device)
        self._count = torch.zeros((), device=device)
        self._edges = torch.tensor(EDGES, device=device)
        self._first_bad = torch.full(
            (3,), -1.0, dtype=torch.float64, device=device
        )  # sample, least and largest log-SNR

    def add(self, offset: Tensor, losses: Mapping[str, Tensor], log_snr: Tensor) -> None:
        """Add the losses of a batch, and note where and at which noise levels the first one is that is not finite.

        Args:
            offset: global index of the batch's first sample, shape ().
            losses: by name, each (B,).
            log_snr: of the samples' times, (B,).
        """
        stacked = torch.stack([losses[name].detach().float() for name in self._names])  # (names, B)
        level = torch.bucketize(log_snr, self._edges)  # (B,)
        at = (level[:, None] == torch.arange(len(_LEVELS), device=log_snr.device)).float()  # (B, levels)
        # Where, and not a product: a loss that is not finite belongs to its own level alone.
        by_level = torch.where(at > 0, stacked[0][:, None], 0.0).sum(0)
        self._sums += torch.cat([stacked.sum(1), by_level, at.sum(0)])
        self._count += len(log_snr)
        found = torch.stack([offset.double(), log_snr.min().double(), log_snr.max().double()])
        first = ~stacked[0].isfinite().all() & (self._first_bad[0] < 0)
        self._first_bad.copy_(torch.where(first, found, self._first_bad))

    def state(self) -> list[Tensor]:
        """Return copies of the sums, for `restore`."""
        return [t.clone() for t in (self._sums, self._count, self._first_bad)]

    def restore(self, state: Sequence[Tensor]) -> None:
        """Put the sums back to what they were."""
        for mine, kept in zip((self._sums, self._count, self._first_bad), state, strict=True):
            mine.copy_(kept)

    def check_finite(self, ranks: Ranks) -> None:
        """Raise a `DivergedError` that names the first sample whose loss was not finite, if there was one."""
        if all_sum((self._first_bad[:1] >= 0).float(), ranks).item() == 0:
            return
        sample, least, largest = self._first_bad.tolist()
        self._first_bad.fill_(-1.0)
        where = f"of the batch from sample {sample:.0f} on" if sample >= 0 else "on another rank"
        levels = f" (its log-SNR: {least:.3g} to {largest:.3g})" if sample >= 0 else ""
        raise DivergedError(f"the loss {where} is not finite{levels}")

    def mean_loss(self, ranks: Ranks) -> float:
        """Return the mean loss per image since `take`, over all ranks, without a reset; waits for the device."""
        self.check_finite(ranks)
        return float((all_sum(self._sums[:1], ranks) / all_sum(self._count, ranks)).item())

    def take(self, ranks: Ranks) -> dict[str, float]:
        """Return the mean losses per image since the last call, all finite and over all ranks, and reset the sums."""
        self.check_finite(ranks)
        sums, count = all_sum(self._sums, ranks).tolist(), all_sum(self._count, ranks).item()
        self._sums.zero_()
        self._count.zero_()
        figures = {name: value / count for name, value in zip(self._names, sums, strict=False)}
        by_level, samples = sums[len(self._names) :][: len(_LEVELS)], sums[-len(_LEVELS) :]
        for name, value, number in zip(_LEVELS, by_level, samples, strict=True):
            if number:
                figures[f"loss_at_log_snr/{name}"] = value / number
        return figures


def check_spike(loss: float, before: Sequence[float], factor: float, limit: float) -> None:
    """Raise a `DivergedError` at a loss spike.

    Args:
        loss: mean loss of the last steps.
        before: those of the reports before, none at the first.
        factor: how many times their median is a spike; 0 does not compare.
        limit: what is a spike whatever came before; 0 is no limit.
    """
    if limit and loss > limit:
        raise DivergedError(f"the loss is {loss:.4g}, above --loss-limit {limit:g}")
    if factor and before and loss > factor * (usual := sorted(before)[len(before) // 2]):
        raise DivergedError(f"the loss rose to {loss:.4g}, more than {factor:g} times the {usual:.4g} before")


@torch.no_grad()
def gradient_norm(net: nn.Module) -> float:
    """Return the norm of all gradients."""
    return _norm([p.grad for p in net.parameters() if p.grad is not None])


@torch.no_grad()
def update_ratio(net: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Return the norm of what AdamW just added to the parameters, without decay, relative to that of the parameters."""
    return _norm(_updates(optimizer)) / max(_norm(net.parameters()), math.ulp(1.0))


def _updates(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        beta1, beta2 = group["betas"]
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            if "exp_avg_sq" in state:
                step = state["step"].double()
                root = (state["exp_avg_sq"] / (1 - beta2**step).float()).sqrt() + group["eps"]
                yield state["exp_avg"] / root * (group["lr"] / (1 - beta1**step)).float()


def _norm(tensors: Iterable[Tensor]) -> float:
    # Of tensors that are split among the ranks each norm is that of the whole.
    norms = [whole(torch.linalg.vector_norm(t)) for t in tensors]
    return float(torch.stack(norms).norm()) if norms else 0.0
