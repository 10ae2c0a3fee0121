"""The options of blocks, which every network has by the same names and gives to all of its blocks."""

import dataclasses

import pytest

from fastmask.models.block_config import BlockConfig
from fastmask.models.networks import NETWORKS
from fastmask.models.stack import all_blocks


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_has_the_options(name):
    config = NETWORKS[name](qk_norm=True)
    assert config.options() == dataclasses.asdict(BlockConfig(qk_norm=True))
    assert NETWORKS[name]().options() == dataclasses.asdict(BlockConfig())
    for chosen, present in ((config, True), (NETWORKS[name](), False)):
        blocks = list(all_blocks(chosen.build(1, 8, 10).stacks))
        assert {hasattr(block.attn, "q_norm") for block in blocks} == {present}
