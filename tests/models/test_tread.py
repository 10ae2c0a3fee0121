"""TREAD's network: a DiT without a mask, and with one the route of its paper."""

import dataclasses

import pytest
import torch
from routes import assert_trains_as, inputs, reference, unequal_mask
from util import small_net

from fastmask.kernels import sample_mask
from fastmask.models.stack import all_blocks
from fastmask.models.tread import TreadConfig
from fastmask.testing import assert_near, network_steps

SIZES = {"depth": 4, "decoder_depth": 0}


def plain_and_routed(**changed):
    """A plain DiT, and the network of the same weights with a route."""
    dense = small_net(**SIZES).model
    config = TreadConfig(width=16, depth=4, num_heads=2, **changed)
    model = config.build(dense.in_channels, dense.input_size, dense.num_classes)
    model.load_state_dict(dense.state_dict())
    return dense, model


def tread(first, route, last, keep):
    """Return the tokens of the route's three parts: those of the kept positions run the middle."""

    def run(h, c):
        f = first(h, c)
        out = f.clone()
        for b, ids in enumerate(keep):
            out[b, ids] = route(f[b : b + 1, ids], c[b : b + 1])[0]
        return last(out, c)

    return run


def test_without_a_mask_it_is_a_plain_dit_bit_for_bit():
    dense, model = plain_and_routed()
    x, c_noise, labels = inputs(model)
    ours, theirs = model(x, c_noise, labels), dense(x, c_noise, labels)
    assert torch.equal(ours, theirs)
    for raw in (ours, theirs):
        raw.square().sum().backward()
    for (name, mine), other in zip(model.named_parameters(), dense.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad), name


def test_the_stacks():
    _, model = plain_and_routed()
    assert [len(stack.blocks) for stack in model.stacks] == [1, 2, 1]
    assert [stack.tokens_of(16, 5) for stack in model.stacks] == [16, 5, 16]
    assert [*all_blocks(model.stacks)] == [*model.blocks]


@pytest.mark.parametrize("keep", [1, 5, 16])
@pytest.mark.parametrize("route", [(1, 3), (2, 3)])
def test_forward_and_gradients(keep, route):
    _, model = plain_and_routed(route_start=route[0], route_end=route[1])
    mask = sample_mask(3, model.length, keep, seed=0, device="cpu")
    assert_trains_as(model, mask, lambda _, *parts: tread(*parts, [ids.long() for ids in mask.ids_keep]))


def test_unequal_numbers_of_kept_tokens():
    """Packed, each sample as it is alone."""
    _, model = plain_and_routed()
    x, c_noise, labels = inputs(model, batch=8)
    mask, keep = unequal_mask(model.length, 0.25, 0.75)
    exact = reference(model, x, c_noise, labels, lambda *parts: tread(*parts, keep))
    assert_near(model(x, c_noise, labels, mask), exact, network_steps(4))


def test_images_of_several_sizes():
    _, model = plain_and_routed()
    wide, (x, c_noise, labels) = torch.randn(2, 3, 4, 12), inputs(model)
    mask = sample_mask(3, model.length, 5, seed=0, device="cpu")
    times, both = torch.cat([c_noise, c_noise[:2]]), torch.cat([labels, labels[:2]])
    ours = model.forward_mixed([x, wide], times, both, [mask, None])
    assert_near(ours[0], model(x, c_noise, labels, mask), network_steps(4))
    assert_near(ours[1], model.forward_mixed([wide], c_noise[:2], labels[:2], [None])[0], network_steps(4))


def test_recomputed_blocks_have_the_same_gradients():
    _, model = plain_and_routed()
    x, c_noise, labels = inputs(model)
    mask = sample_mask(3, model.length, 5, seed=0, device="cpu")
    found = []
    for again in (False, True):
        model.checkpoint_blocks = again
        model.zero_grad()
        model(x, c_noise, labels, mask).square().sum().backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("masked", [True, False])
def test_one_graph(masked):
    _, model = plain_and_routed()
    x, c_noise, labels = inputs(model)
    mask = sample_mask(3, model.length, 5, seed=0, device="cpu") if masked else None
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_near(compiled(x, c_noise, labels, mask), model(x, c_noise, labels, mask), network_steps(4))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"route_start": 0}, "a route needs blocks before it, in it and after it: .* not route_start 0, route_end 3"),
        ({"route_start": 3}, "not route_start 3, route_end 3 and depth 4"),
        ({"route_end": 4}, "not route_start 1, route_end 4 and depth 4"),
        ({"num_heads": 5}, "width 16 does not divide into num_heads 5"),
        ({"patch_size": 3}, "an image side of 8 does not divide into patches of 3"),
    ],
)
def test_sizes_that_cannot_be(changed, message):
    config = dataclasses.replace(TreadConfig(width=16, depth=4, num_heads=2), **changed)
    with pytest.raises(ValueError, match=message):
        config.build(3, 8, 5)


def test_it_has_no_path_to_drop():
    _, model = plain_and_routed()
    with pytest.raises(ValueError, match="network tread has no path to drop, as network sprint has"):
        model.drop_path(torch.arange(3))
