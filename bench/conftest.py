"""Shared fixtures of the benchmarks: options, threads, machine info, progress, and the tables of the session.

Each kernel case is checked, then all its variants are timed in turn. The tables, and skipped variants with the reason,
are printed at the end of the session, training steps last. Each variant has a pytest-benchmark entry
(`bench.report.entries`), so its table, `--benchmark-json` and `--benchmark-compare` use the same times.
"""

import importlib.metadata
import os
import pathlib
import platform
import textwrap
import uuid

import pytest
import torch

from bench import rows
from bench.instruments.cases import PRESET, figures, forms, make
from bench.instruments.progress import Progress, PytestScreen
from bench.ops import OPS, shapes_of
from bench.report.entries import Entries, replayed
from bench.report.tables import kernels, loaders, sampling
from bench.train.table import Table

ROUNDS = {"cuda": 50, "cpu": 10}
WARMUP = 3
_MEASURED = pytest.StashKey[list]()
_MISSING = pytest.StashKey[list]()
_LOADED = pytest.StashKey[list]()
_STEPS = pytest.StashKey[Table]()
_SAMPLED = pytest.StashKey[list]()


def pytest_addoption(parser):
    parser.addoption("--rows", action="store_true", help="append the measured rows to bench/results")
    parser.addoption("--full", action="store_true", help="include cases that take minutes on a CPU")
    parser.addoption("--stacks", default="", help="stacks of training steps to time, such as 'ours,plain eager'; all")


def pytest_configure(config):
    config.stash[_MEASURED], config.stash[_MISSING], config.stash[_LOADED] = [], [], []
    config.stash[_STEPS], config.stash[_SAMPLED] = Table(), []
    # Fewer columns of pytest-benchmark's table by default, to fit a terminal.
    config.option.benchmark_columns = config.option.benchmark_columns or ["min", "median", "rounds"]


def pytest_collection_modifyitems(items):
    """Make pytest-benchmark use the clock under which `Entries` replays times."""
    folder = pathlib.Path(__file__).parent
    for item in items:
        if folder in item.path.parents:
            item.add_marker(pytest.mark.benchmark(timer=replayed))


def pytest_report_header():
    device = rows.default_device()
    shapes = shapes_of(PRESET[device.type], device)
    dtype = str(shapes.dtype).removeprefix("torch.")
    return f"kernel benches: {shapes.preset}, batch {shapes.batch}, {dtype}, on {rows.machine(device)['device']}"


@pytest.fixture(autouse=True, scope="session")
def _threads():
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


def pytest_generate_tests(metafunc):
    """Parametrize the kernel benchmark with every form and direction of every op."""
    if "kernel_case" in metafunc.fixturenames:
        chosen = [(op, form, direction) for op in OPS for form, direction in forms(op)]
        metafunc.parametrize("kernel_case", chosen, indirect=True, ids=map("-".join, chosen))


@pytest.fixture
def kernel_case(request, missing):
    made = make(*request.param, PRESET[rows.default_device().type], rows.default_device())
    for variant, reason in made.missing.items():
        missing(variant, reason, f"{made.op} {made.direction}")
    return made


@pytest.fixture(scope="session")
def missing(request):
    """Record a skipped variant and the reason, for the end of the session."""
    return lambda variant, reason, name: request.config.stash[_MISSING].append((variant, reason, name))


@pytest.fixture(scope="session")
def run_id():
    """The run id shared by the rows of a session."""
    return uuid.uuid4().hex[:12]


@pytest.fixture(scope="session")
def progress(request):
    """The progress display."""
    return Progress(PytestScreen(request.config))


@pytest.fixture(scope="session")
def step_table(request):
    """The table of training steps at the end of the session."""
    return request.config.stash[_STEPS]


@pytest.fixture
def entries(benchmark):
    """The `Entries` that pass a test's times to pytest-benchmark."""
    return Entries(benchmark)


