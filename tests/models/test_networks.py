import pytest
from util import small_net

from fastmask import MaskDiT
from fastmask.described import from_json, to_json
from fastmask.models.networks import NETWORKS


@pytest.mark.parametrize("sizes", [{}, {"decoder_depth": 0}, {"qk_norm": True, "depth": 3}])
def test_a_network_is_built_again_from_its_description(sizes):
    model = small_net(**sizes).model
    config = from_json(to_json(model.config), NETWORKS, "network")
    again = config.build(model.in_channels, model.input_size, model.num_classes)
    assert type(again) is MaskDiT
    assert again.config == model.config
    assert {name: t.shape for name, t in again.state_dict().items()} == {
        name: t.shape for name, t in model.state_dict().items()
    }


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_built_from_its_own_description(name):
    config = NETWORKS[name]()
    assert from_json(to_json(config), NETWORKS, "network") == config
    model = config.build(1, 8, 10)
    assert model.config == config
    assert config.loss_on in ("split", "all", "kept")
    assert config.masked
    others = getattr(config, "decoder_depth", 0) + getattr(config, "mixer_depth", 0)
    assert sum(len(stack.blocks) for stack in model.stacks) == config.depth + others


def test_sizes_that_cannot_be_are_named():
    config = small_net().model.config
    config.check(8)
    with pytest.raises(ValueError, match="an image side of 9 does not divide into patches of 2"):
        config.check(9)
