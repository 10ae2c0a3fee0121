"""The counts by formula against what the operators of a forward pass really do."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from bench.instruments.preset_launches import with_blocks
from fastmask.diffusion.masking import kept_count
from fastmask.kernels import Mask
from fastmask.models.counts import forward_macs, num_parameters
from fastmask.models.maskdit import MaskDiT
from fastmask.presets import PRESETS
from fastmask.training.config import build_model, preset_config


def attention_macs(tokens: int, width: int, depth: int) -> int:
    """The counter misses attention on the CPU: q k^T and its product with v."""
    return depth * 2 * tokens * tokens * width


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "unmasked"])
def test_formula_equals_operator_count(preset, masked):
    """Two blocks of each kind, since all are alike; XL/2 with all of them."""
    config = preset_config(preset, PRESETS)
    if preset != "xl2-in256":
        config = config.replace(network=with_blocks(config.network, 2))
    ratio = config.masking.mask_ratio if masked else 0.0
    if masked and not ratio:
        pytest.skip("this preset trains unmasked")
    batch = 2
    pixels = config.data.data == "digits"
    channels, size = (1, config.data.image_size) if pixels else (4, config.data.image_size // 8)
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        model = build_model(config, channels, size)
        keep = kept_count(model.length, ratio)
        mask = None
        if ratio:
            ids = torch.zeros(batch, model.length, dtype=torch.int32)
            mask = Mask(ids[:, :keep], ids)
        model(torch.zeros(batch, channels, size, size), torch.zeros(batch), torch.zeros(batch, dtype=torch.int64), mask)
    counted = counter.get_total_flops() / 2 / batch
    for stack in model.stacks:
        counted += attention_macs(stack.tokens_of(model.length, keep), stack.width, len(stack.blocks))
    if config.network.name == "sprint" and mask is not None:
        counted -= config.network.width**2 / batch  # W_g of the mask token, once per batch
    assert forward_macs(model, keep) == counted
    assert num_parameters(model) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("preset", "millions", "gmac"),
    [
        ("xl2-in256", 730.1, 65.45),  # MaskDiT-XL/2 at half the patches
        ("l2-in256", 509.8, 46.7),
        ("h2-in256", 1009.5, 89.3),
        ("dit-xl2-in256", 674.8, 118.6),  # DiT, arXiv 2212.09748, table 4
        ("dit-s2-in256", 32.9, 6.05),
        ("dit-b2-in256", 130.3, 23.0),
        ("dit-l2-in256", 457.8, 80.7),
        ("dit-xl2-in512", 674.8, 524.5),
        ("tread-xl2-in256", 674.8, 71.3),  # the weights of DiT
        ("tread-b2-in256", 130.3, 17.1),
        ("deferred-xl2-in256", 751.9, 40.8),  # 6 blocks of 768 before the 28
        ("deferred-b2-in256", 148.0, 8.3),
    ],
)
def test_published_sizes(preset, millions, gmac):
    config = preset_config(preset, PRESETS)
    with torch.device("meta"):
        model = build_model(config, 4, config.data.image_size // 8)
    assert num_parameters(model) / 1e6 == pytest.approx(millions, abs=0.051)
    macs = forward_macs(model, kept_count(model.length, config.masking.mask_ratio))
    assert macs / 1e9 == pytest.approx(gmac, abs=0.06)


@pytest.mark.parametrize(("side", "ratio", "whole"), [(32, 2.84, 2.81), (64, 2.97, 2.94)])
def test_what_sprint_saves(side, ratio, whole):
    """Beside the dense network, without the Linear that joins and with it; SwiGLU adds biases alone."""
    config = preset_config("sprint-xl2-in256", PRESETS)
    with torch.device("meta"):
        model = build_model(config, 4, side)
        plain = MaskDiT(side, decoder_depth=0)
    keep = kept_count(model.length, 0.75)
    dense, own = forward_macs(plain), forward_macs(model, keep)
    joining = sum(stack.tokens_of(model.length, keep) * stack.linear_macs for stack in model.stacks)
    assert dense / (own - joining) == pytest.approx(ratio, abs=0.005)
    assert dense / own == pytest.approx(whole, abs=0.005)
    blocks = 28 * (2 * 3072 - 4 * 1152 + 2 * 72)  # biases, and the scales of queries and keys
    assert num_parameters(model) - num_parameters(plain) == 2 * 1152**2 + 2 * 1152 + blocks


def test_the_unit_of_sprints_training_cost():
    """10^18 FLOP of forward passes, two per MAC: DiT 427.7, SPRINT 43.7 and 65.1, 9.8 and 6.6 times less.

    The dense network is trained for 7M steps of 256 images, and the two runs of SPRINT differ by 1M masked steps.
    """
    dense, sprint = (preset_config(f"{name}-xl2-in256", PRESETS) for name in ("dit", "sprint"))
    with torch.device("meta"):
        plain, model = (build_model(config, 4, 32) for config in (dense, sprint))
    masked = forward_macs(model, kept_count(256, sprint.masking.mask_ratio))

    def cost(config, macs, steps=None):
        return (steps or config.max_steps) * config.batch_size * 2 * macs / 1e18

    assert cost(dense, forward_macs(plain)) == pytest.approx(427.7, rel=0.01)
    assert cost(sprint, masked, 1e6) == pytest.approx(65.1 - 43.7, rel=0.02)  # both are rounded
    second = preset_config("sprint-xl2-in256-unmask", PRESETS)
    costs = cost(dense, forward_macs(plain)), cost(sprint, masked), cost(second, forward_macs(model))
    assert costs == pytest.approx((425.1, 43.3, 48.9), abs=0.05)  # as docs/training.md has them


@pytest.mark.parametrize(("size", "least"), [("s2", 1.2), ("b2", 1.5), ("l2", 1.7), ("xl2", 1.8), ("h2", 1.8)])
def test_masking_saves_operations(size, least):
    """At half the patches every masked preset must do less than the dense DiT of its encoder."""
    config = preset_config(f"{size}-in256", PRESETS)
    with torch.device("meta"):
        masked = build_model(config, 4, 32)
        sizes = config.network
        dense = type(masked)(width=sizes.width, depth=sizes.depth, num_heads=sizes.num_heads, decoder_depth=0)
    assert forward_macs(dense) / forward_macs(masked, kept_count(256, config.masking.mask_ratio)) > least
