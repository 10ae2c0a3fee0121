import subprocess
import sys
import threading
import time

import pytest

from fastmask.data.store import stalls
from fastmask.data.store.stalls import StalledError, within


def blocks(*parts, wait=0.0):
    for part in parts:
        time.sleep(wait)
        yield part


def test_all_blocks_come_in_order():
    parts = [bytes([i]) * i for i in range(1, 200)]
    assert list(within(blocks(*parts))) == parts
    assert list(within(blocks())) == []


def test_an_error_comes_after_the_blocks_before_it():
    def cut():
        yield b"a"
        raise ConnectionResetError("cut")

    found = within(cut())
    assert next(found) == b"a"
    with pytest.raises(ConnectionResetError, match="cut"):
        next(found)


@pytest.mark.parametrize("wait", [0.05, 5.0])
def test_too_little_in_too_long(monkeypatch, wait):
    monkeypatch.setattr(stalls, "PATIENCE", 0.4)
    began = time.monotonic()
    with pytest.raises(StalledError, match=r"only \d bytes came in 0\.4 seconds"):
        list(within(blocks(*[b"x"] * 100, wait=wait)))
    assert time.monotonic() - began < 2


def test_a_slow_line_that_goes_on(monkeypatch):
    monkeypatch.setattr(stalls, "PATIENCE", 1.0)
    monkeypatch.setattr(stalls, "LEAST", 3)
    assert len(list(within(blocks(*[b"x"] * 15, wait=0.1)))) == 15


def test_what_is_done_with_the_blocks_does_not_count(monkeypatch):
    monkeypatch.setattr(stalls, "PATIENCE", 0.3)
    for block in within(blocks(b"a", b"b", b"c", wait=0.05)):
        time.sleep(0.2)
        assert len(block) == 1


def test_the_thread_ends_when_nobody_wants_more():
    before = threading.active_count()
    found = within(blocks(*[b"x"] * 1000))
    next(found)
    found.close()
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


CODE = """
import time
from fastmask.data.store import stalls

def never():
    time.sleep(600)
    yield b""

stalls.PATIENCE = 0.2
try:
    list(stalls.within(never()))
except stalls.StalledError as error:
    print(error)
"""


def test_a_read_that_never_ends_does_not_keep_the_process():
    found = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout == "only 0 bytes came in 0.2 seconds\n"
