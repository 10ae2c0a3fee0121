"""Representation alignment, by its definition in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from util import batch_of, small_net

from fastmask.diffusion import EDM, Denoiser, Denoising, MaskedDenoising, Objective
from fastmask.diffusion.alignment import AlignConfig, Alignment
from fastmask.kernels import Mask, sample_mask
from fastmask.models.deferred import DeferredConfig
from fastmask.models.maskdit import MaskDiTConfig
from fastmask.models.sprint import SprintConfig
from fastmask.models.tread import TreadConfig
from fastmask.testing import assert_near, network_steps

LENGTH, WIDTH, FEATURES = 16, 16, 24
ROUTED = {"width": WIDTH, "depth": 4, "route_start": 1, "route_end": 3}


def networks():
    """A denoiser of each kind, in which no weight is zero, and the blocks that see the kept tokens only."""
    deferred = DeferredConfig(width=WIDTH, depth=2, mixer_width=8, mixer_depth=3)
    kinds = ((TreadConfig(**ROUTED), (2, 3)), (SprintConfig(**ROUTED), (2, 3)), (deferred, (1, 2)), (None, (1, 2)))
    for config, kept in kinds:
        net = small_net()
        if config is not None:
            net = Denoiser(config.build(3, 8, 5), EDM())
            for parameter in net.parameters():
                torch.nn.init.normal_(parameter, std=0.2)
        yield net, kept


def masks():
    """None, a dense mask and a packed one, for three samples."""
    packed = sample_mask(3, LENGTH, torch.tensor([2, 9, 5], dtype=torch.int32), seed=1, device="cpu", total=16)
    return [None, sample_mask(3, LENGTH, 5, seed=0, device="cpu"), packed]


def kept_of(mask: Mask | None, sample: int) -> torch.Tensor:
    """Return the positions of a sample that are kept, in the order of its tokens."""
    if mask is None:
        return torch.arange(LENGTH)
    if mask.cu_seqlens is None:
        return mask.ids_keep[sample].long()
    first, stop = mask.cu_seqlens[sample : sample + 2].tolist()
    return mask.ids_keep[first:stop].long()


def hidden_states(block, call):
    """Return the residual stream after a block, one tensor for each sample, and what the call returns."""
    found = []

    def keep(_, arguments, stream):
        packing = arguments[2]
        ends = None if packing.cu_seqlens is None else packing.cu_seqlens.tolist()
        for sample, gate in enumerate(stream.gate):
            rows = sample if ends is None else slice(ends[sample], ends[sample + 1])
            found.append(stream.x[rows] + gate * stream.branch[rows])

    handle = block.register_forward_hook(keep)
    result = call()
    handle.remove()
    return found, result


BLOCKS = [(kind, block) for kind, depth in enumerate((4, 4, 2, 2)) for block in range(1, depth + 1)]


@pytest.mark.parametrize(("kind", "block"), BLOCKS)
@pytest.mark.parametrize("masking", range(3), ids=["all", "dense", "packed"])
def test_the_loss_is_that_of_the_paper(kind, masking, block):
    net, sees_kept = list(networks())[kind]
    net, mask = net.double(), masks()[masking]
    images, labels, t, noise = batch_of(net, dtype=torch.float64)
    features = torch.randn(3, LENGTH, FEATURES, dtype=torch.float64)
    blocks = net.model.blocks
    width = blocks[block - 1].attn.qkv.in_features
    term = Alignment(0.5, block, width, 32, FEATURES).double()
    objective = Objective(net, [Denoising(), term])
    hidden, losses = hidden_states(blocks[block - 1], lambda: objective(images, labels, mask, t, noise, features))
    seen = mask if block in sees_kept else None
    expected = []
    for sample, tokens in enumerate(hidden):
        one, two, three = (term.projector[i] for i in (0, 2, 4))
        z = three(F.silu(two(F.silu(one(tokens)))))
        y = features[sample, kept_of(seen, sample)]
        assert z.shape == y.shape
        cosine = (z * y).sum(1) / (z.norm(dim=1) * y.norm(dim=1))
        expected.append(-cosine.mean())
    torch.testing.assert_close(losses["alignment"], torch.stack(expected), rtol=1e-9, atol=1e-12)
    assert torch.equal(losses["loss"], losses["denoising"] + 0.5 * losses["alignment"])


@pytest.mark.parametrize("masking", range(3), ids=["all", "dense", "packed"])
def test_gradients_are_those_of_float64(masking):
    net, mask = small_net(), masks()[masking]
    term = Alignment(0.5, 2, WIDTH, 32, FEATURES)
    inputs, features = batch_of(net), torch.randn(3, LENGTH, FEATURES)
    exact = copy.deepcopy(Objective(net, [MaskedDenoising(), term])).double()
    objective = Objective(net, [MaskedDenoising(), term])
    for which, dtype in ((objective, torch.float32), (exact, torch.float64)):
        images, labels, t, noise = (x.to(dtype) if x.is_floating_point() else x for x in inputs)
        which(images, labels, mask, t, noise, features.to(dtype))["alignment"].sum().backward()
    steps = network_steps(2, backward=True) + 2 * 8  # three Linears, two activations, a norm, a product, a mean
    for (name, ours), theirs in zip(objective.named_parameters(), exact.parameters(), strict=True):
        after = any(part in name for part in ("decoder", "final_layer", "mask_token"))
        assert (ours.grad is None) == after, name
        if ours.grad is not None:
            assert_near(ours.grad, theirs.grad, steps)


def test_half_precision_does_not_overflow():
    """The square of a feature's norm is above the largest fp16, and a NaN would follow."""
    net = small_net()
    images, labels, t, noise = batch_of(net)
    features = (300 * torch.randn(3, LENGTH, FEATURES)).half()
    assert features.norm(dim=2, dtype=torch.float32).square().min() > torch.finfo(torch.float16).max
    term = Alignment(0.5, 1, WIDTH, 32, FEATURES)
    objective = Objective(net, [MaskedDenoising(), term])
    exact = objective(images, labels, masks()[1], t, noise, features.float())["alignment"]
    with torch.autocast("cpu", torch.bfloat16):
        losses = objective(images, labels, masks()[1], t, noise, features)
    assert losses["alignment"].dtype == torch.float32
    torch.testing.assert_close(losses["alignment"], exact, rtol=0, atol=0.05)  # of at most 1
    half = objective(images, labels, masks()[1], t, noise, features)["alignment"]
    assert torch.equal(half, exact)  # the features are the same numbers
    losses["loss"].sum().backward()
    assert all(p.grad.isfinite().all() for p in objective.parameters() if p.grad is not None)


