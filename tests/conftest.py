import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this once, when it is imported: without a device its kernels can only be interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# One thread here and in the processes that tests start: tests run in parallel, and how many threads share a sum decides
# its rounding.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory):
    """What tests and their processes put into a cache folder is not the user's."""
    os.environ["FASTMASK_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
