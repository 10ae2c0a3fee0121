"""Timeouts for network reads that stall, or are too slow to finish."""

import contextlib
import queue
import threading
import time
from collections.abc import Iterator

PATIENCE = 60.0  # seconds in which at least LEAST bytes must arrive
LEAST = 64 << 10
_AHEAD = 2  # prefetched blocks


_Found = queue.Queue[bytes | BaseException | None]


class StalledError(OSError):
    """The transfer is too slow."""


def within(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield blocks, read in a thread, while at least `LEAST` bytes, or the end, arrive every `PATIENCE` seconds.

    A stalled read stays in its daemon thread, which does not block the exit of the process.

    Raises:
        StalledError: fewer bytes arrived.
        Exception: any error of the read.
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
            waited += time.monotonic() - began  # excludes the time spent in the consumer
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
    """Put blocks into a queue, then None or the exception of the read, until ``stop`` is set."""
    last: BaseException | None = None
    try:
        for block in blocks:
            if not _put(found, block, stop):
                return
    except Exception as error:  # noqa: BLE001  (the consumer raises it)
        last = error
    _put(found, last, stop)


def _put(found: _Found, value: bytes | BaseException | None, stop: threading.Event) -> bool:
    while not stop.is_set():
        with contextlib.suppress(queue.Full):
            found.put(value, timeout=0.2)
            return True
    return False
