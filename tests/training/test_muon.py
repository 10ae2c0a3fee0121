"""Muon beside AdamW: the formula in float64, which parameter goes where, and runs that resume or are split."""

import copy
import math
import re
import shutil

import pytest
import torch
import torch.distributed as dist
from test_adamw import assert_same, values
from test_parallel import FLAGS, assert_alike, train_on_two
from test_train import assert_same_run, stats, weights
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from util import run_ranks, small_net

from fastmask.testing import norm_error_over_bound
from fastmask.train import main
from fastmask.training.checkpoint import checkpoints
from fastmask.training.ema import EMA
from fastmask.training.monitor import update_ratio
from fastmask.training.muon import MuonAdamW, orthogonalized
from fastmask.training.optim import OptimConfig, clip_gradients, make_optimizer

HYPER = {"lr": 0.03, "betas": (0.8, 0.9), "weight_decay": 0.1}
SHAPES = [(6, 4), (4, 9), (5, 5), (1, 7)]
A, B, C = 3.4445, -4.7750, 2.0315
# Roundings from a matrix to its orthogonal one: a norm, a division, and three matmuls in each of five iterations. The
# slope at 0 multiplies the error of small singular values by A in each, and the start has the norm 1.
STEPS, SLOPE = 17, A**5


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.matrices = nn.ParameterList(torch.randn(shape, generator=generator) for shape in SHAPES)
        self.others = nn.ParameterList(torch.randn(shape, generator=generator) for shape in ((3, 5), (), (8,)))


def backward(net, step):
    """Give a step's gradients, the same for every network."""
    generator = torch.Generator().manual_seed(step)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def ours(net, decays=(0.9, 0.5), **options):
    emas = [EMA(net, decay) for decay in decays]
    averages = [(ema.decay, ema.weights.values()) for ema in emas]
    return MuonAdamW(net.matrices, net.others, **{**HYPER, **options}, averages=averages), emas


def by_singular_values(matrix):
    """Return what the iterations lead to, from the singular values, which alone they change."""
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = A * s + B * s**3 + C * s**5
    return u @ s.diag() @ vt


