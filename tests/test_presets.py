"""The preset table: every row can be built, and says what its source says."""

import pytest

from fastmask.diffusion import EDM, RectifiedFlow
from fastmask.presets import PRESETS
from fastmask.training.config import preset_config


@pytest.mark.parametrize("name", PRESETS)
def test_every_row_is_a_valid_configuration(name):
    config = preset_config(name, PRESETS)
    config.check()
    config.network.check(config.data.image_size if config.data.data == "digits" else config.data.image_size // 8)
    assert config.preset == name


def test_published_recipe():
    """MaskDiT's four training stages (arXiv 2306.09305, section 4)."""
    rows = {name: preset_config(name, PRESETS) for name in PRESETS}
    recipe = {
        name: (row.masking.mask_ratio, row.batch_size, row.optim.lr, row.max_steps, row.data.image_size)
        for name, row in rows.items()
        if name.startswith("xl2")
    }
    assert recipe == {
        "xl2-in256": (0.5, 1024, 1e-4, 2_000_000, 256),
        "xl2-in256-unmask": (0.0, 512, 5e-5, 100_000, 256),
        "xl2-in512": (0.5, 1024, 1e-4, 1_000_000, 512),
        "xl2-in512-unmask": (0.0, 512, 5e-5, 50_000, 512),
    }
    for row in rows.values():
        if row.data.data != "digits":
            assert (row.objective.label_drop, row.ema.ema_decay) == (0.1, 0.9999)
            decay = 0.1 if row.network.name == "deferred" else 0.0
            assert (row.optim.betas, row.optim.weight_decay) == ((0.9, 0.999), decay)


def test_rectified_flow_has_the_sizes_of_its_edm_rows():
    rows = {name: preset_config(name, PRESETS) for name in PRESETS}
    for flow, edm in (
        ("sit-xl2-in256", "dit-xl2-in256"),
        ("flow-xl2-in256", "xl2-in256"),
        ("flow-b2-in256", "b2-in256"),
    ):
        ours, theirs = rows[flow], rows[edm]
        assert (ours.network, ours.masking, ours.optim, ours.batch_size, ours.max_steps) == (
            *(theirs.network, theirs.masking, theirs.optim, theirs.batch_size, theirs.max_steps),
        )
        assert ours.process == RectifiedFlow(t_uniform=flow.startswith("sit"))


def test_routes_are_those_of_their_papers():
    """TREAD (arXiv 2501.04765) at half the tokens; SPRINT (arXiv 2510.21986) at a fourth, with its second stage."""
    rows = {name: preset_config(name, PRESETS) for name in PRESETS}
    routes = {}
    for name, row in rows.items():
        if name.startswith(("tread", "sprint")):
            network, masking = row.network, row.masking
            routes[name] = (
                *(network.route_start, network.route_end, network.depth, masking.mask_ratio, masking.mask_pattern),
                *(row.batch_size, row.optim.lr, row.process.name),
            )
    assert routes == {
        "tread-b2-in256": (2, 8, 12, 0.5, "random", 256, 1e-4, "edm"),
        "tread-xl2-in256": (2, 24, 28, 0.5, "random", 256, 1e-4, "edm"),
        "sprint-s2-in256": (2, 10, 12, 0.75, "structured", 256, 1e-4, "flow"),
        "sprint-b2-in256": (2, 10, 12, 0.75, "structured", 256, 1e-4, "flow"),
        "sprint-xl2-in256": (2, 26, 28, 0.75, "structured", 256, 1e-4, "flow"),
        "sprint-xl2-in256-unmask": (2, 26, 28, 0.0, "random", 1024, 2e-4, "flow"),
    }
    for name in routes:
        size = rows[f"dit-{name.split('-')[1]}-in256"].network
        assert (rows[name].network.width, rows[name].network.num_heads) == (size.width, size.num_heads)
        if name.startswith("sprint"):
            assert (rows[name].network.path_drop, rows[name].optim.grad_clip) == (0.1, 1.0)


def test_deferred_masking_is_that_of_its_paper():
    """Both stages of micro-diffusion at 256 x 256 (arXiv 2407.15811), on the blocks of DiT."""
    rows = {name: preset_config(name, PRESETS) for name in PRESETS if name.startswith("deferred")}
    stages = {}
    for name, row in rows.items():
        mixer = row.network.mixer_width, row.network.mixer_depth
        stages[name] = (*mixer, row.masking.mask_ratio, row.optim.lr, row.optim.warmup_steps, row.max_steps)
        assert row.process == EDM(sigma_data=0.9, p_mean=-0.6, p_std=1.2)
        assert (row.batch_size, row.optim.grad_clip, row.masking.mask_pattern) == (2048, 0.25, "random")
        size = preset_config(f"dit-{name.split('-')[1]}-in256", PRESETS).network
        own = row.network
        assert (own.width, own.depth, own.num_heads) == (size.width, size.depth, size.num_heads)
        assert own.mixer_width == 64 * own.mixer_num_heads
    assert stages == {
        "deferred-b2-in256": (512, 3, 0.75, 2.4e-4, 2500, 250_000),
        "deferred-xl2-in256": (768, 6, 0.75, 2.4e-4, 2500, 250_000),
        "deferred-xl2-in256-unmask": (768, 6, 0.0, 8e-5, 0, 30_000),
    }


def test_unknown_preset_names_the_near_ones():
    with pytest.raises(ValueError, match="unknown preset 'xl2-in25': did you mean xl2-in256"):
        preset_config("xl2-in25", PRESETS)
