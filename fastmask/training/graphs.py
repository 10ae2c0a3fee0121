"""CUDA graphs of the parts of a training step."""

from collections.abc import Callable, Hashable
from typing import Any

import torch


class GraphedCalls:
    """Runs calls, and captures and replays them as CUDA graphs from the second call on.

    The first call of a key runs eagerly as a warm-up: it builds kernels and allocates workspaces, which a capture must
    not do. The second call is captured. Graphs share one memory pool until `clear`.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}
        self._pool: Any = None

    def run(self, key: Hashable, call: Callable[[], None]) -> None:
        """Run a call, or replay its graph.

        Args:
            key: identifies the call; the addresses of its input and output tensors must not change.
            call: must not synchronise with the GPU.

        Raises:
            ValueError: the call cannot be captured.
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
        """Release all graphs and their memory, when their tensors are gone or another stage needs the memory."""
        captured = self._pool is not None
        self._graphs.clear()
        # A pool must not be reused once its last graph is gone: its host memory and cuBLAS workspaces outlive the
        # graphs, and torch's allocator fails on such a pool without an owner.
        self._pool = None
        if captured:
            torch.cuda.empty_cache()

    def _capture(self, call: Callable[[], None]) -> torch.cuda.CUDAGraph:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            # A capture records the current device only; thread_local, since loader threads can allocate meanwhile.
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
