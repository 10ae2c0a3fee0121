"""The cost formulas against what a step's operators do and keep, and the predictions against arithmetic by hand."""

import dataclasses

import pytest
import torch
from networks import preset_network
from torch.utils.flop_counter import FlopCounterMode

from bench.instruments.memory import high_water, per_image
from bench.instruments.model import count_step, network
from bench.instruments.preset_launches import with_blocks
from fastmask.cost.predict import ASSUMED, predict_run
from fastmask.cost.work import RESERVE, memory_of, orthogonal_flops, work_of
from fastmask.cost.workload import workload_of
from fastmask.diffusion import Denoiser, MaskedDenoising, Objective, training_draws
from fastmask.diffusion.masking import kept_count
from fastmask.diffusion.objective import TOTAL
from fastmask.gpus import GPUS
from fastmask.models.counts import num_parameters
from fastmask.presets import PRESETS
from fastmask.training.config import build_model, preset_config
from fastmask.training.ema import EMA
from fastmask.training.muon import block_matrices, orthogonalized
from fastmask.training.optim import make_optimizer


@pytest.fixture
def probe(monkeypatch):
    """Add a preset with few blocks, so that counting it is quick: in each stack, but for one in a decoder.

    Without QK-RMSNorm, of which only a GPU has the one operator that the formulas count.
    """

    def add(name, depth, **options):
        row = PRESETS[name]
        network = dataclasses.replace(with_blocks(row["network"], depth), **{"qk_norm": False, **options})
        if network.name == "maskdit":
            network = dataclasses.replace(network, decoder_depth=min(1, network.decoder_depth))
        monkeypatch.setitem(PRESETS, "probe", {**row, "network": network})
        return preset_network("probe")

    return add


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("xl2-in256", "bf16"),
        ("dit-s2-in256", "fp32"),
        ("tread-xl2-in256", "bf16"),
        ("tread-xl2-in256", "fp32"),
        ("sprint-xl2-in256", "bf16"),
        ("sprint-xl2-in256", "fp32"),
        ("deferred-xl2-in256", "bf16"),
        ("deferred-xl2-in256", "fp32"),
    ],
)
def test_work_is_that_of_the_operators(probe, name, precision):
    """A block's bytes within one percent; launches exactly."""
    found = []
    for depth in (1, 2):
        config, model = probe(name, depth)
        work, counted = work_of(model, config.masking.mask_ratio, precision), count_step("probe", precision)
        assert work.launches == counted.launches
        found.append((work, counted))
    for part in ("matmul_bytes", "other_bytes"):
        formula, operators = (getattr(found[1][i], part) - getattr(found[0][i], part) for i in (0, 1))
        assert formula == pytest.approx(operators, rel=0.01), part
        assert getattr(found[1][0], part) == pytest.approx(getattr(found[1][1], part), rel=0.08), part


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("xl2-in256", "bf16"),
        ("xl2-in256", "fp32"),
        ("xl2-in512", "bf16"),
        ("dit-b2-in256", "fp32"),
        ("tread-xl2-in256", "bf16"),
        ("sprint-xl2-in256", "bf16"),
        ("sprint-xl2-in256", "fp32"),
        ("deferred-xl2-in256", "bf16"),
        ("deferred-xl2-in256", "fp32"),
    ],
)
def test_memory_is_what_autograd_keeps(probe, name, precision):
    config, model = probe(name, 2)
    kept = sum(per_image("probe", "fused", precision).values())
    assert memory_of(model, config.masking.mask_ratio, precision).activations == pytest.approx(kept, rel=0.006)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("options", [{"norm": "rms"}, {"mlp": "swiglu"}, {"rope": True}], ids=str)
