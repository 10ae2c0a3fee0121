"""TREAD, SPRINT and deferred masking in the trainer and the sampler: learning, resuming, ranks, stored weights."""

import dataclasses
import functools
import shutil

import pytest
import torch
from test_parallel import assert_alike, forked, free_port, variables
from test_train import assert_same_run, stats, weights

from fastmask.diffusion import (
    Denoiser,
    Denoising,
    KeptDenoising,
    MaskedDenoising,
    Objective,
    Sampling,
    draw_samples,
    training_draws,
)
from fastmask.diffusion.objective import TOTAL
from fastmask.diffusion.weights import load_maskdit, save_weights
from fastmask.models.deferred import Deferred, DeferredConfig
from fastmask.models.sprint import Sprint, SprintConfig
from fastmask.models.tread import Tread, TreadConfig
from fastmask.presets import PRESETS
from fastmask.train import main
from fastmask.training.checkpoint import checkpoints
from fastmask.training.config import preset_config

NETWORKS = {"digits-tread": Tread, "digits-sprint": Sprint, "digits-deferred": Deferred}
ROUTE, MIXER = {"route_end": 2}, {"mixer_width": 8, "mixer_depth": 1, "mixer_num_heads": 1}
SIZES = {"digits-tread": ROUTE, "digits-sprint": ROUTE, "digits-deferred": MIXER}
FLAGS = ["--width", "16", "--depth", "3", "--num-heads", "2", "--batch-size", "16"]
FLAGS += ["--sample-every", "0", "--device", "cpu", "--warmup-steps", "0", "--lr", "1e-2", "--grad-clip", "1"]
FLAGS += ["--max-steps", "6", "--unmask-steps", "2", "--report-every", "1", "--checkpoint-every", "2"]
FLAGS += ["--keep-checkpoints", "9"]


def arguments(folder, preset, *flags):
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES[preset].items()]
    return ["--run-dir", str(folder), "--preset", preset, *FLAGS, *sizes, *flags]


def run(folder, preset, *flags):
    main(arguments(folder, preset, *flags))


@pytest.fixture(scope="module", params=NETWORKS)
def trained(request, tmp_path_factory):
    """A preset, and the folder of its short run."""
    folder = tmp_path_factory.mktemp(request.param)
    run(folder, request.param)
    return request.param, folder


@pytest.mark.parametrize("preset", NETWORKS)
def test_learning(tmp_path, preset):
    flags = ["--width", "48", "--batch-size", "64", "--lr", "3e-3", "--report-every", "20", "--max-steps", "60"]
    run(tmp_path, preset, *flags, "--unmask-steps", "0", "--checkpoint-every", "60")
    losses = [line["loss"] for line in stats(tmp_path)]
    assert losses[0] > losses[1] > losses[2]
    assert losses[2] < 0.85 * losses[0]


def test_what_a_run_reports(trained):
    """The loss is on all tokens, or the kept ones, and has no reconstruction."""
    preset, folder = trained
    ratio = preset_config(preset, PRESETS).masking.mask_ratio
    assert [line["mask_ratio"] for line in stats(folder)] == [ratio] * 4 + [0.0] * 2
    for line in stats(folder):
        assert line["loss"] == line["denoising"]
        assert "reconstruction" not in line


def test_resuming_from_any_checkpoint_equals_the_run_through(trained, tmp_path):
    preset, folder = trained
    for step in (1, 2):  # the last masked checkpoint, and the one before
        part = tmp_path / str(step)
        shutil.copytree(folder, part)
        for later in checkpoints(part)[step:]:
            shutil.rmtree(later)
        run(part, preset)
        assert_same_run(folder, part)


