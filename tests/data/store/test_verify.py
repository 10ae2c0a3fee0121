import collections
import multiprocessing
import os
import time

import pytest
import torch
from stores import edit_manifest, write

from fastmask import train
from fastmask.data import StoreDataset, batches, open_data
from fastmask.data.store import verify
from fastmask.data.store.manifest import read_manifest
from fastmask.data.store.verify import Compared, Verifier, verifier_of
from fastmask.ranks import Ranks

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTMASK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "compared"


@pytest.fixture
def store(tmp_path):
    write(tmp_path / "store")
    return tmp_path / "store"


@pytest.fixture
def read(monkeypatch):
    """The names of files that were read, in order."""
    names, compare = [], Verifier._compare

    def noted(self, file):
        names.append(file.name)
        compare(self, file)

    monkeypatch.setattr(Verifier, "_compare", noted)
    return names


def begun(store):
    verifier = Verifier(store, read_manifest(store))
    verifier.start()
    return verifier


def ended(verifier):
    deadline = time.monotonic() + 30
    while not verifier.poll():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return verifier


def flip(path, place=-1):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    before = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))


def test_all_files_are_compared_once(store, read, capsys):
    ended(begun(store))
    names = [f"0000{i}{suffix}" for i in range(3) for suffix in (".npy", ".labels.npy")]
    assert read == names
    assert capsys.readouterr().out == (
        f"{store}: 6 files (0.00 GB) are compared with their checksums meanwhile\n"
        f"{store}: all 6 files are those of its manifest\n"
    )
    ended(begun(store))
    assert read == names
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["00001.npy", "00002.labels.npy"])
def test_a_flipped_bit_is_told_by_name(store, read, name):
    flip(store / name)
    for _ in range(2):  # and again at the next start
        with pytest.raises(ValueError, match=rf"store/{name} is damaged: its SHA-256 is not that of the manifest;"):
            ended(begun(store))
    flip(store / name)
    ended(begun(store))
    assert read.count("00000.npy") == 1


def test_files_that_changed_are_compared_again(store, read):
    ended(begun(store))
    read.clear()
    flip(store / "00001.npy")
    with pytest.raises(ValueError, match=r"00001\.npy is damaged"):
        ended(begun(store))
    assert read == ["00001.npy"]
    read.clear()
    flip(store / "00001.npy")
    ended(begun(store))
    assert read == ["00001.npy"]
    read.clear()
    store.rename(store.with_name("moved"))
    ended(begun(store.with_name("moved")))
    assert len(read) == 6


def test_another_manifest_of_the_same_files(store, read):
    """Lengths and times are the same: the checksum that a file was compared with is another."""
    ended(begun(store))
    read.clear()
    edit_manifest(store, lambda fields: fields["shards"][1]["records"].update(sha256="0" * 64))
    with pytest.raises(ValueError, match=r"00001\.npy is damaged"):
        ended(begun(store))
    assert read == ["00001.npy"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"[" * 10**5, b'{"00000.npy": 3}', b'{"00000.npy": [1, 2, "3"]}'], ids=range(6)
)
def test_what_is_kept_may_be_damaged(store, read, cache, content):
    ended(begun(store))
    (path,) = cache.glob("*.json")
    path.write_bytes(content)
    read.clear()
    ended(begun(store))
    assert len(read) == 6


def test_a_cache_that_cannot_be_written(store, read, cache, capsys):
    cache.parent.write_text("a file")
    for _ in range(2):
        ended(begun(store))
    assert len(read) == 12
    assert (
        capsys.readouterr().out.count("which files were compared is not kept, and all are compared at each start") == 2
    )


def test_what_was_compared_is_kept_though_it_was_stopped(store, read, monkeypatch):
    verifier = Verifier(store, read_manifest(store))
    compare = Verifier._compare

    def stopping(self, file):
        if file.name == "00001.npy":
            verifier._stop.set()
        compare(self, file)

    with monkeypatch.context() as patched:
        patched.setattr(Verifier, "_compare", stopping)
        verifier.start()
        verifier._thread.join(30)
    assert not verifier.poll()
    verifier.stop()
    read.clear()
    ended(begun(store))
    assert read[0] == "00001.npy"


def test_stopping_before_it_began(store):
    verifier = Verifier(store, read_manifest(store))
    verifier.stop()
    assert not verifier.poll()


def compare_slowly(store, done):
    compare = Verifier._compare

    def slow(self, file):
        time.sleep(0.05)
        compare(self, file)
        done.put(file.name)

    Verifier._compare = slow
    ended(begun(store))


def test_of_several_processes_one_reads(store, monkeypatch):
    monkeypatch.setattr(verify, "_WAIT", 0.02)
    done = FORK.SimpleQueue()
    processes = [FORK.Process(target=compare_slowly, args=(store, done)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len([done.get() for _ in range(6)]) == 6
    assert done.empty()


def test_a_file_that_is_missing(store):
    verifier = Verifier(store, read_manifest(store))
    (store / "00001.npy").unlink()
    verifier.start()
    with pytest.raises(ValueError, match=r"00001\.npy"):
        ended(verifier)


def test_batches_end_where_a_file_is_damaged(store):
    """After the store was opened: training began, and the file is not what was written."""
    flip(store / "00002.npy", 140)
    data = open_data(str(store), image_size=32, num_classes=None, flip=False)
    verifier = verifier_of(data, Ranks())
    arguments = {"batch_size": 2, "seed": 0, "start": 0, "stop": 10**6, "device": torch.device("cpu")}
    for num_workers in (0, 1):
        parts = batches(data, num_workers=num_workers, verifier=verifier, **arguments)
        with pytest.raises(ValueError, match=r"^[^\n]*00002\.npy is damaged: its SHA-256 [^\n]*$"):
            collections.deque(parts, maxlen=0)


def test_only_stores_are_compared_and_by_one_process_of_a_machine(store):
    data = StoreDataset(store, 32, None, False)
    assert verifier_of(open_data("synthetic", image_size=32, num_classes=0, flip=False), Ranks()) is None
    assert verifier_of(data, Ranks(3, 4, 1)) is None
    ended(verifier_of(data, Ranks(2, 4, 0)))


def test_what_is_known(store, cache):
    file = read_manifest(store).shards[1].records
    compared = Compared(store)
    assert file not in compared
    compared.add(file)
    assert file in compared
    compared.keep()
    assert file in Compared(store)
    assert compared.path.parent == cache
    (store / "00001.npy").unlink()
    assert file not in compared


SMALL = "--width 16 --depth 1 --num-heads 2 --decoder-width 16 --decoder-depth 1 --decoder-num-heads 2 --device cpu"


def test_training_ends_with_the_name_of_a_damaged_file(store, tmp_path, capsys):
    flip(store / "00001.npy", 140)
    flags = [*SMALL.split(), "--image-size", "32", "--batch-size", "4", "--max-steps", "100000", "--unmask-steps", "0"]
    with pytest.raises(ValueError, match=r"store/00001\.npy is damaged: its SHA-256 is not that of the manifest"):
        train.main(["--data", str(store), *flags, "--run-dir", str(tmp_path / "run")])
    assert f"{store}: 6 files (0.00 GB) are compared with their checksums meanwhile" in capsys.readouterr().out
