"""PyTorch settings of precision and determinism."""

import os

import torch

from fastmask.training.config import TrainConfig


def set_numerics(config: TrainConfig) -> None:
    """Set the precision of fp32 matmuls, and make repeated runs bitwise identical."""
    torch.set_float32_matmul_precision("high" if config.precision == "tf32" else "highest")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required for deterministic cuBLAS
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a debugging aid that costs a pass over memory
