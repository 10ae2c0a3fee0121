"""The stacks of a network: what counts, cost, parallel training and compilation know of it."""

import pytest
import torch
import torch.nn.functional as F
from util import small_net

from fastmask.models.stack import Stack, Tap, all_blocks, run_stack
from fastmask.testing import assert_near


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


@pytest.mark.parametrize("packed", [False, True])
def test_a_stack_without_exit_returns_the_residual_stream(packed):
    """That of which a norm would have been taken: a modulated Linear that copies it gives its norm."""
    model = small_net(decoder_depth=0).model
    parts = [torch.randn(3, 5, 16), torch.randn(2, 7, 16)] if packed else [torch.randn(3, 5, 16)]
    condition, masks = torch.randn(sum(map(len, parts)), 16), [None] * len(parts)
    options = condition, None, False, []
    with torch.no_grad():
        model.final_layer.adaLN_modulation[1].weight.zero_()
        model.final_layer.adaLN_modulation[1].bias.zero_()
        head = model.final_layer
        ended = run_stack(Stack(model.blocks, head, "all"), parts, masks, *options)
        left = run_stack(Stack(model.blocks, None, "all"), parts, masks, *options)
        for part, stream, end in zip(parts, left, ended, strict=True):
            assert stream.shape == part.shape
            assert not torch.allclose(stream, part)
            assert_near(end, head.linear(F.layer_norm(stream, (16,), eps=1e-6)), 5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("number", [0, 1])
def test_a_tap_collects_what_a_stack_that_ends_there_returns(packed, number):
    model = small_net(decoder_depth=0).model
    parts = [torch.randn(3, 5, 16), torch.randn(2, 7, 16)] if packed else [torch.randn(3, 5, 16)]
    condition, masks = torch.randn(sum(map(len, parts)), 16), [None] * len(parts)
    (stack,), tap = model.stacks, Tap(model.blocks[number])
    untapped = run_stack(stack, parts, masks, condition, None, False, [])
    tapped = run_stack(stack, parts, masks, condition, None, False, [], tap)
    assert all(map(torch.equal, tapped, untapped))
    until = run_stack(Stack(model.blocks[: number + 1], None, "all"), parts, masks, condition, None, False, [])
    assert [part.shape for part in tap.tokens] == [part.shape for part in parts]
    assert all(map(torch.equal, tap.tokens, until))
    assert tap.masks == masks


def test_a_tap_of_another_stack_stays_empty():
    model = small_net().model
    tap = Tap(model.decoder_blocks[0])
    run_stack(model.stacks[0], [torch.randn(3, 5, 16)], [None], torch.randn(3, 16), None, False, [], tap)
    assert not tap.tokens


@pytest.mark.parametrize("decoder_depth", [0, 2])
def test_every_block_is_in_a_stack(decoder_depth):
    model = small_net(decoder_depth=decoder_depth).model
    listed = [id(block) for block in all_blocks(model.stacks)]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(module) for module in model.modules() if type(module).__name__ == "Block"}
