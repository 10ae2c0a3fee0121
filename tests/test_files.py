import errno
import os
import socket
import subprocess
import sys

import pytest

from fastmask.files import atomic_write, locked, open_lock, open_regular, read_regular, write_durably


def test_a_whole_file(tmp_path):
    path = tmp_path / "deep" / "er" / "out.txt"
    with atomic_write(path) as partial:
        partial.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "out.txt"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), atomic_write(path) as partial:
        partial.write_text("ne\udcff", "ascii")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_never_began(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "out.txt"):
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
    with atomic_write(tmp_path / "weights") as partial:
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
    with pytest.raises(ValueError, match="is a symbolic link"), locked(tmp_path / ".lock"):
        pass
    assert (tmp_path / "precious").read_text() == "kept"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_a_full_disk_names_the_file(tmp_path, number):
    """The system's own error does not: "[Errno 28] No space left on device"."""
    path = tmp_path / "out.txt"
    with pytest.raises(OSError, match=r"out\.txt") as error, atomic_write(path):
        raise OSError(number, os.strerror(number))
    assert str(error.value) == f"[Errno {number}] {os.strerror(number)}: '{path}'"


def test_another_error_is_left_as_it_is(tmp_path):
    with pytest.raises(ConnectionResetError) as error, atomic_write(tmp_path / "out.txt"):
        raise ConnectionResetError(errno.ECONNRESET, "reset")
    assert error.value.filename is None


def test_a_link_in_the_place_of_the_temporary_file_is_not_written_through(tmp_path):
    (tmp_path / "other.txt").write_text("precious")
    (tmp_path / ".partial-out.txt").symlink_to(tmp_path / "other.txt")
    write_durably(tmp_path / "out.txt", b"new")
    assert (tmp_path / "out.txt").read_text() == "new"
    assert (tmp_path / "other.txt").read_text() == "precious"


def test_reading_a_regular_file(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("a")
    assert read_regular(tmp_path / "a") == read_regular(tmp_path / "link", 5) == b"12345"
    with pytest.raises(ValueError, match="a has 5 bytes, which is above the limit of 4"):
        read_regular(tmp_path / "a", 4)
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "gone")


@pytest.mark.parametrize("opened", [read_regular, open_regular, open_lock])
@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_what_need_not_have_an_end(tmp_path, opened, kind):
    """A pipe that nobody writes to would be waited for without end, and a device can be read for ever."""
    path = tmp_path / "file"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises((ValueError, IsADirectoryError), match=r"is not a regular file|symbolic link|Is a directory"):
        opened(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_lock_is_not_opened_through_links(tmp_path):
    (tmp_path / "other.txt").write_text("precious")
    (tmp_path / "soft").symlink_to(tmp_path / "other.txt")
    (tmp_path / "dangling").symlink_to(tmp_path / "made.txt")
    os.link(tmp_path / "other.txt", tmp_path / "hard")
    for name in ("soft", "dangling", "hard"):
        with pytest.raises(
            ValueError, match=rf"{name} is a (symbolic|hard) link.*, which a lock file must not be: remove"
        ):
            open_lock(tmp_path / name)
    assert not (tmp_path / "made.txt").exists()
    os.close(open_lock(tmp_path / "new"))
    (tmp_path / "new").write_text("kept")
    os.close(open_lock(tmp_path / "new"))
    assert (tmp_path / "new").read_text() == "kept"
