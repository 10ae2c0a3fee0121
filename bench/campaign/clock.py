"""Time boxes."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

_AGAIN = 5.0  # seconds until the alarm repeats, in case a destructor swallowed it


class TimeUp(BaseException):
    """The time is up. Not an Exception, so that no code on the way, such as a compiler, handles it as an error."""


@contextlib.contextmanager
def time_box(seconds: float) -> Iterator[None]:
    """Raise `TimeUp` inside the block when the time is up, after any running C call. Main thread only."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise TimeUp

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), _AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def share(left: float, weights: list[float]) -> float:
    """Return the time of the first of several parts: its share of the remaining time, which includes unused time."""
    return left * weights[0] / sum(weights)