@pytest.mark.parametrize("shape", [*SHAPES, (48, 16), (16, 48)])
def test_an_orthogonal_matrix_of_the_same_singular_vectors(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 1e-3
    exact = by_singular_values(matrix)
    assert norm_error_over_bound(orthogonalized(matrix, torch.float32), exact, STEPS, least=SLOPE) <= 1
    assert orthogonalized(torch.zeros(shape), torch.float32).count_nonzero() == 0


class Formula:
    """Muon in float64, written from the formula alone.

    Attributes:
        p: the matrices.
        update: the last update of each, without weight decay.
        moved: the sum of the factors of the orthogonal matrices, for each matrix.
    """

    def __init__(self, matrices):
        self.p = [p.detach().double() for p in matrices]
        self.momentum, self.update = ([torch.zeros_like(p) for p in self.p] for _ in range(2))
        self.moved = [0.0] * len(self.p)

    def step(self, grads, lr, decay):
        for i, (p, grad) in enumerate(zip(self.p, grads, strict=True)):
            g = grad.double()
            self.momentum[i] = 0.95 * self.momentum[i] + 0.05 * g
            x = 0.95 * self.momentum[i] + 0.05 * g
            x = x / x.norm()
            for _ in range(5):
                gram = x @ x.T
                x = A * x + (B * gram + C * gram @ gram) @ x
            scale = lr * 0.2 * math.sqrt(max(p.shape))
            self.moved[i] += scale
            self.update[i] = scale * x
            self.p[i] = p - lr * decay * p - self.update[i]


@pytest.mark.parametrize("clip", [False, True])
def test_several_steps_of_the_formula(clip):
    """The matrices by Muon, the others by torch's AdamW, and averages of both, at changing rates."""
    mine, theirs = Net(), Net()
    optimizer, emas = ours(mine)
    adamw, expected = torch.optim.AdamW(theirs.others, **HYPER), Formula(theirs.matrices)
    averages = [EMA(mine, decay) for decay in (0.9, 0.5)]
    for step in range(6):
        lr = 0.03 / (step + 1)
        for net in (mine, theirs):
            backward(net, step)
        if clip:
            clip_gradients(optimizer, 0.5)
            nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        for group in (*optimizer.param_groups, *adamw.param_groups):
            group["lr"] = lr
        optimizer.step()
        adamw.step()
        expected.step([p.grad for p in theirs.matrices], lr, HYPER["weight_decay"])
        for average in averages:
            average.update(mine)
    for p, exact, moved in zip(mine.matrices, expected.p, expected.moved, strict=True):
        assert norm_error_over_bound(p.detach(), exact, 6 * STEPS, least=SLOPE * moved) <= 1
    norm = torch.cat([update.flatten() for update in expected.update]).norm()
    assert float(optimizer.update_norm) == pytest.approx(float(norm), rel=1e-3)  # SLOPE roundings are 1e-4
    for p, q in zip(mine.others, theirs.others, strict=True):
        torch.testing.assert_close(p, q)
    for ema, average in zip(emas, averages, strict=True):
        for name, tensor in ema.weights.items():
            torch.testing.assert_close(tensor, average.weights[name])


def test_bf16_is_torchs_muon():
    """With the same roundings; torch's knows no other dtype."""
    mine, theirs = small_net(), small_net()
    config = OptimConfig(lr=0.03, weight_decay=0.1, optimizer="muon")
    optimizer = make_optimizer(mine, config, precision="bf16")
    names = [name for name, p in mine.named_parameters() if p in set(optimizer.param_groups[0]["params"])]
    muon = torch.optim.Muon(
        [dict(theirs.named_parameters())[name] for name in names],
        lr=0.03, weight_decay=0.1, adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    for step in range(3):
        for net, stepped in ((mine, optimizer), (theirs, muon)):
            backward(net, step)
            stepped.step()
    for name in names:
        torch.testing.assert_close(*(dict(net.named_parameters())[name] for net in (mine, theirs)))


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}])
def test_muon_takes_the_matrices_of_the_blocks(options):
    net = small_net(**options)
    optimizer = make_optimizer(net, OptimConfig(optimizer="muon"))
    names = {p: name for name, p in net.named_parameters()}
    muon, adamw = ([names.pop(p) for p in group["params"]] for group in optimizer.param_groups)
    assert not names
    layers = r"(attn\.(qkv|proj)|mlp\.(fc1|fc2)|adaLN_modulation\.1)\.weight"
    assert all(re.fullmatch(rf"model\.(decoder_)?blocks\.\d+\.{layers}", name) for name in muon)
    assert len(muon) == 5 * 4  # blocks
    for part in ("embedder", "mask_token", "final_layer", "decoder_layer", "bias", "_norm"):
        assert any(part in name for name in adamw) or (part == "_norm" and not options), part
        assert not any(part in name for name in muon)


def test_a_vector_is_no_matrix():
    with pytest.raises(ValueError, match=r"Muon updates matrices, not a parameter of shape \(8,\): give it to AdamW"):
        MuonAdamW([torch.zeros(8)], [])


