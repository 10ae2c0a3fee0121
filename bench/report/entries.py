"""pytest-benchmark entries for existing measurements, one per variant.

Variants are timed in turn by `bench.rows.take`, which pytest-benchmark cannot do, since it times one function per test.
So a test measures, and `Entries` then replays each variant's times under its own clock. These are the times that
pytest-benchmark prints, stores (`--benchmark-json`) and compares (`--benchmark-compare`).
"""

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import Any


class _Replay:
    """A clock that only advances by replayed times."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def reset(self) -> None:
        self.seconds = 0.0

    def advance(self, milliseconds: float) -> None:
        self.seconds += milliseconds / 1e3


_REPLAY = _Replay()


def replayed() -> float:
    """Return the seconds of the replay clock, pytest-benchmark's ``timer`` for tests that use `Entries`."""
    return _REPLAY.seconds


class Entries:
    """The entries of one test.

    Args:
        benchmark: the test's unused `benchmark` fixture, with the timer `replayed`. The first entry uses it and the
            others use copies, because a fixture can be used only once.
    """

    def __init__(self, benchmark: Any) -> None:
        self._unused = benchmark

    def add(self, variant: str, times: Sequence[float], *, group: str, about: Mapping[str, Any]) -> None:
        """Add the entry of a variant; nothing is recorded if benchmarks are disabled.

        Args:
            variant: name of the variant, added to the entry's name and as the parameter "variant".
            times: milliseconds of each call.
            group: table of the entry.
            about: the entry's extra_info.
        """
        entry = self._unused
        self._unused = copy.copy(entry)
        entry.name, entry.fullname = _joined(entry.name, variant), _joined(entry.fullname, variant)
        entry.param = f"{entry.param}-{variant}" if entry.param else variant
        entry.params = {**(entry.params or {}), "variant": variant}
        entry.group, entry.extra_info = group, dict(about)
        left = itertools.cycle(times)  # a cycle, for a profiler's extra calls
        entry.pedantic(lambda: _REPLAY.advance(next(left)), setup=_REPLAY.reset, rounds=len(times))


def _joined(name: str, variant: str) -> str:
    """Add the variant to the parameters in a test's name."""
    return f"{name[:-1]}-{variant}]" if name.endswith("]") else f"{name}[{variant}]"
