"""Alignment through the trainer: learning, its end, resuming, several ranks, compilation, CUDA graphs, refusals."""

import functools
import json
import shutil

import numpy as np
import pytest
import torch
from fake_cuda import FakeCuda
from stores import manifest, write
from test_parallel import FLAGS, assert_alike, forked, free_port, variables
from test_train import assert_same_run, stats, weights
from torch._dynamo.utils import counters

from fastmask.data import StoreDataset, batches, open_data
from fastmask.data.in_memory import load_digits
from fastmask.data.teacher import Teacher
from fastmask.diffusion import Denoiser, training_draws
from fastmask.diffusion.weights import load_maskdit
from fastmask.prepare import main as prepare
from fastmask.ranks import Ranks
from fastmask.train import main
from fastmask.training.align import Aligned, open_features, stack_of
from fastmask.training.checkpoint import checkpoints
from fastmask.training.config import TrainConfig, build_model, build_step
from fastmask.training.ema import EMA
from fastmask.training.optim import make_optimizer

CPU = torch.device("cpu")
ALIGN = ["--align-coef", "0.5", "--align-teacher", "teachers:small", "--align-hidden", "32", "--depth", "2"]
OFF = ["--align-coef", "0", "--align-teacher", "", "--align-until", "0"]
UNTIL = [*ALIGN, "--align-until", "3"]  # of six steps, the last two of which are unmasked


def run(folder, *flags):
    main(["--run-dir", str(folder), *FLAGS, *flags])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run that is aligned in its first half."""
    folder = tmp_path_factory.mktemp("alone")
    run(folder, *UNTIL)
    return folder


def stored(folder, step, name="projector"):
    from safetensors.torch import load_file  # noqa: PLC0415

    return load_file(folder / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors")


def test_the_features_are_learned(tmp_path):
    flags = ["--batch-size", "64", "--width", "32", "--report-every", "20", "--max-steps", "60", "--unmask-steps", "0"]
    run(tmp_path, *ALIGN, *flags, "--lr", "3e-3", "--checkpoint-every", "60")
    cosines = [-line["alignment"] for line in stats(tmp_path)]
    assert cosines[0] < cosines[1] < cosines[2]
    assert cosines[2] > 0.5


def test_what_a_run_reports(alone):
    """The term is in the loss until its end, and then it is gone."""
    lines = stats(alone)
    for step, line in enumerate(lines):
        parts = line["denoising"] + 0.1 * line["reconstruction"]
        assert ("alignment" in line) == (step < 3)
        assert line["loss"] == pytest.approx(parts + 0.5 * line.get("alignment", 0), rel=1e-5)
    config = json.loads((alone / "run.json").read_text())["config"]
    assert (config["align_coef"], config["align_until"], config["align_block"]) == (0.5, 3, 0)


def test_a_falling_loss_is_no_spike(tmp_path):
    """The term makes the loss negative, and its end raises it; both are no error of the denoiser's."""
    run(
        tmp_path,
        *UNTIL,
        "--align-coef",
        "40",
        "--divergence-factor",
        "1.5",
        "--loss-limit",
        "30",
        "--report-every",
        "1",
    )
    lines = stats(tmp_path)
    assert min(line["loss"] for line in lines) < -1
    assert lines[3]["loss"] > 1
    for line in lines:
        levels = [value for name, value in line.items() if name.startswith("loss_at_log_snr/")]
        own = line["denoising"] + 0.1 * line["reconstruction"]
        assert min(levels) - 1e-3 < own < max(levels) + 1e-3


def test_a_report_over_the_end_has_the_mean_of_the_aligned_steps(alone, tmp_path):
    run(tmp_path, *UNTIL, "--report-every", "6")
    (line,) = stats(tmp_path)
    mean = sum(each["alignment"] for each in stats(alone)[:3]) / 3
    assert line["alignment"] == pytest.approx(mean, rel=1e-6)
    assert line["denoising"] == pytest.approx(sum(each["denoising"] for each in stats(alone)) / 6, rel=1e-6)


