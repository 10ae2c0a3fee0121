import pytest
import torch
from triton.language import bfloat16, float32
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


@pytest.fixture(autouse=True)
def _round_as_a_gpu_does(monkeypatch):
    """Triton's interpreter cuts an fp32 number off to bfloat16, where a GPU rounds it to the nearest."""
    plain = InterpreterBuilder.cast_impl

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar != float32 or dst_type.scalar != bfloat16:
            return plain(self, src, dst_type)
        rounded = torch.tensor(src.data).to(torch.bfloat16).view(torch.uint16)
        return TensorHandle(rounded.numpy(), bfloat16)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
