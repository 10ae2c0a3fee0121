"""Time boxes."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

_AGAIN = 5.0  # seconds until an alarm that was lost in a destructor is repeated


class TimeUp(BaseException):
    """A time box is used up. Not an Exception, so that nothing on the way (a compiler, say) takes it for an error."""


@contextlib.contextmanager
def time_box(seconds: float) -> Iterator[None]:
    """Raise `TimeUp` inside the block when the seconds are over; what runs in C ends first. In the main thread only."""

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
    """Return the seconds of the first of several parts: its share of what is left, so that none spared is lost."""
    return left * weights[0] / sum(weights)