@pytest.fixture
def noted(benchmark, entries, run_id, request):
    """Record and store a loader's times, unless benchmarks are disabled."""

    def note(bench, case, variant, times, device, **more):
        timing = rows.timing(times)
        rate = round(case["batch"] * case["batches"] / timing.median_ms * 1e3, 1)
        found = {**timing._asdict(), "images_per_s": rate, **more, "run": run_id}
        group = f"{bench}, {case['batches']} batches of {case['batch']}"
        entries.add(variant, times, group=group, about={**case, **found})
        if benchmark.disabled:
            return  # a single call can be served from prefetched batches
        request.config.stash[_LOADED].append((case, variant, found))
        if request.config.getoption("rows"):
            rows.append({"bench": bench, "case": case, "variant": variant, **found}, device)

    return note


@pytest.fixture
def sampled(benchmark, entries, run_id, request):
    """Record and store a sampler's times, unless benchmarks are disabled."""

    def record(case, variant, times, device):
        timing = rows.timing(times)
        found = {**timing._asdict(), "images_per_s": round(case["batch"] / timing.median_ms * 1e3, 4), "run": run_id}
        entries.add(variant, times, group=f"sampling, {case['size']}", about={**case, **found})
        if benchmark.disabled:
            return
        request.config.stash[_SAMPLED].append((case, variant, found))
        if request.config.getoption("rows"):
            rows.append({"bench": "sampling", "case": case, "variant": variant, **found}, device)

    return record


@pytest.fixture(scope="session")
def bandwidth():
    """Bytes per second of a plain copy, once per session."""
    return rows.copy_bandwidth(rows.default_device())


@pytest.fixture
def timed(benchmark, entries, bandwidth, run_id, progress, request):
    """Time the variants of a case in turn, and record the figures; one call each if benchmarks are disabled."""

    def run(case):
        off = benchmark.disabled
        times = {"rounds": 1 if off else ROUNDS[rows.default_device().type], "warmup": 0 if off else WARMUP}
        name = f"{case.op} {case.direction}"
        with progress.of(name, times["warmup"] * len(case.variants)) as told:
            taken = rows.take(case.variants, rows.default_device(), progress=told, **times)
        what = {name: getattr(case, name) for name in ("op", "direction", "shape", "dtype", "preset")}
        versions = {"torch": torch.__version__, "triton": _triton(), "commit": rows.commit()}
        about = {**what, **versions, "copy_gb_per_s": round(bandwidth / 1e9, 2)}
        timings = {variant: rows.timing(found) for variant, found in taken.items()}
        for variant, found in figures(case, timings, bandwidth).items():
            entries.add(variant, taken[variant], group=case.op, about={**about, **found})
            if off:
                continue
            request.config.stash[_MEASURED].append((what, variant, found))
            if request.config.getoption("rows"):
                row = {"bench": "kernel", "case": what, "variant": variant, **found, "triton": _triton(), "run": run_id}
                rows.append(row, rows.default_device())

    return run


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    """Print skipped variants and the tables of kernels, loaders and steps, below pytest-benchmark's table."""
    cases = {}
    for variant, reason, name in config.stash[_MISSING]:
        cases.setdefault((variant, reason), []).append(name)
    absent = []
    for (variant, reason), names in cases.items():
        indented = {"width": 79, "initial_indent": "    ", "subsequent_indent": "    "}
        absent += [f"{variant}: {reason}", *textwrap.wrap(", ".join(dict.fromkeys(names)), **indented)]
    sections = {
        "kernels: median [20th, 80th percentile]": kernels(config.stash[_MEASURED]),
        "not run": absent,
        "loaders: images/s, and ms [20th, 80th percentile] of a batch": loaders(config.stash[_LOADED]),
        "sampling: ms [20th, 80th percentile] of a batch": sampling(config.stash[_SAMPLED]),
        f"training steps on {rows.machine(rows.default_device())['device']}": [*config.stash[_STEPS].lines()],
    }
    for title, lines in sections.items():
        if lines:
            terminalreporter.section(title)
        for line in lines:
            terminalreporter.write_line(line)


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()


def _triton():
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None
