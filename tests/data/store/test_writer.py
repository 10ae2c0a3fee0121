import errno
import multiprocessing
import os
import time

import numpy as np
import pytest
from stores import manifest, records_of, write

from fastmask.data.store import writer
from fastmask.data.store.manifest import read_manifest
from fastmask.data.store.writer import StoreWriter
from fastmask.ranks import Ranks

FORK = multiprocessing.get_context("fork")


def content(store):
    return {path.name: path.read_bytes() for path in store.iterdir() if path.name != ".lock"}


def begin(path):
    """Start a process that writes a store of nine shards slowly."""
    process = FORK.Process(target=write_slowly, args=(path,))
    process.start()
    return process


def write_slowly(path):
    add = writer.ShardWriter.add

    def slow(self, records, labels):
        time.sleep(0.002)
        add(self, records, labels)

    writer.ShardWriter.add = slow
    write(path, count=60, shard_size=7, skip=(5, 20))


def test_files_are_plain_npy(tmp_path):
    about = write(tmp_path / "store")
    records, labels = records_of(about, 10)
    found = [np.load(tmp_path / "store" / f"0000{i}.npy") for i in range(3)]
    assert [len(part) for part in found] == [4, 4, 2]
    assert np.array_equal(np.concatenate(found), records)
    found = [np.load(tmp_path / "store" / f"0000{i}.labels.npy") for i in range(3)]
    assert np.concatenate(found).dtype == np.int32
    assert np.array_equal(np.concatenate(found), labels)
    assert set(content(tmp_path / "store")) == {
        "manifest.json",
        *(f"0000{i}{suffix}" for i in range(3) for suffix in (".npy", ".labels.npy")),
    }


def test_stopped_and_gone_on(tmp_path):
    write(tmp_path / "whole", skip=(6,))
    about = manifest()
    records, labels = records_of(about, 10)
    with pytest.raises(RuntimeError), StoreWriter(tmp_path / "store", about, 10, 4) as store:  # noqa: PT012
        with store.shard(0) as shard:
            shard.add(records[:4], labels[:4])
        with store.shard(1) as shard:
            shard.add(records[4:6], labels[4:6])
            raise RuntimeError
    assert {"00000.npy", "00000.labels.npy", "00000.json", "unfinished.json"} == set(content(tmp_path / "store"))
    before = (tmp_path / "store" / "00000.npy").stat().st_mtime_ns
    write(tmp_path / "store", skip=(6,))
    assert (tmp_path / "store" / "00000.npy").stat().st_mtime_ns == before
    assert content(tmp_path / "store") == content(tmp_path / "whole")


def test_killed_at_any_moment(tmp_path):
    whole = write(tmp_path / "whole", count=60, shard_size=7, skip=(5, 20))
    kept = set()
    for i, wait in enumerate(np.random.default_rng(0).uniform(0, 0.4, 20)):
        store = tmp_path / str(i)
        process = begin(store)
        time.sleep(wait)
        process.kill()
        process.join()
        kept.add(len(list(store.glob("0000?.json"))))
        if (store / "manifest.json").exists():
            assert read_manifest(store) == whole
            with pytest.raises(ValueError, match="is a finished store"):
                write(store, count=60, shard_size=7, skip=(5, 20))
        else:
            write(store, count=60, shard_size=7, skip=(5, 20))
        assert content(store) == content(tmp_path / "whole")
    assert len(kept) > 2, "killed at the same moment each time"


def test_a_shard_that_was_damaged_while_unfinished_is_done_again(tmp_path):
    about = manifest()
    records, labels = records_of(about, 10)
    with StoreWriter(tmp_path / "store", about, 10, 4) as store:
        for number in (0, 1, 2):
            with store.shard(number) as shard:
                shard.add(records[store.items_of(number)], labels[store.items_of(number)])
        with (tmp_path / "store" / "00001.npy").open("r+b") as file:
            file.truncate(200)
        (tmp_path / "store" / "00002.json").write_text("{")
        assert [bool(store.finished(number)) for number in (0, 1, 2)] == [True, False, False]
        with pytest.raises(ValueError, match="shard 1 is not finished"):
            store.finish([])
    write(tmp_path / "store")
    write(tmp_path / "whole")
    assert content(tmp_path / "store") == content(tmp_path / "whole")


