"""Distributed processes: rank and world size, devices, collectives."""

import contextlib
import ctypes
import dataclasses
import datetime
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


_PR_SET_PDEATHSIG = 1  # of prctl(2)


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Rank and world size of this process.

    Attributes:
        rank: global rank.
        count: world size.
        local: rank on this machine, and index of the GPU.
    """

    rank: int = 0
    count: int = 1
    local: int = 0

    @classmethod
    def from_environment(cls) -> "Ranks":
        """Read the ranks from torchrun's environment variables; a single process without them."""
        try:
            rank, count, local = (int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        except ValueError as error:
            raise ValueError(f"RANK, WORLD_SIZE and LOCAL_RANK must be numbers, as torchrun sets: {error}") from None
        return cls(rank, count, local) if count > 1 else cls()


def signal_if_torchrun_dies(number: int) -> None:
    """Have Linux signal this process when torchrun, its parent, dies and can no longer stop it.

    Without torchrun nothing is set up: the process can outlive its parent.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    torchrun = os.getppid()
    with contextlib.suppress(OSError, AttributeError):  # other systems lack the call
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != torchrun:  # it died before the call
        signal.raise_signal(number)


def own_device(device: torch.device, ranks: Ranks) -> torch.device:
    """Return the GPU of a rank for "cuda" without an index, else the device itself.

    A GPU becomes the current device: streams, CUDA graphs and kernels of other libraries use the current one.

    Raises:
        ValueError: fewer GPUs than processes.
    """
    if device.type != "cuda":
        return device
    if device.index is None:
        if ranks.local >= torch.cuda.device_count():
            raise ValueError(
                f"process {ranks.local} of this machine sees {torch.cuda.device_count()} GPUs: start as many processes "
                f"as there are GPUs, and let each see all of them"
            )
        device = torch.device("cuda", ranks.local)
    torch.cuda.set_device(device)
    return device


def require_one_process(command: str) -> None:
    """Raise a ValueError under torchrun with several processes, which would all do the same work."""
    count = Ranks.from_environment().count
    if count > 1:
        raise ValueError(f"{command} works in one process, and {count} were started: start it without torchrun")


@contextlib.contextmanager
def process_group(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """Initialise the process group inside the block: NCCL for GPU tensors, gloo for CPU tensors."""
    if ranks.count == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(minutes=30))
    try:
        yield
    finally:
        dist.destroy_process_group()


def all_sum(tensor: Tensor, ranks: Ranks) -> Tensor:
    """Return the sum of a tensor over all ranks."""
    if ranks.count > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def all_max(number: int, ranks: Ranks) -> int:
    """Return the maximum of a number over all ranks, without waiting for the device."""
    if ranks.count == 1:
        return number
    shared = torch.tensor(number)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return int(shared)


def from_first(ranks: Ranks, call: Callable[[], T]) -> T:
    """Call a function on rank 0 and broadcast its result; an error there is a ValueError on the other ranks."""
    if ranks.count == 1:
        return call()
    answer: list[Any] = [None, None]
    failed = None
    if not ranks.rank:
        try:
            answer[0] = call()
        except (ValueError, OSError) as error:
            failed, answer[1] = error, str(error)
    dist.broadcast_object_list(answer, device=torch.device("cpu"))
    if failed:
        raise failed
    if answer[1] is not None:
        raise ValueError(answer[1])
    return cast(T, answer[0])


def is_lost_rank(error: RuntimeError) -> bool:
    """Return whether an error of a collective means that another process died or hangs."""
    signs = ("closed by peer", "reset by peer", "Broken pipe", "Timed out", "remote process exited", "Watchdog")
    return any(sign in str(error) for sign in signs)


def barrier(ranks: Ranks) -> Callable[[], None]:
    """Return a barrier with a timeout of 7 days, which raises a ValueError if another rank died.

    Every rank must call this function too; it waits with the same timeout.
    """
    if ranks.count == 1:
        return lambda: None
    group = dist.new_group(timeout=datetime.timedelta(days=7), backend="gloo")

    def wait() -> None:
        try:
            dist.barrier(group)
        except RuntimeError as error:
            raise ValueError("another process stopped before it was done: see what it says") from error

    return wait


def whole(tensor: Tensor) -> Tensor:
    """Return the full tensor of a DTensor, or the tensor itself; every rank must call it."""
    return cast(Tensor, tensor.full_tensor()) if hasattr(tensor, "full_tensor") else tensor
