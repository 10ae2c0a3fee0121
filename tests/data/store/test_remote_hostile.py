"""Stores at URLs: secrets that nobody may read, servers that never end, and what others may plant in the cache."""

import contextlib
import functools
import http.server
import importlib.util
import os
import threading
import time
from pathlib import Path
from typing import ClassVar

import fsspec
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem
from stores import records_of, write

from fastmask.console import without_secrets
from fastmask.data import StoreDataset, open_data
from fastmask.data.store import stalls
from fastmask.data.store.remote import RemoteStore, local_copy

NO_HTTP = pytest.mark.skipif(not importlib.util.find_spec("aiohttp"), reason="fsspec reads http with aiohttp")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTMASK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def url(tmp_path):
    write(tmp_path / "store")
    return f"file://{tmp_path}/store"


def assert_records(url):
    data = StoreDataset(local_copy(url), 32, None, False)
    assert np.array_equal(data.read(np.arange(10))[0].numpy(), records_of(data.manifest, 10)[0][:, 0])


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://bucket/store", "s3://bucket/store"),
        ("abfs://container@account.dfs.core.windows.net/store", "abfs://container@account.dfs.core.windows.net/store"),
        ("https://host:8080/store", "https://host:8080/store"),
        ("https://user:secret@host/store", "https://user:***@host/store"),
        ("https://user:sec@ret@host:80/a:b@c", "https://user:***@host:80/a:b@c"),
        ("ftp://user:secret@host/store", "ftp://user:***@host/store"),
        ("https://token@host/store", "https://***@host/store"),
        ("https://:secret@host/store", "https://:***@host/store"),
        ("https://host/store?sig=secret&X-Amz-Signature=secret#x", "https://host/store?sig=***&X-Amz-Signature=***#x"),
        ("no https://u:secret@h/s for https://secret@h/s?t=secret", "no https://u:***@h/s for https://***@h/s?t=***"),
    ],
)
def test_passwords_are_not_shown(url, shown):
    assert without_secrets(url) == shown


def test_passwords_are_not_printed(tmp_path, cache, capsys):
    """Neither what the backend says of a URL with a password, nor what is said when it is fetched."""
    fsspec.register_implementation("secret", Secret, clobber=True)
    write(tmp_path / "store")
    url = f"secret://user:hunter2@{tmp_path}/store?token=hunter2"
    local_copy(url)
    open_data(url, image_size=32, num_classes=None, flip=False)
    with pytest.raises(ValueError, match=r"secret://user:\*\*\*@host/gone.*manifest\.json") as error:
        local_copy("secret://user:hunter2@host/gone?token=hunter2")
    said = capsys.readouterr().out
    assert "fetching secret://user:***@" in said
    assert "hunter2" not in said + str(error.value) + "".join(path.name for path in cache.iterdir())


class Secret(LocalFileSystem):
    """Files of this machine, at URLs that hold a password, of which it tells in its errors."""

    protocol = "secret"

    @classmethod
    def _strip_protocol(cls, path):
        return path

    def _open(self, path, mode="rb", **kwargs):
        where, _, name = path.rpartition("/")
        folder = Path(where.partition("@")[2].partition("?")[0])
        if not folder.is_dir():
            raise OSError(f"cannot reach {path}")
        return super()._open(str(folder / name), mode, **kwargs)


class Slow(http.server.SimpleHTTPRequestHandler):
    """Sends one byte in a while of everything but the manifest, or of that too."""

    names: ClassVar[tuple[str, ...]] = ()

    def log_message(self, *arguments):
        pass

    def copyfile(self, source, outputfile):
        if not self.path.endswith(self.names):
            return super().copyfile(source, outputfile)
        with contextlib.suppress(OSError):
            while byte := source.read(1):
                outputfile.write(byte)
                outputfile.flush()
                time.sleep(0.05)


@NO_HTTP
@pytest.mark.parametrize("names", [("manifest.json",), (".npy",)])
def test_a_server_that_sends_a_byte_at_a_time(tmp_path, monkeypatch, names):
    write(tmp_path / "store")
    monkeypatch.setattr(stalls, "PATIENCE", 0.5)
    monkeypatch.setattr(Slow, "names", names)
    serve = functools.partial(Slow, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        began = time.monotonic()
        with pytest.raises(ValueError, match=r"\(StalledError: only \d+ bytes came in 0\.5 seconds\)"):
            local_copy(f"http://127.0.0.1:{server.server_port}/store")
        assert time.monotonic() - began < 20
        server.shutdown()


def test_a_lock_that_is_a_link_empties_no_file(url, tmp_path, cache):
    folder = RemoteStore(url).folder
    folder.mkdir(parents=True)
    (tmp_path / "thesis.txt").write_text("precious")
    (folder / ".lock").symlink_to(tmp_path / "thesis.txt")
    with pytest.raises(ValueError, match=r"\.lock is a symbolic link, which a lock file must not be: remove it"):
        local_copy(url)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_a_link_in_the_cache_is_not_written_through(url, tmp_path):
    folder = RemoteStore(url).folder
    folder.mkdir(parents=True)
    (tmp_path / "thesis.txt").write_text("precious")
    for name in ("manifest.json", ".fetching.json", ".partial-00000.npy", "00001.npy"):
        (folder / name).symlink_to(tmp_path / "thesis.txt")
    local_copy(url)
    assert (tmp_path / "thesis.txt").read_text() == "precious"
    assert_records(url)


@pytest.mark.parametrize("name", [".lock", "manifest.json", ".fetching.json", "00000.npy", ".partial-00000.npy"])
def test_a_pipe_in_the_cache_is_not_waited_for(url, name):
    folder = RemoteStore(url).folder
    folder.mkdir(parents=True)
    os.mkfifo(folder / name)
    if name in (".lock", "manifest.json"):
        with pytest.raises(ValueError, match=rf"{name} is not a regular file"):
            local_copy(url)
        (folder / name).unlink()
    assert_records(url)
