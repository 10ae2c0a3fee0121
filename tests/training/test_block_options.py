"""The options of blocks through the trainer and the sampler: learning, resuming, several ranks, unequal samples."""

import shutil

import pytest
import torch
from test_parallel import assert_alike, forked, free_port, variables
from test_train import SMALL, assert_same_run, run, stats

from fastmask.diffusion import Sampling, draw_samples
from fastmask.diffusion.weights import load_maskdit
from fastmask.train import main
from fastmask.training.checkpoint import checkpoints

OPTIONS = {"norm": ["--norm", "rms"], "mlp": ["--mlp", "swiglu"], "rope": ["--rope"]}
ALL = ["--qk-norm", *(flag for flags in OPTIONS.values() for flag in flags)]
SHORT = ["--report-every", "1", "--checkpoint-every", "2", "--keep-checkpoints", "9"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a short run with all options, masks of unequal samples, and an unmasked end."""
    folder = tmp_path_factory.mktemp("all")
    run(folder, *ALL, *SHORT, "--mask-ratio-per-sample", "uniform(0.25,0.75)")
    return folder


def test_learning(tmp_path):
    """The loss of each option falls as that of the published blocks does, on the same images and noise."""
    flags = ["--width", "48", "--decoder-width", "32", "--batch-size", "64", "--lr", "3e-3", "--report-every", "40"]
    losses = {}
    for name, options in {"none": [], **OPTIONS, "all": ALL}.items():
        run(tmp_path / name, *flags, *options, "--checkpoint-every", "120", steps=120, unmask=0)
        losses[name] = [line["loss"] for line in stats(tmp_path / name)]
    first, last = losses["none"][0], losses["none"][-1]
    assert last < 0.8 * first
    for name, found in losses.items():
        assert found[0] > found[1] > found[2], name
        assert abs(found[-1] - last) < 0.25 * (first - last), name


def test_resuming_equals_the_run_through(trained, tmp_path):
    part = tmp_path / "part"
    shutil.copytree(trained, part)
    for later in checkpoints(part)[1:]:
        shutil.rmtree(later)
    run(part, *ALL, *SHORT, "--mask-ratio-per-sample", "uniform(0.25,0.75)")
    assert_same_run(trained, part)


@pytest.mark.parametrize(
    ("flags", "field"), [(["--norm", "layer"], "norm"), (["--mlp", "gelu"], "mlp"), (["--no-rope"], "rope")]
)
def test_options_cannot_change(trained, tmp_path, flags, field):
    part = tmp_path / "part"
    shutil.copytree(trained, part)
    with pytest.raises(ValueError, match=rf"cannot be resumed with {field} .*the checkpoint's weights are of that net"):
        run(part, *ALL, *SHORT, "--mask-ratio-per-sample", "uniform(0.25,0.75)", *flags)
    with pytest.raises(ValueError, match=f"is of another network: its {field} is "):
        run(tmp_path / "new", *ALL, *flags, "--init", str(trained))


def test_the_weights_are_drawn_from(trained):
    net = load_maskdit(trained)
    assert net.model.config.options() == {"qk_norm": True, "norm": "rms", "mlp": "swiglu", "rope": True}
    settings = Sampling(sample_steps=2, cfg_scale=2.0)
    drawn = draw_samples(net, torch.arange(4), settings, seed=0)
    assert drawn.isfinite().all()
    assert torch.equal(draw_samples(load_maskdit(trained), torch.arange(4), settings, seed=0), drawn)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_ranks_learn_the_same_as_one(tmp_path, parallel):
    alone, two, port = tmp_path / "alone", tmp_path / "two", free_port()
    stage = ["--max-steps", "4", "--unmask-steps", "1", "--report-every", "1", "--grad-clip", "1"]
    main(["--run-dir", str(alone), *SMALL, *ALL, *stage])
    two.mkdir()
    arguments = ["--run-dir", str(two), *SMALL, *ALL, *stage, "--parallel", parallel]
    ranks = [forked.start(arguments, two / f"rank-{rank}.log", **variables(rank, port)) for rank in range(2)]
    for rank in ranks:
        rank.join(timeout=300)
    said = [(two / f"rank-{rank}.log").read_text() for rank in range(2)]
    assert [rank.exitcode for rank in ranks] == [0, 0], "\n".join(said)
    assert_alike(two, alone)
