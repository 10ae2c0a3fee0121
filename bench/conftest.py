"""What the benches share: options, threads, the machine beside the figures, and the kernels' cases and report.

Each kernel case is checked, then timed with all its variants in turn. The figures and what was not run, with the
reason, stand at the end of the session; the table of pytest-benchmark has the time of all variants together.
"""

import importlib.metadata
import os
import platform
import uuid

import pytest
import torch

from bench import rows
from bench.kernels import figures, forms, make
from bench.kernels._cases import PRESET, shapes_of

ROUNDS = {"cuda": 50, "cpu": 10}
_MEASURED = pytest.StashKey[list]()
_MISSING = pytest.StashKey[list]()
_LOADED = pytest.StashKey[list]()


def pytest_addoption(parser):
    parser.addoption("--rows", action="store_true", help="append what is measured to bench/results")
    parser.addoption("--full", action="store_true", help="also what takes minutes a case on a CPU")


def pytest_configure(config):
    config.stash[_MEASURED], config.stash[_MISSING], config.stash[_LOADED] = [], [], []


def pytest_report_header():
    shapes = shapes_of(PRESET[_device().type], _device())
    dtype = str(shapes.dtype).removeprefix("torch.")
    return f"kernel benches: {shapes.preset}, batch {shapes.batch}, {dtype}, on {rows.machine(_device())['device']}"


@pytest.fixture(autouse=True, scope="session")
def _threads():
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


def pytest_generate_tests(metafunc):
    """Give each kernel bench the forms and directions of its op."""
    if "kernel_case" in metafunc.fixturenames:
        op = metafunc.module.__name__.rpartition("bench_")[2]
        chosen = [(op, form, direction) for form, direction in forms(op)]
        metafunc.parametrize("kernel_case", chosen, indirect=True, ids=["-".join(choice[1:]) for choice in chosen])


@pytest.fixture
def kernel_case(request, missing):
    made = make(*request.param, PRESET[_device().type], _device(), None)
    for variant, reason in made.missing.items():
        missing(variant, reason, f"{made.op} {made.direction}")
    return made


@pytest.fixture(scope="session")
def missing(request):
    """Take down that a variant of something was not run, and why, for the end of the session."""
    return lambda variant, reason, name: request.config.stash[_MISSING].append((variant, reason, name))


@pytest.fixture(scope="session")
def run_id():
    """What the rows of one session share: they were taken in one run."""
    return uuid.uuid4().hex[:12]


@pytest.fixture
def noted(benchmark, run_id, request):
    """Take a loader's timing down for the end of the session, and store it. Not where benches are off."""

    def note(bench, case, variant, timing, device, **more):
        if benchmark.disabled:
            return  # a single call may take what a worker has read before it
        rate = round(case["batch"] * case["batches"] / timing.median_ms * 1e3, 1)
        found = {**timing._asdict(), "images_per_s": rate, **more, "run": run_id}
        benchmark.extra_info[variant] = found
        request.config.stash[_LOADED].append((case, variant, found))
        if request.config.getoption("rows"):
            rows.append({"bench": bench, "case": case, "variant": variant, **found}, device)

    return note


@pytest.fixture(scope="session")
def bandwidth():
    """Bytes per second of a plain copy, once per session."""
    return rows.copy_bandwidth(_device())


@pytest.fixture
def timed(benchmark, bandwidth, run_id, request):
    """Time the variants of a case in turn, and note and store the figures. One call of each where benches are off."""

    def run(case):
        off = benchmark.disabled
        rounds = {"rounds": 1 if off else ROUNDS[_device().type], "warmup": 0 if off else 3}
        timings = benchmark.pedantic(rows.measure, (case.variants, _device()), rounds, rounds=1)
        what = {name: getattr(case, name) for name in ("op", "direction", "shape", "dtype", "preset")}
        versions = {"torch": torch.__version__, "triton": _triton(), "commit": rows.commit()}
        benchmark.extra_info.update(**what, **versions, copy_gb_per_s=round(bandwidth / 1e9, 2))
        for variant, found in figures(case, timings, bandwidth).items():
            benchmark.extra_info[variant] = found
            request.config.stash[_MEASURED].append((what, variant, found))
            if request.config.getoption("rows") and not off:
                row = {"bench": "kernel", "case": what, "variant": variant, **found, "triton": _triton(), "run": run_id}
                rows.append(row, _device())

    return run


def pytest_terminal_summary(terminalreporter, config):
    """Print the figures of the kernels, what was not run and why, and the figures of the loaders."""
    if config.stash[_MEASURED]:
        terminalreporter.section("kernels: median [20th, 80th percentile]")
    for what, variant, found in config.stash[_MEASURED]:
        times = f"{found['median_ms']:9.3f} ms [{found['p20_ms']:.3f}, {found['p80_ms']:.3f}]"
        rates = f"{found['gb_per_s']:8.2f} GB/s {found['copy_percent']:6.1f} % of a copy"
        flops = f" {found['tflop_per_s']:8.3f} TFLOP/s" if "flops" in found else ""
        name = f"{what['op']} {what['direction']}, {what['shape']}"
        terminalreporter.write_line(f"{name:<68} {variant:<10} {times:<32} {rates}{flops}")
    cases = {}
    for variant, reason, name in config.stash[_MISSING]:
        cases.setdefault((variant, reason), []).append(name)
    if cases:
        terminalreporter.section("not run")
    for (variant, reason), names in cases.items():
        terminalreporter.write_line(f"{variant}: {reason}\n    {', '.join(dict.fromkeys(names))}")
    if config.stash[_LOADED]:
        terminalreporter.section("loaders: images/s, and ms [20th, 80th percentile] of a batch")
    for case, variant, found in config.stash[_LOADED]:
        median, low, high = (found[name] / case["batches"] for name in ("median_ms", "p20_ms", "p80_ms"))
        name = f"{case['data']}, batch {case['batch']}, num_workers {case['num_workers']}"
        times = f"{median:9.3f} ms [{low:.3f}, {high:.3f}]"
        grown = f", {found['own_mib']:,.0f} MiB and {found['grown_mib']:+.1f}" if "own_mib" in found else ""
        terminalreporter.write_line(f"{name:<68} {variant:<22} {found['images_per_s']:9,.0f} images/s {times}{grown}")


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()


def _device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _triton():
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None
