"""What a network keeps for backward, counted without data at full size."""

import pytest
import torch
from torch import nn

from bench.instruments.memory import Live, per_image


@pytest.mark.parametrize(("precision", "most"), [("bf16", 150e6), ("fp32", 255e6)])
def test_the_largest_published_network_keeps_little(precision, most):
    fused = sum(per_image("xl2-in256", "fused", precision).values())
    assert 0.9 * most < fused <= most


def test_the_count_is_that_of_one_image():
    """By hand, for the dense S/2 in fp32: each Linear's and norm's input and result that plain PyTorch keeps."""
    kept = per_image("dit-s2-in256", "fused", "fp32")
    tokens, width, depth = 256, 384, 12
    wide = {f"{4 * tokens * width} x float32": depth, f"{3 * tokens * width} x float32": depth}
    for kind, count in wide.items():  # before GELU; qkv
        assert kept[kind] == count * 4 * int(kind.split()[0])
    # Attention's result, two branches and two residuals per block, and the residual that enters the first.
    assert kept[f"{tokens * width} x float32"] == (5 * depth + 1) * 4 * tokens * width


def test_live_bytes_are_those_of_storages_that_somebody_holds():
    linear, x = nn.Linear(8, 16, bias=False), torch.randn(4, 8)
    result = 4 * 4 * 16
    with torch.no_grad(), Live(iter((*linear.parameters(), x))) as live:
        y = linear(x)
        view = y.view(-1)
        assert live.now == live.most == result
        z = view.relu() + y.view(-1)  # the relu is freed at once
        assert (live.now, live.most) == (2 * result, 3 * result)
        del y  # its view is there
        assert live.now == 2 * result
        del view, z
        assert (live.now, live.most) == (0, 3 * result)
