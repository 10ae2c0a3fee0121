import math

import pytest
import torch
from util import golden, small_net

from fastmask.models.layers import sincos_position


def test_no_label_trains_no_label():
    model = small_net().model
    embedding = model.y_embedder(torch.tensor([5, 2, 5, 2]))
    assert not embedding[[0, 2]].any()
    embedding.sum().backward()
    grad = torch.zeros(16, 5)
    grad[:, 2] = 2
    assert torch.equal(model.y_embedder.embedding_table.weight.grad, grad)


@pytest.mark.parametrize("name", ["pos_embed", "decoder_pos_embed"])
def test_position_tables_are_the_published_ones(name):
    table = golden().arrays[name]
    assert torch.equal(sincos_position(math.isqrt(table.shape[1]), math.isqrt(table.shape[1]), table.shape[2]), table)


@pytest.mark.parametrize(("side", "width"), [(1, 4), (1, 12), (3, 8), (5, 16)])
def test_position_table_by_the_formula(side, width):
    table = sincos_position(side, side, width)
    assert table.dtype == torch.float32
    assert table.shape == (1, side * side, width)
    quarter = width // 4
    for l in range(side * side):
        row, column = divmod(l, side)
        angles = [[at * 10000 ** (-i / quarter) for i in range(quarter)] for at in (column, row)]
        expected = [f(angle) for half in angles for f in (math.sin, math.cos) for angle in half]
        assert table[0, l].tolist() == pytest.approx(expected, rel=1e-7, abs=1e-12)
