"""PyTorch settings of precision and determinism."""

import os

import torch


def set_numerics(precision: str) -> None:
    """Set the precision of fp32 matmuls, "tf32" or any other, and make repeated runs bitwise identical."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required for deterministic cuBLAS
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a debugging aid that costs a pass over memory
