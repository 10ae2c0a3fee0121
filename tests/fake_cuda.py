"""CUDA graphs on a CPU: captures and replays by recorded operations, with the driver's and torch's rules checked."""

import contextlib
import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = ("_local_scalar_dense", "nonzero", "unique")  # operations whose result the host waits for


class FakeGraph:
    """Operations that were captured. The capture has done them already, so the first replay is left out."""

    def __init__(self):
        self.operations, self.pool, self.fresh = [], None, True

    def replay(self):
        assert self.operations, "the graph is empty"
        if self.fresh:
            self.fresh = False
            return
        with torch.no_grad():
            for func, args, kwargs, results in self.operations:
                for made, place in zip(tensors_of(func(*args, **kwargs)), results, strict=True):
                    if made.data_ptr() != place.data_ptr() and "empty" not in func.name():
                        place.copy_(made)


class FakeCuda:
    """What `torch.cuda` offers for graphs; `install` puts it there.

    Attributes:
        current: index of the current device.
        captures: pool and device of every capture, in order.
        emptied: how often cached memory was given back.
    """

    def __init__(self):
        self.current, self.captures, self.emptied = 0, [], 0
        self._pools, self._owners = 0, {}  # graphs by the pool that they were captured into

    def install(self, monkeypatch):
        for name in ("graph_pool_handle", "graph", "device", "set_device", "empty_cache"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
        return self

    def graph_pool_handle(self):
        self._pools += 1
        return (0, self._pools)

    def set_device(self, device):
        self.current = torch.device(device).index

    @contextlib.contextmanager
    def device(self, device):
        before, self.current = self.current, torch.device(device).index or 0
        yield
        self.current = before

    def empty_cache(self):
        self.emptied += 1

    @contextlib.contextmanager
    def graph(self, graph, pool, capture_error_mode):
        # Host memory and workspaces keep a pool known to the allocator, which then wants a graph that owns it.
        owners = self._owners.setdefault(pool, [])
        assert not owners or any(owner() is not None for owner in owners), "use_count > 0 INTERNAL ASSERT FAILED"
        owners.append(weakref.ref(graph))
        self.captures.append((pool, self.current))
        with Recorder(graph):
            yield


class Recorder(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in func.name() for name in WAITS):
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        self.graph.operations.append((func, args, kwargs or {}, tensors_of(out)))
        return out


def tensors_of(out):
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
