"""The settings under which training repeats its bits."""

import os

import pytest
import torch

from fastmask.training.numerics import set_numerics


@pytest.fixture(autouse=True)
def _as_before():
    """Leave the process as it was."""
    precision = torch.get_float32_matmul_precision()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is absent again where it was
        patch.delenv("CUBLAS_WORKSPACE_CONFIG")
        yield
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fills


@pytest.mark.parametrize(("precision", "products"), [("tf32", "high"), ("fp32", "highest"), ("bf16", "highest")])
def test_repeated_runs_give_the_same_bits(precision, products):
    set_numerics(precision)
    assert torch.get_float32_matmul_precision() == products
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_the_users_own_workspace_of_cublas_stays(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    set_numerics("fp32")
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
