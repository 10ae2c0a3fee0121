"""The random draws of training: sigma, noise, masks and labels to drop, of the loss alone and of a batch."""

import math
from types import SimpleNamespace

import pytest
import torch
from scipy import stats
from util import small_net

from fastmask.diffusion import EDMLoss, training_draws
from fastmask.kernels import sample_mask


def draws(images, labels, **kw):
    settings = {
        "seed": 3,
        "offset": 0,
        "num_classes": 5,
        "label_drop": 0.1,
        "length": 4,
        "keep": 2,
        "p_mean": -1.2,
        "p_std": 1.2,
    }
    return training_draws(images, labels, **{**settings, **kw})


class RecordingNet:
    """Stands in for a denoiser in `EDMLoss`, answers zero and keeps what it was asked."""

    def __init__(self, length, patch_size=2):
        self.model = SimpleNamespace(length=length, patch_size=patch_size, impl="reference")

    def raw_tokens(self, x, sigma, labels, mask):
        self.x, self.sigma, self.labels, self.mask = x, sigma, labels, mask
        return x.new_zeros(x.shape[0], self.model.length, x.shape[1] * self.model.patch_size**2)


def test_absent_noise_is_drawn_from_edms_distribution():
    net, batch = RecordingNet(4), 20_000
    EDMLoss(p_mean=-0.4, p_std=0.8)(net, torch.zeros(batch, 1, 4, 4), torch.zeros(batch, dtype=torch.int64))
    assert net.sigma.shape == (batch,)
    assert stats.kstest(net.sigma.log().double().numpy(), "norm", (-0.4, 0.8)).pvalue > 0.01
    z = net.x / net.sigma[:, None, None, None]
    assert stats.kstest(z.flatten().double().numpy(), "norm").pvalue > 0.01
    assert net.mask is None


def test_absent_sigma_has_edms_defaults():
    net = RecordingNet(1)
    EDMLoss()(net, torch.zeros(20_000, 1, 2, 2), torch.zeros(20_000, dtype=torch.int64))
    assert stats.kstest(net.sigma.log().double().numpy(), "norm", (-1.2, 1.2)).pvalue > 0.01


@pytest.mark.parametrize(("ratio", "keep"), [(0.5, 8), (0.25, 12), (0.9, 1), (0.99, 1), (1e-9, 15)])
def test_absent_mask_is_drawn_at_the_ratio(ratio, keep):
    net = RecordingNet(16)
    EDMLoss(mask_ratio=ratio)(net, torch.zeros(5, 1, 8, 8), torch.zeros(5, dtype=torch.int64))
    assert torch.equal(net.mask.dropped.sum(1), torch.full((5,), 16 - keep))


def test_what_is_given_is_used():
    net = RecordingNet(16)
    images, labels = torch.randn(2, 1, 8, 8), torch.tensor([3, 1])
    mask = sample_mask(2, 16, 3, seed=1, device="cpu")
    sigma, noise = torch.tensor([0.1, 0.2]), torch.randn(2, 1, 8, 8)
    EDMLoss(mask_ratio=0.5)(net, images, labels, mask=mask, sigma=sigma, noise=noise)
    assert net.mask is mask
    assert torch.equal(net.sigma, sigma)
    assert torch.equal(net.x, images + noise)
    assert torch.equal(net.labels, labels)


def drawn(images, ratio=0.5, **kw):
    """Return what a call of the loss drew: sigma, noise over it, and the mask's two lists."""
    net = RecordingNet(16)
    EDMLoss(mask_ratio=ratio)(net, images, torch.zeros(len(images), dtype=torch.int64), **kw)
    unit = (net.x - images) / net.sigma[:, None, None, None]
    return [net.sigma, unit, *([] if net.mask is None else net.mask[:2])]


def test_draws_by_a_seed_are_those_of_training():
    images = torch.zeros(4, 1, 8, 8)
    by_training = draws(images, torch.arange(4), seed=2**63 + 5, offset=9, length=16, keep=8)
    for seed, offset in ((2**63 + 5, 9), (torch.tensor(-(2**63) + 5), torch.tensor(9))):
        net = RecordingNet(16)
        EDMLoss(mask_ratio=0.5)(net, images, torch.arange(4), seed=seed, offset=offset)
        assert torch.equal(net.sigma, by_training.sigma)
        assert torch.equal(net.x, by_training.noise)
        assert all(torch.equal(a, b) for a, b in zip(net.mask[:2], by_training.mask[:2], strict=True))


@pytest.mark.parametrize("split", [[2, 4], [1, 1, 4], [6]])
def test_draws_by_a_seed_know_no_batches(split):
    images = torch.zeros(6, 1, 8, 8)
    whole = drawn(images, seed=3, offset=10)
    firsts = [sum(split[:i]) for i in range(len(split))]
    for first, count in reversed(list(zip(firsts, split, strict=True))):
        torch.manual_seed(first)
        part = drawn(images[:count], seed=3, offset=10 + first)
        assert all(torch.equal(a, b[first : first + count]) for a, b in zip(part, whole, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(drawn(images, seed=4, offset=10), whole, strict=True))
    # What a call brings changes nothing of the rest.
    given = torch.linspace(0.5, 2.0, 6)
    _, unit, ids_keep, _ = drawn(images, seed=3, offset=10, sigma=given)
    torch.testing.assert_close(unit, whole[1])
    assert torch.equal(ids_keep, whole[2])


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_without_a_seed_every_call_draws_anew(ratio):
    images = torch.zeros(4, 1, 8, 8)
    torch.manual_seed(7)
    calls = [drawn(images, ratio) for _ in range(3)]
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert not any(torch.equal(a, b) for a, b in zip(calls[one], calls[other], strict=True))
    torch.manual_seed(7)
    for call in calls:
        assert all(torch.equal(a, b) for a, b in zip(drawn(images, ratio), call, strict=True))


def test_a_call_that_brings_everything_draws_nothing():
    images, sigma = torch.zeros(2, 1, 8, 8), torch.ones(2)
    before = torch.get_rng_state()
    mask = sample_mask(2, 16, 3, seed=1, device="cpu")
    drawn(images, sigma=sigma, noise=images, mask=mask)
    drawn(images, seed=3, offset=0)
    assert torch.equal(torch.get_rng_state(), before)
    drawn(images)
    assert not torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("kw", "missing"), [({"seed": 3}, "offset"), ({"offset": 0}, "seed")])
