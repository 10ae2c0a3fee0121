"""Entries of pytest-benchmark for times that were taken already: one per variant, of that variant's own calls.

Variants that are compared are timed in turn by `bench.rows.take`, which pytest-benchmark cannot do: it times one
function per test. So a test measures, and `Entries` then replays each variant's times under a clock of its own. What is
shown, stored by `--benchmark-json` and compared by `--benchmark-compare` are those times, and never that of a whole
measurement.
"""

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import Any


class _Replay:
    """A clock that stands still but for the times that it replays."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def reset(self) -> None:
        self.seconds = 0.0

    def advance(self, milliseconds: float) -> None:
        self.seconds += milliseconds / 1e3


_REPLAY = _Replay()


def replayed() -> float:
    """Return the seconds of the replay: what tests that use `Entries` have as pytest-benchmark's ``timer``."""
    return _REPLAY.seconds


class Entries:
    """The entries of one test.

    Args:
        benchmark: the fixture of the test, unused, whose timer is `replayed`. It serves the first entry and copies of
            it the others, because a fixture can be used once.
    """

    def __init__(self, benchmark: Any) -> None:
        self._unused = benchmark

    def add(self, variant: str, times: Sequence[float], *, group: str, about: Mapping[str, Any]) -> None:
        """Add the entry of a variant; where benches are off nothing is recorded.

        Args:
            variant: becomes part of the entry's name, and the parameter "variant".
            times: milliseconds of each call.
            group: entries of one group stand in one table.
            about: the entry's extra_info.
        """
        entry = self._unused
        self._unused = copy.copy(entry)
        entry.name, entry.fullname = _joined(entry.name, variant), _joined(entry.fullname, variant)
        entry.param = f"{entry.param}-{variant}" if entry.param else variant
        entry.params = {**(entry.params or {}), "variant": variant}
        entry.group, entry.extra_info = group, dict(about)
        left = itertools.cycle(times)  # a profiler's extra calls find one too
        entry.pedantic(lambda: _REPLAY.advance(next(left)), setup=_REPLAY.reset, rounds=len(times))


def _joined(name: str, variant: str) -> str:
    """Return the name of a test with the variant among its parameters."""
    return f"{name[:-1]}-{variant}]" if name.endswith("]") else f"{name}[{variant}]"