def test_the_weights_are_read_and_drawn_from(trained, tmp_path):
    preset, folder = trained
    net = load_maskdit(folder)
    assert type(net.model) is NETWORKS[preset]
    sizes = {"width": 16, "depth": 3, **SIZES[preset]}
    assert net.model.config == dataclasses.replace(preset_config(preset, PRESETS).network, **sizes)
    stored = weights(folder, "ema")
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, stored[name]), name
    save_weights(tmp_path / "copy.safetensors", net)
    again, settings = load_maskdit(tmp_path / "copy.safetensors"), Sampling(sample_steps=2, cfg_scale=2.0)
    drawn = draw_samples(net, torch.arange(4), settings, seed=0)
    assert torch.equal(draw_samples(again, torch.arange(4), settings, seed=0), drawn)
    assert drawn.isfinite().all()
    by_path = Sampling(sample_steps=2, cfg_scale=2.0, guidance="path-drop")
    if preset == "digits-sprint":
        assert not torch.allclose(draw_samples(net, torch.arange(4), by_path, seed=0), drawn)
    else:
        with pytest.raises(ValueError, match=f"network {net.model.config.name} has no path to drop"):
            draw_samples(net, torch.arange(4), by_path, seed=0)


def test_a_tread_starts_from_a_plain_dit_and_the_other_way(tmp_path):
    dense = ["--width", "16", "--depth", "3", "--num-heads", "2", "--decoder-depth", "0", "--mask-ratio", "0"]
    few = ["--max-steps", "1", "--unmask-steps", "0", "--batch-size", "8", "--device", "cpu", "--sample-every", "0"]
    main(["--run-dir", str(tmp_path / "dit"), *dense, *few])
    run(tmp_path / "tread", "digits-tread", *few, "--init", str(tmp_path / "dit"))
    main(["--run-dir", str(tmp_path / "again"), *dense, *few, "--init", str(tmp_path / "tread")])
    with pytest.raises(ValueError, match=r"is of another network: model\.fuse_first\.bias is missing"):
        run(tmp_path / "sprint", "digits-sprint", *few, "--init", str(tmp_path / "dit"))


def test_a_deferred_network_starts_from_its_masked_stage(trained, tmp_path):
    """As its second preset does; other networks' weights are refused."""
    preset, folder = trained
    flags = ["--max-steps", "1", "--unmask-steps", "0", "--mask-ratio", "0", "--checkpoint-every", "1"]
    flags += ["--unmask-lr", "0", "--lr", "0", "--init", str(folder)]
    if preset == "digits-deferred":
        run(tmp_path, preset, *flags)
        for name, tensor in weights(folder).items():
            assert torch.equal(weights(tmp_path)[name], tensor), name
    else:
        with pytest.raises(ValueError, match="is of another network: model"):
            run(tmp_path, "digits-deferred", *flags)


@pytest.mark.parametrize(
    ("preset", "parallel", "flags"),
    [
        ("digits-tread", "ddp", ()),
        ("digits-tread", "fsdp2", ()),
        ("digits-sprint", "ddp", ("--path-drop", "0")),  # the mask token has no part in unmasked steps
        ("digits-deferred", "ddp", ()),
        ("digits-deferred", "fsdp2", ("--activation-checkpointing", "block")),
        ("digits-sprint", "fsdp2", ("--sample-every", "6", "--sample-steps", "2", "--guidance", "path-drop")),
    ],
)
def test_two_ranks_learn_the_same_as_one(tmp_path, preset, parallel, flags):
    alone, two, port = tmp_path / "alone", tmp_path / "two", free_port()
    run(alone, preset, *flags)
    two.mkdir()
    called = arguments(two, preset, *flags, "--parallel", parallel)
    ranks = [forked.start(called, two / f"rank-{rank}.log", **variables(rank, port)) for rank in range(2)]
    for rank in ranks:
        rank.join(timeout=300)
    said = [(two / f"rank-{rank}.log").read_text() for rank in range(2)]
    assert [rank.exitcode for rank in ranks] == [0, 0], "\n".join(said)
    assert_alike(two, alone)


