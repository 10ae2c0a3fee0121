import math
from itertools import combinations

import pytest
import torch
from scipy import stats

from fastmask.kernels import Mask, gather_tokens, restore_tokens, sample_mask


def draw(batch, length, keep, **kw):
    return sample_mask(batch, length, keep, **{"seed": 0, "device": "cpu", **kw})


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 9])
def test_counts_and_index_lists(length):
    for keep in range(1, length + 1):
        mask = draw(7, length, keep)
        assert mask.ids_keep.dtype == mask.ids_restore.dtype == torch.int32
        assert mask.ids_keep.shape == (7, keep)
        assert mask.ids_restore.shape == (7, length)
        assert torch.equal(mask.dropped.sum(1), torch.full((7,), length - keep))
        for kept, restore in zip(mask.ids_keep.tolist(), mask.ids_restore.tolist(), strict=True):
            assert kept == sorted(set(kept))
            assert sorted(restore) == list(range(length))
            assert [restore[position] for position in kept] == list(range(keep))
            dropped = [position for position in range(length) if position not in kept]
            assert [restore[position] for position in dropped] == list(range(keep, length))


@pytest.mark.parametrize(("length", "keep"), [(255, 127), (16, 1), (16, 16)])
def test_restore_undoes_gather(length, keep):
    mask = draw(5, length, keep)
    x = torch.randn(5, length, 3)
    restored = restore_tokens(
        gather_tokens(x, mask.ids_keep), torch.full((3,), 9.0), torch.zeros(length, 3), mask.ids_restore
    )
    assert torch.equal(restored, x.masked_fill(mask.dropped[..., None], 9.0))


def test_keeping_all_keeps_the_order():
    mask = draw(3, 6, 6)
    in_order = torch.arange(6, dtype=torch.int32).expand(3, 6)
    assert torch.equal(mask.ids_keep, in_order)
    assert torch.equal(mask.ids_restore, in_order)


def test_every_subset_is_equally_likely():
    mask = draw(20_000, 6, 3, seed=1)
    subsets = dict.fromkeys(combinations(range(6), 3), 0)
    for kept in mask.ids_keep.tolist():
        subsets[tuple(kept)] += 1
    assert stats.chisquare(list(subsets.values())).pvalue > 0.01


def test_every_pair_is_kept_equally_often():
    batch, length, keep = 20_000, 64, 32
    kept = (~draw(batch, length, keep, seed=2).dropped).double()
    share = kept.T @ kept / batch
    single, pair = keep / length, keep * (keep - 1) / (length * (length - 1))
    expected = torch.full((length, length), pair, dtype=torch.float64).fill_diagonal_(single)
    z = (share - expected) / (expected * (1 - expected) / batch).sqrt()
    # Of 2080 standard normal numbers one in 800 draws exceeds 5.
    assert z.abs().max() < 5
    # Neighbouring samples are independent: their masks share keep^2 / length positions on average.
    overlap = (kept[1:] * kept[:-1]).sum(1)
    assert abs(overlap.mean() - keep**2 / length) < 5 * overlap.std() / math.sqrt(batch - 1)


def test_a_samples_mask_depends_on_its_global_index_alone():
    whole = draw(9, 32, 11, seed=5, offset=2**33 - 4)
    parts = [draw(4, 32, 11, seed=5, offset=2**33 - 4), draw(5, 32, 11, seed=5, offset=torch.tensor(2**33))]
    assert torch.equal(torch.cat([part.ids_keep for part in parts]), whole.ids_keep)
    assert torch.equal(torch.cat([part.ids_restore for part in parts]), whole.ids_restore)
    assert len({tuple(kept) for kept in whole.ids_keep.tolist()}) == 9


def test_the_seed_decides():
    assert torch.equal(draw(4, 64, 32, seed=3).ids_keep, draw(4, 64, 32, seed=torch.tensor(3)).ids_keep)
    assert not torch.equal(draw(4, 64, 32, seed=3).ids_keep, draw(4, 64, 32, seed=4).ids_keep)


def test_masks_of_one_sample_are_nested():
    # The keys belong to positions, so a schedule that keeps more adds positions and takes none away.
    fewer, more = draw(6, 50, 20), draw(6, 50, 30)
    assert not (more.dropped & ~fewer.dropped).any()


@pytest.mark.parametrize("keep", [0, -1, 7])
def test_impossible_counts(keep):
    with pytest.raises(ValueError, match=f"between 1 and the 6 positions, not {keep}"):
        draw(2, 6, keep)


def test_dropped_is_read_from_any_order_of_rows():
    mask = Mask(torch.tensor([[3, 1]]), torch.tensor([[2, 1, 3, 0]]))
    assert mask.dropped.tolist() == [[True, False, True, False]]


@pytest.mark.gpu
def test_a_gpu_draws_the_same_mask():
    on_gpu, on_cpu = draw(33, 255, 100, seed=8, device="cuda"), draw(33, 255, 100, seed=8)
    assert torch.equal(on_gpu.ids_keep.cpu(), on_cpu.ids_keep)
    assert torch.equal(on_gpu.ids_restore.cpu(), on_cpu.ids_restore)
