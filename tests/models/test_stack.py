"""The stacks of a network: what counts, cost, parallel training and compilation know of it."""

import pytest
from util import small_net

from fastmask.models.stack import all_blocks


def test_the_stacks_of_a_masked_network():
    model = small_net().model
    encoder, decoder = model.stacks
    assert (encoder.blocks, encoder.exit) == (model.blocks, model.decoder_layer)
    assert (decoder.blocks, decoder.exit) == (model.decoder_blocks, model.final_layer)
    assert (encoder.width, encoder.num_heads) == (16, 2)
    assert (decoder.width, decoder.num_heads) == (12, 3)
    assert [stack.tokens_of(16, 5) for stack in model.stacks] == [5, 16]


def test_the_stack_of_a_plain_dit():
    model = small_net(decoder_depth=0).model
    (stack,) = model.stacks
    assert (stack.blocks, stack.exit) == (model.blocks, model.final_layer)
    assert (stack.width, stack.num_heads, stack.tokens_of(16, 16)) == (16, 2, 16)


@pytest.mark.parametrize("decoder_depth", [0, 2])
def test_every_block_is_in_a_stack(decoder_depth):
    model = small_net(decoder_depth=decoder_depth).model
    listed = [id(block) for block in all_blocks(model.stacks)]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(module) for module in model.modules() if type(module).__name__ == "Block"}