def test_two_writers(tmp_path):
    process = begin(tmp_path / "store")
    while not (tmp_path / "store" / "unfinished.json").exists():
        time.sleep(0.01)
    with pytest.raises(
        ValueError, match=rf"is being written by another process \(process {process.pid} on .*\): wait for it"
    ):
        write(tmp_path / "store")
    process.join()
    assert process.exitcode == 0
    assert read_manifest(tmp_path / "store").count == 58


def test_a_full_disk(tmp_path, monkeypatch):
    about = manifest()
    records, labels = records_of(about, 10)

    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with StoreWriter(tmp_path / "store", about, 10, 4) as store, store.shard(0) as shard:
        shard.add(records[:4], labels[:4])
    monkeypatch.setattr("fastmask.data.store.writer.sync", full)
    message = r"00001\.npy cannot be written: No space left on device; finished shards are"
    with StoreWriter(tmp_path / "store", about, 10, 4) as store:  # which a thread meets, and the next shard tells
        with store.shard(1) as shard:
            shard.add(records[4:8], labels[4:8])
        with pytest.raises(ValueError, match=message), store.shard(2) as shard:
            shard.add(records[8:], labels[8:])
        with pytest.raises(ValueError, match=message):
            store.finish([])
    monkeypatch.undo()
    assert {"00000.npy", "00000.labels.npy", "00000.json", "unfinished.json"} == set(content(tmp_path / "store"))
    write(tmp_path / "store")
    assert read_manifest(tmp_path / "store").count == 10


def test_what_cannot_be_gone_on_with(tmp_path):
    write(tmp_path / "finished")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("")
    with StoreWriter(tmp_path / "store", manifest(), 10, 4):
        pass
    for store, arguments, message in [
        ("finished", (manifest(), 10, 4), "is a finished store: give another folder, or delete it first"),
        ("other", (manifest(), 10, 4), r"is not empty \(thesis\.txt\): a store wants a folder of its own"),
        ("store", (manifest(), 11, 4), r"unfinished store of something else \(items 10 -> 11\)"),
        (
            "store",
            (manifest(scale=2.0), 10, 5),
            r"\(shard_size 4 -> 5, scale 0\.5 -> 2\.0\): give what it was begun with",
        ),
    ]:
        with pytest.raises(ValueError, match=message), StoreWriter(tmp_path / store, *arguments):
            pass
    (tmp_path / "store" / "unfinished.json").write_text("{")
    with pytest.raises(ValueError, match=r"unfinished\.json is damaged .*: delete .* and start over"):
        write(tmp_path / "store")


def test_records_of_another_shape(tmp_path):
    with (
        StoreWriter(tmp_path / "store", manifest(), 4, 4) as store,
        pytest.raises(ValueError, match=r"records of float16 \(2, 2, 8, 4, 5\) are not those of the store"),
        store.shard(0) as shard,
    ):
        shard.add(np.zeros((2, 2, 8, 4, 5), np.float16), np.zeros(2, int))


class Meeting:
    """Stands in for what ranks exchange: the first one's answer is kept for the others."""

    def __init__(self, monkeypatch):
        self.answer = None
        monkeypatch.setattr(writer, "from_first", self.from_first)
        monkeypatch.setattr(writer, "barrier", lambda ranks: lambda: None)

    def from_first(self, ranks, call):
        if not ranks.rank:
            self.answer = call()
        return self.answer


def test_unfinished_shards_are_dealt_out(tmp_path, monkeypatch):
    Meeting(monkeypatch)
    with StoreWriter(tmp_path, manifest(), 20, 2) as alone:
        for number in (0, 3):
            with alone.shard(number) as shard:
                shard.skipped += ["a", "b"]
    parts = []
    for rank in range(3):
        with StoreWriter(tmp_path, manifest(), 20, 2, Ranks(rank, 3, rank)) as store:
            parts.append(store.todo)
            assert store.before == 4
            assert store.items_elsewhere() == 4
    assert parts == [[1, 5, 8], [2, 6, 9], [4, 7]]


