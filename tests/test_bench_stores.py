"""Everything that the bench of stores reads with returns what was stored, and its gate is red where one does not."""

import contextlib

import numpy as np
import pytest

from bench.data import bench_stores


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(bench_stores, "RECORDS", 256)
    monkeypatch.setattr(bench_stores, "BATCH", 16)
    return bench_stores.moments(256)


def test_every_reader_returns_the_records(small, tmp_path):
    stored, labels = small
    for name, read in bench_stores.prepared(tmp_path, stored, labels).items():
        for workers in (0, 1):
            with contextlib.closing(read(workers)) as parts:
                bench_stores.check(stored, labels, next(parts), name)
                for _ in range(20):  # more than one time through
                    bench_stores.check(stored, labels, next(parts), "copy")


def test_the_gate_is_red_for_other_records(small):
    stored, labels = small
    ids = np.array(next(iter(bench_stores.Order())))
    bench_stores.check(stored, labels, (stored[ids], labels[ids]), "x")
    changed = stored[ids].copy()
    changed[5, 7, 31, 31] += 1
    for batch, said in (
        ((changed, labels[ids]), "x: the records are not those that were stored"),
        ((stored[ids], labels[ids] + 1), "x: the labels are not those of the records"),
        ((stored[ids // 128], labels[ids // 128]), "x: 16 records, 2 of them different"),
        ((stored[ids[::-1]], labels[ids[::-1]]), "x: the records are not in the order that was asked for"),
    ):
        with pytest.raises(AssertionError, match=said):
            bench_stores.check(stored, labels, batch, "x")


def test_workers_read_ahead_untimed_and_end_with_the_timing(small, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_stores, "TIMED", 3)
    read, closed = [], []

    def reader(workers):
        try:
            for number in range(100):
                read.append(number)
                yield number
        finally:
            closed.append(workers)

    taken = bench_stores.take({"a": reader, "b": reader}, 2, 2)
    assert {name: len(times) for name, times in taken.items()} == {"a": 2, "b": 2}
    assert read == [*range(1 + 2 * 2 + 3)] * 4
    assert closed == [2] * 4
