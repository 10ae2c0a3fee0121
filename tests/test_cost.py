"""The cost formulas against what a step's operators do and keep, and the predictions against arithmetic by hand."""

import dataclasses

import pytest
import torch

import bench.model
from bench.memory import high_water, per_image
from bench.model import count_step, network
from fastmask.config import preset_config
from fastmask.cost import ASSUMED, GPUS, RESERVE, Memory, Work, gpu_named, memory_of, predict_run, step_seconds, work_of
from fastmask.counts import trainable_parameters
from fastmask.diffusion import Denoiser, MaskedDenoising, Objective, training_draws
from fastmask.diffusion.objective import TOTAL
from fastmask.ema import EMA
from fastmask.masking import kept_count
from fastmask.optim import make_optimizer
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


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("name", ["b2-in256", "dit-s2-in256"])
def test_a_block_computed_again_keeps_exactly_what_enters_it(probe, name, precision):
    kept, counted = {}, {}
    for depth in (1, 2):
        config, model = probe(name, depth)
        kept[depth] = memory_of(model, config.mask_ratio, precision, checkpoint_blocks=True).activations
        counted[depth] = sum(per_image("probe", "fused", precision, True).values())
    assert kept[2] - kept[1] == counted[2] - counted[1]
    assert 0 < counted[1] - kept[1] < 100e3  # the condition, and what the loss keeps of an image


@pytest.mark.parametrize("checkpoint_blocks", [False, True])
@pytest.mark.parametrize(("name", "precision"), [("b2-in256", "bf16"), ("b2-in256", "fp32"), ("dit-s2-in256", "bf16")])
def test_high_water_is_that_of_a_step(probe, name, precision, checkpoint_blocks):
    """Beside what a storage for every tensor takes, from its making to its end, in a step of two micro-batches."""
    config, model = probe(name, 4)
    memory = memory_of(model, config.mask_ratio, precision, checkpoint_blocks=checkpoint_blocks)
    state = memory.weights + memory.moments + memory.ema
    for batch in (4, 32):
        most, between = high_water("probe", precision, batch, checkpoint_blocks)
        assert 1 <= memory.high_water(batch) / (state + most) < 1.1
    kept = batch * memory.activations + memory.gradients + (0 if checkpoint_blocks else memory.copy)
    assert kept == pytest.approx(between, rel=0.03)


def test_recomputation_is_work_too(probe, monkeypatch):
    build = bench.model.build_model

    def build_checkpointing(*args):
        model = build(*args)
        model.checkpoint_blocks = True
        return model

    monkeypatch.setattr(bench.model, "build_model", build_checkpointing)
    found = []
    for depth in (1, 2):
        config, model = probe("b2-in256", depth)
        work = work_of(model, config.mask_ratio, "bf16", checkpoint_blocks=True)
        counted = count_step("probe", "bf16")
        assert work.launches == counted.launches
        found.append((work, counted))
    for part in ("product_bytes", "other_bytes"):
        formula, operators = (getattr(found[1][i], part) - getattr(found[0][i], part) for i in (0, 1))
        assert formula == pytest.approx(operators, rel=0.01), part
    config, model = preset("xl2-in256")
    again, once = (work_of(model, 0.5, "bf16", checkpoint_blocks=flag).flops for flag in (True, False))
    assert 1.32 < again / once < 4 / 3
    blocks = dataclasses.replace(config, activation_checkpointing="block")
    slow, fast = (predict_run(each, model, GPUS["h100"], "bf16", assumed=MFU).images_per_s for each in (blocks, config))
    assert fast / slow == pytest.approx(again / once)


@pytest.mark.gpu
@pytest.mark.parametrize("checkpoint_blocks", [False, True])
def test_high_water_is_what_the_gpu_says(checkpoint_blocks):
    config, device, batch = preset_config("b2-in256", PRESETS), torch.device("cuda"), 64
    config = dataclasses.replace(config, ema_widths=(0.1,))
    before = torch.cuda.memory_allocated()
    with device:
        net = Denoiser(bench.model.build_model(config, 4, 32), config.process)
    model = net.model
    model.checkpoint_blocks = checkpoint_blocks
    averages = [EMA(net, config.ema_decay), EMA(net, 0.99)]
    optimizer, objective = make_optimizer(net, config, averages), Objective(net, [MaskedDenoising()])
    images = torch.randn(batch, 4, 32, 32, device=device)
    labels = torch.randint(config.num_classes, (batch,), device=device)

    def step(first):
        for offset in (first, first + batch):
            draws = training_draws(
                config.process,
                images,
                labels,
                seed=0,
                offset=offset,
                num_classes=config.num_classes,
                label_drop=0.1,
                length=model.length,
                keep=kept_count(model.length, config.mask_ratio),
            )
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = objective(images, *draws)[TOTAL].mean()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step(0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step(2 * batch)
    torch.cuda.synchronize()
    taken = torch.cuda.max_memory_allocated() - before
    memory = memory_of(model, config.mask_ratio, "bf16", averages=2, checkpoint_blocks=checkpoint_blocks)
    assert memory.high_water(batch) == pytest.approx(taken, rel=0.1)


def test_memory_by_part():
    _, model = preset("xl2-in256")
    memory, n = memory_of(model, 0.5, "bf16"), trainable_parameters(model)
    assert memory[:5] == (4 * n, 4 * n, 8 * n, 4 * n, 2 * n)
    assert memory_of(model, 0.5, "tf32").copy == 0
    assert memory.activations / 1e6 == pytest.approx(147.1, abs=0.2)  # counted: `python -m bench.memory`
    most = memory.largest_batch(80e9)
    assert memory.fixed + most * memory.per_image <= 80e9 * (1 - RESERVE) < memory.fixed + (most + 1) * memory.per_image
    assert memory.largest_batch(1e9) == 0
    assert memory_of(model, 0.75, "bf16").activations < memory.activations
    assert memory_of(model, 0.5, "bf16", averages=3) == memory._replace(ema=12 * n)
    blocks = memory_of(model, 0.5, "bf16", checkpoint_blocks=True)
    assert blocks.activations / 1e6 == pytest.approx(32.7, abs=0.1)  # `python -m bench.memory --checkpoint-blocks`
    assert memory.recomputed == 0 < blocks.recomputed < memory.activations / 30
    assert blocks.largest_batch(80e9) > 3 * most


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
