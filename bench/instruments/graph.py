"""CUDA graph replay of calls, which excludes Python's launch overhead."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Earlier versions leave the allocator and the generator in capture mode after a failed capture (pytorch/pytorch
# 180395).
RECOVERS = torch.__version__ >= "2.12"


class CaptureFailedError(RuntimeError):
    """A call could not be captured, so further measurements in this process cannot be trusted."""


class Graphed:
    """A call that is replayed from a CUDA graph, so that its time is GPU time, without launches from Python.

    It is captured at the first call. A call that cannot be captured is launched each time, and `timed` reports it. If
    PyTorch cannot recover from the failed capture, a CaptureFailedError is raised instead; a new process can then
    launch the call directly, by passing `refused`.

    Args:
        call: the call to capture.
        refused: the reason why it cannot be captured, if known; it is launched directly then.
    """

    def __init__(self, call: Callable[[], tuple[Tensor, ...]], refused: str = ""):
        self.call, self.refused = call, refused
        self._graph: Any = None
        self._results: tuple[Tensor, ...] = ()

    @property
    def timed(self) -> str:
        """The kind of execution; empty before the first call."""
        if self.refused:
            return f"launches, as no graph could be captured: {self.refused}"
        return "graph replay" if self._graph else ""

    def __call__(self) -> tuple[Tensor, ...]:
        """Return the results of the call; a replay returns the same tensors each time."""
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
            for _ in range(3):  # compiles and tunes, which is not allowed during capture
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
            torch.cuda.set_stream(current)  # the stream of the failed capture is still current
        else:
            self._graph = graph
