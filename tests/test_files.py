import os
import socket
import subprocess
import sys

import pytest

from fastmask.files import locked, whole_file, write_durably


def test_a_whole_file(tmp_path):
    path = tmp_path / "deep" / "er" / "out.txt"
    with whole_file(path) as partial:
        partial.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "out.txt"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), whole_file(path) as partial:
        partial.write_text("ne\udcff", "ascii")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_never_began(tmp_path):
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "out.txt"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_durable_file(tmp_path):
    path = tmp_path / "new" / "out.txt"
    for content in (b"first", b"second"):
        write_durably(path, content)
        assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_files_have_the_mode_that_the_umask_asks_for(tmp_path):
    """Whatever the library that writes them thinks: safetensors lets the owner alone read."""
    with whole_file(tmp_path / "weights") as partial:
        partial.write_bytes(b"")
        partial.chmod(0o600)
    (tmp_path / "other").write_bytes(b"")
    assert (tmp_path / "weights").stat().st_mode == (tmp_path / "other").stat().st_mode


HOLD = """
import sys
from pathlib import Path
from fastmask.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_is_held_by_one_process(tmp_path):
    path = tmp_path / "folder" / ".lock"
    command = [sys.executable, "-c", HOLD, str(path)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    message = f"{path.parent} is in use by process {holder.pid} on {socket.gethostname()}: wait for it, or name another"
    with pytest.raises(ValueError, match=message), locked(path):
        pytest.fail("two hold it")
    holder.kill()
    holder.wait()
    with locked(path):
        assert path.read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"


def test_a_link_at_the_place_of_a_lock_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"), locked(tmp_path / ".lock"):
        pass
    assert (tmp_path / "precious").read_text() == "kept"
