"""Calls of a GPU without the time that Python takes to launch them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Before, a capture that ended in an error left the allocator and the generator in it (pytorch/pytorch 180395).
RECOVERS = torch.__version__ >= "2.12"


class CaptureFailedError(RuntimeError):
    """A call could not be captured, after which nothing that this process measures is to be trusted."""


class Graphed:
    """A call that a CUDA graph replays: then its time is that of the GPU, and not of Python that launches kernels.

    Captured at the first call. What cannot be captured is launched each time, and `timed` says so. Where PyTorch does
    not recover from a failed capture, a CaptureFailedError is raised instead: in a new process the call can be
    launched, as one that is known to be `refused`.

    Args:
        call: what to capture.
        refused: why it cannot be captured, if that is known; it is launched then.
    """

    def __init__(self, call: Callable[[], tuple[Tensor, ...]], refused: str = ""):
        self.call, self.refused = call, refused
        self._graph: Any = None
        self._results: tuple[Tensor, ...] = ()

    @property
    def timed(self) -> str:
        """How the call is done; empty before the first one."""
        if self.refused:
            return f"launches, as no graph could be captured: {self.refused}"
        return "graph replay" if self._graph else ""

    def __call__(self) -> tuple[Tensor, ...]:
        """Return what the call returns; a replay returns the same tensors each time."""
        if not self.timed:
            self._capture()
        if self.refused:
            return self.call()
        self._graph.replay()
        return self._results

    def _capture(self) -> None:
        current = torch.cuda.current_stream()
        side = torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(3):  # compiles and tunes, which a capture does not allow
                self.call()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._results = self.call()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.refused = str(error).splitlines()[0]
            if not RECOVERS:
                after = (
                    f"torch {torch.__version__} measures nothing right after that: name the variant in the op's `host`"
                )
                raise CaptureFailedError(f"no graph could be captured: {self.refused}; {after}") from error
            torch.cuda.set_stream(current)  # the failed capture's is still the current one
        else:
            self._graph = graph
