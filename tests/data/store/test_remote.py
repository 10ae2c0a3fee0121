import errno
import functools
import http.server
import importlib.util
import multiprocessing
import os
import shutil
import threading
import time
from pathlib import Path
from typing import ClassVar

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from safetensors.torch import load_file
from stores import edit_manifest, manifest, records_of, write

from fastmask import prepare, train
from fastmask.data import StoreDataset, open_data
from fastmask.data.store import remote
from fastmask.data.store.features import StoredFeatures, add_features
from fastmask.data.store.manifest import Features, read_manifest
from fastmask.data.store.remote import RemoteStore, is_url, local_copy
from fastmask.training.checkpoint import checkpoints

FORK = multiprocessing.get_context("fork")
NAMES = {f"0000{i}{suffix}" for i in range(3) for suffix in (".npy", ".labels.npy")}
NO_HTTP = pytest.mark.skipif(not importlib.util.find_spec("aiohttp"), reason="fsspec reads http with aiohttp")


class Line(LocalFileSystem):
    """Files of this machine, behind a line that can be slow, cut and down, and that notes what was opened."""

    protocol = "line"
    log: ClassVar[Path]
    slow: ClassVar[float] = 0.0
    cut: ClassVar[set[str]] = set()
    down: ClassVar[Exception | None] = None

    @classmethod
    def _strip_protocol(cls, path):
        return path.removeprefix("line://")

    def _open(self, path, mode="rb", **kwargs):
        name = Path(path).name
        if name == "manifest.json":
            if Line.down:
                raise Line.down
            return super()._open(path, mode, **kwargs)
        with Line.log.open("a") as log:
            log.write(f"{name}\n")
        time.sleep(Line.slow)
        file = super()._open(path, mode, **kwargs)
        if name not in Line.cut:
            return file

        def read(size):
            if file.tell():
                raise ConnectionResetError("the line was cut")
            return type(file).read(file, 100)

        file.read = read
        return file