def test_a_seed_needs_the_samples_indices(kw, missing):
    """A seed alone would give every call the same noise."""
    with pytest.raises(ValueError, match=rf"{next(iter(kw))} is given and {missing} is missing"):
        drawn(torch.zeros(2, 1, 8, 8), **kw)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_noise_has_the_dtype_of_the_images(dtype):
    images = torch.zeros(3, 1, 8, 8, dtype=dtype)
    net = RecordingNet(16)
    EDMLoss()(net, images, torch.zeros(3, dtype=torch.int64), seed=3, offset=0)
    assert net.x.dtype == dtype
    expected = draws(images.float(), torch.arange(3), length=16, keep=16)
    assert torch.equal(net.x, expected.noise.to(dtype))


def test_draws_compile_without_a_graph_break_and_stay_fresh():
    net = small_net()
    images, labels = torch.randn(3, 3, 8, 8), torch.arange(3)
    compiled = torch.compile(lambda: EDMLoss(mask_ratio=0.5)(net, images, labels), fullgraph=True, backend="aot_eager")
    torch.manual_seed(7)
    first, second = compiled().total, compiled().total
    assert (first != second).all()
    torch.manual_seed(7)
    assert torch.equal(compiled().total, first)


def test_the_global_seed_governs_the_draws():
    net = small_net()
    images, labels = torch.randn(3, 3, 8, 8), torch.arange(3)
    loss = EDMLoss(mask_ratio=0.5)
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        results.append(loss(net, images, labels).total)
    assert torch.equal(results[0], results[1])
    assert (results[0] != results[2]).all()


# Those of a training batch


def test_draws_belong_to_samples():
    images, labels = torch.zeros(8, 3, 4, 4), torch.arange(8) % 5
    whole = draws(images, labels, offset=2**33 - 3, label_drop=0.5)
    halves = [draws(images[:3], labels[:3], offset=2**33 - 3, label_drop=0.5)]
    halves += [draws(images[3:], labels[3:], offset=2**33, label_drop=0.5)]
    for name in ("labels", "sigma", "noise"):
        assert torch.equal(torch.cat([getattr(half, name) for half in halves]), getattr(whole, name)), name
    for name in ("ids_keep", "ids_restore"):
        assert torch.equal(torch.cat([getattr(half.mask, name) for half in halves]), getattr(whole.mask, name)), name
    assert len(set(whole.sigma.tolist())) == 8


def test_draws_depend_on_the_seed():
    images, labels = torch.zeros(8, 3, 4, 4), torch.arange(8) % 5
    one, other = draws(images, labels, length=64, keep=32), draws(images, labels, length=64, keep=32, seed=4)
    assert (one.sigma != other.sigma).all()
    assert (one.noise != other.noise).any((1, 2, 3)).all()
    assert (one.mask.ids_keep != other.mask.ids_keep).any(1).all()


def test_drawn_noise_and_masks():
    batch = 20_000
    drawn = draws(torch.ones(batch, 1, 2, 2), torch.zeros(batch, dtype=torch.int64), p_mean=-0.4, p_std=0.8)
    log_sigma = drawn.sigma.log().double()
    assert stats.kstest(log_sigma.numpy(), "norm", (-0.4, 0.8)).pvalue > 0.01
    z = (drawn.noise / drawn.sigma[:, None, None, None]).double().flatten(1)
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 0.01
    # Noise level, noise, mask and dropped labels come from streams of their own.
    columns = torch.cat([log_sigma[:, None], z, drawn.mask.dropped[:, :3], drawn.labels[:, None]], dim=1)
    correlation = torch.corrcoef(columns.T)
    between_masked = correlation[5:8, 5:8].clone()
    correlation[5:8, 5:8] = 0  # two of four positions are dropped: these exclude one another
    assert (correlation.fill_diagonal_(0).abs() < 5 / math.sqrt(batch)).all()
    assert (between_masked - torch.eye(3) + (1 - torch.eye(3)) / 3).abs().max() < 5 / math.sqrt(batch)
    expected = sample_mask(batch, 4, 2, seed=3, device="cpu")
    assert torch.equal(drawn.mask.ids_keep, expected.ids_keep)


def test_nothing_dropped_is_no_mask():
    assert draws(torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64), keep=4).mask is None


def test_labels_are_dropped_at_the_rate():
    batch = 20_000
    images, labels = torch.zeros(batch, 1, 2, 2), torch.arange(batch) % 5
    assert torch.equal(draws(images, labels, label_drop=0.0).labels, labels)
    assert torch.equal(draws(images, labels, label_drop=1.0).labels, torch.full_like(labels, 5))
    dropped = draws(images, labels, label_drop=0.1).labels
    kept = dropped != 5
    assert torch.equal(dropped[kept], labels[kept])
    assert abs((~kept).double().mean() - 0.1) < 5 * math.sqrt(0.1 * 0.9 / batch)
