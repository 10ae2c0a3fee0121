"""SPRINT's network: its paper's formulas, the dropped path, and the way around the middle."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from routes import assert_trains_as, inputs, reference, routed, unequal_mask

from fastmask.diffusion import Denoiser, RectifiedFlow
from fastmask.diffusion.guidance import guided
from fastmask.diffusion.masking import structured_mask
from fastmask.kernels import sample_mask
from fastmask.models.sprint import NoPath, PathDrop, SprintConfig
from fastmask.models.stack import all_blocks
from fastmask.testing import assert_near, network_steps

CONFIG = SprintConfig(width=16, depth=4, num_heads=2, path_drop=0.5)
CPU = torch.device("cpu")


def sprint(w, first, middle, last, keep, dropped=()):
    """Return the tokens of the paper's three parts, with one Linear of the concatenation.

    ``keep`` holds the kept positions of each sample, None for all; ``dropped`` the samples without a middle.
    """
    weight = torch.cat([w["fuse_middle.weight"], w["fuse_first.weight"]], 1)

    def run(h, c):
        f = first(h, c)
        g = w["mask_token"].expand(*f.shape).clone()
        for b in set(range(len(f))) - {*dropped}:
            ids = torch.arange(f.shape[1]) if keep is None else keep[b]
            g[b, ids] = middle(f[b : b + 1, ids], c[b : b + 1])[0]
        return last(F.linear(torch.cat([g, f], -1), weight, w["fuse_first.bias"]), c)

    return run


def kept(mask):
    return None if mask is None else [ids.long() for ids in mask.ids_keep]


def masks(model, batch=3):
    side = int(model.length**0.5)
    return {
        "none": None,
        "one": sample_mask(batch, model.length, 1, seed=0, device="cpu"),
        "random": sample_mask(batch, model.length, 5, seed=0, device="cpu"),
        "structured": structured_mask(batch, side, seed=0, offset=0, device=CPU),
    }


def weights(model):
    return {name: tensor.detach().double() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("dropped", [(), (1,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("kind", ["none", "one", "random", "structured"])
def test_forward_and_gradients(kind, dropped):
    model = routed(CONFIG)
    mask, chosen = masks(model)[kind], torch.tensor([b in dropped for b in range(3)])
    assert_trains_as(
        model,
        mask,
        lambda w, *parts: sprint(w, *parts, kept(mask), dropped),
        lambda labels: model.drop_path(labels, chosen) if dropped or kind != "none" else labels,
    )


def test_the_stacks():
    model = routed(dataclasses.replace(CONFIG, depth=6, route_end=4))
    assert [len(stack.blocks) for stack in model.stacks] == [1, 3, 2]
    assert [stack.tokens_of(16, 4) for stack in model.stacks] == [16, 4, 16]
    assert [stack.linear_macs for stack in model.stacks] == [256, 256, 0]
    assert [*all_blocks(model.stacks)] == [*model.blocks]


def test_the_fresh_linear_has_the_deviation_of_one_of_both_inputs():
    model = dataclasses.replace(CONFIG, width=64).build(3, 8, 5)
    values = torch.cat([model.fuse_middle.weight, model.fuse_first.weight], 1).detach()
    bound = (6 / (values.shape[0] + values.shape[1])) ** 0.5
    assert values.abs().max() <= bound + 1e-6
    z = values.square().mean() / (bound**2 / 3)
    assert abs(z - 1) < 5 * (4 / 5 / values.numel()) ** 0.5  # five standard errors of a uniform's variance
    assert not model.fuse_first.bias.any()


def test_the_network_without_its_middle_does_not_run_it():
    model = routed(CONFIG)
    x, c_noise, labels = inputs(model)
    ran = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, *_: ran.append(block))
    everyone = torch.ones(3, dtype=torch.bool)
    without = model(x, c_noise, model.drop_path(labels))
    assert ran == [model.blocks[0], model.blocks[3]]
    assert torch.equal(without, model(x, c_noise, model.drop_path(labels, everyone)))
    exact = reference(model, x, c_noise, labels, lambda *parts: sprint(weights(model), *parts, None, (0, 1, 2)))
    assert_near(without, exact, network_steps(2))


def test_path_drop_guidance_is_that_of_its_formula():
    net = Denoiser(routed(CONFIG).double(), RectifiedFlow())
    x, _, labels = inputs(net.model, dtype=torch.float64)
    t = torch.tensor(0.6, dtype=torch.float64)
    times, none = t.expand(3), torch.full((3,), net.model.num_classes)
    strong, weak = net(x, times, labels), net(x, times, NoPath(none))
    expected = weak + 3.0 * (strong - weak)
    assert_near(guided(net, labels, 3.0, path_drop=True)(x, t), expected, network_steps(4))
    assert not torch.allclose(guided(net, labels, 3.0)(x, t), expected)
    # Outside of the interval only the network itself.
    assert torch.equal(guided(net, labels, 3.0, path_drop=True, interval=(5.0, 9.0))(x, t), strong)


def test_guidance_that_cannot_be():
    net = Denoiser(routed(CONFIG), RectifiedFlow())
    with pytest.raises(ValueError, match="either another model or the network without its path"):
        guided(net, torch.arange(3), 3.0, path_drop=True, guide=net)


def test_unequal_numbers_of_kept_tokens():
    model = routed(CONFIG)
    x, c_noise, labels = inputs(model, batch=8)
    mask, keep = unequal_mask(model.length, 0.5, 0.9)
    exact = reference(model, x, c_noise, labels, lambda *parts: sprint(weights(model), *parts, keep))
    assert_near(model(x, c_noise, labels, mask), exact, network_steps(4))


def test_images_of_several_sizes():
    model = routed(CONFIG)
    wide, (x, c_noise, labels) = torch.randn(2, 3, 4, 12), inputs(model)
    mask = masks(model)["structured"]
    times, both = torch.cat([c_noise, c_noise[:2]]), torch.cat([labels, labels[:2]])
    dropped = torch.tensor([True, False, False, False, True])
    ours = model.forward_mixed([x, wide], times, PathDrop(both, dropped), [mask, None])
    assert_near(ours[0], model(x, c_noise, PathDrop(labels, dropped[:3]), mask), network_steps(4))
    alone = model.forward_mixed([wide], c_noise[:2], PathDrop(labels[:2], dropped[3:]), [None])[0]
    assert_near(ours[1], alone, network_steps(4))


@pytest.mark.parametrize("kind", ["none", "structured"])
def test_one_graph(kind):
    model = routed(CONFIG)
    x, c_noise, labels = inputs(model)
    condition, mask = PathDrop(labels, torch.tensor([True, False, False])), masks(model)[kind]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_near(compiled(x, c_noise, condition, mask), model(x, c_noise, condition, mask), network_steps(4))
    torch._dynamo.reset()


def test_bf16_autocast_keeps_the_residual_stream_in_fp32():
    model = routed(CONFIG)
    x, c_noise, labels = inputs(model)
    mask, seen = masks(model)["structured"], []
    model.blocks[3].register_forward_pre_hook(lambda _, args: seen.append(args[0].x.dtype))
    for condition in (labels, NoPath(labels)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            raw = model(x, c_noise, condition, mask)
        assert_near(raw, model(x, c_noise, condition, mask), network_steps(4), dtype=torch.bfloat16)
    assert set(seen) == {torch.float32}


def test_conditions_that_do_not_fit():
    model = routed(CONFIG)
    x, c_noise, labels = inputs(model)
    with pytest.raises(ValueError, match=r"dropped must be bool of shape \(3,\), not torch.int64 of shape \(3,\)"):
        model(x, c_noise, model.drop_path(labels, labels))
    with pytest.raises(ValueError, match="label 9 is outside"):
        model(x, c_noise, model.drop_path(labels + 9))


def test_sizes_that_cannot_be():
    for changed, message in (
        ({"route_end": 4}, "a route needs blocks before it, in it and after it"),
        ({"path_drop": 1.5}, r"path_drop must be in \[0, 1\], not 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(CONFIG, **changed).check(8)
