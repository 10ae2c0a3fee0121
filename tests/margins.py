"""`pytest --margins`: how near each test comes to its bounds, printed at the end.

A test whose largest error is most of its bound here may fail on another processor, where errors are others.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmask import testing

WORST = 12  # tests that are named


class Margins:
    """A plugin that notes every error over its bound that the tests' measures find, and reports the largest."""

    def __init__(self, listed: str | None):
        self._listed = listed
        self._found: list[float] = []
        self.by_test: dict[str, list[float]] = {}
        for owner, name in ((testing, "error_over_bound"), (testing, "norm_error_over_bound")):
            setattr(owner, name, self._noted(getattr(owner, name)))
        torch.testing.assert_close = self._noted_close(torch.testing.assert_close)

    def _noted(self, measure: Callable[..., float]) -> Callable[..., float]:
        @functools.wraps(measure)
        def noted(*args: Any, **options: Any) -> float:
            over = measure(*args, **options)
            self._found.append(over)
            return over

        return noted

    def _noted_close(self, check: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(check)
        def noted(actual: Any, expected: Any, **options: Any) -> None:
            check(actual, expected, **options)
            if isinstance(actual, torch.Tensor) and actual.is_floating_point() and actual.numel():
                rtol, atol = options.get("rtol"), options.get("atol")
                if rtol is None:
                    rtol, atol = torch.testing._comparison.get_tolerances(actual, expected, rtol=None, atol=None)
                if rtol or atol:
                    right = expected.detach().double()
                    over = (actual.detach().double() - right).abs() / (atol + rtol * right.abs())
                    self._found.append(float(over.nan_to_num(0.0).max()))

        return noted

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Any:
        self._found.clear()
        passed = False
        try:
            result = yield
            passed = True
            return result
        finally:
            # What a passing test found too large was wrong on purpose.
            found = [over for over in self._found if not passed or over <= 1]
            if found:
                item.user_properties.append(("margins", found))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            for name, found in report.user_properties:
                if name == "margins":
                    self.by_test[report.nodeid] = found

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self._listed:
            lines = (f"{max(found)} {test}" for test, found in self.by_test.items())
            Path(self._listed).write_text("\n".join(lines))
        files: dict[str, list[float]] = defaultdict(list)
        for test, found in self.by_test.items():
            files[test.split("::")[0]].append(max(found))
        terminalreporter.section("largest error over its bound")
        for file, largest in sorted(files.items()):
            terminalreporter.write_line(f"{max(largest):5.2f}  {file}, {len(largest)} tests")
        worst = sorted(self.by_test.items(), key=lambda entry: -max(entry[1]))[:WORST]
        for test, found in worst:
            terminalreporter.write_line(f"{max(found):5.2f}  {test}")
        every = [over for found in self.by_test.values() for over in found]
        largest = f"the largest {max(every, default=math.nan):.3f} of its bound"
        terminalreporter.write_line(f"margins: {len(every)} errors in {len(self.by_test)} tests, {largest}")
