"""The cost formulas against what a step's operators do and keep, and the predictions against arithmetic by hand."""

import dataclasses

import pytest

from bench.memory import per_image
from bench.model import count_step, network
from fastmask.config import preset_config
from fastmask.cost import ASSUMED, GPUS, RESERVE, Memory, Work, gpu_named, memory_of, predict_run, step_seconds, work_of
from fastmask.counts import trainable_parameters
from fastmask.presets import PRESETS

MFU = ASSUMED._replace(mfu=0.5)


def preset(name):
    config = preset_config(name, PRESETS)
    return config, network(config)


@pytest.fixture
def probe(monkeypatch):
    """Add a preset with few blocks, so that counting it is quick."""

    def add(name, depth):
        row = PRESETS[name]
        few = {"depth": depth, "decoder_depth": min(1, row.get("decoder_depth", 1))}
        monkeypatch.setitem(PRESETS, "probe", {**row, **few})
        return preset("probe")

    return add


@pytest.mark.parametrize(("name", "precision"), [("xl2-in256", "bf16"), ("dit-s2-in256", "fp32")])
def test_work_is_that_of_the_operators(probe, name, precision):
    """A block's bytes within one percent; launches exactly."""
    found = []
    for depth in (1, 2):
        config, model = probe(name, depth)
        work, counted = work_of(model, config.mask_ratio, precision), count_step("probe", precision)
        assert work.launches == counted.launches
        found.append((work, counted))
    for part in ("product_bytes", "other_bytes"):
        formula, operators = (getattr(found[1][i], part) - getattr(found[0][i], part) for i in (0, 1))
        assert formula == pytest.approx(operators, rel=0.01), part
        assert getattr(found[1][0], part) == pytest.approx(getattr(found[1][1], part), rel=0.08), part


@pytest.mark.parametrize(
    ("name", "precision"),
    [("xl2-in256", "bf16"), ("xl2-in256", "fp32"), ("xl2-in512", "bf16"), ("dit-b2-in256", "fp32")],
)
def test_memory_is_what_autograd_keeps(probe, name, precision):
    config, model = probe(name, 2)
    kept = sum(per_image("probe", "fused", precision).values())
    assert memory_of(model, config.mask_ratio, precision).activations == pytest.approx(kept, rel=0.006)


def test_memory_by_part():
    config, model = preset("xl2-in256")
    memory, n = memory_of(model, 0.5, "bf16"), trainable_parameters(model)
    assert memory[:5] == (4 * n, 4 * n, 8 * n, 4 * n, 2 * n)
    assert memory_of(model, 0.5, "tf32").copy == 0
    assert memory.activations / 1e6 == pytest.approx(147.1, abs=0.2)  # counted: `python -m bench.memory`
    most = memory.largest_batch(80e9)
    assert memory.fixed + most * memory.per_image <= 80e9 * (1 - RESERVE) < memory.fixed + (most + 1) * memory.per_image
    assert memory.largest_batch(1e9) == 0
    half = memory_of(network(config), 0.75, "bf16")
    assert half.activations < memory.activations


def test_the_update_reads_five_arrays_and_writes_four():
    config, model = preset("xl2-in256")
    assert work_of(model, config.mask_ratio, "bf16").update_bytes == 36 * trainable_parameters(model)


@pytest.mark.parametrize(
    ("name", "at_half", "goal"),
    [("xl2-in256", 1259, 1219), ("dit-xl2-in256", 695, 673), ("xl2-in512", 294, 285), ("dit-xl2-in512", 157, 152)],
)
def test_known_figures_of_an_h100(name, at_half, goal):
    """6 MAC images/s against 989 TFLOP/s: half of it, and what share the project's goals are."""
    config, model = preset(name)
    assert predict_run(config, model, GPUS["h100"], "bf16", assumed=MFU).images_per_s == pytest.approx(at_half, abs=1)
    share = goal * work_of(model, config.mask_ratio, "bf16").flops / GPUS["h100"].bf16
    assert share == pytest.approx(0.484, abs=0.002)


