import pytest
import torch
from fake_cuda import FakeCuda

from fastmask.ranks import Ranks, own_device
from fastmask.train import resolve_machine
from fastmask.training.config import TrainConfig


def test_a_rank_has_a_gpu_of_its_own_unless_one_is_named(monkeypatch):
    rank = Ranks(rank=5, count=8, local=1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="process 1 of this machine sees 1 GPUs: start as many processes as there"):
        own_device(torch.device("cuda"), rank)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert own_device(torch.device("cuda"), rank) == torch.device("cuda", 1)
    assert own_device(torch.device("cuda", 0), rank) == torch.device("cuda", 0)
    assert own_device(torch.device("cpu"), rank) == torch.device("cpu")
    assert current == [torch.device("cuda", 1), torch.device("cuda", 0)]


@pytest.mark.parametrize("ranks", [Ranks(), Ranks(rank=1, count=2, local=1)], ids=["alone", "of two"])
def test_the_gpu_of_a_run_is_the_current_one(monkeypatch, ranks):
    """Also of a single process: CUDA graphs record what runs on the current device alone."""
    cuda = FakeCuda().install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    config = resolve_machine(TrainConfig.of(device="cuda:2", optimizer="torch"), ranks)
    assert config.machine.device == "cuda:2"
    assert cuda.current == 2


def test_ranks_of_a_broken_environment(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ValueError, match="must be numbers"):
        Ranks.from_environment()