def test_options_of_blocks(probe, options, precision):
    """Launches exactly, traffic and memory of a block, once and recomputed, as the operators have them."""
    for again in (False, True):
        found = []
        for depth in (1, 2):
            config, model = probe("sprint-b2-in256", depth, **{"mlp": "gelu", "rope": False, **options})
            ratio = config.masking.mask_ratio
            work = work_of(model, ratio, precision, checkpoint_blocks=again)
            counted = count_step("probe", precision, checkpoint_blocks=again)
            assert work.launches == counted.launches
            kept = sum(per_image("probe", "fused", precision, again).values())
            found.append((work, counted, memory_of(model, ratio, precision, checkpoint_blocks=again).activations, kept))
        (first, counted, kept, listed), (second, counted2, kept2, listed2) = found
        for part in ("matmul_bytes", "other_bytes"):
            formula, operators = (
                getattr(b, part) - getattr(a, part) for a, b in ((first, second), (counted, counted2))
            )
            assert formula == pytest.approx(operators, rel=0.01), part
        assert kept2 - kept == listed2 - listed
        assert kept2 == pytest.approx(listed2, rel=0.02)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_high_water_with_options(probe, precision):
    config, model = probe("sprint-b2-in256", 4)
    assert (config.network.mlp, config.network.rope) == ("swiglu", True)
    memory = memory_of(model, config.masking.mask_ratio, precision)
    state = memory.weights + memory.moments + memory.ema
    for batch in (4, 32):
        assert 1 <= memory.high_water(batch) / (state + high_water("probe", precision, batch)[0]) < 1.1


def test_normalised_queries_and_keys_are_work_and_memory():
    """As a GPU has them: two norms, each one operator, of which the results and the statistics are kept."""
    config, _ = preset_network("dit-s2-in256")
    found = {}
    for flag in (False, True):
        model = network(config.replace(qk_norm=flag))
        found[flag] = work_of(model, 0, "fp32"), memory_of(model, 0, "fp32").activations
    tokens = 12 * 256  # of all blocks
    (plain, before), (normed, after) = found[False], found[True]
    assert normed.launches - plain.launches == 12 * 4
    assert normed.other_bytes - plain.other_bytes == tokens * 384 * (2 * 2 + 2 * 3) * 4
    assert after - before == tokens * (2 * 384 * 4 + 2 * 6 * 4)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("name", ["b2-in256", "dit-s2-in256"])
def test_a_block_computed_again_keeps_exactly_what_enters_it(probe, name, precision):
    kept, counted = {}, {}
    for depth in (1, 2):
        config, model = probe(name, depth)
        kept[depth] = memory_of(model, config.masking.mask_ratio, precision, checkpoint_blocks=True).activations
        counted[depth] = sum(per_image("probe", "fused", precision, True).values())
    assert kept[2] - kept[1] == counted[2] - counted[1]
    assert 0 < counted[1] - kept[1] < 100e3  # the condition, and what the loss keeps of an image


@pytest.mark.parametrize("checkpoint_blocks", [False, True])
@pytest.mark.parametrize(("name", "precision"), [("b2-in256", "bf16"), ("b2-in256", "fp32"), ("dit-s2-in256", "bf16")])
def test_high_water_is_that_of_a_step(probe, name, precision, checkpoint_blocks):
    """Beside what a storage for every tensor takes, from its making to its end, in a step of two micro-batches."""
    config, model = probe(name, 4)
    memory = memory_of(model, config.masking.mask_ratio, precision, checkpoint_blocks=checkpoint_blocks)
    state = memory.weights + memory.moments + memory.ema
    for batch in (4, 32):
        most, between = high_water("probe", precision, batch, checkpoint_blocks)
        assert 1 <= memory.high_water(batch) / (state + most) < 1.1
    kept = batch * memory.activations + memory.gradients + (0 if checkpoint_blocks else memory.copy)
    assert kept == pytest.approx(between, rel=0.03)


def test_recomputation_is_work_too(probe):
    found = []
    for depth in (1, 2):
        config, model = probe("b2-in256", depth)
        work = work_of(model, config.masking.mask_ratio, "bf16", checkpoint_blocks=True)
        counted = count_step("probe", "bf16", checkpoint_blocks=True)
        assert work.launches == counted.launches
        found.append((work, counted))
    for part in ("matmul_bytes", "other_bytes"):
        formula, operators = (getattr(found[1][i], part) - getattr(found[0][i], part) for i in (0, 1))
        assert formula == pytest.approx(operators, rel=0.01), part
    config, model = preset_network("xl2-in256")
    again, once = (work_of(model, 0.5, "bf16", checkpoint_blocks=flag).flops for flag in (True, False))
    assert 1.32 < again / once < 4 / 3
    blocks = config.replace(activation_checkpointing="block")
    slow, fast = (
        predict_run(workload_of(each), model, GPUS["h100"], "bf16", assumed=ASSUMED._replace(mfu=0.5)).images_per_s
        for each in (blocks, config)
    )
    assert fast / slow == pytest.approx(again / once)


