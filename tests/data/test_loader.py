import contextlib
import multiprocessing
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fastmask.data import batches, sample_ids
from fastmask.data.images.dataset import ImageDataset
from fastmask.data.loader import to_gpu
from fastmask.data.sources.open import open_source

CPU = torch.device("cpu")


class Numbers:
    """A dataset whose samples are their own ids."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def read(self, ids):
        return torch.from_numpy(ids), torch.from_numpy(ids) % 3


def ids_of(size=10, batch_size=4, seed=0, start=0, stop=20, num_workers=0, **shared):
    settings = {"batch_size": batch_size, "seed": seed, "start": start, "stop": stop, "num_workers": num_workers}
    parts = batches(Numbers(size), **settings, device=CPU, **shared)
    return [ids.tolist() for ids, _ in parts]


def flat(parts):
    return [i for part in parts for i in part]


def test_each_epoch_is_a_permutation():
    ids = sample_ids(0, 0, 70, 7).reshape(10, 7)
    assert (np.sort(ids, axis=1) == np.arange(7)).all()
    assert len({tuple(epoch) for epoch in ids.tolist()}) > 5


def test_order_is_a_function_of_the_seed():
    assert np.array_equal(sample_ids(3, 0, 50, 20), sample_ids(3, 0, 50, 20))
    assert not np.array_equal(sample_ids(3, 0, 20, 20), sample_ids(4, 0, 20, 20))
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002  (the global state must not matter)
    assert sample_ids(0, 0, 6, 6).tolist() == np.random.default_rng([0, 0]).permutation(6).tolist()


@pytest.mark.parametrize("size", [1, 3, 7, 64])
def test_any_part_can_be_read_alone(size):
    whole = sample_ids(1, 0, 100, size)
    for offset in (0, 1, 6, 7, 50, 99):
        for count in {0, 1, (100 - offset) // 2, 100 - offset}:
            assert np.array_equal(sample_ids(1, offset, count, size), whole[offset : offset + count])


def test_a_far_epoch_is_read_at_once():
    assert sorted(sample_ids(0, 10**12 * 5, 5, 5)) == list(range(5))


def test_batches_across_epochs():
    parts = ids_of(stop=22)
    assert [len(part) for part in parts] == [4, 4, 4, 4, 4, 2]
    assert flat(parts) == sample_ids(0, 0, 22, 10).tolist()


@pytest.mark.parametrize("start", [1, 4, 9, 10, 17])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_any_start_and_batch_size_give_the_same_samples(start, batch_size):
    assert flat(ids_of(start=start, batch_size=batch_size)) == flat(ids_of())[start:]


def test_nothing_left_to_read():
    assert ids_of(start=20) == []


def test_workers_give_the_same_batches():
    assert ids_of(start=3, num_workers=2) == ids_of(start=3)


def test_labels_come_along():
    for ids, labels in batches(Numbers(10), batch_size=4, seed=0, start=0, stop=9, num_workers=0, device=CPU):
        assert torch.equal(labels, ids % 3)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("damage", ["cut off", "gone"])
def test_an_unreadable_image_is_one_line(tmp_path, num_workers, damage):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for i in range(6):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    data = ImageDataset(open_source(tmp_path), 16, None, False)
    if damage == "gone":
        (tmp_path / "3.png").unlink()
    else:
        (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:300])
    with pytest.raises(ValueError, match=r"3\.png cannot be read as an image: ") as error:
        list(batches(data, batch_size=2, seed=0, start=0, stop=6, num_workers=num_workers, device=CPU))
    assert multiprocessing.active_children() == []
    assert str(error.value).startswith(str(tmp_path))
    assert "\n" not in str(error.value)


class Slow(Numbers):
    """A dataset whose later samples take minutes."""

    def read(self, ids):
        if 0 not in ids:
            time.sleep(300)
        return super().read(ids)


def test_workers_that_are_reading_end_with_the_loader():
    """They ignore the signals that Python ends processes with, so it would wait for them at its exit."""
    first = int(np.flatnonzero(sample_ids(0, 0, 10, 10) == 0)[0])
    settings = {"seed": 0, "start": first, "stop": 100, "num_workers": 1, "device": CPU}
    loader = batches(Slow(10), batch_size=1, **settings)
    next(loader)
    (worker,) = multiprocessing.active_children()
    loader.close()
    worker.join(timeout=20)
    assert not worker.is_alive()


@pytest.mark.parametrize(("ranks", "batch_size"), [(1, 12), (1, 4), (2, 6), (2, 2), (3, 4)])
def test_the_ranks_and_their_parts_make_up_every_step(ranks, batch_size):
    """12 samples a step, from the second step of a run on: the same samples whatever reads them."""
    parts = [ids_of(batch_size=batch_size, start=12, stop=36, step_size=12, rank=r, ranks=ranks) for r in range(ranks)]
    per_step = len(parts[0]) // 2
    steps = [[part for rank in parts for part in rank[i * per_step : (i + 1) * per_step]] for i in range(2)]
    assert flat([part for step in steps for part in step]) == sample_ids(0, 12, 24, 10).tolist()


def test_a_step_must_divide():
    with pytest.raises(ValueError, match="a step of 10 samples does not divide into batches of 4 on 2 ranks"):
        ids_of(step_size=10, ranks=2)


class Nested(Numbers):
    """A dataset whose condition is a dict of tensors and a tuple of them."""

    def read(self, ids):
        stored, labels = super().read(ids)
        return stored, {"a": stored[:, None] + torch.arange(2), "b": (labels, -stored)}


def assert_nested(parts, stop):
    given = [Nested(10).read(sample_ids(0, first, min(4, stop - first), 10)) for first in range(0, stop, 4)]
    for (stored, condition), (ids, expected) in zip(parts, given, strict=True):
        assert torch.equal(stored, ids)
        assert condition.keys() == expected.keys()
        for ours, theirs in zip((condition["a"], *condition["b"]), (expected["a"], *expected["b"]), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_condition_comes_along_whatever_it_is(num_workers):
    settings = {"batch_size": 4, "seed": 0, "start": 0, "stop": 10, "num_workers": num_workers, "device": CPU}
    assert_nested(batches(Nested(10), **settings), 10)


def test_all_tensors_of_a_condition_are_copied_to_a_gpu(monkeypatch):
    """On a CPU, with streams that do nothing: each tensor is told which stream computes with it."""
    told = []
    stream = SimpleNamespace(record_event=lambda: "copied", wait_event=told.append)
    for name, value in {"Stream": stream, "stream": contextlib.nullcontext(), "current_stream": stream}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, by: told.append(tensor.data_ptr()))
    given = [Nested(10).read(sample_ids(0, first, 4, 10)) for first in (0, 4)]
    copied = list(to_gpu(iter(given), CPU))
    assert_nested(copied, 8)
    tensors = [[stored, condition["a"], *condition["b"]] for stored, condition in copied]
    assert told == [x for part in tensors for x in ("copied", *(tensor.data_ptr() for tensor in part))]
