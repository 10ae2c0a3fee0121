"""The training step: no graph breaks, no recompiles, no waits, and tensors that stay where they are."""

import copy
import functools
import time
import weakref
from collections.abc import Iterator

import pytest
import torch
from fake_cuda import FakeCuda
from torch import Tensor
from torch._dynamo.utils import counters

from fastmask.data import batches, open_data
from fastmask.data.loader import Batch
from fastmask.diffusion import EDM, Denoiser, MaskedDenoising, Objective, training_draws
from fastmask.models.maskdit import MaskDiTConfig
from fastmask.ranks import Ranks
from fastmask.training.config import TrainConfig, build_model, build_step
from fastmask.training.ema import EMA, PowerEMA
from fastmask.training.optim import make_optimizer

SMALL = TrainConfig.of(
    data="synthetic",
    image_size=64,
    num_classes=5,
    network=MaskDiTConfig(width=16, depth=3, decoder_width=16),
    batch_size=16,
    max_steps=100,
    device="cpu",
    precision="fp32",
    compile="none",
    cuda_graphs="off",
    lr=1e-2,
    grad_clip=1.0,
    ema_widths=(0.1,),
)
gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


class Training:
    """A step, and what it moves."""

    def __init__(self, **changed):
        self.config = config = SMALL.replace(**changed)
        device = torch.device(config.machine.device)
        dataset = open_data(
            "synthetic", image_size=config.data.image_size, num_classes=config.data.num_classes, flip=False
        )
        torch.manual_seed(0)
        self.net = Denoiser(build_model(config, *dataset.shape[:2]), EDM()).to(device)
        self.emas = [EMA(self.net, config.ema.ema_decay), PowerEMA(self.net, 0.1)]
        self.optimizer = make_optimizer(self.net, config.optim, self.emas)
        self.step = build_step(config, self.net, dataset, self.optimizer, self.emas, Ranks())
        self.data: Iterator[Batch] = batches(
            dataset, batch_size=config.micro_batch, seed=0, start=0, stop=10**6, num_workers=0, device=device
        )
        self.done = 0

    def __call__(self, keep: int = 8) -> None:
        self.step(self.data, self.done * self.config.batch_size, keep, 1e-2, self.done)
        self.step.finish()
        self.done += 1

    def roll_back(self) -> None:
        """Load a state as a rollback does: other tensors for the moments, and weights in their places."""
        self.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        self.step.reset()

    def values(self) -> list[Tensor]:
        return [p.detach().cpu() for p in self.net.parameters()] + [t.cpu() for t in self.emas[1].weights.values()]


@pytest.fixture
def traced(monkeypatch):
    """torch.compile with Dynamo and autograd's tracing, but without a code generator, which takes minutes."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("what", "graphs", "more"), [("whole", 1, 1), ("block", 4, 2)])
def test_a_stage_is_traced_once_and_whole(traced, what, graphs, more):
    """Blocks of one width share a graph, but for the first, before which no branch is left to add.

    Another number of kept patches makes new ones, another step none.
    """
    training = Training(compile=what, micro_batch_size=8)
    for _ in range(3):
        training()
    assert counters["stats"]["unique_graphs"] == graphs
    for _ in range(2):
        training(keep=4)
    # The decoder sees all patches in either stage.
    assert counters["stats"]["unique_graphs"] == graphs + more
    for keep in (8, 4, 8):
        training(keep)
    assert counters["stats"]["unique_graphs"] == graphs + more
    assert not counters["graph_break"]


def test_a_graph_break_is_an_error(traced, monkeypatch):
    def look(q, k, v, **_):
        return q if q.sum().item() < 0 else v  # the host waits for a value

    monkeypatch.setattr("fastmask.models.layers.attention", look)
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        Training(compile="whole")()


@pytest.mark.parametrize("what", ["whole", "block"])
def test_compiled_steps_learn_the_same(traced, what):
    few = MaskDiTConfig(width=16, depth=2, decoder_width=16, decoder_depth=1)  # tracing takes as long as they are many
    eager, compiled = Training(network=few), Training(compile=what, network=few)
    for keep in (8, 8, 4, 16):
        eager(keep)
        compiled(keep)
    for a, b in zip(eager.values(), compiled.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_blocks_computed_again_learn_the_same():
    plain, again = Training(), Training(activation_checkpointing="block")
    for keep in (8, 16):
        plain(keep)
        again(keep)
    for a, b in zip(plain.values(), again.values(), strict=True):
        assert torch.equal(a, b)


def test_what_a_graph_reads_and_writes_stays_where_it_is(monkeypatch):
    """Replayed graphs know addresses alone: batches, sample numbers, gradients, rates and sums must keep theirs."""
    training = Training(micro_batch_size=8, cuda_graphs="on")
    monkeypatch.setattr(training.step._graphs, "run", lambda key, call: call())

    def places():
        step, optimizer = training.step, training.optimizer
        tensors = [*step._buffers, step._offset, optimizer.rates, optimizer.param_groups[0]["lr"]]
        tensors += [t for p in training.net.parameters() for t in (p, p.grad, *optimizer.state[p].values())]
        tensors += [t for ema in training.emas for t in ema.weights.values()]
        tensors += [t for t in vars(step.tally).values() if isinstance(t, Tensor)]
        return [t.data_ptr() for t in tensors]

    training()
    first = places()
    for _ in range(3):
        training()
    assert places() == first


def test_the_mask_token_rests_in_unmasked_steps():
    training = Training()
    training(keep=8)
    token = training.net.model.mask_token
    before = token.detach().clone()
    training(keep=16)
    assert torch.equal(token, before)
    training(keep=8)
    assert not torch.equal(token, before)


def losses_in_float64(steps: int) -> list[float]:
    """Train on the same samples, noise and masks with float64 weights, plain ops and PyTorch's AdamW."""
    training, config, losses = Training(), SMALL, []
    net = training.net.double()
    net.model.impl = "reference"
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=1e-2, betas=config.optim.betas, weight_decay=config.optim.weight_decay
    )
    objective = Objective(net, [MaskedDenoising(config.objective.mae_coef)])
    for step in range(steps):
        images, labels = next(training.data)
        draws = training_draws(
            EDM(), images, labels, length=16, keep=8, drop=net.model.drop,
            label_drop=config.objective.label_drop, seed=config.seed, offset=step * config.batch_size,
        )  # fmt: skip
        doubles = draws._replace(t=draws.t.double(), noise=draws.noise.double())
        loss = objective(images.double(), *doubles)["loss"].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), config.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", 1e-4), ("bf16", 0.01)])