def test_ranks_that_write_keep_others_out(tmp_path, monkeypatch):
    Meeting(monkeypatch)
    there, done = FORK.Event(), FORK.Event()

    def hold():
        with StoreWriter(tmp_path, manifest(), 20, 2, Ranks(0, 2, 0)):
            there.set()
            done.wait(60)

    process = FORK.Process(target=hold)
    process.start()
    assert there.wait(60)
    message = rf"is being written by another process \(process {process.pid} on .*\): wait for it"
    for ranks in (Ranks(), Ranks(0, 2, 0)):
        with pytest.raises(ValueError, match=message), StoreWriter(tmp_path, manifest(), 20, 2, ranks):
            pass
    done.set()
    process.join()
    with StoreWriter(tmp_path, manifest(), 20, 2):
        pass


def test_ranks_that_would_write_something_else(tmp_path, monkeypatch):
    Meeting(monkeypatch)
    with (
        StoreWriter(tmp_path, manifest(), 20, 2, Ranks(0, 2, 0)),
        pytest.raises(ValueError, match=r"process 1 would write another store than the first one \(decoder  -> dali\)"),
        StoreWriter(tmp_path, manifest(decoder="dali"), 20, 2, Ranks(1, 2, 1)),
    ):
        pass


@pytest.mark.parametrize(
    ("labels", "num_classes", "message"),
    [
        (
            [0, 1, 2**32 + 1],
            0,
            r"photo 2 has label 4294967297, which is outside 0 \.\. 999999, the largest that a store",
        ),
        ([0, 2**31, 1], 0, "photo 1 has label 2147483648, which is outside"),
        ([0, 10**6, 1], 0, "photo 1 has label 1000000, which is outside"),
        ([-1, 0, 1], 0, "photo 0 has label -1, which is outside"),
        ([0, 1, 3], 3, r"photo 2 has label 3, which is outside 0 \.\. 2, the classes of the source"),
        ([0.0, 1.0, 2.0], 0, "labels must be integers, not float64"),
        ([True, False, True], 0, "labels must be integers, not bool"),
    ],
)
def test_labels_that_are_no_classes(tmp_path, labels, num_classes, message):
    """They are 32 bits wide in the store, where 4294967297 would have become 1."""
    about = manifest()
    with (
        StoreWriter(tmp_path, about, 3, 3, num_classes=num_classes) as store,
        pytest.raises(ValueError, match=message),
        store.shard(0) as shard,
    ):
        shard.add(records_of(about, 3)[0], np.array(labels), "photo {}".format)
    assert not (tmp_path / "00000.npy").exists()


def test_the_largest_label(tmp_path):
    about = manifest()
    with StoreWriter(tmp_path, about, 3, 3, num_classes=3) as store:
        with store.shard(0) as shard:
            shard.add(records_of(about, 3)[0], np.array([0, 2, 2], np.uint64))
        assert store.finish(["a", "b", "c"]).class_counts == [1, 0, 2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale": 0.0}, "scale"),
        ({"scale": float("nan")}, "Out of range float values are not JSON compliant"),
        ({"scale": [1.0, 2.0]}, "scale has 2 values for 4 channels"),
        ({"image_size": 33}, "cannot be float16 of shape"),
    ],
)
def test_a_store_that_nobody_could_open_is_not_begun(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        StoreWriter(tmp_path / "store", manifest(**fields), 4, 4)
    assert not (tmp_path / "store").exists()


def test_a_lock_that_is_a_link(tmp_path):
    """The holder's name is written into the lock, which would overwrite the file at the other end."""
    (tmp_path / "thesis.txt").write_text("precious")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / ".lock").symlink_to(tmp_path / "thesis.txt")
    with pytest.raises(ValueError, match=r"\.lock is a symbolic link, which a lock file must not be: remove it"):
        write(tmp_path / "store")
    assert (tmp_path / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize("content", ["[]", "3", "[" * 100_000, '{"items": ' + "9" * 5000 + "}"], ids=range(4))
def test_an_unfinished_store_that_is_damaged(tmp_path, content):
    with StoreWriter(tmp_path, manifest(), 10, 4):
        pass
    (tmp_path / "unfinished.json").write_text(content)
    with pytest.raises(ValueError, match=r"unfinished\.json is damaged .*: delete .* and start over"):
        write(tmp_path)