def test_the_projector_is_beside_the_network(alone, tmp_path):
    """In a file of its own, trained until the end of the term and frozen from then on, with its moments."""
    before, after, last = (stored(alone, step) for step in (2, 4, 6))
    assert set(last) == {f"{i}.{name}" for i in (0, 2, 4) for name in ("weight", "bias")}
    for name, tensor in last.items():
        assert torch.equal(tensor, after[name]), name
        assert not torch.equal(tensor, before[name]), name
        moments = stored(alone, 6, "optimizer")
        assert moments[f"projector.{name}/step"] == 3
        assert torch.equal(
            moments[f"projector.{name}/exp_avg"], stored(alone, 4, "optimizer")[f"projector.{name}/exp_avg"]
        )
    run(tmp_path, "--depth", "2")
    for name in ("model", "ema"):
        assert stored(alone, 6, name).keys() == stored(tmp_path, 6, name).keys()
    assert not (checkpoints(tmp_path)[-1] / "projector.safetensors").exists()
    net = load_maskdit(alone)
    assert all(torch.equal(tensor, weights(alone, "ema")[name]) for name, tensor in net.state_dict().items())


def test_the_term_changes_neither_initial_weights_nor_draws(alone, tmp_path):
    run(tmp_path, "--depth", "2")
    ours, theirs = ([line["denoising"] for line in stats(folder)] for folder in (alone, tmp_path))
    assert ours[0] == theirs[0]
    assert ours[3] != theirs[3]  # a zero-initialised decoder does not see the encoder's blocks before


@pytest.mark.parametrize("optimizer", ["torch", "adamw_ema", "muon"])
@pytest.mark.parametrize("steps", [1, 2], ids=["before the end", "after it"])
def test_resuming_equals_the_run_through(tmp_path, optimizer, steps):
    whole, part = tmp_path / "whole", tmp_path / "part"
    run(whole, *UNTIL, "--optimizer", optimizer)
    shutil.copytree(whole, part)
    for later in checkpoints(part)[steps:]:
        shutil.rmtree(later)
    run(part, *UNTIL, "--optimizer", optimizer)
    assert_same_run(whole, part)
    assert all(torch.equal(tensor, stored(part, 6)[name]) for name, tensor in stored(whole, 6).items())


def test_rolling_back_over_the_end_aligns_again(alone, tmp_path, monkeypatch):
    """One batch after the end of the term is bad, and the run goes back to a checkpoint before it."""
    real, bad_sample, seen = training_draws, 3 * 16, []

    def draws(*arguments, offset, **settings):
        drawn = real(*arguments, offset=offset, **settings)
        return drawn._replace(noise=torch.where(offset == bad_sample, torch.nan, drawn.noise))

    monkeypatch.setattr("fastmask.training.step.training_draws", draws)
    real_targets = Teacher.targets
    monkeypatch.setattr(Teacher, "targets", lambda *arguments: seen.append(1) or real_targets(*arguments))
    run(tmp_path, *UNTIL, "--on-divergence", "rollback")
    assert len(seen) == 3 + 1  # the third step was done twice
    lines = {line["step"]: line for line in stats(tmp_path)}
    assert [("alignment" in lines[step]) for step in range(1, 7)] == [True] * 3 + [False] * 3


def test_accumulation_equals_the_whole_batch(alone, tmp_path):
    run(tmp_path, *UNTIL, "--micro-batch-size", "4")
    assert_alike(tmp_path, alone)
    for name, tensor in stored(tmp_path, 6).items():
        torch.testing.assert_close(tensor, stored(alone, 6)[name], rtol=1e-3, atol=2e-4)


def test_recomputed_blocks_give_the_same_bits(alone, tmp_path):
    run(tmp_path, *UNTIL, "--activation-checkpointing", "block")
    assert_same_run(tmp_path, alone)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precisions_align_alike(alone, tmp_path, precision):
    run(tmp_path, *UNTIL, "--precision", precision)
    for ours, theirs in zip(stats(tmp_path)[:3], stats(alone)[:3], strict=True):
        assert ours["alignment"] == pytest.approx(theirs["alignment"], abs=0.03)  # of at most 1
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in stored(tmp_path, 6).values())


