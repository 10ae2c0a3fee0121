"""Muon for the weight matrices of blocks, AdamW for all other parameters.

Muon (arXiv 2502.16982, section 2) replaces the update of a matrix by an orthogonal matrix near it. With the gradient g,
the momentum mu = 0.95 and Nesterov's form of it:

    m = mu m + (1 - mu) g
    o = orthogonalized(mu m + (1 - mu) g)
    p = p - lr weight_decay p - lr 0.2 sqrt(max(rows, columns)) o

The last factor gives an update the usual RMS of AdamW's (equation 4 there), so that both share a learning rate and a
weight decay.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fastmask.kernels import Impl
from fastmask.models.stack import Stack, all_blocks
from fastmask.ranks import whole
from fastmask.training.adamw import AdamWEMA, local_part

_MOMENTUM = 0.95
_RMS = 0.2  # usual RMS of AdamW's updates, relative to the learning rate
# Newton-Schulz: number of iterations, and coefficients of x, x^3 and x^5, chosen for a large slope at 0: singular
# values end near 1, between about 0.7 and 1.2, rather than at 1.
ITERATIONS = 5
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_SMALLEST = 1e-7  # norm below which an update shrinks, so that a gradient of zeros moves nothing


def block_matrices(stacks: Iterable[Stack]) -> Iterator[Tensor]:
    """Yield the parameters that Muon updates: the two-dimensional ones of the blocks, their modulation included."""
    for block in all_blocks(stacks):
        yield from (p for p in block.parameters() if p.ndim == 2)


def orthogonalized(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a matrix with the singular vectors of ``matrix``, and singular values near 1.

    Newton-Schulz: x = a x + (b g + c g^2) x with g = x x^T, five times, from x = matrix / |matrix|.

    Args:
        matrix: shape (rows, columns).
        dtype: dtype of the matmuls and of the result.
    """
    a, b, c = _COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.to(dtype)
    x = x.mT if is_tall else x  # the smaller Gram matrix
    x = x / x.norm().clamp(min=_SMALLEST)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class MuonAdamW(AdamWEMA):
    """Muon for matrices and AdamW for other parameters, with EMAs of all of them; otherwise like `AdamWEMA`.

    The processes of torch.distributed share the matrices: each orthogonalizes its part and broadcasts the results.
    Sharded matrices (DTensor) are gathered for it, one per process at a time, in the dtype of the matmuls.

    The state of a matrix is its momentum, ``momentum_buffer`` as in `torch.optim.Muon`, and ``step`` as in AdamW.

    Args:
        matrices: parameters of two dimensions, for Muon.
        others: parameters for AdamW.
        more: further parameters for AdamW, of which no EMA is kept.
        dtype: dtype of Muon's matmuls.
        lr: learning rate of both, a number or a tensor on the device of the parameters.
        betas: decay rates of AdamW's moments.
        weight_decay: decoupled weight decay of both, multiplied by the learning rate.
        averages: for each EMA its decay, and its tensors in the order of ``matrices``, then ``others``.
        impl: form of AdamW, passed to `fastmask.kernels.adamw_ema`.

    Attributes:
        update_norm: norm of the last update of the matrices, without weight decay, shape ().

    Raises:
        ValueError: a parameter of ``matrices`` that has not two dimensions.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        others: Iterable[Tensor],
        more: Iterable[Tensor] = (),
        *,
        dtype: torch.dtype = torch.float32,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 1e-2,
        averages: Sequence[tuple[float, Iterable[Tensor]]] = (),
        impl: Impl | None = None,
    ) -> None:
        matrices = list(matrices)
        for p in matrices:
            if p.ndim != 2:
                raise ValueError(f"Muon updates matrices, not a parameter of shape {tuple(p.shape)}: give it to AdamW")
        groups = [{"params": matrices, "muon": True}, {"params": list(others), "muon": False}]
        if more := list(more):
            groups.append({"params": more, "muon": False})
        super().__init__(groups, lr, betas, weight_decay=weight_decay, averages=averages, impl=impl)
        self._dtype = dtype
        self.update_norm = torch.zeros((), device=matrices[0].device)

    def _step(self, group: dict[str, Any], params: list[Tensor], factor: Tensor | None, found_inf: Any) -> None:
        if not group["muon"]:
            super()._step(group, params, factor, found_inf)
            return
        lr = group["lr"]
        if not isinstance(lr, Tensor):
            lr = torch.full((), lr, dtype=torch.float32, device=params[0].device)
        kept = 1 - lr * group["weight_decay"]
        rank, count = _position()
        norms = []
        # Large ones first, so that the matrices of a round cost about the same.
        ordered = sorted(params, key=Tensor.numel, reverse=True)
        for first in range(0, len(ordered), count):
            part = ordered[first : first + count]
            updates = [whole(self._direction(p, factor, found_inf)) for p in part]
            if rank < len(part):
                updates[rank] = orthogonalized(updates[rank], self._dtype).contiguous()
            for owner, (p, update) in enumerate(zip(part, updates, strict=True)):
                if count > 1:
                    dist.broadcast(update, owner)
                scale = _RMS * math.sqrt(max(p.shape))
                norms.append(scale * torch.linalg.vector_norm(update, dtype=torch.float32))
                own = local_part(_sharded_like(p, update)).to(p.dtype)
                _put(local_part(p), local_part(p) * kept - own * (lr * scale), found_inf)
                self._average(p, found_inf)
        _put(self.update_norm, lr * torch.stack(norms).norm(), found_inf)

    def _direction(self, p: Tensor, factor: Tensor | None, found_inf: Tensor | None) -> Tensor:
        """Update the momentum of a matrix, and return what is to be orthogonalized, sharded like the matrix."""
        grad = local_part(cast(Tensor, p.grad))
        grad = grad if factor is None else grad * factor
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), device=p.device)
            state["momentum_buffer"] = torch.zeros_like(p)
        state["step"] += 1 if found_inf is None else (found_inf == 0).float().reshape(())
        momentum = local_part(state["momentum_buffer"])
        updated = momentum.lerp(grad, 1 - _MOMENTUM)
        _put(momentum, updated, found_inf)
        return _with_shards(p, grad.lerp(updated, _MOMENTUM).to(self._dtype))


def _put(target: Tensor, value: Tensor, found_inf: Tensor | None) -> None:
    """Store a value, unless the step is skipped."""
    target.copy_(value if found_inf is None else torch.where(found_inf == 0, value, target))


def _position() -> tuple[int, int]:
    """Return the rank of this process and the number of processes."""
    distributed = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)


def _with_shards(p: Tensor, shard: Tensor) -> Tensor:
    """Return a tensor sharded like a parameter, from this process's shard."""
    if not hasattr(p, "device_mesh"):
        return shard
    from torch.distributed.tensor import DTensor  # noqa: PLC0415  (slow to import)

    assert isinstance(p, DTensor)
    return DTensor.from_local(shard, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def _sharded_like(p: Tensor, full: Tensor) -> Tensor:
    """Return a full tensor, which every process has, sharded like a parameter."""
    if not hasattr(p, "device_mesh"):
        return full
    from torch.distributed.tensor import DTensor, distribute_tensor  # noqa: PLC0415  (slow to import)

    assert isinstance(p, DTensor)
    return distribute_tensor(full, p.device_mesh, p.placements, src_data_rank=None)
