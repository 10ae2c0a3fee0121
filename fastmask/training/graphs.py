"""CUDA graphs of the calls that a training step consists of."""

from collections.abc import Callable, Hashable
from typing import Any

import torch


class GraphedCalls:
    """Runs calls, and replays them as CUDA graphs from the second time on.

    The first call of a key is run as it is: it warms up what a capture must not meet, such as kernels to build and
    workspaces to allocate. The second one is captured. Graphs share one memory pool until `clear`.

    Args:
        device: the GPU that the calls run on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}
        self._pool: Any = None

    def run(self, key: Hashable, call: Callable[[], None]) -> None:
        """Do a call, or replay its graph.

        Args:
            key: what tells this call from others; the tensors it reads and writes stay where they are.
            call: must not wait for the GPU.

        Raises:
            ValueError: it cannot be captured.
        """
        if key not in self._graphs:
            call()
            self._graphs[key] = None
            return
        graph = self._graphs[key]
        if graph is None:
            self._graphs[key] = graph = self._capture(call)
        graph.replay()

    def clear(self) -> None:
        """Drop all graphs and their memory: what they read and wrote is gone, or another stage needs the room."""
        captured = self._pool is not None
        self._graphs.clear()
        # A pool must not be named again once its last graph is gone: its host memory and cuBLAS workspaces outlive
        # the graphs, and torch's allocator stops at such a pool without an owner.
        self._pool = None
        if captured:
            torch.cuda.empty_cache()

    def _capture(self, call: Callable[[], None]) -> torch.cuda.CUDAGraph:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            # A capture records the current device alone. Threads of the loaders may allocate meanwhile.
            with (
                torch.cuda.device(self._device),
                torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
            ):
                call()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"a step cannot be captured as a CUDA graph ({reason}): give --cuda-graphs off") from error
        return graph
