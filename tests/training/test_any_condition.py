"""A condition that nothing but its dataset and its network knows, through the trainer and the sampler."""

import functools
import socket

import pytest
import torch
from captions import Captioned, TextDiTConfig
from fake_cuda import FakeCuda
from safetensors.torch import load_file
from test_train import stats
from util import run_ranks

from fastmask.data import batches, sample_ids
from fastmask.diffusion import Denoiser, Sampling, draw_samples, training_draws
from fastmask.models.condition import joined, part_of
from fastmask.ranks import Ranks, process_group
from fastmask.testing import assert_near, network_steps
from fastmask.train import resolve_machine, train
from fastmask.training.checkpoint import checkpoints
from fastmask.training.config import TrainConfig, build_model, build_step
from fastmask.training.ema import EMA
from fastmask.training.optim import make_optimizer

CPU = torch.device("cpu")
CONFIG = TrainConfig.of(
    network=TextDiTConfig(width=16, depth=1, num_heads=2, decoder_width=16, decoder_depth=1, decoder_num_heads=2),
    num_classes=0, batch_size=8, micro_batch_size=2, max_steps=6, unmask_steps=2, warmup_steps=0, lr=1e-2,
    grad_clip=1.0, label_drop=0.5, num_workers=2, report_every=1, checkpoint_every=3, sample_every=6, sample_steps=2,
    device="cpu", precision="fp32", compile="none",
)  # fmt: skip


def trained(folder, ranks=Ranks(), **changed):  # noqa: B008  (immutable)
    train(resolve_machine(CONFIG.replace(run_dir=str(folder), **changed), ranks), Captioned(), ranks)


def train_as(rank, folder, port):
    """Train as one of two processes."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            environment.setenv(name, str(value))
        torch.set_num_threads(1)
        ranks = Ranks.from_environment()
        with process_group(ranks, CPU):
            trained(folder, ranks)


def free_port():
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return made.getsockname()[1]


def weights(folder):
    return load_file(checkpoints(folder)[-1] / "model.safetensors")


def assert_same_condition(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    trained(folder)
    return folder


def test_a_run_trains_writes_and_draws(alone):
    assert [line["step"] for line in stats(alone)] == [1, 2, 3, 4, 5, 6]
    assert (alone / "samples" / "step-00000006.png").exists()
    torch.manual_seed(CONFIG.seed)
    fresh = build_model(CONFIG, 1, 8).token_embedder.weight
    assert not torch.equal(weights(alone)["model.token_embedder.weight"], fresh)


@pytest.mark.parametrize("ranks", [1, 2])
def test_other_parts_of_the_batch_learn_the_same(alone, tmp_path, ranks):
    """In one process without micro-batches or workers, and in two with them."""
    if ranks == 1:
        trained(tmp_path, micro_batch_size=0, num_workers=0)
    else:
        run_ranks(train_as, tmp_path, free_port(), processes=2)
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(weights(tmp_path)[name], tensor, rtol=1e-3, atol=2e-4)
    for ours, theirs in zip(stats(tmp_path), stats(alone), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-4)


class Training:
    """A step and its network, with what it has read."""

    def __init__(self, **changed):
        self.config = CONFIG.replace(**{"cuda_graphs": "off", **changed})
        torch.manual_seed(0)
        self.net = Denoiser(build_model(self.config, 1, 8), self.config.process)
        emas = [EMA(self.net, 0.9)]
        optimizer = make_optimizer(self.net, self.config.optim, emas)
        self.step = build_step(self.config, self.net, Captioned(), optimizer, emas, Ranks())
        self.data = batches(
            Captioned(), batch_size=self.config.micro_batch, seed=0, start=0, stop=10**6, num_workers=0, device=CPU
        )

    def __call__(self, steps):
        for step in range(steps):
            self.step(self.data, step * 8, 8, 1e-2, step)
            self.step.finish()
        return self.net.state_dict()


def test_the_network_reads_what_the_dataset_gave_it():
    """Half of the texts are dropped: those that are drawn by the samples' numbers, whatever the micro-batches."""
    training = Training()
    training(2)
    seen = joined(*training.net.model.seen)
    given = Captioned().condition(torch.from_numpy(sample_ids(0, 0, 16, 40)))
    drawn = training_draws(
        training.config.process, torch.zeros(16, 1, 8, 8), given, length=16, keep=8, drop=training.net.model.drop,
        label_drop=0.5, seed=0, offset=0,
    )  # fmt: skip
    assert_same_condition(seen, drawn.condition)
    dropped = seen["length"] == 0
    assert 0 < dropped.sum() < 16
    assert torch.equal(seen["length"][~dropped], given["length"][~dropped])


