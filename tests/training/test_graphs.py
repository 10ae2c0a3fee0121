"""Calls that become CUDA graphs: when they are captured, where, into which memory, and what cannot be."""

import pytest
import torch
from fake_cuda import FakeCuda

from fastmask.training.graphs import GraphedCalls


@pytest.fixture
def cuda(monkeypatch):
    return FakeCuda().install(monkeypatch)


class Counter:
    """A call that adds one to a number, and notes when Python runs it."""

    def __init__(self):
        self.number, self.runs = torch.zeros(()), 0

    def __call__(self):
        self.runs += 1
        self.number.add_(1)


def test_the_second_call_is_captured_and_the_next_ones_replayed(cuda):
    calls, count = GraphedCalls(torch.device("cuda", 0)), Counter()
    for _ in range(5):
        calls.run("key", count)
    assert count.number == 5
    assert count.runs == 2
    assert len(cuda.captures) == 1


def test_a_pool_is_not_named_again_after_its_last_graph_is_gone(cuda):
    calls = GraphedCalls(torch.device("cuda", 0))
    for _ in range(3):
        for key, count in (("a", Counter()), ("b", Counter())):
            for _ in range(3):
                calls.run(key, count)
        calls.clear()
    pools = [pool for pool, _ in cuda.captures]
    assert [len(set(pools[i : i + 2])) for i in (0, 2, 4)] == [1, 1, 1]
    assert len(set(pools)) == 3


def test_a_capture_is_of_the_device_that_the_tensors_are_on(cuda):
    """A capture of another one records nothing, so that replays would train nothing."""
    calls, count = GraphedCalls(torch.device("cuda", 1)), Counter()
    for _ in range(2):
        calls.run("key", count)
    assert [device for _, device in cuda.captures] == [1]
    assert cuda.current == 0


def test_nothing_is_given_back_where_nothing_was_captured(cuda):
    calls = GraphedCalls(torch.device("cuda", 0))
    calls.run("key", Counter())
    calls.clear()
    assert not cuda.emptied


def test_what_waits_for_the_gpu_cannot_be_captured(cuda):
    calls, number = GraphedCalls(torch.device("cuda", 0)), torch.ones(())
    calls.run("key", number.item)
    with pytest.raises(ValueError, match=r"cannot be captured as a CUDA graph \(operation not permitted.*--cuda-graph"):
        calls.run("key", number.item)


def test_too_little_memory_is_not_blamed_on_the_graph(cuda):
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory")

    calls = GraphedCalls(torch.device("cuda", 0))
    calls.run("key", lambda: None)
    with pytest.raises(torch.OutOfMemoryError):
        calls.run("key", full)