def test_a_run_from_weights_draws_a_projector_of_its_own(alone, tmp_path, capsys):
    run(tmp_path, *UNTIL, "--init", str(alone))
    count = len(stored(alone, 6, "model"))
    assert f"took {count} of {count} tensors" in capsys.readouterr().out
    assert stats(tmp_path)[0]["alignment"] > stats(alone)[2]["alignment"]


def test_ratios_per_sample(tmp_path):
    run(tmp_path, *UNTIL, "--mask-ratio-per-sample", "uniform(0.25,0.75)")
    assert [("alignment" in line) for line in stats(tmp_path)] == [True] * 3 + [False] * 3


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2", "fsdp2-grad-op"])
def test_two_ranks_learn_the_same_as_one(alone, tmp_path, parallel):
    flags = ["--run-dir", str(tmp_path), *FLAGS, *UNTIL, "--parallel", parallel, "--micro-batch-size", "4"]
    port = free_port()
    ranks = [forked.start(flags, tmp_path / f"rank-{rank}.log", **variables(rank, port)) for rank in range(2)]
    for rank in ranks:
        rank.join(timeout=300)
    said = [(tmp_path / f"rank-{rank}.log").read_text() for rank in range(2)]
    assert [rank.exitcode for rank in ranks] == [0, 0], "\n".join(said)
    assert_alike(tmp_path, alone)
    for name, tensor in stored(tmp_path, 6).items():
        torch.testing.assert_close(tensor, stored(alone, 6)[name], rtol=1e-3, atol=2e-4)
    # The same run resumes with one process, from before the end of the term.
    for later in checkpoints(tmp_path)[1:]:
        shutil.rmtree(later)
    run(tmp_path, *UNTIL)
    assert_alike(tmp_path, alone)


@pytest.mark.parametrize(("what", "network"), [("block", "digits"), ("whole", "digits"), ("whole", "digits-sprint")])
def test_compiled_steps_learn_the_same(tmp_path, monkeypatch, what, network):
    """In whole graphs, one more of which is made at the end of the term if the objective is compiled."""
    flags = ["--preset", network, *UNTIL[:6], "--align-until", "2", "--max-steps", "4", "--unmask-steps", "0"]
    if network == "digits-sprint":
        sizes = ["--width", "16", "--depth", "3", "--route-end", "2", "--num-heads", "2", "--batch-size", "16"]
        rest = [*sizes, "--sample-every", "0", "--device", "cpu", "--report-every", "1", "--lr", "1e-2"]
        call = lambda folder, *more: main(["--run-dir", str(folder), *flags, *rest, *more])  # noqa: E731
    else:
        call = lambda folder, *more: run(folder, *flags, "--depth", "2", *more)  # noqa: E731
    call(tmp_path / "eager")
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    call(tmp_path / "compiled", "--compile", what)
    assert_alike(tmp_path / "compiled", tmp_path / "eager")
    assert not counters["graph_break"]
    if what == "whole":
        assert counters["stats"]["unique_graphs"] == 2
    torch._dynamo.reset()


@pytest.fixture
def store(tmp_path):
    """A store of the digits' pixels, enlarged by repetition, with features."""
    split = load_digits()
    images = ((split.train_images[:96] + 1) * 127.5).byte().numpy()
    np.savez(tmp_path / "digits.npz", images=images[:, 0], labels=split.train_labels[:96].numpy())
    pixels = ["--space", "pixel", "--num-workers", "0", "--shard-size", "40", "--device", "cpu"]
    prepare([str(tmp_path / "digits.npz"), str(tmp_path / "store"), *pixels])
    prepare([str(tmp_path / "store"), "--features", "teachers:small", "--features-grid", "4", "--device", "cpu"])
    return tmp_path / "store"


@pytest.mark.parametrize("more", [(), ("--flip",), ("--num-workers", "1")], ids=lambda flags: "".join(flags) or "plain")
def test_stored_features_are_those_of_the_teacher(store, tmp_path, more):
    """But for their rounding to fp16; and the teacher sees flipped images, whose features are not the flipped ones."""
    data = ["--data", str(store), *UNTIL, *more]
    run(tmp_path / "stored", *data, "--align-teacher", "cached")
    run(tmp_path / "run", *data)
    for ours, theirs in zip(stats(tmp_path / "stored"), stats(tmp_path / "run"), strict=True):
        assert ours["denoising"] == pytest.approx(theirs["denoising"], rel=1e-2 if more == ("--flip",) else 1e-3)
    shutil.rmtree(checkpoints(tmp_path / "stored")[-1])
    shutil.copytree(tmp_path / "stored", tmp_path / "again")
    run(tmp_path / "again", *data, "--align-teacher", "cached")
    run(tmp_path / "stored", *data, "--align-teacher", "cached", "--num-workers", "0")
    assert_same_run(tmp_path / "again", tmp_path / "stored")


