"""The choice among optimizers, and the learning rate."""

import sys
import types

import pytest
import torch
from test_adamw import Net, assert_close, backward, values

from fastmask.kernels._dispatch import Backend
from fastmask.training.adamw import AdamWEMA
from fastmask.training.ema import EMA
from fastmask.training.optim import OptimConfig, learning_rate, make_optimizer, resolve_optimizer

CPU = torch.device("cpu")


def config_of(optimizer):
    return OptimConfig(lr=0.03, betas=(0.8, 0.9), weight_decay=0.1, optimizer=optimizer)


def test_every_optimizer_moves_the_average():
    found = {}
    for name in ("torch", "adamw_ema"):
        net = Net()
        ema = EMA(net, 0.9)
        optimizer = make_optimizer(net, config_of(name), [ema])
        for step in range(3):
            backward(net, step)
            optimizer.step()
        found[name] = values(net, optimizer, [ema])
    assert isinstance(optimizer, AdamWEMA)
    assert_close(found["adamw_ema"], found["torch"])


def test_auto_takes_ours_where_it_has_a_kernel_of_the_device(monkeypatch):
    for device, kernel, name in [
        ("cuda", "triton", "adamw_ema"),
        ("cuda", "none", "torch"),
        ("cpu", "native", "adamw_ema"),
        ("cpu", "triton", "torch"),  # interpreted
        ("cpu", "none", "torch"),
    ]:
        rows = [Backend("adamw_ema", device, kernel, "the reason")]
        monkeypatch.setattr("fastmask.training.optim.backends", lambda rows=rows: rows)
        assert resolve_optimizer("auto", torch.device(device)) == name
        assert resolve_optimizer("torch", torch.device(device)) == "torch"
    with pytest.raises(ValueError, match=r"adamw_ema has no kernel on cpu \(the reason\): take torch"):
        resolve_optimizer("adamw_ema", CPU)


class FusedAdam(torch.optim.Optimizer):
    """What is relied on of apex: a count of steps per group, moments beside the parameters."""

    def __init__(self, params, lr, betas, weight_decay):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if p.grad is not None:
                    if not self.state[p]:
                        self.state[p]["exp_avg"] = torch.zeros_like(p)
                    self.state[p]["exp_avg"].lerp_(p.grad, 0.1)


def test_apex_keeps_its_count_where_checkpoints_look(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", types.ModuleType("apex.optimizers"))
    sys.modules["apex.optimizers"].FusedAdam = FusedAdam
    with pytest.raises(ValueError, match="--optimizer apex runs on a GPU, not on cpu: take torch"):
        make_optimizer(Net(), config_of("apex"))
    monkeypatch.setattr("fastmask.training.optim.resolve_optimizer", lambda *_: "apex")
    net = Net()
    ema = EMA(net, 0.9)
    optimizer = make_optimizer(net, config_of("apex"), [ema])
    for step in range(2):
        backward(net, step)
        optimizer.step()
    assert float(optimizer.state[net.used[0]]["step"]) == 2
    again = make_optimizer(net, config_of("apex"))
    for p, state in optimizer.state.items():
        again.state[p] = dict(state)
    backward(net, 2)
    again.step()
    assert again.param_groups[0]["step"] == 3
    assert float(again.state[net.at_times]["step"]) == 3


def test_apex_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(ValueError, match=r"apex needs NVIDIA's apex: build github\.com/NVIDIA/apex with its CUDA ext"):
        resolve_optimizer("apex", torch.device("cuda"))


def test_learning_rate_rises_then_stays_then_drops_for_the_unmasked_stage():
    config = OptimConfig(lr=1.0, warmup_steps=4, unmask_lr=0.1)
    rates = [learning_rate(config, step, masked_steps=7) for step in range(10)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 0.1, 0.1, 0.1])


def test_no_warmup_starts_at_the_full_rate():
    assert learning_rate(OptimConfig(lr=0.3), 0, masked_steps=1000) == 0.3
