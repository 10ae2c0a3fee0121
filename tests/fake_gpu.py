"""A GPU that is made up, for tests on a machine without one."""

import contextlib
from types import SimpleNamespace

import torch


class Cuda:
    """The part of torch.cuda that captures, for a machine without a GPU: a call that reads a value cannot be captured.

    A failed capture leaves its stream the current one, as `torch.cuda.graph` does.
    """

    CUDAGraph = SimpleNamespace
    WHY = "operation not permitted when stream is capturing"

    def __init__(self, monkeypatch):
        self.default = self.current = self.Stream()
        self.captures, self.capturing = 0, False
        for name in ("CUDAGraph", "Stream", "stream", "current_stream", "set_stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    class Stream:
        def wait_stream(self, other):
            pass

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def current_stream(self):
        return self.current

    def set_stream(self, stream):
        self.current = stream

    @contextlib.contextmanager
    def graph(self, graph):
        self.captures += 1
        self.capturing = True
        before, self.current = self.current, self.Stream()
        graph.replay = lambda: None
        try:
            yield
        finally:
            self.capturing = False
        self.current = before  # not after an error

    def reads(self):
        """Return a call that reads a value, or does what a capture does not allow."""

        def call():
            if self.capturing:
                raise RuntimeError(f"{self.WHY}\nand more")
            return (torch.ones(1),)

        return call
