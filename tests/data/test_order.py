import itertools
import tracemalloc

import numpy as np
import pytest
from scipy.stats import chi2

from fastmask.data import order
from fastmask.data.order import LISTED, following, shuffled


def whole(seed, epoch, size):
    return shuffled(seed, epoch, np.arange(size), size)


def unlikely(counts):
    """Return the probability of counts at least so uneven, were all alike."""
    counts = np.asarray(counts, float)
    expected = counts.mean()
    return chi2.sf(((counts - expected) ** 2).sum() / expected, counts.size - 1)


@pytest.mark.parametrize("size", [1, 2, 7, LISTED, LISTED + 1, 66_049, 70_001, 2**17, 1_281_167])
def test_every_id_comes_once(size):
    assert (np.bincount(whole(3, 5, size), minlength=size) == 1).all()


@pytest.mark.parametrize("size", [*range(1, 70), 120, 121, 122, 257])
def test_the_bijection_holds_for_few_too(size, monkeypatch):
    monkeypatch.setattr(order, "LISTED", 0)
    assert np.array_equal(np.sort(whole(0, 2, size)), np.arange(size))


@pytest.mark.parametrize("listed", [0, LISTED])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 64, 65, 121, 122])
def test_what_follows_is_a_round_through_all(size, listed, monkeypatch):
    """The order of a list, by the rounds and by their inverse."""
    monkeypatch.setattr(order, "LISTED", listed)
    rounds = [[0] for _ in range(2)]
    for seed, ids in enumerate(rounds):
        while len(ids) < size:
            ids.append(following(seed, ids[-1], size))
        assert sorted(ids) == list(range(size))
        assert following(seed, ids[-1], size) == 0
    assert size < 7 or rounds[0] != rounds[1]


@pytest.mark.parametrize("size", [LISTED + 1, 1_281_167, 10**12])
def test_what_follows_among_many(size):
    """The rounds have an inverse: the order continues from an id as from its position."""
    places = np.array([0, 1, size // 3, size - 2])
    ids = shuffled(5, order._REPLACING, np.append(places, places + 1), size)
    assert [following(5, item, size) for item in ids[:4].tolist()] == ids[4:].tolist()


@pytest.mark.parametrize("size", [5, 100_000])
def test_a_function_of_seed_and_epoch(size):
    first = whole(0, 0, size)
    assert np.array_equal(first, whole(0, 0, size))
    for other in (whole(1, 0, size), whole(0, 1, size), whole(2**70, 10**12, size)):
        assert not np.array_equal(first, other)
    positions = np.array([[3, 0], [4, 3]])
    assert np.array_equal(shuffled(0, 0, positions, size), first[positions])


def test_a_billion_cost_no_memory():
    tracemalloc.start()
    ids = shuffled(0, 7, np.arange(10**9 - 1000, 10**9), 10**9)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert len(set(ids.tolist())) == 1000
    assert ids.min() >= 0
    assert ids.max() < 10**9


@pytest.mark.parametrize("size", [LISTED + 1, 100_000, 2**18])
def test_uniform(size):
    """Where an id comes, what comes after it and what comes there in the next epoch are all even."""
    bins = 64
    orders = [whole(11, epoch, size) for epoch in range(12)]
    where = np.arange(size) * bins // size
    places = [np.bincount(where * bins + ids * bins // size, minlength=bins * bins) for ids in orders]
    after = [np.bincount((ids[1:] - ids[:-1]) % size * bins // size, minlength=bins) for ids in orders]
    later = [np.bincount((b - a) % size * bins // size, minlength=bins) for a, b in itertools.pairwise(orders)]
    for counts in (sum(places), sum(after), sum(later), *after, *later):
        assert unlikely(counts) > 1e-5


def test_first_ids_of_many_epochs_are_uniform():
    size, epochs, bins = 100_003, 6000, 50
    first = np.stack([shuffled(0, epoch, np.arange(4), size) for epoch in range(epochs)])
    for column in first.T:
        assert unlikely(np.bincount(column * bins // size, minlength=bins)) > 1e-5
    pairs = first[:, 0] * 10 // size * 10 + first[:, 1] * 10 // size
    assert unlikely(np.bincount(pairs, minlength=100)) > 1e-5


def test_the_test_of_uniformity_sees_a_cyclic_shift():
    size, bins = 100_000, 64
    ids = (np.arange(size) * 7919 + 12345) % size
    assert unlikely(np.bincount((ids[1:] - ids[:-1]) % size * bins // size, minlength=bins)) < 1e-5
