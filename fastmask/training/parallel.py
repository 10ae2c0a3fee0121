"""Parallel training: DDP, FSDP2, gradient accumulation without communication."""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastmask.models.maskdit import MaskDiT
from fastmask.models.stack import all_blocks
from fastmask.ranks import Ranks

Parallel = Literal["ddp", "fsdp2", "fsdp2-grad-op"]


def shard(
    model: MaskDiT,
    parallel: Parallel,
    dtype: torch.dtype | None,
    device: torch.device,
    ranks: Ranks,
    more: nn.Module | None = None,
) -> None:
    """Shard the parameters of a network over the ranks, block by block (FSDP2); a no-op with DDP or one rank.

    Args:
        model: the network, the same on every rank.
        parallel: "fsdp2" gathers a block's weights again in backward, "fsdp2-grad-op" keeps them from the forward pass.
        dtype: dtype of gathered weights (autocast's); None keeps theirs. Gradients are reduced in fp32.
        device: device of the network.
        ranks: rank and world size.
        more: a module that is trained with the network, sharded too.
    """
    if ranks.count == 1 or parallel == "ddp":
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # noqa: PLC0415  (slow to import)

    # Inputs keep their dtype: noise levels lose too much precision in 16 bits.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = dist.device_mesh.init_device_mesh(device.type, (ranks.count,))
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "reshard_after_forward": parallel == "fsdp2"}
    for block in all_blocks(model.stacks):
        fully_shard(block, **options)
    fully_shard(model, **options)
    if more is not None:
        fully_shard(more, **options)


def replicate(objective: nn.Module, parallel: Parallel, device: torch.device, ranks: Ranks) -> nn.Module:
    """Wrap a module in DDP, which averages gradients over the ranks; a no-op with FSDP2 or one rank.

    Every parameter that requires a gradient must receive one.
    """
    if ranks.count == 1 or parallel != "ddp":
        return objective
    devices = [device] if device.type == "cuda" else None
    # Buffers are constant tables, identical on all ranks. torch 2.13 renamed the flag.
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    options: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return DistributedDataParallel(objective, devices, gradient_as_bucket_view=True, **options)


@contextlib.contextmanager
def no_sync(module: nn.Module, models: Sequence[nn.Module], stay: bool) -> Iterator[None]:
    """Skip gradient synchronisation inside the block if ``stay``, for all micro-batches of a step but the last.

    Args:
        module: what is called, which can be replicated.
        models: what can be sharded by itself.
        stay: whether the gradients stay on their rank.
    """
    if hasattr(models[0], "set_requires_gradient_sync"):  # added by `fully_shard`
        for model in models:
            cast(Any, model).set_requires_gradient_sync(not stay)
        yield
    elif stay and isinstance(module, DistributedDataParallel):
        with module.no_sync():
            yield
    else:
        yield