class Steps:
    """A step of an aligned run on a store, and what it moves."""

    def __init__(self, store, teacher, until, **changed):
        self.config = config = TrainConfig.of(
            data=str(store), num_classes=10, width=16, depth=2, decoder_width=16, decoder_depth=1, batch_size=8,
            device="cpu", precision="fp32", compile="none", lr=1e-2, grad_clip=1.0, flip=True, align_coef=0.5,
            align_teacher=teacher, align_hidden=32, align_until=until, **changed,
        )  # fmt: skip
        dataset = open_data(str(store), image_size=8, num_classes=10, flip=True)
        torch.manual_seed(0)
        self.net = Denoiser(build_model(config, 1, 8), config.process)
        self.ema = EMA(self.net, 0.9)
        features = open_features(config.align, config.data, config.network, dataset, CPU)
        self.aligned = Aligned(config.align, features, self.net.model)
        self.optimizer = make_optimizer(self.net, config.optim, [self.ema], self.aligned.projector)
        self.step = build_step(config, self.net, dataset, self.optimizer, [self.ema], Ranks(), self.aligned)
        self.data = batches(
            dataset, batch_size=8, seed=0, start=0, stop=10**4, num_workers=0, device=CPU,
            features=self.aligned.reader, features_stop=8 * until,
        )  # fmt: skip
        self.done = 0

    def __call__(self, keep=8):
        self.step(self.data, self.done * 8, keep, 1e-2, self.done)
        self.step.finish()
        self.done += 1

    def values(self):
        parts = self.net.state_dict(), self.ema.weights, self.aligned.projector.state_dict()
        return [tensor for part in parts for tensor in part.values()]


@pytest.mark.parametrize("optimizer", ["adamw_ema", "muon"])
@pytest.mark.parametrize("teacher", ["cached", "teachers:small"])
def test_replayed_steps_learn_the_same_bits(store, monkeypatch, teacher, optimizer):
    cuda = FakeCuda().install(monkeypatch)
    eager, replayed = (
        Steps(store, teacher, 5, optimizer=optimizer, cuda_graphs=on, weight_decay=0.1) for on in ("off", "on")
    )
    for step in range(10):
        eager()
        replayed()
        if step == 4:
            frozen = [tensor.clone() for tensor in replayed.aligned.projector.state_dict().values()]
    assert len(cuda.captures) >= 4  # gradients and update, in both stages
    for a, b in zip(eager.values(), replayed.values(), strict=True):
        assert torch.equal(a, b)
    # Neither weight decay nor old moments move the projector after the end.
    assert all(map(torch.equal, frozen, replayed.aligned.projector.state_dict().values()))
    assert replayed.step.tally.take(Ranks()) == eager.step.tally.take(Ranks())


def test_the_gradient_norm_is_that_of_what_is_clipped(store):
    steps = Steps(store, "cached", 5)
    steps.step.gradients(steps.data, 0, 8, 0)
    gradients = [p.grad for group in steps.optimizer.param_groups for p in group["params"]]
    beside = [p.grad for p in steps.aligned.projector.parameters()]
    assert all(grad is not None and grad.any() for grad in beside)
    expected = torch.stack([grad.norm() for grad in gradients]).norm()
    assert steps.step.norms()["grad_norm"] == pytest.approx(float(expected), rel=1e-5)


def test_counts(store):
    steps = Steps(store, "cached", 5)
    hidden = 16 * 32 + 32 * 32 + 32 * 24
    assert [steps.aligned.macs(8, step) for step in (0, 4, 5)] == [8 * hidden, 8 * hidden, 0]
    kept = stack_of(steps.net.model, 2)
    assert (kept.tokens, kept.blocks) == ("kept", steps.net.model.blocks)


