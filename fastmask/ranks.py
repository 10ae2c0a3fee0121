"""The processes that train together: who they are, and what they tell each other."""

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
    """Which of the processes this one is.

    Attributes:
        rank: its number.
        count: how many there are.
        local: its number on its machine, and that of its GPU.
    """

    rank: int = 0
    count: int = 1
    local: int = 0

    @classmethod
    def from_environment(cls) -> "Ranks":
        """Return what torchrun says in the environment, a single process without it."""
        try:
            rank, count, local = (int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        except ValueError as error:
            raise ValueError(f"RANK, WORLD_SIZE and LOCAL_RANK must be numbers, as torchrun sets: {error}") from None
        return cls(rank, count, local) if count > 1 else cls()


def signal_if_torchrun_dies(number: int) -> None:
    """Have Linux send a signal to this process when torchrun, which started it, is killed and can end it no more.

    A process of another launcher, or of none, may outlive the one that started it.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    torchrun = os.getppid()
    with contextlib.suppress(OSError, AttributeError):  # other systems lack the call
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != torchrun:  # it died before the call
        signal.raise_signal(number)


def own_device(device: torch.device, ranks: Ranks) -> torch.device:
    """Return the GPU of a rank where the device is "cuda" without a number, else the device itself.

    A GPU becomes the current one of the process: streams, CUDA graphs and kernels of others are made for that one.

    Raises:
        ValueError: there are fewer GPUs than processes.
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
    """Raise a ValueError under torchrun with several processes, each of which would do all of the work."""
    count = Ranks.from_environment().count
    if count > 1:
        raise ValueError(f"{command} works in one process, and {count} were started: start it without torchrun")


@contextlib.contextmanager
def process_group(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """Connect the processes inside the block: NCCL between GPUs, gloo between CPUs and for what the hosts agree on."""
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
    """Return the sum of a tensor over the ranks."""
    if ranks.count > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def all_max(number: int, ranks: Ranks) -> int:
    """Return the largest of a number over the ranks; the host waits for theirs, not for the device."""
    if ranks.count == 1:
        return number
    shared = torch.tensor(number)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return int(shared)


def from_first(ranks: Ranks, call: Callable[[], T]) -> T:
    """Return on every rank what a function returned on the first one; an error there is a ValueError on the others."""
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
    """Return whether an error of a collective operation means that another process is gone, or answers no more."""
    signs = ("closed by peer", "reset by peer", "Broken pipe", "Timed out", "remote process exited", "Watchdog")
    return any(sign in str(error) for sign in signs)


def barrier(ranks: Ranks) -> Callable[[], None]:
    """Return what waits until every rank has called it, for days if need be; a ValueError if one of them is gone.

    All ranks must call this too, which is as patient.
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
    """Return a tensor that may be split among the ranks as one that is not; all ranks must call."""
    return cast(Tensor, tensor.full_tensor()) if hasattr(tensor, "full_tensor") else tensor
