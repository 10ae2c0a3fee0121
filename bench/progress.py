"""How far a measurement is, said on the terminal while it runs, past pytest's capture.

A terminal shows one line that is updated; a file or a pipe gets a line now and then. A measurement that is over in a
moment, as those of most kernels are, leaves no line at all.
"""

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol


class Screen(Protocol):
    """Where progress is shown.

    Attributes:
        seconds: the least time between two lines, and before the first, but for those that have to be seen.
    """

    seconds: float

    def show(self, text: str) -> None:
        """Show a line; on a terminal in the place of the one before."""

    def end(self, text: str) -> None:
        """Show the last line of a measurement, which stays."""


class PytestScreen:
    """The terminal of a pytest session, whose own lines continue below each measurement."""

    def __init__(self, config: Any) -> None:
        self._reporter = config.pluginmanager.get_plugin("terminalreporter")
        self._capture = config.pluginmanager.get_plugin("capturemanager")
        self._silent = self._reporter is None or config.getoption("verbose") < 0
        self._updates = not self._silent and bool(self._reporter.isatty)
        self._shown = False  # whether the present line is this measurement's
        self.seconds = 0.5 if self._updates else 10.0

    def show(self, text: str) -> None:
        """Show a line; on a terminal in the place of the one before."""
        if self._silent:
            return
        if self._updates:
            text = text[: shutil.get_terminal_size().columns - 1]
        with self._capture.global_and_fixture_disabled() if self._capture else contextlib.nullcontext():
            if self._updates and self._shown:
                self._reporter.rewrite("", erase=True)
                self._reporter.rewrite(text)
            else:
                # The line stays open, for pytest begins what it writes next with a newline.
                self._reporter.currentfspath = None
                self._reporter.write(f"\n{text}")
            self._reporter.flush()
        self._shown = True

    def end(self, text: str) -> None:
        """Show the last line of a measurement, which stays; pytest's letter for the test follows it."""
        self.show(f"{text} ")
        self._shown = False


class Progress:
    """The progress of one measurement after the other.

    Args:
        screen: where it is shown.
        now: the clock, in seconds.
    """

    def __init__(self, screen: Screen, now: Callable[[], float] = time.monotonic) -> None:
        self._screen, self._now = screen, now
        self._last = now()

    @contextlib.contextmanager
    def of(self, what: str, warmups: int, *, long: bool = False) -> Iterator["Measurement"]:
        """Return what is told how far a measurement is, inside the block that measures.

        Args:
            what: the name of the measurement.
            warmups: the number of its warm-up calls.
            long: what comes before its rounds may take minutes, so each part of that is shown.
        """
        measurement = Measurement(self._show, what, warmups, long, self._now)
        begun, ended = self._now(), "stopped after"
        self._last = begun  # what is over soon is not shown
        try:
            yield measurement
            ended = "measured in"
        finally:
            if measurement.shown:
                self._screen.end(f"{what}: {ended} {duration(self._now() - begun)}")
                self._last = self._now()

    def _show(self, text: str, must: bool) -> bool:
        """Show a line unless another was shown just before, and return whether it was."""
        if not must and self._now() - self._last < self._screen.seconds:
            return False
        self._screen.show(text)
        self._last = self._now()
        return True


class Measurement:
    """The progress of one measurement; see `Progress.of`. Called before each call, as `bench.rows.take` does."""

    def __init__(
        self, show: Callable[[str, bool], bool], what: str, warmups: int, long: bool, now: Callable[[], float]
    ) -> None:
        self._show, self._what, self._warmups, self._long = show, what, warmups, long
        self._estimate = _Estimate(now)
        self._warmed = 0
        self.shown = False

    def __call__(self, variant: Any, number: int, rounds: int) -> None:
        """Say which variant is called next, and in which round; 0 is the warm-up."""
        if number:
            self._say(f"{variant}: round {number} of {rounds}{self._estimate.left(number, rounds)}", must=False)
            return
        self._warmed += 1
        compiles = " and compile" if any(word in str(variant) for word in ("compiled", "graphs")) else ""
        self._say(f"{variant}: warm-up{compiles}, {self._warmed} of {self._warmups}", must=self._long)

    def prepare(self, text: str) -> None:
        """Say what is done before the warm-up."""
        self._say(text, must=self._long)

    def _say(self, text: str, *, must: bool) -> None:
        self.shown = self._show(f"{self._what}: {text}", must) or self.shown


class _Estimate:
    """The time that is left, by the mean of the rounds that are over."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._round, self._first, self._latest = 0, 0.0, 0.0  # the round, and when the first and this one began

    def left(self, number: int, rounds: int) -> str:
        """Return it in words, at some time in a round; nothing in the first."""
        now = self._now()
        if number > self._round:
            self._round, self._latest = number, now
            self._first = self._first if number > 1 else now
        if number == 1:
            return ""
        whole = (self._latest - self._first) / (number - 1) * rounds
        return f", about {duration(max(0.0, self._first + whole - now))} left"


def duration(seconds: float) -> str:
    """Return seconds in words: "45 s", "3 min 05 s", "1 h 02 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
