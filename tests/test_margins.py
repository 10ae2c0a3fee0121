"""`pytest --margins` reports the largest error over its bound, by file and by test."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

FILE = """
import pytest
import torch
from fastmask.testing import assert_accurate, assert_near, error_over_bound

exact = torch.ones(64, dtype=torch.float64)
one = exact.float()

def test_measured():
    bound = 8 * 2.0**-24
    assert_near(one * (1 + bound / 2), exact)
    torch.testing.assert_close(one + 3e-6, one, rtol=0, atol=1e-5)

def test_wrong_on_purpose():
    with pytest.raises(AssertionError):
        assert_accurate(one + 1, exact, one)
    assert error_over_bound(one, exact, one) == 0

def test_of_other_things():
    assert torch.get_num_threads() == {threads}
    assert torch.initial_seed() == {seed}
    torch.set_num_threads(4)

def test_after_one_that_changed_the_threads():
    assert torch.get_num_threads() == {threads}
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_the_report(tmp_path, workers):
    (tmp_path / "test_it.py").write_text(FILE.format(threads=2, seed=5))
    for name in ("conftest.py", "margins.py"):
        (tmp_path / name).write_text((TESTS / name).read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = .\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", str(workers), "--margins"]
    command += ["--margins-list", str(tmp_path / "list"), "--seed=5", "--threads=2"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = str(TESTS.parent)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = done.stdout.split("largest error over its bound")[1].split("\n")[1:5]
    assert report == [
        " 0.50  test_it.py, 2 tests",
        " 0.50  test_it.py::test_measured",
        " 0.00  test_it.py::test_wrong_on_purpose",
        "margins: 3 errors in 2 tests, the largest 0.500 of its bound",
    ]
    assert (tmp_path / "list").read_text() == "0.5 test_it.py::test_measured\n0.0 test_it.py::test_wrong_on_purpose"