@pytest.mark.parametrize("masking", range(3), ids=["all", "dense", "packed"])
def test_an_inactive_term_leaves_the_objective_as_it_was(masking):
    net, mask = small_net(), masks()[masking]
    inputs, term = batch_of(net), Alignment(0.5, 2, WIDTH, 32, FEATURES)
    images, labels, t, noise = inputs
    both, alone = Objective(net, [MaskedDenoising(), term]), Objective(net, [MaskedDenoising()])
    plain = alone(images, labels, mask, t, noise)
    active = both(images, labels, mask, t, noise, torch.randn(3, LENGTH, FEATURES))
    term.active = False
    left = both(images, labels, mask, t, noise)
    assert left.keys() == plain.keys()
    assert all(torch.equal(left[name], plain[name]) for name in plain)
    # The other terms do not feel it either.
    assert all(torch.equal(active[name], plain[name]) for name in ("denoising", "reconstruction"))


def test_recomputed_blocks_give_the_same_bits():
    net = small_net()
    images, labels, t, noise = batch_of(net)
    features, mask = torch.randn(3, LENGTH, FEATURES), masks()[1]
    objective = Objective(net, [MaskedDenoising(), Alignment(0.5, 1, WIDTH, 32, FEATURES)])
    found = []
    for again in (False, True):
        net.model.checkpoint_blocks = again
        objective.zero_grad()
        objective(images, labels, mask, t, noise, features)["loss"].sum().backward()
        found.append([p.grad.clone() for p in objective.parameters()])
    assert all(map(torch.equal, *found))


