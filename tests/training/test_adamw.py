"""AdamWEMA: AdamW and then the averages, in one step."""

import copy

import pytest
import torch
from torch import nn

from fastmask.training.adamw import AdamWEMA
from fastmask.training.ema import EMA, PowerEMA
from fastmask.training.optim import begin_step, clip_gradients

HYPER = {"lr": 0.03, "betas": (0.8, 0.9), "weight_decay": 0.1}
IMPLS = pytest.mark.parametrize("impl", ["fused", "reference"])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.used = nn.ParameterList(torch.randn(shape, generator=generator) for shape in ((3, 5), (), (8,)))
        self.at_times = nn.Parameter(torch.randn(4, generator=generator))
        self.never = nn.Parameter(torch.randn(2, generator=generator))


def backward(net, step):
    """Give a step's gradients, the same for every network; one parameter has none in odd steps."""
    generator = torch.Generator().manual_seed(step)
    net.zero_grad()
    for p in [*net.used, net.at_times][: 4 - step % 2]:
        p.grad = torch.randn(p.shape, generator=generator)


def ours(net, decays=(0.9, 0.5), **options):
    emas = [EMA(net, decay) for decay in decays]
    averages = [(ema.decay, ema.weights.values()) for ema in emas]
    return AdamWEMA(net.parameters(), **HYPER, averages=averages, **options), emas


def values(net, optimizer, emas=()):
    """Return copies of all there is, by name."""
    found = dict(net.named_parameters())
    found |= {f"{k}/{name}": t for k, ema in enumerate(emas) for name, t in ema.weights.items()}
    found |= {f"{name}/{key}": t for name, p in net.named_parameters() for key, t in optimizer.state.get(p, {}).items()}
    return {name: t.detach().clone() for name, t in found.items()}


def assert_close(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name], msg=lambda said, name=name: f"{name}: {said}")


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert torch.equal(tensor, expected[name]), name


@IMPLS
def test_it_is_adamw_and_then_the_averages(impl):
    mine, theirs = Net(), Net()
    optimizer, emas = ours(mine, impl=impl)
    adamw, expected = torch.optim.AdamW(theirs.parameters(), **HYPER), [EMA(theirs, 0.9), EMA(theirs, 0.5)]
    for step in range(6):
        for net, stepped in ((mine, optimizer), (theirs, adamw)):
            backward(net, step)
            stepped.param_groups[0]["lr"] = 0.03 / (step + 1)
            stepped.step()
        for ema in expected:
            ema.update(theirs)
    assert float(optimizer.state[mine.at_times]["step"]) == 3
    assert mine.never not in optimizer.state
    assert_close(values(mine, optimizer, emas), values(theirs, adamw, expected))


def test_groups_and_a_rate_on_the_device():
    mine, theirs = Net(), Net()
    rates = {0: 0.5, 1: 0.25}

    def groups(net, rate):
        return [{"params": list(net.used), "lr": rate(0)}, {"params": [net.at_times], "lr": rate(1), "eps": 0.1}]

    optimizer = AdamWEMA(groups(mine, lambda i: torch.tensor(rates[i])), impl="reference")
    adamw = torch.optim.AdamW(groups(theirs, rates.get))
    for net, stepped in ((mine, optimizer), (theirs, adamw)):
        backward(net, 0)
        stepped.step()
    assert_close(values(mine, optimizer), values(theirs, adamw))


def with_a_profile(net):
    ema = PowerEMA(net, 0.1)
    averages = [(ema.decay, ema.weights.values())]
    return AdamWEMA(net.parameters(), lr=torch.tensor(1.0, device=net.never.device), averages=averages), [ema]


def test_what_changes_from_step_to_step_changes_in_place():
    optimizer, emas = with_a_profile(Net())
    lr, rates = optimizer.param_groups[0]["lr"], optimizer.rates
    begin_step(optimizer, emas, 0.25, step=3)
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr == 0.25
    assert optimizer.rates is rates
    assert rates.tolist() == pytest.approx([1 - emas[0].decay], rel=1e-7)
    with pytest.raises(ValueError, match="decays must have one value per average, 1, not 2"):
        optimizer.set_decays([0.9, 0.99])


@pytest.mark.gpu
def test_a_graph_takes_the_rates_of_each_replay():
    nets = [Net().cuda() for _ in range(2)]
    made = [with_a_profile(net) for net in nets]
    for net, (optimizer, emas) in zip(nets, made, strict=True):
        for p in net.used:
            p.grad = p.detach().sin()
        begin_step(optimizer, emas, 0.5, step=0)
        optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made[0][0].step()
    for step in (1, 2):
        for (optimizer, emas), run in zip(made, (graph.replay, made[1][0].step), strict=True):
            begin_step(optimizer, emas, 0.5 / step, step)
            run()
    captured, eager = (values(net, *both) for net, both in zip(nets, made, strict=True))
    assert_same(captured, eager)


def test_the_closure_is_called_with_gradients():
    net = Net()
    optimizer, _ = ours(net)

    def closure():
        loss = net.at_times.square().sum()
        loss.backward()
        return loss

    before = float(net.at_times.detach().square().sum())
    assert float(optimizer.step(closure).detach()) == before
    assert float(net.at_times.detach().square().sum()) < before


