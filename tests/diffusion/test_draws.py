"""The random draws of training: times, noise, masks and labels to drop."""

import math

import pytest
import torch
from scipy import stats
from util import small_net

from fastmask.diffusion import EDM, MaskedDenoising, Objective, training_draws
from fastmask.diffusion.masking import kept_count
from fastmask.kernels import sample_mask

PROCESS = EDM()
SEEDED = {"seed": 3, "offset": 0}
LENGTH = 16


def unlabelled(labels, chosen):
    return labels.masked_fill(chosen, 5)


def draws(images, labels=None, process=PROCESS, **settings):
    labels = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels
    return training_draws(process, images, labels, **{"length": LENGTH, "keep": 8, "drop": unlabelled, **settings})


def tensors(drawn):
    """What was drawn, by name."""
    named = {"condition": drawn.condition, "t": drawn.t, "noise": drawn.noise}
    mask = {} if drawn.mask is None else {"ids_keep": drawn.mask.ids_keep, "ids_restore": drawn.mask.ids_restore}
    return {**named, **mask}


def assert_same(drawn, expected, part=slice(None)):
    drawn, expected = tensors(drawn), tensors(expected)
    assert drawn.keys() == expected.keys()
    for name, value in drawn.items():
        assert torch.equal(value, expected[name][part]), name


# Their distribution


@pytest.mark.parametrize("by", [{}, SEEDED], ids=["unseeded", "seeded"])
def test_distribution_of_the_draws(by):
    batch, images = 20_000, torch.ones(20_000, 1, 2, 2)
    drawn = draws(images, process=EDM(p_mean=-0.4, p_std=0.8), length=4, keep=2, label_drop=0.1, **by)
    assert drawn.t.shape == (batch,)
    log_t, noise = drawn.t.log().double(), drawn.noise.double().flatten(1)
    assert stats.kstest(log_t.numpy(), "norm", (-0.4, 0.8)).pvalue > 0.01
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 0.01
    # Times, noise, mask and dropped labels come from streams of their own.
    columns = torch.cat([log_t[:, None], noise, drawn.mask.dropped[:, :3], drawn.condition[:, None]], dim=1)
    correlation = torch.corrcoef(columns.T)
    between_masked = correlation[5:8, 5:8].clone()
    correlation[5:8, 5:8] = 0  # two of four positions are dropped: these exclude one another
    assert (correlation.fill_diagonal_(0).abs() < 5 / math.sqrt(batch)).all()
    assert (between_masked - torch.eye(3) + (1 - torch.eye(3)) / 3).abs().max() < 5 / math.sqrt(batch)


def test_times_have_edms_defaults():
    drawn = draws(torch.zeros(20_000, 1, 2, 2))
    assert stats.kstest(drawn.t.log().double().numpy(), "norm", (-1.2, 1.2)).pvalue > 0.01


@pytest.mark.parametrize(("ratio", "keep"), [(0.5, 8), (0.25, 12), (0.9, 1), (0.99, 1), (1e-9, 15)])
def test_mask_is_drawn_at_the_ratio(ratio, keep):
    mask = draws(torch.zeros(5, 1, 8, 8), keep=kept_count(LENGTH, ratio)).mask
    assert torch.equal(mask.dropped.sum(1), torch.full((5,), LENGTH - keep))


def test_mask_is_sample_masks():
    expected = sample_mask(4, LENGTH, 8, seed=3, offset=9, device="cpu")
    assert torch.equal(draws(torch.zeros(4, 1, 8, 8), seed=3, offset=9).mask.ids_keep, expected.ids_keep)


def test_nothing_dropped_is_no_mask():
    assert draws(torch.zeros(2, 1, 4, 4), keep=LENGTH).mask is None


