import math
import random

import pytest
import torch

from fastmask.kernels import philox, random_normal, random_uniform
from fastmask.kernels.philox import philox_words

# Counter, key and result of the authors' test file (Random123, kat_vectors, philox4x32 with 10 rounds).
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
INT64 = {"min": -(2**63), "max": 2**63 - 1}


def published_philox(counter, key):
    """Philox4x32-10 on Python's unbounded integers (Salmon et al., section 3.3)."""
    (a, b, c, d), (k0, k1) = counter, key
    for _ in range(10):
        high_0, low_0 = divmod(0xD2511F53 * a, 2**32)
        high_1, low_1 = divmod(0xCD9E8D57 * c, 2**32)
        a, b, c, d = high_1 ^ b ^ k0, low_1, high_0 ^ d ^ k1, low_0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return a, b, c, d


def published_words(seed, sample, count, stream):
    key = (seed % 2**32, seed // 2**32 % 2**32)
    low, high = sample % 2**32, sample // 2**32 % 2**32
    blocks = [published_philox((block, low, high, stream), key) for block in range(math.ceil(count / 4))]
    return [word for block in blocks for word in block][:count]


def samples(*indices):
    return torch.tensor(indices, dtype=torch.int64)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_the_oracle_gives_the_known_answers(counter, key, words):
    assert published_philox(counter, key) == words


def test_known_answer_of_counter_and_key_zero():
    assert philox_words(0, samples(0), 4, 0).tolist() == [list(KNOWN_ANSWERS[0][2])]


def test_words_are_the_published_generators():
    rng = random.Random(0)
    for _ in range(60):
        seed = rng.randrange(-(2**63), 2**64)
        stream = rng.choice([0, 1, 6, 0xFFFFFFFF, rng.randrange(2**32)])
        count = rng.randrange(1, 14)
        indices = [0, 1, -1, 2**32, INT64["max"], rng.randrange(2**63), rng.randrange(2**32)]
        expected = [published_words(seed, index, count, stream) for index in indices]
        words = philox_words(seed, samples(*indices), count, stream)
        assert words.dtype == torch.int64
        assert words.tolist() == expected, (seed, stream, count)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**32, 2**32 + 1, -(2**32), 0x123456789ABCDEF0, *INT64.values()])
def test_seed_as_int_and_as_tensor_agree(seed):
    expected = [published_words(seed, index, 6, 3) for index in (0, 9)]
    assert philox_words(seed, samples(0, 9), 6, 3).tolist() == expected
    assert philox_words(torch.tensor(seed), samples(0, 9), 6, 3).tolist() == expected


def test_all_64_bits_of_the_seed_count():
    results = {tuple(philox_words(seed, samples(0), 4, 0)[0].tolist()) for seed in (0, 1, 2**31, 2**32, 2**40, 2**63)}
    assert len(results) == 6


@pytest.mark.parametrize("draw", [philox_words, random_uniform, random_normal])
def test_a_samples_numbers_do_not_depend_on_its_batch(draw):
    index = samples(5, 2**33, 0, 6, 7, 2**40 + 1, 8)
    whole = draw(11, index, 9, 2)
    assert torch.equal(torch.cat([draw(11, index[:3], 9, 2), draw(11, index[3:], 9, 2)]), whole)
    assert torch.equal(draw(11, index.flip(0), 9, 2), whole.flip(0))
    assert torch.equal(draw(11, index, 4, 2), whole[:, :4])
    assert draw(11, index[:0], 9, 2).shape == (0, 9)


# (seed, sample, stream), near one another in every word of key and counter.
SOURCES = [(0, 0, 0), (1, 0, 0), (2**32, 0, 0), (0, 1, 0), (0, 2**32, 0), (0, 0, 1), (0, 0, 2), (0, 0, 3), (0, 1, 1)]


def test_samples_streams_and_seeds_are_uncorrelated():
    count = 1 << 16
    rows = [random_normal(seed, samples(index), count, stream)[0].double() for seed, index, stream in SOURCES]
    correlation = torch.corrcoef(torch.stack(rows)) - torch.eye(len(rows))
    assert correlation.abs().max() < 5 / math.sqrt(count)


def test_uniform_numbers_are_uniform():
    stats = pytest.importorskip("scipy.stats")
    u = random_uniform(7, torch.arange(64), 1 << 14, 1).double()
    assert u.min() > 0
    assert u.max() < 1
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 0.01
    # Five standard errors of the mean, the variance and the products of neighbours.
    root = math.sqrt(u.numel())
    centred = u - 0.5
    assert abs(centred.mean()) < 5 * math.sqrt(1 / 12) / root
    assert abs(centred.square().mean() - 1 / 12) < 5 * math.sqrt(1 / 180) / root
    assert abs((centred[:, 1:] * centred[:, :-1]).mean()) < 5 / 12 / root


def test_normal_numbers_are_normal():
    stats = pytest.importorskip("scipy.stats")
    z = random_normal(7, torch.arange(64), 1 << 14, 1).double()
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 0.01
    # Five standard errors of the first four moments, and of the products of neighbours.
    root = math.sqrt(z.numel())
    assert abs(z.mean()) < 5 / root
    assert abs(z.square().mean() - 1) < 5 * math.sqrt(2) / root
    assert abs(z.pow(3).mean()) < 5 * math.sqrt(15) / root
    assert abs(z.pow(4).mean() - 3) < 5 * math.sqrt(96) / root
    assert abs((z[:, 1:] * z[:, :-1]).mean()) < 5 / root


def test_normal_numbers_are_box_and_mullers():
    u, v = random_uniform(3, samples(1, 2), 10, 4).double().view(2, 5, 2).unbind(-1)
    exact = torch.sqrt(-2 * torch.log(u)) * torch.cos(2 * math.pi * v)
    torch.testing.assert_close(random_normal(3, samples(1, 2), 5, 4).double(), exact, rtol=0, atol=3e-6)


def test_extreme_words_stay_inside_the_open_interval(monkeypatch):
    monkeypatch.setattr(philox, "philox_words", lambda *_: torch.tensor([[0, 2**32 - 1, 2**32 - 1, 0]]))
    u = random_uniform(0, samples(0), 4, 0)
    assert u.dtype == torch.float32
    assert u.tolist() == [[2.0**-24, 1 - 2.0**-24, 1 - 2.0**-24, 2.0**-24]]
    z = random_normal(0, samples(0), 2, 0)
    assert z.dtype == torch.float32
    assert z[0].tolist() == pytest.approx([math.sqrt(48 * math.log(2)), math.sqrt(2 * 2.0**-24)], rel=1e-6)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_words():
    index = samples(0, 1, 2**33, INT64["max"])
    on_gpu = philox_words(-5, index.cuda(), 4097, 2)
    assert torch.equal(on_gpu.cpu(), philox_words(-5, index, 4097, 2))