def test_the_published_rate_is_a_third_of_an_a100():
    config, model = preset("xl2-in256")
    assert 276 * work_of(model, config.mask_ratio, "bf16").flops / GPUS["a100"].bf16 == pytest.approx(0.35, abs=0.005)


def test_a_step_by_hand():
    gpu = GPUS["h100"]._replace(bf16=100.0, bandwidth=10.0)
    assumed = ASSUMED._replace(products=0.5, bandwidth=0.5, launch_s=0.0)
    work = Work(100.0, 1.0, 5.0, 0.0, 10.0, 5.0, 20.0, launches=3)
    # Four images: 8 s of products, 4 s of other bytes; two parts: 4 s of casts, 1 s to add gradients; 4 s of AdamW.
    assert step_seconds(work, gpu, "bf16", 4, 2, assumed) == pytest.approx(8 + 4 + 4 + 1 + 4)
    slow = work._replace(product_bytes=50.0)  # then products take as long as their bytes, 40 s
    assert step_seconds(slow, gpu, "bf16", 4, 2, assumed) == pytest.approx(40 + 4 + 4 + 1 + 4)
    assert step_seconds(work, gpu, "bf16", 4, 2, assumed._replace(launch_s=10.0)) == pytest.approx(60 + 4)
    assert step_seconds(work, gpu, "bf16", 4, 2, assumed._replace(mfu=0.25)) == pytest.approx(16)


def test_a_run_on_several_gpus():
    config, model = preset("xl2-in256")
    one, eight = (predict_run(config, model, GPUS["h100"], "bf16", gpus, MFU) for gpus in (1, 8))
    assert one.hours == pytest.approx(config.max_steps * config.batch_size / one.images_per_s / 3600)
    assert eight.gpu_hours == pytest.approx(one.gpu_hours)
    assert eight.images_per_s == pytest.approx(8 * one.images_per_s)
    with pytest.raises(ValueError, match="does not divide among 7 GPUs"):
        predict_run(config, model, GPUS["h100"], "bf16", 7)
    with pytest.raises(ValueError, match="too little memory for any batch"):
        predict_run(config, model, GPUS["h100"]._replace(memory=16e9), "bf16")
    small = predict_run(config, model, GPUS["h100"]._replace(memory=20e9), "bf16")
    assert 0 < small.micro_batch < config.micro_batch


def test_a_schedule_is_averaged_over_the_run():
    config, model = preset("digits")
    config = dataclasses.replace(config, max_steps=400, unmask_steps=100)
    run = predict_run(config, model, GPUS["h100"], "bf16", assumed=MFU)
    flops = 0.75 * work_of(model, 0.5, "bf16").flops + 0.25 * work_of(model, 0.0, "bf16").flops
    assert run.images_per_s == pytest.approx(0.5 * GPUS["h100"].bf16 / flops)


def test_a_better_gpu_is_faster():
    config, model = preset("xl2-in256")
    rates = [predict_run(config, model, GPUS[name], "bf16").images_per_s for name in ("a100", "h100", "b200")]
    assert rates == sorted(rates)
    assert predict_run(config, model, GPUS["h100"], "tf32").images_per_s < rates[1]


def test_predictions_name_their_assumptions():
    assert str(ASSUMED) == ("assuming 65% of the peak in products, 85% of the bandwidth elsewhere, 5 us per launch")
    assert "50.0% of the peak for whole steps" in str(MFU)
    assert Memory(*range(7)).per_image == 11
    assert all(gpu.peak("fp32") < gpu.peak("tf32") < gpu.peak("bf16") == gpu.peak("fp16") for gpu in GPUS.values())


def test_a_gpu_is_known_by_its_drivers_name():
    for device, name in (("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA B200", "b200")):
        assert gpu_named(device) == GPUS[name]
    assert gpu_named("NVIDIA GH200 480GB") is gpu_named("NVIDIA GB200") is gpu_named("NVIDIA H100 PCIe") is None
