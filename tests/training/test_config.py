"""What a configuration refuses, and what it computes."""

import dataclasses

import pytest

from fastmask.diffusion.masking import ratio_stages
from fastmask.training.config import TrainConfig, check_config, fit_stages

GOOD = TrainConfig()


def changed(config, **fields):
    """A configuration with other fields, of its network as well."""
    own = {field.name for field in dataclasses.fields(config.network)} & fields.keys()
    network = dataclasses.replace(config.network, **{name: fields.pop(name) for name in own})
    return dataclasses.replace(config, network=network, **fields)


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
        ({"cfg_scale": float("nan")}, "cfg_scale must be at least 0, not nan"),
        ({"cfg_scale": -3.0}, r"cfg_scale must be at least 0, not -3\.0"),
        ({"label_drop": 1.1}, "label_drop must be in"),
        ({"ema_decay": -0.1}, "ema_decay must be in"),
        ({"betas": (0.9, 1.0)}, "betas must be in"),
        ({"sample_steps": 1}, "sample_steps must be at least 2"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_values_are_named(change, message):
    check_config(GOOD, 8)
    with pytest.raises(ValueError, match=message):
        check_config(changed(GOOD, **change), 8)


def test_ratio_falls_over_the_masked_steps_alone():
    config = dataclasses.replace(GOOD, max_steps=100, unmask_steps=20, mask_schedule="linear", mask_ratio_end=0.1)
    assert config.ratio_at(0) == 0.5
    assert config.ratio_at(40) == pytest.approx(0.3)
    assert 0.1 < config.ratio_at(79) < 0.11
    assert [config.ratio_at(step) for step in (80, 99)] == [0.0, 0.0]


def test_unmasked_from_the_first_step():
    config = dataclasses.replace(GOOD, max_steps=10, unmask_steps=10)
    check_config(config, 8)
    assert config.ratio_at(0) == 0.0
    assert config.stages(16) == ((0, 16),)
    assert config.kept_at(0, 16) == 16


def test_stages_of_a_run():
    config = dataclasses.replace(GOOD, max_steps=100, unmask_steps=20)
    assert config.stages(16) == ((0, 8), (80, 16))
    assert [config.kept_at(step, 16) for step in (0, 79, 80, 99)] == [8, 8, 16, 16]
    assert dataclasses.replace(config, unmask_steps=0).stages(16) == ((0, 8),)
    falling = dataclasses.replace(config, mask_schedule="linear", mask_ratio_end=0.1, mask_levels=4)
    assert falling.stages(256) == (*ratio_stages("linear", 80, 0.5, 0.1, 256, 4), (80, 256))
    kept = [falling.kept_at(step, 256) for step in range(100)]
    assert kept == sorted(kept)
    assert len(set(kept)) == 5
    assert sum(kept[:80]) / 80 == pytest.approx(256 * (1 - sum(map(falling.ratio_at, range(80))) / 80), rel=0.01)


def test_a_schedule_that_ends_unmasked_has_no_stage_after():
    config = dataclasses.replace(GOOD, max_steps=1000, unmask_steps=100, mask_schedule="exp")
    stages = config.stages(16)
    assert stages == ratio_stages("exp", 900, 0.5, 0.0, 16, 8)
    assert stages[-1].keep == 16
    assert stages[-1].first_step < 900
    assert config.kept_at(950, 16) == 16


def test_ratios_per_sample():
    assert GOOD.per_sample is None
    config = dataclasses.replace(GOOD, mask_ratio_per_sample="uniform(0.2,0.8)", micro_batch_size=64)
    check_config(config, 8)
    assert config.per_sample == ("uniform", 0.2, 0.8)
    config = dataclasses.replace(GOOD, mask_ratio_per_sample="noise", mask_ratio=0.25, batch_size=8)
    check_config(config, 8)
    assert config.per_sample == ("noise", 0.125, 0.375)
    assert config.kept_at(0, 16) == 12


def test_micro_batch_is_never_larger_than_the_batch():
    assert dataclasses.replace(GOOD, batch_size=8, micro_batch_size=128).micro_batch == 8
    assert dataclasses.replace(GOOD, batch_size=8).micro_batch == 8
    assert dataclasses.replace(GOOD, batch_size=8, micro_batch_size=2).micro_batch == 2


PRESET = dataclasses.replace(GOOD, max_steps=1000, unmask_steps=300, warmup_steps=100)


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        ({"max_steps": 60}, (18, 6)),
        ({"max_steps": 399}, (119, 39)),
        ({"max_steps": 400}, (300, 100)),  # which fit
        ({"max_steps": 60, "unmask_steps": 200}, (200, 100)),  # not the preset's
        ({"max_steps": 0}, (300, 100)),
    ],
    ids=str,
)
def test_stages_of_a_short_run_have_the_proportions_of_the_preset(changes, stages):
    config = fit_stages(dataclasses.replace(PRESET, **changes), PRESET)
    assert (config.unmask_steps, config.warmup_steps) == stages
