"""AdamWEMA on parameters that two processes share, against one process that holds them all."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from util import run_ranks

from fastmask.training.adamw import AdamWEMA
from fastmask.training.ema import EMA
from fastmask.training.optim import clip_gradients

PROCESSES, DECAYS = 2, (0.9, 0.5)
HYPER = {"lr": 0.03, "betas": (0.8, 0.9), "weight_decay": 0.1}


def network():
    """Return a network of whose last bias the second process holds nothing, and with a parameter that is at rest."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))
    net[0].bias.requires_grad_(False)
    return net


def with_optimizer(net):
    emas = [EMA(net, decay) for decay in DECAYS]
    averages = [(ema.decay, ema.weights.values()) for ema in emas]
    return AdamWEMA(net.parameters(), **HYPER, averages=averages, impl="fused"), emas


def trained(net, inputs):
    """Return the parameters, averages and moments after a clipped step on each of ``inputs``, and the optimizer."""
    optimizer, emas = with_optimizer(net)
    for x in inputs:
        optimizer.zero_grad()
        net(x).square().mean().backward()
        clip_gradients(optimizer, 0.5)
        optimizer.step()
    moments = [
        optimizer.state[p][name] for p in net.parameters() if p.requires_grad for name in ("exp_avg", "exp_avg_sq")
    ]
    return [*net.parameters(), *(t for ema in emas for t in ema.weights.values()), *moments], optimizer


def compare(rank, rendezvous):
    """Train in this process of two, and hold what all have to what one process gets."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=PROCESSES)
    inputs = torch.randn(4, 8, 6, generator=torch.Generator().manual_seed(4))
    expected, _ = trained(network(), inputs)
    net = network()
    fully_shard(net, mesh=init_device_mesh("cpu", (PROCESSES,)))
    found, optimizer = trained(net, inputs.chunk(PROCESSES, dim=1)[rank])
    assert [tuple(t.to_local().shape) for t in net[2].parameters()] == [(1 - rank, 5), (1 - rank,)]
    for sharded, whole in zip(found, expected, strict=True):
        torch.testing.assert_close(sharded.full_tensor(), whole, rtol=1e-5, atol=1e-6)
    adamw = torch.optim.AdamW(net.parameters(), fused=True)
    adamw.load_state_dict(optimizer.state_dict())
    adamw.step()
    assert float(adamw.state[net[2].weight]["step"]) == len(inputs) + 1
    dist.destroy_process_group()


def test_two_processes_do_the_step_of_one(tmp_path):
    run_ranks(compare, tmp_path / "rendezvous", processes=PROCESSES)