def test_what_the_network_refuses_is_its_own_message():
    training = Training()
    images, condition = next(training.data)
    with pytest.raises(ValueError, match=r"a text must have shape \(2, 3, 8\)"):
        training.net(images, torch.ones(2), part_of(condition, 0, 1))
    condition["length"][1] = 4
    for call in (
        lambda: training.net(images, torch.ones(2), condition),
        lambda: draw_samples(training.net, condition, Sampling(), seed=0),
    ):
        with pytest.raises(ValueError, match="a text has at most 3 tokens"):
            call()


def test_replayed_steps_learn_the_same_bits(monkeypatch):
    cuda = FakeCuda().install(monkeypatch)
    eager, replayed = Training()(5), Training(cuda_graphs="on")(5)
    assert cuda.captures
    for name, tensor in eager.items():
        assert torch.equal(replayed[name], tensor), name


@pytest.mark.parametrize("shape", [(2, 2, 8), (1, 3, 8)])
def test_graphs_refuse_a_condition_of_another_shape(monkeypatch, shape):
    """The second could be copied to both samples."""
    FakeCuda().install(monkeypatch)
    training = Training(cuda_graphs="on")
    training(1)
    images, condition = next(training.data)
    training.data = iter([(images, {**condition, "text": torch.zeros(shape)})])
    with pytest.raises(
        ValueError, match=r"of shape \(., ., 8\) where those before had \(2, 3, 8\), .*--cuda-graphs off"
    ):
        training(1)


def test_compiled_steps_learn_the_same(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    eager, compiled = Training()(2), Training(compile="whole")(2)
    for name, tensor in eager.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


def test_samples_are_guided_by_it():
    net = Training().net.double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.2)
    condition = Captioned().condition(torch.arange(5))
    condition["text"] = condition["text"].double()
    few = Sampling(sample_steps=2, cfg_scale=2.0)
    whole = draw_samples(net, condition, few, seed=3)
    without = net.model.drop(condition, torch.ones(5, dtype=torch.bool))
    assert_same_condition(net.model.seen[0], joined(condition, without))
    # As the definition has it, with two evaluations.
    x, t = torch.randn(5, 1, 8, 8, dtype=torch.float64), torch.full((5,), 2.0, dtype=torch.float64)
    strong, weak = net(x, t, condition), net(x, t, without)
    assert not torch.allclose(strong, weak)
    assert_near(net(x.repeat(2, 1, 1, 1), t.repeat(2), joined(condition, without)).chunk(2)[1], weak, network_steps(2))
    # In other batches, of other texts, and by another model.
    assert_near(draw_samples(net, condition, few, seed=3, batch=2), whole)
    unguided = draw_samples(net, condition, few.unguided(), seed=3)
    assert not torch.allclose(unguided, whole)
    assert not torch.allclose(draw_samples(net, without, few.unguided(), seed=3), unguided)
    guide = Training().net.double()
    drawn = draw_samples(net, condition, few, seed=3, guide=guide)
    assert_same_condition(guide.model.seen[0], condition)
    assert not torch.allclose(drawn, whole)