def test_labels_are_dropped_at_the_rate():
    batch = 20_000
    images, labels = torch.zeros(batch, 1, 2, 2), torch.arange(batch) % 5
    for drop in ({}, {"label_drop": 0.0}):
        assert torch.equal(draws(images, labels, **drop, **SEEDED).condition, labels)
    assert torch.equal(draws(images, labels, label_drop=1.0, **SEEDED).condition, torch.full_like(labels, 5))
    dropped = draws(images, labels, label_drop=0.1, **SEEDED).condition
    kept = dropped != 5
    assert torch.equal(dropped[kept], labels[kept])
    assert abs((~kept).double().mean() - 0.1) < 5 * math.sqrt(0.1 * 0.9 / batch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_noise_is_fp32_and_noised_images_have_the_dtype_of_the_images(dtype):
    images = torch.zeros(3, 1, 8, 8, dtype=dtype)
    drawn = draws(images, **SEEDED)
    assert drawn.noise.dtype == torch.float32
    assert torch.equal(drawn.noise, draws(images.float(), **SEEDED).noise)
    assert EDM().noised(images, drawn.noise, drawn.t).dtype == dtype


# By a seed and the samples' indices


@pytest.mark.parametrize("split", [[3, 5], [1, 1, 6], [8]])
def test_draws_belong_to_samples(split):
    images, labels, offset = torch.zeros(8, 3, 8, 8), torch.arange(8) % 5, 2**33 - 3
    whole = draws(images, labels, label_drop=0.5, seed=3, offset=offset)
    assert len(set(whole.t.tolist())) == 8
    ends = [sum(split[: i + 1]) for i in range(len(split))]
    for end, count in reversed(list(zip(ends, split, strict=True))):
        torch.manual_seed(end)
        part = slice(end - count, end)
        drawn = draws(images[part], labels[part], label_drop=0.5, seed=3, offset=offset + part.start)
        assert_same(drawn, whole, part)


def test_draws_depend_on_the_seed():
    images = torch.zeros(8, 3, 4, 4)
    one, other = (draws(images, length=64, keep=32, seed=seed, offset=0) for seed in (3, 4))
    assert (one.t != other.t).all()
    assert (one.noise != other.noise).any((1, 2, 3)).all()
    assert (one.mask.ids_keep != other.mask.ids_keep).any(1).all()


def test_seed_and_offset_as_tensors():
    images = torch.zeros(4, 1, 8, 8)
    by_tensors = draws(images, seed=torch.tensor(-(2**63) + 5), offset=torch.tensor(9))
    assert_same(by_tensors, draws(images, seed=2**63 + 5, offset=9))


def test_one_draw_does_not_change_the_others():
    images = torch.zeros(6, 1, 8, 8)
    whole = draws(images, **SEEDED)
    assert_same(draws(images, process=EDM(p_mean=0.3), **SEEDED)._replace(t=whole.t), whole)
    assert_same(draws(images, label_drop=1.0, **SEEDED)._replace(condition=whole.condition), whole)
    assert_same(draws(images, keep=LENGTH, **SEEDED)._replace(mask=whole.mask), whole)


@pytest.mark.parametrize(("by", "missing"), [({"seed": 3}, "offset"), ({"offset": 0}, "seed")])
def test_a_seed_needs_the_samples_indices(by, missing):
    """A seed alone would give every call the same noise."""
    with pytest.raises(ValueError, match=rf"{next(iter(by))} is given and {missing} is missing"):
        draws(torch.zeros(2, 1, 8, 8), **by)


# By torch's generator


@pytest.mark.parametrize("keep", [LENGTH, 8])
def test_without_a_seed_every_call_draws_anew(keep):
    images = torch.zeros(4, 1, 8, 8)
    torch.manual_seed(7)
    calls = [draws(images, keep=keep) for _ in range(3)]
    for one, other in ((0, 1), (1, 2), (0, 2)):
        expected = tensors(calls[other])
        same = [name for name, value in tensors(calls[one]).items() if torch.equal(value, expected[name])]
        assert same == ["condition"]
    torch.manual_seed(7)
    for call in calls:
        assert_same(draws(images, keep=keep), call)


def test_only_draws_without_a_seed_change_torchs_generator():
    net = small_net()
    images, labels = torch.zeros(2, 3, 8, 8), torch.arange(2)
    before = torch.get_rng_state()
    Objective(net, [MaskedDenoising()])(images, *draws(images, labels, **SEEDED))
    assert torch.equal(torch.get_rng_state(), before)
    draws(images)
    assert not torch.equal(torch.get_rng_state(), before)


def drawn_losses():
    """A function that draws for a fixed batch and returns its losses."""
    objective = Objective(small_net(), [MaskedDenoising()])
    images, labels = torch.randn(3, 3, 8, 8), torch.arange(3)
    return lambda: objective(images, *draws(images, labels))["loss"]


def test_draws_compile_without_a_graph_break_and_stay_fresh():
    compiled = torch.compile(drawn_losses(), fullgraph=True, backend="aot_eager")
    torch.manual_seed(7)
    first, second = compiled(), compiled()
    assert (first != second).all()
    torch.manual_seed(7)
    assert torch.equal(compiled(), first)


def test_the_global_seed_governs_the_draws():
    losses, results = drawn_losses(), []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        results.append(losses())
    assert torch.equal(results[0], results[1])
    assert (results[0] != results[2]).all()
