"""pytest-benchmark's own output is of the times that were taken: an entry for each variant, whatever the options."""

import json
import os
import subprocess
import sys

import pytest

from bench.report import tables
from bench.rows import ROOT

CONFTEST = """
import pytest
from bench.report.entries import Entries, replayed

def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=replayed))

@pytest.fixture
def entries(benchmark):
    return Entries(benchmark)
"""
BENCHES = """
import pytest

@pytest.mark.parametrize("size", ["s2", "b2"])
def bench_case(entries, size):
    for variant, times in (("plain eager", [300.0, 100.0, 200.0]), ("ours", [10.0, 30.0])):
        entries.add(variant, times, group=f"steps, {size}", about={"batch": 4})

def bench_alone(entries):
    entries.add("copy", [7.0], group="loaders", about={})

def bench_broken(entries):
    raise AssertionError("a red gate")
"""


@pytest.fixture
def session(tmp_path):
    """Return a function that runs the benches above with some options, and returns what they printed and stored."""
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "bench_it.py").write_text(BENCHES)
    (tmp_path / "pytest.ini").write_text("[pytest]\npython_files = bench_*.py\npython_functions = bench_*\n")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}

    def run(*options, code=0):
        stored = tmp_path / "stored.json"
        stored.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--benchmark-json={stored}", *options]
        command += [f"--benchmark-storage={tmp_path / 'saved'}"]
        environment["PYTHONPATH"] = str(ROOT)
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        text = stored.read_text() if stored.exists() else ""  # some versions leave an empty file
        return done.stdout, json.loads(text)["benchmarks"] if text else []

    return run


def test_each_variant_has_an_entry_of_its_own_calls(session):
    out, found = session("--benchmark-only", code=1)
    by_name = {entry["name"]: entry for entry in found}
    assert {name: [1e3 * time for time in entry["stats"]["data"]] for name, entry in by_name.items()} == {
        "bench_case[s2-plain eager]": [300.0, 100.0, 200.0],
        "bench_case[s2-ours]": [10.0, 30.0],
        "bench_case[b2-plain eager]": [300.0, 100.0, 200.0],
        "bench_case[b2-ours]": [10.0, 30.0],
        "bench_alone[copy]": [7.0],
    }
    ours = by_name["bench_case[b2-ours]"]
    assert ours["fullname"] == "bench_it.py::bench_case[b2-ours]"
    assert (ours["group"], ours["param"], ours["extra_info"]) == ("steps, b2", "b2-ours", {"batch": 4})
    assert ours["params"] == {"size": "b2", "variant": "ours"}
    assert by_name["bench_alone[copy]"]["params"] == {"variant": "copy"}
    assert ours["stats"]["median"] == 0.02
    assert by_name["bench_case[s2-plain eager]"]["stats"]["median"] == 0.2
    assert "benchmark 'steps, s2': 2 tests" in out
    assert "bench_broken" not in out[out.index("benchmark 'loaders'") : out.index("Legend")]


def test_what_is_selected_grouped_and_profiled(session):
    out, found = session("--benchmark-only", "-k", "s2", "--benchmark-group-by=param:variant")
    assert [entry["name"] for entry in found] == ["bench_case[s2-plain eager]", "bench_case[s2-ours]"]
    assert "benchmark 'variant=ours': 1 tests" in out
    _, found = session("--benchmark-only", "-k", "alone", "--benchmark-cprofile=cumtime")
    assert [entry["stats"]["data"] for entry in found] == [[0.007]]


def test_an_entry_is_compared_with_its_own_variant(session):
    session("--benchmark-only", "-k", "case", "--benchmark-save=before")
    out, _ = session("--benchmark-only", "-k", "case", "--benchmark-compare", "--benchmark-compare-fail=median:1%")
    # Each variant stands beside its own time of before, and nothing has regressed.
    assert "before" in out
    assert "PerformanceRegression" not in out
    for variant in ("plain eager", "ours"):
        assert f"bench_case[s2-{variant}]" in out


def test_where_benches_are_off_nothing_is_recorded(session):
    for option in ("--benchmark-disable", "--benchmark-skip"):
        out, found = session(option, "-k", "not broken")
        assert found == []
        assert "not used at all" not in out
        assert "tests ---" not in out
        assert ("3 passed" in out) is (option == "--benchmark-disable")


def timing(median):
    return {"median_ms": median, "p20_ms": 0.9 * median, "p80_ms": 1.25 * median}


def test_the_table_of_kernels():
    case = {"op": "add_gated_norm", "direction": "forward_backward", "shape": "B=128 K=128 D=1152", "dtype": "bfloat16"}
    moved, others = {"gb_per_s": 1234.56, "copy_percent": 45.67}, {**case, "direction": "forward"}
    measured = [(case, name, {**timing(median), **moved}) for name, median in (("reference", 0.25), ("ours", 0.125))]
    measured += [(others, "flash-attn", {**timing(1234.5), **moved, "flops": 1, "tflop_per_s": 0.1234})]
    lines = tables.kernels(measured)
    assert [line.split() for line in lines] == [
        ["against", "of", "a"],
        ["ms", "[p20,", "p80]", "reference", "GB/s", "copy", "TFLOP/s"],
        ["add_gated_norm", "forward_backward,", "B=128", "K=128", "D=1152,", "bfloat16"],
        ["reference", "0.250", "[0.225,", "0.312]", "1235", "45.7%"],
        ["ours", "0.125", "[0.113,", "0.156]", "2.00x", "1235", "45.7%"],
        ["add_gated_norm", "forward,", "B=128", "K=128", "D=1152,", "bfloat16"],
        ["flash-attn", "1234", "[1111,", "1543]", "1235", "45.7%", "0.123"],
    ]
    assert max(map(len, lines)) < 80
    assert tables.kernels([]) == []


def test_the_table_of_loaders():
    case = {"data": "8,192 moments 8x32x32 fp16", "batch": 256, "batches": 32, "num_workers": 2}
    measured = [(case, "DataLoader over .npy", {**timing(3200.0), "images_per_s": 25_600.0})]
    assert [line.split() for line in tables.loaders(measured)][2:] == [
        ["DataLoader", "over", ".npy", "25,600", "100", "[90.0,", "125]"]
    ]
    measured.append((case, "StoreDataset", {**timing(32.0), "images_per_s": 1e6, "own_mib": 1494.3, "grown_mib": 0.21}))
    lines = tables.loaders(measured)
    assert lines[0].split() == ["images/s", "ms", "[p20,", "p80]", "MiB", "growth"]
    assert lines[-1].split() == ["StoreDataset", "1,000,000", "1.00", "[0.900,", "1.25]", "1,494", "+0.2"]
    assert len(lines) == 4
    assert max(map(len, lines)) < 80
    assert tables.loaders([]) == []