@pytest.mark.parametrize("fused", [False, True])
def test_states_interchange_with_torch(fused):
    """Either resumes from the other's state as from its own."""
    mine, theirs = Net(), Net()
    optimizer, _ = ours(mine)
    adamw = torch.optim.AdamW(theirs.parameters(), **HYPER, fused=fused)
    for net, stepped in ((mine, optimizer), (theirs, adamw)):
        for step in range(3):
            backward(net, step)
            stepped.step()
    a, b = copy.deepcopy(mine), copy.deepcopy(theirs)
    crossed, back = ours(b)[0], torch.optim.AdamW(a.parameters(), fused=fused)
    crossed.load_state_dict(copy.deepcopy(adamw.state_dict()))  # torch shares the tensors
    back.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert crossed.state_dict().keys() == back.state_dict().keys()
    assert crossed.state_dict()["param_groups"][0].keys() == adamw.state_dict()["param_groups"][0].keys()
    for net, stepped in ((mine, optimizer), (theirs, adamw), (a, back), (b, crossed)):
        backward(net, 4)
        stepped.step()
    assert_close(values(a, back), values(mine, optimizer))
    assert_close(values(b, crossed), values(theirs, adamw))


def test_a_state_that_it_cannot_resume():
    net = Net()
    state = torch.optim.AdamW(net.parameters(), amsgrad=True).state_dict()
    with pytest.raises(ValueError, match=r"with amsgrad or maximize cannot be continued here: use torch\.optim\.AdamW"):
        ours(net)[0].load_state_dict(state)


def test_averages_of_another_network():
    with pytest.raises(ValueError, match=r"averages\[0\] must have a tensor of the shape of each parameter"):
        AdamWEMA(Net().parameters(), averages=[(0.9, [torch.zeros(3, 5)])])


@IMPLS
def test_a_grad_scaler_unscales_and_skips(impl):
    scaled, plain = Net(), Net()
    optimizer, emas = ours(scaled, impl=impl)
    expected, averages = ours(plain, impl=impl)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(3):
        for net in (scaled, plain):
            backward(net, step)
        expected.step()
        scaler.scale(torch.zeros(()))
        for p in scaled.parameters():
            if p.grad is not None:
                p.grad *= 4
        scaler.step(optimizer)
        scaler.update()
    assert_same(values(scaled, optimizer, emas), values(plain, expected, averages))

    backward(scaled, 0)
    scaled.used[0].grad[1, 1] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2
    assert_same(values(scaled, optimizer, emas), values(plain, expected, averages))


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_clipping_without_touching_the_gradients(max_norm):
    mine, theirs = Net(), Net()
    optimizer, adamw = ours(mine)[0], torch.optim.AdamW(theirs.parameters(), **HYPER)
    for step in range(2):
        for net, stepped in ((mine, optimizer), (theirs, adamw)):
            backward(net, step)
            kept = [p.grad.clone() for p in net.used]
            clip_gradients(stepped, max_norm)
            assert all(torch.equal(p.grad, g) for p, g in zip(net.used, kept, strict=True)) is (
                net is mine or max_norm == 100
            )
            stepped.step()
    assert_close(values(mine, optimizer), values(theirs, adamw))


def test_a_clipping_holds_for_one_step():
    clipped, plain = Net(), Net()
    optimizer, expected = ours(clipped)[0], ours(plain)[0]
    backward(clipped, 0)
    clip_gradients(optimizer, 0.1)
    optimizer.zero_grad()
    optimizer.step()
    for net, stepped in ((clipped, optimizer), (plain, expected)):
        backward(net, 0)
        stepped.step()
    assert_same(values(clipped, optimizer), values(plain, expected))


@IMPLS
def test_the_last_groups_may_have_no_averages(impl):
    """They are updated as by AdamW, and the averages of the others as without them."""
    net, alone, beside = Net(), Net(), nn.Linear(3, 2)
    plain = copy.deepcopy(beside)
    emas, theirs = [EMA(net, 0.9)], [EMA(alone, 0.9)]
    groups = [{"params": list(net.parameters())}, {"params": list(beside.parameters())}]
    optimizer = AdamWEMA(groups, **HYPER, averages=[(0.9, emas[0].weights.values())], impl=impl)
    other = AdamWEMA(alone.parameters(), **HYPER, averages=[(0.9, theirs[0].weights.values())], impl=impl)
    reference = torch.optim.AdamW(plain.parameters(), **HYPER)
    for step in range(4):
        for one in (net, alone):
            backward(one, step)
        for p, q in zip(beside.parameters(), plain.parameters(), strict=True):
            p.grad = q.grad = None if step == 2 else torch.full_like(p, 0.5 + step)
        for each in (optimizer, other, reference):
            each.step()
    assert_same(values(net, optimizer, emas), values(alone, other, theirs))
    for p, q in zip(beside.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    few = list(emas[0].weights.values())[:-1]
    with pytest.raises(ValueError, match="a tensor for each parameter of a group, or for none of them"):
        AdamWEMA(groups, **HYPER, averages=[(0.9, few)])