def test_a_dry_run_counts_the_projector(store, tmp_path, capsys):
    flags = ["--depth", "2", "--data", str(store), "--align-hidden", "2048"]
    run(tmp_path, *flags, "--dry-run")
    assert "projector" not in capsys.readouterr().out
    run(tmp_path, *ALIGN, *flags, "--dry-run", "--align-teacher", "teachers:small")
    out = capsys.readouterr().out
    parameters, macs = 17 * 2048 + 2049 * 2048 + 2049 * 24, 8 * 2048 * (16 + 2048 + 24)
    assert f"{parameters / 1e6:.1f}M parameters, {macs / 1e9:.2f} GMAC" in out
    assert "teacher teachers:small" in out
    assert not (tmp_path / "run.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--align-coef", "0.5"], "give --align-teacher"),
        (["--align-teacher", "cached"], "has no effect without --align-coef"),
        (
            ["--align-coef", "0.5", "--align-teacher", "cached"],
            "reads the features in a store, and --data digits is none",
        ),
        (["--align-coef", "0.5", "--align-teacher", "dinov2"], "names no teacher: give timm:NAME"),
        ([*ALIGN, "--align-block", "3"], "--align-block 3 is not one of the 2 blocks"),
        (
            [*ALIGN, "--data", "synthetic", "--image-size", "64", "--patch-size", "2"],
            "is run on images, and --data synthetic is trained on as latents: add the features to a store by python -m",
        ),
    ],
)
def test_what_is_refused(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, *flags)


def test_features_that_do_not_fit(store, tmp_path):
    with pytest.raises(
        ValueError, match=r"holds features of 4 x 4 patches, and the network has 8 x 8: prepare them with"
    ):
        run(tmp_path, *ALIGN, "--data", str(store), "--align-teacher", "cached", "--patch-size", "1")
    write(tmp_path / "bare", manifest("pixels"), class_names=("a", "b", "c"))
    with pytest.raises(ValueError, match="holds no features: python -m fastmask"):
        run(tmp_path, *ALIGN, "--data", str(tmp_path / "bare"), "--align-teacher", "cached")
    config = TrainConfig.of(align_coef=0.5, align_teacher="teachers:small")
    data = StoreDataset(store, 8, None, False)
    data.shape = (4, 8, 8)
    with pytest.raises(ValueError, match="a teacher is run on images of 1 or 3 channels, not 4"):
        open_features(config.align, config.data, config.network, data, CPU)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (OFF, "align_coef 0.5 -> 0.0 .a run is aligned from its beginning"),
        (["--align-block", "2"], "align_block 0 -> 2 .the checkpoint's projector was trained for it"),
        (["--align-hidden", "16"], "align_hidden 32 -> 16 .the checkpoint's projector"),
        (["--align-teacher", "teachers:Small"], "align_teacher teachers:small -> teachers:Small"),
    ],
)
def test_changes_that_a_resumed_run_cannot_make(alone, tmp_path, flags, message):
    shutil.copytree(alone, tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", *UNTIL, "--max-steps", "8", *flags)


def test_changes_that_are_recorded(alone, tmp_path):
    shutil.copytree(alone, tmp_path / "run")
    run(tmp_path / "run", *UNTIL, "--max-steps", "8", "--align-coef", "0.25", "--align-until", "7")
    changes = {
        each["field"]: (each["from"], each["to"])
        for each in json.loads((tmp_path / "run" / "run.json").read_text())["changes"]
    }
    assert changes["align_coef"] == (0.5, 0.25)
    assert changes["align_until"] == (3, 7)
    assert [("alignment" in line) for line in stats(tmp_path / "run")[6:]] == [True, False]


def test_another_teacher_of_the_same_name_is_noticed(alone, tmp_path, monkeypatch):
    shutil.copytree(alone, tmp_path / "run")
    other = "b" * 64
    monkeypatch.setattr("fastmask.data.teacher.of_weights", lambda module: other)
    with pytest.raises(ValueError, match="was aligned with other features of teachers:small than are there now"):
        run(tmp_path / "run", *UNTIL, "--max-steps", "8")