def test_wrong_features():
    net = small_net()
    images, labels, t, noise = batch_of(net)
    objective = Objective(net, [MaskedDenoising(), Alignment(0.5, 1, WIDTH, 32, FEATURES)])
    with pytest.raises(
        ValueError, match=r"features must have shape \(3, 16, 24\), one for each patch, and are missing"
    ):
        objective(images, labels, None, t, noise)
    for shape in ((3, 15, FEATURES), (3, LENGTH, 8), (2, LENGTH, FEATURES)):
        with pytest.raises(ValueError, match=r"features must have shape .* are of shape"):
            objective(images, labels, None, t, noise, torch.randn(shape))
    with pytest.raises(ValueError, match="features of images of several sizes are not aligned"):
        objective.mixed([images], labels, [None], t, [noise])


def test_one_term_reads_a_hidden_state():
    terms = [Alignment(0.5, 1, WIDTH, 32, FEATURES), Alignment(0.5, 2, WIDTH, 32, FEATURES)]
    terms[1].weights = {"other": 0.5}
    with pytest.raises(ValueError, match="one term of an objective may read a hidden state, not 2"):
        Objective(small_net(), [MaskedDenoising(), *terms])
    objective = Objective(small_net(), [MaskedDenoising(), terms[0]])
    assert {name.split(".")[0] for name in objective.state_dict()} == {"net", "terms"}


def test_the_projector_is_counted_as_its_operators():
    term = Alignment(0.5, 1, WIDTH, 32, FEATURES)
    with FlopCounterMode(display=False) as counter:
        term.projector(torch.randn(1, 5, WIDTH))
    assert 2 * term.macs(5) == counter.get_total_flops()


@pytest.mark.parametrize(("depth", "block"), [(1, 1), (2, 1), (4, 1), (12, 4), (24, 8), (28, 8), (32, 8)])
def test_the_block_of_a_depth(depth, block):
    network = MaskDiTConfig(depth=depth)
    assert AlignConfig(align_coef=0.5, align_teacher="cached").block(network) == block
    assert AlignConfig(align_coef=0.5, align_teacher="cached", align_block=1).block(network) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"align_coef": 0.5}, "give --align-teacher"),
        ({"align_teacher": "cached"}, "--align-teacher cached has no effect without --align-coef"),
        ({"align_until": 9}, "--align-until 9 has no effect without --align-coef and --align-teacher"),
        ({"align_block": 2}, "--align-block 2 has no effect without --align-coef and --align-teacher"),
        ({"align_coef": -1.0}, "align_coef must be at least 0, not -1"),
        ({"align_coef": float("nan")}, "align_coef must be at least 0, not nan"),
        (
            {"align_coef": 0.5, "align_teacher": "cached", "align_block": 5},
            "--align-block 5 is not one of the 4 blocks",
        ),
        ({"align_coef": 0.5, "align_teacher": "cached", "align_block": -1}, "align_block must be at least 0"),
        ({"align_coef": 0.5, "align_teacher": "cached", "align_hidden": 0}, "align_hidden must be at least 1"),
        ({"align_coef": 0.5, "align_teacher": "cached", "align_until": -1}, "align_until must be at least 0"),
    ],
)
def test_fields_that_cannot_be(fields, message):
    AlignConfig().check(MaskDiTConfig())
    AlignConfig(align_coef=0.5, align_teacher="cached", align_block=4).check(MaskDiTConfig())
    with pytest.raises(ValueError, match=message):
        AlignConfig(**fields).check(MaskDiTConfig())


def test_steps_with_the_term():
    on = AlignConfig(align_coef=0.5, align_teacher="cached", align_until=3)
    assert [on.active_at(step) for step in (0, 2, 3, 9)] == [True, True, False, False]
    assert AlignConfig(align_coef=0.5, align_teacher="cached").active_at(10**9)
    assert not AlignConfig().active_at(0)
