"""Training monitors: loss by noise level, gradient and update norms, divergence. Sums stay on the device."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from fastmask.fields import check_at_least, free
from fastmask.ranks import Ranks, all_sum, whole
from fastmask.training.muon import MuonAdamW

# Edges of the log-SNR buckets. EDM's training draws log-SNR around 2.4 +- 2.4, rectified flow's around 0 +- 2.
EDGES = (-2.0, 0.0, 2.0, 4.0, 6.0)
_LEVELS = [f"{low}..{high}" for low, high in zip(("-inf", *EDGES), (*EDGES, "inf"), strict=True)]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DivergenceConfig:
    """Thresholds of a loss spike, and what follows one."""

    on_divergence: Literal["stop", "rollback"] = free("stop")
    """After a loss spike: stop, or roll back to the last checkpoint and skip the samples since then."""
    divergence_factor: float = free(5.0)
    """Loss spike threshold: multiple of the median of the last ten reports; 0 disables it."""
    loss_limit: float = free(100.0)
    """Absolute loss spike threshold, from the first report on; 0 disables it."""

    def check(self) -> None:
        """Raise a ValueError for the first invalid field."""
        check_at_least(self, divergence_factor=0, loss_limit=0)


class DivergedError(ValueError):
    """The loss is not finite, or spiked."""


class Tally:
    """Accumulates losses on the device, in total and by noise level.

    All updates are in place, so that a CUDA graph can capture `add`.

    Args:
        device: device of the losses.
        names: names of the losses, the weighted sum first.
        beside: weights, by name, of the losses that are left out of the loss by noise level and of `own_loss`: those
            that can be negative, and end or change within a run.
    """

    def __init__(self, device: torch.device, names: Sequence[str], beside: Mapping[str, float] | None = None) -> None:
        self._names, self._beside = tuple(names), dict(beside or {})
        # Layout: one sum per loss, then per log-SNR bucket the sum of the own loss, then the samples per bucket.
        self._sums = torch.zeros(len(self._names) + 2 * len(_LEVELS), device=device)
        self._count = torch.zeros(len(self._names), device=device)  # samples of each loss
        self._edges = torch.tensor(EDGES, device=device)
        # First sample, smallest and largest log-SNR of the first batch with a non-finite loss.
        self._first_bad = torch.full((3,), -1.0, dtype=torch.float64, device=device)

    def add(self, offset: Tensor, losses: Mapping[str, Tensor], log_snr: Tensor) -> None:
        """Add the losses of a batch, and record the position and log-SNR range of the first non-finite one.

        Args:
            offset: global index of the batch's first sample, shape ().
            losses: losses by name, each (B,); the last names can be missing.
            log_snr: log-SNR of each sample, (B,).
        """
        given = [losses[name].detach().float() for name in self._names if name in losses]
        stacked = torch.stack(given)  # (names, B)
        level = torch.bucketize(log_snr, self._edges)  # (B,)
        at = (level[:, None] == torch.arange(len(_LEVELS), device=log_snr.device)).float()  # (B, levels)
        # torch.where, not a multiplication, which would spread a non-finite loss to all buckets.
        own = stacked[0]
        for name, weight in self._beside.items():
            if name in losses:
                own = own - weight * losses[name].detach().float()
        by_level = torch.where(at > 0, own[:, None], 0.0).sum(0)
        self._sums[: len(given)] += stacked.sum(1)
        self._sums[len(self._names) :] += torch.cat([by_level, at.sum(0)])
        self._count[: len(given)] += len(log_snr)
        found = torch.stack([offset.double(), log_snr.min().double(), log_snr.max().double()])
        first = ~stacked[0].isfinite().all() & (self._first_bad[0] < 0)
        self._first_bad.copy_(torch.where(first, found, self._first_bad))

    def state(self) -> list[Tensor]:
        """Return copies of the sums, for `restore`."""
        return [t.clone() for t in (self._sums, self._count, self._first_bad)]

    def restore(self, state: Sequence[Tensor]) -> None:
        """Restore the sums from `state`."""
        for mine, kept in zip((self._sums, self._count, self._first_bad), state, strict=True):
            mine.copy_(kept)

    def check_finite(self, ranks: Ranks) -> None:
        """Raise a `DivergedError` with the first sample of the batch if a loss was not finite."""
        if all_sum((self._first_bad[:1] >= 0).float(), ranks).item() == 0:
            return
        sample, least, largest = self._first_bad.tolist()
        self._first_bad.fill_(-1.0)
        where = f"of the batch from sample {sample:.0f} on" if sample >= 0 else "on another rank"
        levels = f" (its log-SNR: {least:.3g} to {largest:.3g})" if sample >= 0 else ""
        raise DivergedError(f"the loss {where} is not finite{levels}")

    def mean_loss(self, ranks: Ranks) -> float:
        """Return the mean own loss per image since `take`, over all ranks, without a reset; waits for the device."""
        self.check_finite(ranks)
        return self.own_loss(self._means(ranks)[0])

    def _means(self, ranks: Ranks) -> tuple[dict[str, float], list[float], list[float]]:
        """Return the means by name, over all ranks, and the sum of the own loss and the samples of each bucket."""
        sums, counts = all_sum(self._sums, ranks).tolist(), all_sum(self._count, ranks).tolist()
        means = {n: value / count for n, value, count in zip(self._names, sums, counts, strict=False) if count}
        return means, sums[len(self._names) :][: len(_LEVELS)], sums[-len(_LEVELS) :]

    def own_loss(self, figures: Mapping[str, float]) -> float:
        """Return the total of mean losses by name, without those beside it."""
        beside = sum(weight * figures[name] for name, weight in self._beside.items() if name in figures)
        return figures[self._names[0]] - beside

    def take(self, ranks: Ranks) -> dict[str, float]:
        """Return the mean losses per image since the last call, over all ranks, and reset the sums."""
        self.check_finite(ranks)
        figures, by_level, samples = self._means(ranks)
        self._sums.zero_()
        self._count.zero_()
        for name, value, number in zip(_LEVELS, by_level, samples, strict=True):
            if number:
                figures[f"loss_at_log_snr/{name}"] = value / number
        return figures


def check_spike(loss: float, before: Sequence[float], factor: float, limit: float) -> None:
    """Raise a `DivergedError` at a loss spike.

    Args:
        loss: mean loss since the last report.
        before: mean losses of the previous reports; may be empty.
        factor: threshold as a multiple of the median of ``before``; 0 disables it.
        limit: absolute threshold; 0 disables it.
    """
    if limit and loss > limit:
        raise DivergedError(f"the loss is {loss:.4g}, above --loss-limit {limit:g}")
    if factor and before and loss > factor * (usual := sorted(before)[len(before) // 2]):
        raise DivergedError(f"the loss rose to {loss:.4g}, more than {factor:g} times the {usual:.4g} before")


@torch.no_grad()
def gradient_norm(net: nn.Module) -> float:
    """Return the global gradient norm."""
    return _norm([p.grad for p in net.parameters() if p.grad is not None])


@torch.no_grad()
def update_ratio(net: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Return the norm of the last update, without weight decay, relative to the norm of the parameters."""
    return _norm(_updates(optimizer)) / max(_norm(net.parameters()), math.ulp(1.0))


def _updates(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Yield AdamW's last updates, which follow from its moments, and the norm of Muon's."""
    if isinstance(optimizer, MuonAdamW):
        yield optimizer.update_norm
    for group in optimizer.param_groups:
        beta1, beta2 = group["betas"]
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            if "exp_avg_sq" in state:
                step = state["step"].double()
                root = (state["exp_avg_sq"] / (1 - beta2**step).float()).sqrt() + group["eps"]
                yield state["exp_avg"] / root * (group["lr"] / (1 - beta1**step)).float()


def _norm(tensors: Iterable[Tensor]) -> float:
    # `whole` reduces the norm of a DTensor over its shards.
    norms = [whole(torch.linalg.vector_norm(t)) for t in tensors]
    return float(torch.stack(norms).norm()) if norms else 0.0
