import gc
import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this once, when it is imported: without a device its kernels can only be interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser):
    group = parser.getgroup("fastmask")
    group.addoption("--margins", action="store_true", help="print how much of its bound the error of each test takes")
    group.addoption("--margins-list", metavar="FILE", help="write what --margins found, a test a line")
    group.addoption("--seed", type=int, default=0, help="seed of every test's random numbers")
    group.addoption("--threads", type=int, default=1, help="threads of torch, here and in processes that tests start")


def pytest_configure(config):
    # One thread: tests run in parallel, and how many threads share a sum decides its rounding.
    os.environ["OMP_NUM_THREADS"] = str(config.getoption("--threads"))
    torch.set_num_threads(config.getoption("--threads"))
    if config.getoption("--margins"):
        from margins import Margins  # noqa: PLC0415 - imports fastmask, which reads the variable above

        config.pluginmanager.register(Margins(config.getoption("--margins-list")))


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    # What is imported and collected stays until the end: no collection of garbage has to go over it, now or later.
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_unconfigure():
    gc.unfreeze()  # or libraries report at the end what was left over


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory):
    """What tests and their processes put into a cache folder is not the user's."""
    os.environ["FASTMASK_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _fixed_seed(request):
    torch.manual_seed(request.config.getoption("--seed"))
    yield
    # What a test may have changed, such as by training.
    torch.set_num_threads(request.config.getoption("--threads"))
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
