"""The machine of a run: what is resolved, and what cannot be had."""

import pytest
import torch

from fastmask.ranks import Ranks
from fastmask.training.machine import MachineConfig

CPU = MachineConfig(device="cpu")


def test_what_is_left_open_is_resolved_on_a_cpu():
    resolved = CPU.resolved(torch.device("cpu"), Ranks(), 32)
    assert resolved == MachineConfig(
        device="cpu", precision="fp32", compile="none", cuda_graphs="off", micro_batch_size=32
    )
    assert resolved.resolved(torch.device("cpu"), Ranks(), 32) == resolved


def test_what_is_given_stays():
    given = MachineConfig(device="cpu", precision="bf16", compile="block", micro_batch_size=4)
    resolved = given.resolved(torch.device("cpu"), Ranks(), 32)
    assert (resolved.precision, resolved.compile, resolved.micro_batch_size) == ("bf16", "block", 4)


def test_the_share_of_a_process():
    assert CPU.resolved(torch.device("cpu"), Ranks(1, 4), 32).micro_batch_size == 8
    with pytest.raises(ValueError, match="batch_size 30 does not divide among 4 processes"):
        CPU.resolved(torch.device("cpu"), Ranks(1, 4), 30)
    machine = MachineConfig(device="cpu", micro_batch_size=3)
    with pytest.raises(ValueError, match="a process's share of 8 images does not divide into parts of micro_batch_siz"):
        machine.resolved(torch.device("cpu"), Ranks(1, 4), 32)


@pytest.mark.parametrize(
    ("given", "ranks", "message"),
    [
        ({"compile": "whole", "parallel": "fsdp2"}, Ranks(0, 2), "--compile whole cannot hold the gathering"),
        ({"compile": "whole", "activation_checkpointing": "block"}, Ranks(), "recomputes compiled blocks"),
        ({"cuda_graphs": "on"}, Ranks(), "--cuda-graphs on works on one GPU, not on 1 x cpu"),
    ],
)
def test_what_cannot_be_had(given, ranks, message):
    with pytest.raises(ValueError, match=message):
        MachineConfig(**{"device": "cpu", **given}).resolved(torch.device("cpu"), ranks, 32)


def test_micro_batches():
    assert MachineConfig(micro_batch_size=128).micro_batch(8) == 8
    assert MachineConfig(micro_batch_size=2).micro_batch(8) == 2
    assert MachineConfig().micro_batch(8) == 8
    MachineConfig(micro_batch_size=4).check(8)
    with pytest.raises(ValueError, match="batch_size 8 does not divide into parts of micro_batch_size 3"):
        MachineConfig(micro_batch_size=3).check(8)
    with pytest.raises(ValueError, match="micro_batch_size must be at least 0, not -1"):
        MachineConfig(micro_batch_size=-1).check(8)
