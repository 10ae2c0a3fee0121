"""Calls of a GPU without the time that Python takes to launch them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Graphed:
    """A call that a CUDA graph replays: then its time is that of the GPU, and not of Python that launches kernels.

    Captured at the first call. What cannot be captured is launched each time, and `timed` says so.
    """

    def __init__(self, call: Callable[[], tuple[Tensor, ...]]):
        self.call, self.timed = call, ""
        self._graph: Any = None
        self._results: tuple[Tensor, ...] = ()

    def __call__(self) -> tuple[Tensor, ...]:
        if not self.timed:
            self._capture()
        if self._graph is None:
            return self.call()
        self._graph.replay()
        return self._results

    def _capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # compiles and tunes, which a capture does not allow
                self.call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._results = self.call()
        except RuntimeError as error:
            self.timed = f"launches, as no graph could be captured: {str(error).splitlines()[0]}"
        else:
            self._graph, self.timed = graph, "graph replay"