@pytest.mark.gpu
@pytest.mark.parametrize("checkpoint_blocks", [False, True])
def test_high_water_is_what_the_gpu_says(checkpoint_blocks):
    config, device, batch = preset_config("b2-in256", PRESETS), torch.device("cuda"), 64
    config = config.replace(ema_widths=(0.1,))
    before = torch.cuda.memory_allocated()
    with device:
        net = Denoiser(build_model(config, 4, 32), config.process)
    model = net.model
    model.checkpoint_blocks = checkpoint_blocks
    averages = [EMA(net, config.ema.ema_decay), EMA(net, 0.99)]
    optimizer, objective = make_optimizer(net, config.optim, averages), Objective(net, [MaskedDenoising()])
    images = torch.randn(batch, 4, 32, 32, device=device)
    labels = torch.randint(config.data.num_classes, (batch,), device=device)

    def step(first):
        for offset in (first, first + batch):
            draws = training_draws(
                config.process,
                images,
                labels,
                seed=0,
                offset=offset,
                drop=model.drop,
                label_drop=0.1,
                length=model.length,
                keep=kept_count(model.length, config.masking.mask_ratio),
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
    memory = memory_of(model, config.masking.mask_ratio, "bf16", averages=2, checkpoint_blocks=checkpoint_blocks)
    assert memory.high_water(batch) == pytest.approx(taken, rel=0.1)


def test_memory_by_part():
    _, model = preset_network("xl2-in256")
    memory, n = memory_of(model, 0.5, "bf16"), num_parameters(model)
    assert memory[:5] == (4 * n, 4 * n, 8 * n, 4 * n, 2 * n)
    assert memory_of(model, 0.5, "tf32").copy == 0
    assert memory.activations / 1e6 == pytest.approx(147.1, abs=0.2)  # counted: `python -m bench.instruments.memory`
    most = memory.largest_batch(80e9)
    assert memory.fixed + most * memory.per_image <= 80e9 * (1 - RESERVE) < memory.fixed + (most + 1) * memory.per_image
    assert memory.largest_batch(1e9) == 0
    assert memory_of(model, 0.75, "bf16").activations < memory.activations
    assert memory_of(model, 0.5, "bf16", averages=3) == memory._replace(ema=12 * n)
    blocks = memory_of(model, 0.5, "bf16", checkpoint_blocks=True)
    assert blocks.activations / 1e6 == pytest.approx(32.7, abs=0.1)  # the same with --checkpoint-blocks
    assert memory.recomputed == 0 < blocks.recomputed < memory.activations / 30
    assert blocks.largest_batch(80e9) > 3 * most


def test_the_update_reads_five_arrays_and_writes_four():
    config, model = preset_network("xl2-in256")
    assert work_of(model, config.masking.mask_ratio, "bf16").update_bytes == 36 * num_parameters(model)


def test_muon_is_work_of_the_update():
    """Its matmuls, as a counter of FLOP sees them, are shared by the GPUs; what is moved is more than AdamW's."""
    config, model = preset_network("s2-in256")
    plain, muon = (work_of(model, 0.5, "bf16", muon=flag) for flag in (False, True))
    assert plain.update_flops == 0
    assert muon._replace(update_flops=0, update_bytes=plain.update_bytes) == plain
    assert plain.update_bytes < muon.update_bytes < 100 * num_parameters(model)
    shapes = [tuple(matrix.shape) for matrix in block_matrices(model.stacks)]
    assert muon.update_flops == sum(orthogonal_flops(*shape) for shape in shapes)
    for shape in shapes[:5]:  # a block's
        with FlopCounterMode(display=False) as counter:
            orthogonalized(torch.ones(shape), torch.float32)
        assert counter.get_total_flops() == orthogonal_flops(*shape)

    def seconds(optimizer, gpus):
        load = workload_of(config.replace(optimizer=optimizer))
        return load.batch_size / predict_run(load, model, GPUS["h100"], "bf16", gpus).images_per_s

    added = [seconds("muon", gpus) - seconds("auto", gpus) for gpus in (1, 2)]
    halved = muon.update_flops / 2 / GPUS["h100"].peak("bf16") / ASSUMED.products
    assert added[0] - added[1] == pytest.approx(halved, rel=1e-3)
    assert added[1] > halved  # the traffic stays