def test_a_grad_scaler_unscales_and_skips():
    scaled, plain = Net(), Net()
    (optimizer, emas), (expected, averages) = ours(scaled), ours(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(3):
        for net in (scaled, plain):
            backward(net, step)
        expected.step()
        scaler.scale(torch.zeros(()))
        for p in scaled.parameters():
            p.grad *= 4
        scaler.step(optimizer)
        scaler.update()
    assert_same(values(scaled, optimizer, emas), values(plain, expected, averages))
    backward(scaled, 0)
    scaled.others[0].grad[1, 1] = torch.inf
    scaled.matrices[0].grad[1, 1] = torch.nan
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2
    assert_same(values(scaled, optimizer, emas), values(plain, expected, averages))
    assert torch.equal(optimizer.update_norm, expected.update_norm)


def test_a_state_resumes_in_the_same_bits():
    one, two = Net(), Net()
    (first, _), (second, _) = ours(one), ours(two, lr=0.5)
    backward(one, 0)
    first.step()
    two.load_state_dict(one.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for net, optimizer in ((one, first), (two, second)):
        backward(net, 1)
        optimizer.step()
    assert_same(values(two, second), values(one, first))
    assert float(second.state[two.matrices[0]]["step"]) == 2


def test_the_reported_norm_is_that_of_the_update():
    net = small_net()
    optimizer = make_optimizer(net, OptimConfig(lr=1e-2, optimizer="muon"))
    for step in range(3):
        last = torch.cat([p.detach().flatten() for p in net.parameters()])
        backward(net, step)
        optimizer.step()
    after = torch.cat([p.detach().flatten() for p in net.parameters()])
    assert update_ratio(net, optimizer) == pytest.approx(((after - last).norm() / after.norm()).item(), rel=1e-3)


def trained(net, inputs):
    """Return the parameters, averages and momenta after a clipped step on each of ``inputs``."""
    parameters = list(net.parameters())
    matrices, others = ([p for p in parameters if (p.ndim == 2) is wanted] for wanted in (True, False))
    ema = EMA(net, 0.9)
    averages = [
        (ema.decay, [ema.weights[name] for kind in (2, 1) for name, p in net.named_parameters() if p.ndim == kind])
    ]
    optimizer = MuonAdamW(matrices, others, **HYPER, averages=averages)
    for x in inputs:
        optimizer.zero_grad()
        net(x).square().mean().backward()
        clip_gradients(optimizer, 0.5)
        optimizer.step()
    momenta = [optimizer.state[p]["momentum_buffer"] for p in matrices]
    return [*parameters, *ema.weights.values(), *momenta], optimizer


def compare(rank, rendezvous):
    """Train three matrices in this process of two, and hold what all have to what one process gets."""
    torch.set_num_threads(1)

    def network():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))

    inputs = torch.randn(4, 8, 6, generator=torch.Generator().manual_seed(4))
    expected, alone = trained(network(), inputs)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    net = network()
    fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    found, optimizer = trained(net, inputs.chunk(2, dim=1)[rank])
    assert [tuple(p.to_local().shape) for p in net[4].parameters()] == [(1 - rank, 4), (1 - rank,)]
    moved = len(inputs) * HYPER["lr"] * 0.2 * math.sqrt(6)
    for sharded, whole in zip(found, expected, strict=True):
        assert norm_error_over_bound(sharded.full_tensor(), whole, len(inputs) * STEPS, least=SLOPE * moved) <= 1
    assert float(optimizer.update_norm) == pytest.approx(float(alone.update_norm), rel=1e-3)
    dist.destroy_process_group()


def test_two_processes_share_an_odd_number_of_matrices(tmp_path):
    """Of the last the second process holds nothing, and orthogonalizes none."""
    run_ranks(compare, tmp_path / "rendezvous", processes=2)


MUON = [*FLAGS, "--optimizer", "muon", "--weight-decay", "0.1"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run in one process that the others are compared with."""
    folder = tmp_path_factory.mktemp("alone")
    main(["--run-dir", str(folder), *MUON])
    return folder


def resumed_from(run_dir, copied, number):
    """Copy a run as it was at its n-th checkpoint."""
    shutil.copytree(run_dir, copied)
    for later in checkpoints(copied)[number:]:
        shutil.rmtree(later)


def test_a_resumed_run_has_the_same_bits(alone, tmp_path):
    resumed_from(alone, tmp_path / "resumed", 1)
    main(["--run-dir", str(tmp_path / "resumed"), *MUON])
    assert_same_run(alone, tmp_path / "resumed")
    stored = weights(alone, "optimizer")
    assert "model.blocks.0.mlp.fc1.weight/momentum_buffer" in stored
    assert not any(key.startswith("model.blocks.0.mlp.fc1.weight/exp_avg") for key in stored)
    assert "model.blocks.0.mlp.fc1.bias/exp_avg_sq" in stored


def test_a_run_keeps_its_kind_of_optimizer(alone):
    with pytest.raises(ValueError, match=r"optimizer muon -> torch \(AdamW and Muon keep another state in the check"):
        main(["--run-dir", str(alone), *MUON, "--optimizer", "torch"])


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_processes_train_as_one_and_resume_in_the_same_bits(alone, tmp_path, parallel):
    """The blocks have ten matrices, so each process orthogonalizes five."""
    train_on_two(tmp_path / "two", *MUON[len(FLAGS) :], "--parallel", parallel)
    assert_alike(tmp_path / "two", alone)
    resumed_from(tmp_path / "two", tmp_path / "resumed", 2)
    train_on_two(tmp_path / "resumed", *MUON[len(FLAGS) :], "--parallel", parallel)
    assert_same_run(tmp_path / "two", tmp_path / "resumed")


def test_the_digits_train(tmp_path):
    flags = ["--preset", "digits", "--optimizer", "muon", "--device", "cpu", "--sample-every", "0"]
    main(["--run-dir", str(tmp_path), *flags, "--max-steps", "60", "--unmask-steps", "0", "--report-every", "10"])
    losses = [line["loss"] for line in stats(tmp_path)]
    assert losses[0] > 1.4
    assert losses[-1] < 0.85 * losses[0]