def test_a_few_steps_stay_near_float64(precision, allowed):
    """The losses of bf16 autocast over fp32 weights follow those of float64 within the rounding of the products."""
    training = Training(precision=precision)
    losses = []
    for _ in range(4):
        training()
        losses.append(training.step.tally.take(Ranks())["loss"])
    assert losses == pytest.approx(losses_in_float64(4), rel=allowed)
    assert all(p.dtype == torch.float32 for p in training.net.parameters())


def test_waiting_for_data_is_counted():
    training = Training()
    read = training.data

    def slowly():
        for batch in read:
            time.sleep(0.05)
            yield batch

    training.data = slowly()
    training()
    training()
    assert 0.1 <= training.step.data_wait_s < 1


def check_graphs_learn_the_same_bits(device, micro, optimizer):
    """Through stages of fewer patches and of all of them, and after a rollback to a state that was stored."""
    options = {"device": device, "micro_batch_size": micro, "optimizer": optimizer}
    eager, replayed = (Training(**options, cuda_graphs=on) for on in ("off", "on"))
    for keep in (8, 8, 8, 8, 4, 4, 4, 16, 16, 16, 8, 8, 8):
        eager(keep)
        replayed(keep)
    assert eager.step.tally.take(Ranks()) == replayed.step.tally.take(Ranks())
    for training in (eager, replayed):
        training.roll_back()
        for _ in range(3):
            training(8)
    for a, b in zip(eager.values(), replayed.values(), strict=True):
        assert torch.equal(a, b)


OPTIMIZERS = pytest.mark.parametrize("optimizer", ["auto", "muon"])


@OPTIMIZERS
@pytest.mark.parametrize("micro", [0, 8])
def test_replayed_steps_learn_the_same_bits(monkeypatch, micro, optimizer):
    """On a CPU, where the operations of a graph are recorded and done again."""
    cuda = FakeCuda().install(monkeypatch)
    check_graphs_learn_the_same_bits("cpu", micro, optimizer)
    assert cuda.captures


def test_a_stage_gives_its_memory_back_before_the_next(monkeypatch):
    """Else the first step of the next, which is no graph yet, would need the memory of two."""
    cuda = FakeCuda().install(monkeypatch)
    training = Training(cuda_graphs="on")
    for _ in range(3):
        training(8)
    gradients = training.step.gradients
    graphs = [weakref.ref(graph) for graph in training.step._graphs._graphs.values()]
    assert len(graphs) == 2
    assert not cuda.emptied

    def look(*arguments):
        gradients(*arguments)
        assert cuda.emptied == 1
        assert all(graph() is None for graph in graphs)

    training.step.gradients = look
    training(4)


@gpu
@needs_gpu
@OPTIMIZERS
@pytest.mark.parametrize("micro", [0, 8])
def test_graphs_learn_the_same_bits(micro, optimizer):
    check_graphs_learn_the_same_bits("cuda", micro, optimizer)


@gpu
@needs_gpu
@OPTIMIZERS
def test_no_step_waits_for_the_gpu(optimizer):
    training = Training(device="cuda", cuda_graphs="on", optimizer=optimizer)
    for _ in range(3):
        training()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            training()
    finally:
        torch.cuda.set_sync_debug_mode("default")
