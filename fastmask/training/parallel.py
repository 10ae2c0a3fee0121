"""Parallel training: DDP and FSDP2 of a network, and gradients that are accumulated without communication."""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastmask.models.maskdit import MaskDiT
from fastmask.ranks import Ranks

Parallel = Literal["ddp", "fsdp2", "fsdp2-grad-op"]


def shard(model: MaskDiT, parallel: Parallel, dtype: torch.dtype | None, device: torch.device, ranks: Ranks) -> None:
    """Split the parameters of a network among the ranks, block by block (FSDP2); nothing to do with DDP or one rank.

    Args:
        model: the network, the same on every rank.
        parallel: "fsdp2" gathers a block's weights again in backward, "fsdp2-grad-op" keeps them from the forward pass.
        dtype: in which weights are gathered, autocast's; None is their own. Gradients are added up in fp32.
        device: of the network.
        ranks: the processes.
    """
    if ranks.count == 1 or parallel == "ddp":
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # noqa: PLC0415  (slow to import)

    # The inputs keep their dtype: noise levels lose too much in 16 bits.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = dist.device_mesh.init_device_mesh(device.type, (ranks.count,))
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "reshard_after_forward": parallel == "fsdp2"}
    for block in (block for stack in model.stacks for block in stack.blocks):
        fully_shard(block, **options)
    fully_shard(model, **options)


def replicate(objective: nn.Module, parallel: Parallel, device: torch.device, ranks: Ranks) -> nn.Module:
    """Return a module whose backward averages the gradients over the ranks (DDP); itself with FSDP2 or one rank.

    All parameters that ask for a gradient must get one.
    """
    if ranks.count == 1 or parallel != "ddp":
        return objective
    devices = [device] if device.type == "cuda" else None
    # The buffers are tables that every rank has computed alike. torch 2.13 has renamed the flag.
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    options: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return DistributedDataParallel(objective, devices, gradient_as_bucket_view=True, **options)


@contextlib.contextmanager
def no_sync(module: nn.Module, model: nn.Module, stay: bool) -> Iterator[None]:
    """Let backward inside the block add up gradients on this rank alone, if ``stay``: more follow in the same step."""
    if hasattr(model, "set_requires_gradient_sync"):  # which `fully_shard` gives it
        cast(Any, model).set_requires_gradient_sync(not stay)
        yield
    elif stay and isinstance(module, DistributedDataParallel):
        with module.no_sync():
            yield
    else:
        yield
