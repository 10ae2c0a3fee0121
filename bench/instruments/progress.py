"""Progress of a measurement, printed while it runs, bypassing pytest's capture.

A terminal shows one line that is updated; a file or pipe gets a line occasionally. Short measurements, such as most
kernels', print no line.
"""

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol


class Screen(Protocol):
    """An output for progress.

    Attributes:
        seconds: minimum time between two lines, and before the first, except for lines that must be shown.
    """

    seconds: float

    def show(self, text: str) -> None:
        """Show a line; on a terminal, replace the previous one."""

    def end(self, text: str) -> None:
        """Show the last line of a measurement, which stays."""


class PytestScreen:
    """The terminal of a pytest session; pytest's own output continues below each measurement."""

    def __init__(self, config: Any) -> None:
        self._reporter = config.pluginmanager.get_plugin("terminalreporter")
        self._capture = config.pluginmanager.get_plugin("capturemanager")
        self._silent = self._reporter is None or config.getoption("verbose") < 0
        self._updates = not self._silent and bool(self._reporter.isatty)
        self._shown = False  # whether the current line belongs to this measurement
        self.seconds = 0.5 if self._updates else 10.0

    def show(self, text: str) -> None:
        """Show a line; on a terminal, replace the previous one."""
        if self._silent:
            return
        if self._updates:
            text = text[: shutil.get_terminal_size().columns - 1]
        with self._capture.global_and_fixture_disabled() if self._capture else contextlib.nullcontext():
            if self._updates and self._shown:
                self._reporter.rewrite("", erase=True)
                self._reporter.rewrite(text)
            else:
                # The line stays open: pytest begins its next output with a newline.
                self._reporter.currentfspath = None
                self._reporter.write(f"\n{text}")
            self._reporter.flush()
        self._shown = True

    def end(self, text: str) -> None:
        """Show the last line of a measurement, which stays; pytest's letter for the test follows it."""
        self.show(f"{text} ")
        self._shown = False


class Progress:
    """The progress of consecutive measurements.

    Args:
        screen: output for the lines.
        now: clock, in seconds.
    """

    def __init__(self, screen: Screen, now: Callable[[], float] = time.monotonic) -> None:
        self._screen, self._now = screen, now
        self._last = now()

    @contextlib.contextmanager
    def of(self, what: str, warmups: int, *, long: bool = False) -> Iterator["Measurement"]:
        """Yield the progress callback of a measurement, for the block that measures.

        Args:
            what: name of the measurement.
            warmups: number of warm-up calls.
            long: the setup can take minutes, so each part of it is shown.
        """
        measurement = Measurement(self._show, what, warmups, long, self._now)
        begun, ended = self._now(), "stopped after"
        self._last = begun  # short measurements are not shown
        try:
            yield measurement
            ended = "measured in"
        finally:
            if measurement.shown:
                self._screen.end(f"{what}: {ended} {duration(self._now() - begun)}")
                self._last = self._now()

    def _show(self, text: str, must: bool) -> bool:
        """Show a line, unless one was shown just before; return whether it was shown."""
        if not must and self._now() - self._last < self._screen.seconds:
            return False
        self._screen.show(text)
        self._last = self._now()
        return True


class Measurement:
    """The progress of one measurement, see `Progress.of`; a callback of `bench.rows.take`, called before each call."""

    def __init__(
        self, show: Callable[[str, bool], bool], what: str, warmups: int, long: bool, now: Callable[[], float]
    ) -> None:
        self._show, self._what, self._warmups, self._long = show, what, warmups, long
        self._estimate = _Estimate(now)
        self._warmed = 0
        self.shown = False

    def __call__(self, variant: Any, number: int, rounds: int) -> None:
        """Show the next variant and its round; round 0 is the warm-up."""
        if number:
            self._say(f"{variant}: round {number} of {rounds}{self._estimate.left(number, rounds)}", must=False)
            return
        self._warmed += 1
        compiles = " and compile" if any(word in str(variant) for word in ("compiled", "graphs")) else ""
        self._say(f"{variant}: warm-up{compiles}, {self._warmed} of {self._warmups}", must=self._long)

    def prepare(self, text: str) -> None:
        """Show a step of the setup before the warm-up."""
        self._say(text, must=self._long)

    def _say(self, text: str, *, must: bool) -> None:
        self.shown = self._show(f"{self._what}: {text}", must) or self.shown


class _Estimate:
    """The remaining time, estimated from the mean of the finished rounds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._round, self._first, self._latest = 0, 0.0, 0.0  # current round, start of the first and of this one

    def left(self, number: int, rounds: int) -> str:
        """Return the remaining time in words; empty in the first round."""
        now = self._now()
        if number > self._round:
            self._round, self._latest = number, now
            self._first = self._first if number > 1 else now
        if number == 1:
            return ""
        whole = (self._latest - self._first) / (number - 1) * rounds
        return f", about {duration(max(0.0, self._first + whole - now))} left"


def duration(seconds: float) -> str:
    """Format seconds: "45 s", "3 min 05 s", "1 h 02 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
