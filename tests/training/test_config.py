"""What a configuration refuses, and what it computes."""

import dataclasses
import json

import pytest

from fastmask.diffusion import EDM, RectifiedFlow
from fastmask.diffusion.processes import PROCESSES
from fastmask.models.networks import NETWORKS
from fastmask.training.config import TrainConfig, fit_stages, refuse_foreign_flags

GOOD = TrainConfig()


def check(config):
    config.network.check(8)
    config.check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_ratio": 1.0}, "mask_ratio must be at least 0 and below 1, not 1.0"),
        ({"mask_ratio": -0.1}, "mask_ratio must be at least 0"),
        ({"mask_ratio": float("nan")}, "mask_ratio must be at least 0"),
        ({"mask_ratio_end": 1.5}, "mask_ratio_end must be at least 0"),
        ({"mask_schedule": "cosine"}, "unknown mask_schedule 'cosine': did you mean cosine"),
        ({"patch_size": 3}, "an image side of 8 does not divide into patches of 3"),
        ({"width": 98}, "width must be a multiple of 4"),
        ({"num_heads": 5}, "width 96 does not divide into num_heads 5"),
        ({"decoder_num_heads": 7}, "decoder_width 64 does not divide into decoder_num_heads 7"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"decoder_depth": 0}, "a network without a decoder .* trains unmasked"),
        ({"mask_levels": 0}, "mask_levels must be at least 1, not 0"),
        ({"mask_ratio_per_sample": "normal"}, "mask_ratio_per_sample must be constant, noise, .*, not 'normal'"),
        (
            {"mask_ratio_per_sample": "uniform(0.3,0.6)"},
            "has a mean of 0.45, and mask_ratio is 0.5: give the same to both",
        ),
        (
            {"mask_ratio_per_sample": "noise", "mask_schedule": "linear"},
            "mask_ratio_per_sample noise goes with mask_schedule constant, not linear",
        ),
        (
            {"mask_ratio_per_sample": "noise", "micro_batch_size": 4},
            "groups of 8 samples: the images computed at a time .*, 4, must be a multiple",
        ),
        ({"mask_ratio_per_sample": "noise", "mask_ratio": 0.0}, "mask_ratio, which must be above 0"),
        ({"max_steps": 0}, "max_steps must be at least 1, not 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"micro_batch_size": 5}, "batch_size 128 does not divide into parts of micro_batch_size 5"),
        ({"unmask_steps": 2000}, "unmask_steps 2000 is more than max_steps 1000"),
        ({"lr": -1.0}, "lr must be at least 0"),
        ({"lr": float("inf")}, "lr must be at least 0"),
        ({"lr": float("nan")}, "lr must be at least 0"),
        ({"mask_ratio_per_sample": "sigma(0.2,0.8)"}, "sigma is called noise now"),
        ({"cfg_scale": float("nan")}, "--cfg-scale must be a number of at least 0, not nan"),
        ({"cfg_scale": -3.0}, r"--cfg-scale must be a number of at least 0, not -3\.0"),
        ({"label_drop": 1.1}, "label_drop must be in"),
        ({"ema_decay": -0.1}, "ema_decay must be in"),
        ({"betas": (0.9, 1.0)}, "betas must be in"),
        ({"sample_steps": 1}, "--sample-steps must be at least 2"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_values_are_named(change, message):
    check(GOOD)
    with pytest.raises(ValueError, match=message):
        check(GOOD.replace(**change))


def test_micro_batch_is_never_larger_than_the_batch():
    assert GOOD.replace(batch_size=8, micro_batch_size=128).micro_batch == 8
    assert GOOD.replace(batch_size=8).micro_batch == 8
    assert GOOD.replace(batch_size=8, micro_batch_size=2).micro_batch == 2


PRESET = GOOD.replace(max_steps=1000, unmask_steps=300, warmup_steps=100)


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        ({"max_steps": 60}, (18, 6)),
        ({"max_steps": 399}, (119, 39)),
        ({"max_steps": 400}, (120, 40)),
        ({"max_steps": 1000}, (300, 100)),
        ({"max_steps": 3000}, (300, 100)),
        ({"max_steps": 60, "unmask_steps": 200}, (200, 100)),  # not the preset's
        ({"max_steps": 0}, (300, 100)),
    ],
    ids=str,
)
def test_stages_of_a_short_run_have_the_proportions_of_the_preset(changes, stages):
    config = fit_stages(PRESET.replace(**changes), PRESET)
    assert (config.masking.unmask_steps, config.optim.warmup_steps) == stages


def test_flat_names_go_to_their_owners():
    config = TrainConfig.of(lr=0.5, mask_ratio=0.25, data="synthetic", width=128, p_std=1.0, seed=3)
    assert (config.optim.lr, config.masking.mask_ratio, config.data.data, config.seed) == (0.5, 0.25, "synthetic", 3)
    assert (config.network.width, config.process.p_std) == (128, 1.0)
    again = config.replace(process=RectifiedFlow(t_mean=1.0), shift=2.0, max_steps=5)
    assert again.process == RectifiedFlow(t_mean=1.0, shift=2.0)
    assert (again.max_steps, again.optim) == (5, config.optim)
    assert config.process == EDM(p_std=1.0)


@pytest.mark.parametrize(
    ("name", "near"), [("mask_ration", "mask_ratio"), ("shift", ""), ("masking", "mask_ratio"), ("replace", "")]
)
def test_a_name_that_no_member_has(name, near):
    with pytest.raises(ValueError, match=f"unknown field '{name}': did you mean .*{near}"):
        GOOD.replace(**{name: 1})


@pytest.mark.parametrize("process", [kind() for kind in PROCESSES.values()], ids=lambda process: process.name)
@pytest.mark.parametrize("network", [kind() for kind in NETWORKS.values()], ids=lambda network: network.name)
def test_every_flag_is_one_field(process, network):
    """So that flat names, on the command line and in `run.json`, are enough."""
    config = GOOD.replace(process=process, network=network)
    names = [field.name for part in config.parts().values() for field in dataclasses.fields(part)]
    assert len(names) == len(set(names))
    assert config.recorded().keys() == {*names, "process", "network"}
    assert all(len(rule) <= 1 for rule in config.on_resume().values())


def test_the_record_is_flat_and_names_the_kinds():
    stored = GOOD.replace(data="https://user:secret@host/store?token=x").recorded()
    assert (stored["lr"], stored["width"], stored["p_mean"]) == (1e-4, 96, -1.2)
    assert (stored["process"], stored["network"]) == ("edm", "maskdit")
    assert "secret" not in stored["data"]
    assert json.loads(json.dumps(stored)).keys() == stored.keys()


def test_a_flag_of_another_process():
    refuse_foreign_flags(["--p-mean", "0", "--lr=1", "x"], GOOD)
    with pytest.raises(ValueError, match="--shift is a flag of process flow, and preset digits trains process edm"):
        refuse_foreign_flags(["--lr", "1", "--shift=3"], GOOD)
