import pytest
import torch
from torch import nn

from fastmask.ema import EMA


def test_average_is_the_weighted_sum_of_all_steps():
    module = nn.Linear(3, 2).double()
    ema = EMA(module, decay=0.9)
    expected = module.weight.detach().clone()
    for _ in range(20):
        with torch.no_grad():
            module.weight.add_(torch.randn(2, 3, dtype=torch.float64))
        ema.update(module)
        expected = 0.9 * expected + 0.1 * module.weight.detach()
    torch.testing.assert_close(ema.weights["weight"], expected, rtol=1e-12, atol=1e-12)


def test_applied_swaps_in_the_average_and_gives_the_weights_back():
    module = nn.Linear(3, 2)
    ema = EMA(module, decay=0.5)
    own = module.weight.detach().clone()
    ema.weights["weight"].add_(1)
    with ema.applied(module):
        torch.testing.assert_close(module.weight.detach(), own + 1)
    assert torch.equal(module.weight, own)


def test_weights_come_back_when_the_block_fails():
    module = nn.Linear(3, 2)
    ema = EMA(module, decay=0.5)
    own = module.weight.detach().clone()
    ema.weights["weight"].add_(1)
    with pytest.raises(RuntimeError, match="inside"), ema.applied(module):
        raise RuntimeError("inside")
    assert torch.equal(module.weight, own)