fsspec.register_implementation("line", Line, clobber=True)
fsspec.register_implementation("nowhere", "no_such_backend.Files", errtxt="Install it")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder of copies; lines are whole and quick again, and nothing was opened yet."""
    monkeypatch.setenv("FASTMASK_CACHE", str(tmp_path / "cache"))
    for name, value in {"log": tmp_path / "log", "slow": 0.0, "cut": set(), "down": None}.items():
        monkeypatch.setattr(Line, name, value, raising=False)
    Line.log.touch()
    return tmp_path / "cache"


@pytest.fixture
def url(tmp_path):
    """A store at the other end of a line."""
    write(tmp_path / "store")
    return f"line://{tmp_path}/store"


def fetched():
    """Return what was opened since the last call, in order of the names."""
    names = sorted(Line.log.read_text().split())
    Line.log.write_text("")
    return names


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def change(path, place=-1):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def assert_records(path_or_url):
    data = open_data(str(path_or_url), image_size=32, num_classes=None, flip=True)
    assert isinstance(data, StoreDataset)
    records, labels = records_of(data.manifest, 10)
    stored, read_labels = data.read(np.arange(20))
    assert np.array_equal(stored.numpy(), np.concatenate([records[:, 0], records[:, 1]]))
    assert np.array_equal(read_labels.numpy(), np.tile(labels, 2))


def test_names():
    assert all(map(is_url, ["s3://bucket/store", "gs://b/s", "https://host/s", "memory://s", "file:///tmp/s"]))
    assert not any(map(is_url, ["digits", "my/store", "/tmp/store", "C:store", "a:b.npz"]))


def test_the_records_of_a_file_url(tmp_path, cache):
    write(tmp_path / "store")
    assert_records(f"file://{tmp_path}/store")
    (folder,) = cache.iterdir()
    assert folder.name.startswith("store-")
    assert content(folder) == content(tmp_path / "store")
    assert local_copy(f"file://{tmp_path}/store/") == folder


def test_the_records_of_a_store_in_memory(tmp_path, cache):
    write(tmp_path / "store")
    memory = fsspec.filesystem("memory")
    memory.put(f"{tmp_path}/store/", "/bucket/store/", recursive=True)
    try:
        assert_records("memory://bucket/store")
    finally:
        memory.rm("/bucket", recursive=True)
    # What is not found is not taken from the copy: somebody removed it.
    with pytest.raises(ValueError, match=r"memory://bucket/store/manifest\.json does not exist: is that the URL of a"):
        local_copy("memory://bucket/store")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@NO_HTTP
def test_the_records_of_a_web_server(tmp_path):
    write(tmp_path / "store")
    serve = functools.partial(Quiet, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/store"
        assert_records(url)
        with pytest.raises(ValueError, match=r"nothing/manifest\.json does not exist"):
            local_copy(f"{url}/nothing")
        server.shutdown()
    assert_records(url)  # from the copy, since nothing answers any more
    with pytest.raises(ValueError, match=r"manifest\.json cannot be read \(ClientConnectorError: "):
        local_copy(f"{url}/nothing")


def test_features_are_fetched_and_verified_too(tmp_path, cache):
    store = tmp_path / "store"
    write(store)
    shards = iter(np.split(np.random.default_rng(0).standard_normal((10, 4, 6)).astype(np.float16), [4, 8]))
    about = Features("teachers:small", "a" * 64, "float32 on cpu", 2, 6)
    add_features(store, read_manifest(store), about, lambda number: [next(shards)])
    copy = local_copy(f"file://{store}")
    names = {f"0000{i}.features.npy" for i in range(3)}
    assert {path.name for path in copy.glob("*.npy")} == NAMES | names
    read = [StoredFeatures(StoreDataset(path, 32, None, False), False).reader(np.arange(10)) for path in (store, copy)]
    assert torch.equal(*read)
    (copy / "00002.features.npy").unlink()
    assert local_copy(f"file://{store}") == copy
    assert (copy / "00002.features.npy").read_bytes() == (store / "00002.features.npy").read_bytes()


def test_what_is_there_is_not_fetched_again(url):
    folder = local_copy(url)
    assert fetched() == sorted(NAMES)
    assert local_copy(url) == folder
    assert fetched() == []
    (folder / "00001.npy").unlink()  # as those do who tidy a scratch disk
    (folder / "00002.npy").write_bytes(b"short")
    local_copy(url)
    assert fetched() == ["00001.npy", "00002.npy"]
    assert_records(url)


def test_a_cut_line_keeps_the_finished_files(url, cache, monkeypatch):
    monkeypatch.setattr(remote, "_IN_FLIGHT", 1)
    Line.cut = {"00001.npy"}
    cut = rf"^{url}/00001\.npy cannot be read \(ConnectionResetError: the line was cut\)"
    with pytest.raises(ValueError, match=cut + r"; [2-5] of 6 files are kept, and the same command resumes$"):
        local_copy(url)
    (folder,) = cache.iterdir()
    kept = set(content(folder))
    assert {"00000.npy", "00000.labels.npy"} <= kept <= NAMES - {"00001.npy"}
    fetched()
    Line.cut = set()
    local_copy(url)
    assert fetched() == sorted(NAMES - kept)
    assert_records(url)


def fetch_in_turn(url, done):
    remote._SAY_EVERY = 0.0
    local_copy(url)
    done.put(len(StoreDataset(local_copy(url), 32, None, False)))


def test_killed_at_any_moment(url, cache):
    Line.slow = 0.04
    kept = set()
    for wait in np.random.default_rng(0).uniform(0, 0.3, 12):
        shutil.rmtree(cache, ignore_errors=True)
        process = FORK.Process(target=fetch_in_turn, args=(url, FORK.SimpleQueue()))
        process.start()
        time.sleep(wait)
        process.kill()
        process.join()
        there = {path.name for path in cache.glob("*/0*.npy")}
        kept.add(len(there))
        fetched()
        local_copy(url)
        assert not there & set(fetched())
        assert_records(url)
        assert not list(cache.glob("*/.partial-*"))
    assert len(kept) > 1  # different moments were hit


def test_two_processes_fetch_once(url, capfd):
    Line.slow = 0.2
    done = FORK.SimpleQueue()
    processes = [FORK.Process(target=fetch_in_turn, args=(url, done)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [done.get() for _ in processes] == [10, 10, 10]
    assert fetched() == sorted(NAMES)
    said = capfd.readouterr().out
    assert said.count("fetching line://") == 1
    assert "/6 files  0.00/0.00 GB  " in said


@pytest.mark.parametrize("place", [0, 130, -1])
def test_a_flipped_bit_at_the_other_end(url, tmp_path, cache, place):
    change(tmp_path / "store" / "00002.npy", place)
    with pytest.raises(ValueError, match=rf"{url}/00002\.npy is damaged, there or on the way: its SHA-256 is not that"):
        local_copy(url)
    assert not list(cache.glob("*/00002.npy"))
    assert not list(cache.glob("*/manifest.json"))
    change(tmp_path / "store" / "00002.npy", place)
    fetched()
    local_copy(url)
    assert "00002.npy" in fetched()
    assert_records(url)


@pytest.mark.parametrize(("length", "has"), [(200, "200"), (9999, "more")])
def test_a_file_of_another_length(url, tmp_path, length, has):
    path = tmp_path / "store" / "00000.npy"
    path.write_bytes(path.read_bytes().ljust(length, b"x")[:length])
    with pytest.raises(ValueError, match=rf"00000\.npy has {has} bytes instead of 2,176: it is cut off, or of another"):
        local_copy(url)


def test_a_file_that_is_missing(url, tmp_path):
    (tmp_path / "store" / "00001.labels.npy").unlink()
    with pytest.raises(ValueError, match=r"00001\.labels\.npy does not exist: is that the URL of a whole store"):
        local_copy(url)


def test_only_what_changed_is_fetched_again(url, tmp_path, capsys):
    folder = local_copy(url)
    fetched()
    changed = write(tmp_path / "other")
    store, other = tmp_path / "store", tmp_path / "other"
    change(other / "00001.npy")
    digest = remote.hashlib.sha256((other / "00001.npy").read_bytes()).hexdigest()
    edit_manifest(other, lambda fields: fields["shards"][1]["records"].update(sha256=digest))
    shutil.rmtree(store)
    other.rename(store)
    assert "6 files of 0.00 GB, 1 of them (0.00 GB) not yet in" in RemoteStore(url).plan()
    capsys.readouterr()
    Line.cut = {"00001.npy"}
    with pytest.raises(ValueError, match="5 of 6 files are kept"):
        local_copy(url)
    assert f"1 files of {url} are others than when it was fetched before" in capsys.readouterr().out
    assert set(content(folder)) == NAMES - {"00001.npy"}  # and no manifest: it is no store of any day
    Line.cut = set()
    local_copy(url)
    assert fetched() == ["00001.npy", "00001.npy"]
    assert content(folder) == content(store)
    # Files that went, and one of the same name and length, from a folder that nothing vouches for.
    shutil.rmtree(store)
    write(store, changed and manifest(), count=4)
    (folder / "manifest.json").unlink()
    local_copy(url)
    assert fetched() == ["00000.labels.npy", "00000.npy"]
    assert content(folder).items() >= content(store).items()


def test_a_new_manifest_of_the_same_files(url, tmp_path):
    folder = local_copy(url)
    fetched()
    edit_manifest(tmp_path / "store", lambda fields: fields.update(class_names=["x", "y", "z"]))
    assert open_data(url, image_size=32, num_classes=None, flip=False).class_names == ["x", "y", "z"]
    assert fetched() == []
    assert content(folder) == content(tmp_path / "store")


def test_nothing_answers(url, capsys, monkeypatch):
    Line.down = OSError("no route to host")
    with pytest.raises(ValueError, match=r"manifest\.json cannot be read \(OSError: no route to host\)$"):
        local_copy(url)
    Line.down = None
    folder = local_copy(url)
    capsys.readouterr()
    Line.down = OSError("no route to host")
    assert_records(url)
    said, _ = capsys.readouterr().out.splitlines()  # and what the store holds
    assert said.startswith(
        f"warning: {url}/manifest.json cannot be read (OSError: no route to host): continuing with the"
    )
    assert said.endswith(f" in {folder}")
    # Where several machines train, they must not continue with copies of several days.
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ValueError, match=f"no route to host.*; {folder} is a whole copy of .* give its path"):
        local_copy(url)
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert local_copy(url) == folder
    (folder / "00001.npy").unlink()
    with pytest.raises(ValueError, match=r"no route to host\)$"):
        local_copy(url)


def test_a_refusal_is_no_silence(url):
    local_copy(url)
    Line.down = PermissionError("Forbidden")
    with pytest.raises(ValueError, match=r"manifest\.json cannot be read \(PermissionError: Forbidden\)"):
        local_copy(url)


def test_a_missing_backend():
    with pytest.raises(ValueError, match=r"nowhere://bucket/store cannot be read: pip install no_such_backend$"):
        local_copy("nowhere://bucket/store")
    if not importlib.util.find_spec("aiohttp"):
        with pytest.raises(ValueError, match=r"https://host/store cannot be read: pip install aiohttp$"):
            local_copy("https://host/store")
    with pytest.raises(ValueError, match=r"cannot be read .*Protocol not known: swift"):
        local_copy("swift://bucket/store")


@pytest.mark.parametrize("name", ["../evil.npy", "/tmp/evil.npy", ".lock", "..", "a/b.npy", "a\\b.npy", "", "x\0", 7])
def test_names_that_lead_elsewhere(url, tmp_path, cache, name):
    edit_manifest(tmp_path / "store", lambda fields: fields["shards"][0]["records"].update(name=name))
    with pytest.raises(ValueError, match=rf"{url}/manifest\.json is damaged"):
        local_copy(url)
    assert fetched() == []
    assert not cache.exists()


def test_no_space(url, cache, monkeypatch):
    (local_copy(url) / "00002.npy").unlink()
    usage, needed = shutil.disk_usage(cache), 128 + 2 * 512
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    fetched()
    with pytest.raises(ValueError, match=r"needs 0\.00 GB more, .* has 0\.00 GB: set FASTMASK_CACHE to a folder with"):
        local_copy(url)
    assert fetched() == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    local_copy(url)  # what is there already needs none
    assert_records(url)


def test_a_disk_that_fills_up_on_the_way(url, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)

    line = r"No space left on device: .*\.partial-0.*; 0 of 6 files are kept, and the same command resumes$"
    with monkeypatch.context() as patched:
        patched.setattr(remote, "sync", full)
        with pytest.raises(ValueError, match=line):
            local_copy(url)
    assert_records(url)


def test_a_cache_that_cannot_be_written(url, cache):
    cache.write_text("a file")
    with pytest.raises(ValueError, match=r"cannot be written .*: set FASTMASK_CACHE to a folder that can"):
        local_copy(url)


def test_what_does_not_fit_is_said_before_anything_is_fetched(url):
    with pytest.raises(ValueError, match="holds images of side 32, not 64: give --image-size 32"):
        open_data(url, image_size=64, num_classes=None, flip=False)
    assert fetched() == []


SMALL = "--width 16 --depth 1 --num-heads 2 --decoder-width 16 --decoder-depth 1 --decoder-num-heads 2 --device cpu"


def test_training(url, tmp_path, capsys):
    flags = [*SMALL.split(), "--image-size", "32", "--batch-size", "4", "--max-steps", "2", "--unmask-steps", "0"]
    flags += ["--run-dir"]
    train.main(["--data", url, "--dry-run", *flags, str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert f"{url}: 6 files of 0.00 GB, 6 of them (0.00 GB) not yet in {tmp_path}/cache/store-" in said
    assert fetched() == []
    train.main(["--data", url, *flags, str(tmp_path / "run")])
    assert fetched() == sorted(NAMES)
    train.main(["--data", str(tmp_path / "store"), *flags, str(tmp_path / "local")])
    ours, theirs = (load_file(checkpoints(tmp_path / n)[-1] / "model.safetensors") for n in ("run", "local"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_check(url, tmp_path, capsys):
    prepare.main(["--check", url])
    whole, *_, sheet = capsys.readouterr().out.splitlines()[-3:]  # the store is of latents without their VAE
    assert whole == f"{local_copy(url)} is intact"
    assert sheet == f"10 images: {local_copy(url) / 'sheet.png'}"
    with pytest.raises(ValueError, match="file:///x: a store is written to a folder; copy it to the URL when it is"):
        prepare.main(["source", "file:///x"])


def test_a_process_that_reads_for_training_needs_no_line(url):
    data = open_data(url, image_size=32, num_classes=None, flip=False)
    Line.down = OSError("gone")
    stored, _ = data.read(np.arange(10))
    assert torch.equal(stored, StoreDataset(local_copy(url), 32, None, False).read(np.arange(10))[0])
