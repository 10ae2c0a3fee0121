"""Reads of a line that may stall, or send so little that it never ends."""

import contextlib
import queue
import threading
import time
from collections.abc import Iterator

PATIENCE = 60.0  # seconds, in which at least so many bytes must come:
LEAST = 64 << 10
_AHEAD = 2  # blocks that are read before they are asked for


_Found = queue.Queue[bytes | BaseException | None]


class StalledError(OSError):
    """Too little came in too long a time."""


def within(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield blocks that a thread reads, as long as `LEAST` bytes, or the end, come in every `PATIENCE` seconds.

    A read that is waited for in vain stays behind in its thread, which does not keep the process from ending.

    Raises:
        StalledError: too little came.
        Exception: what reading raised.
    """
    found: _Found = queue.Queue(_AHEAD)
    stop = threading.Event()
    threading.Thread(target=_read, args=(blocks, found, stop), daemon=True).start()
    try:
        came, waited = 0, 0.0
        while True:
            began = time.monotonic()
            try:
                block = found.get(timeout=max(0.0, PATIENCE - waited))
            except queue.Empty:
                raise StalledError(f"only {came:,} bytes came in {PATIENCE:g} seconds") from None
            waited += time.monotonic() - began  # and not what is done with the blocks
            if isinstance(block, BaseException):
                raise block
            if block is None:
                return
            came += len(block)
            yield block
            if came >= LEAST:
                came, waited = 0, 0.0
    finally:
        stop.set()


def _read(blocks: Iterator[bytes], found: _Found, stop: threading.Event) -> None:
    """Put blocks into a queue, then None or what reading raised, until nobody wants them any more."""
    last: BaseException | None = None
    try:
        for block in blocks:
            if not _put(found, block, stop):
                return
    except Exception as error:  # noqa: BLE001  (whoever reads from the queue raises it)
        last = error
    _put(found, last, stop)


def _put(found: _Found, value: bytes | BaseException | None, stop: threading.Event) -> bool:
    while not stop.is_set():
        with contextlib.suppress(queue.Full):
            found.put(value, timeout=0.2)
            return True
    return False