@pytest.mark.parametrize("what", ["block", "whole"])
def test_compiled_steps_learn_the_same(trained, tmp_path, monkeypatch, what):
    preset, folder = trained
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    run(tmp_path, preset, "--compile", what)
    assert_alike(tmp_path, folder)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("preset", "flag", "message"),
    [
        ("digits-sprint", "--mae-coef=0.2", "--mae-coef is of the reconstruction of dropped patches"),
        ("digits-tread", "--mae-target=clean", "--mae-target is of the reconstruction of dropped patches"),
        ("digits-deferred", "--mae-coef=0.2", "which network deferred of .* its loss is denoising of the kept patches"),
        ("digits-deferred", "--route-end=2", "--route-end is a flag of network tread or sprint, and preset digits-def"),
        ("digits-tread", "--mixer-depth=2", "--mixer-depth is a flag of network deferred, and preset digits-tread tr"),
        ("digits-tread", "--path-drop=0.2", "--path-drop is a flag of network sprint, and preset digits-tread trains"),
        ("digits", "--route-end=2", "--route-end is a flag of network tread or sprint, and preset digits trains"),
        ("digits-sprint", "--mask-ratio=0.5", "mask_pattern structured keeps one patch of four: give mask_ratio 0.75"),
    ],
)
def test_flags_that_cannot_be(tmp_path, preset, flag, message):
    with pytest.raises(ValueError, match=message):
        main(["--run-dir", str(tmp_path), "--preset", preset, "--device", "cpu", "--sample-every", "0", flag])


def test_path_drops_are_drawn_by_the_samples_numbers():
    """Whatever the batch, at their rate, and without a change of the other draws."""
    model = SprintConfig(width=16, depth=3, route_end=2).build(1, 8, 10)
    process, labels = preset_config("digits-sprint", PRESETS).process, torch.arange(4096) % 10
    options = {"length": 16, "keep": 4, "drop": model.drop, "label_drop": 0.1, "structured": True, "seed": 3}
    images = torch.zeros(4096, 1, 8, 8)
    whole = training_draws(process, images, labels, drop_path=model.drop_path, path_drop=0.1, offset=0, **options)
    part = training_draws(
        process, images[:64], labels[64:128], drop_path=model.drop_path, path_drop=0.1, offset=64, **options
    )
    assert torch.equal(part.condition.dropped, whole.condition.dropped[64:128])
    share = whole.condition.dropped.float().mean()
    assert abs(share - 0.1) < 5 * (0.09 / 4096) ** 0.5
    without = training_draws(process, images, labels, offset=0, **options)
    assert torch.equal(without.condition, whole.condition.condition)
    assert torch.equal(without.noise, whole.noise)
    assert torch.equal(without.mask.ids_keep, whole.mask.ids_keep)
    # Independent of the label's: both are dropped for a hundredth.
    both = (whole.condition.dropped & (without.condition == 10)).float().mean()
    assert abs(both - 0.01) < 5 * (0.0099 / 4096) ** 0.5


def test_the_loss_is_that_of_the_denoised_images():
    """By its definition, on all tokens; MaskDiT's splits it."""
    torch.manual_seed(0)
    config = preset_config("digits-tread", PRESETS)
    net = Denoiser(config.network.build(1, 8, 10), config.process)
    torch.nn.init.normal_(net.model.final_layer.linear.weight, std=0.1)
    images = torch.randn(4, 1, 8, 8)
    options = {"length": 16, "keep": 8, "drop": net.model.drop, "seed": 0, "offset": 0}
    draws = training_draws(config.process, images, torch.arange(4), **options)
    losses = Objective(net, [Denoising()])(images, *draws)
    noised, c = config.process.noised(images, draws.noise, draws.t), config.process.coefficients(draws.t)
    denoised = net(noised, draws.t, draws.condition, draws.mask)
    torch.testing.assert_close(losses[TOTAL], c.weight * (denoised - images).square().mean((1, 2, 3)))
    assert [type(term) for term in config.objective.terms(TreadConfig())] == [Denoising]
    assert [type(term) for term in config.objective.terms(DeferredConfig())] == [KeptDenoising]
    assert [type(term) for term in config.objective.terms(preset_config("digits", PRESETS).network)] == [
        MaskedDenoising
    ]
