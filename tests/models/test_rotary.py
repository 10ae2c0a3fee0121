"""Rotary positions: by their formula, and what makes them positions: only differences count."""

import math

import pytest
import torch

from fastmask.models.rotary import rotary_table, rotate
from fastmask.testing import assert_near

CPU = torch.device("cpu")


def table_of(rows, columns, head_width, dtype=torch.float64):
    return rotary_table(rows, columns, head_width, dtype, CPU)


def by_complex_numbers(x, row, column):
    """Rotate one head's channels: pair j is a complex number that is multiplied by e^(i angle)."""
    width = len(x)
    frequencies = [10000.0 ** (-i / (width // 4)) for i in range(width // 4)]
    angles = [row * f for f in frequencies] + [column * f for f in frequencies]
    turned = [complex(x[j], x[j + width // 2]) * complex(math.cos(a), math.sin(a)) for j, a in enumerate(angles)]
    return [z.real for z in turned] + [z.imag for z in turned]


@pytest.mark.parametrize(("rows", "columns", "head_width"), [(1, 1, 4), (2, 3, 8), (4, 2, 12)])
def test_rotation_by_the_formula(rows, columns, head_width):
    x, table = torch.randn(2, rows * columns, 3, head_width, dtype=torch.float64), table_of(rows, columns, head_width)
    assert table.shape == (rows * columns, 2, head_width // 2)
    turned = rotate(x, table)
    for position in range(rows * columns):
        row, column = divmod(position, columns)
        for head in range(3):
            exact = by_complex_numbers(x[1, position, head].tolist(), row, column)
            assert turned[1, position, head].tolist() == pytest.approx(exact, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("shift", [(1, 0), (0, 2), (3, 1)])
def test_logits_depend_on_the_difference_of_positions(shift):
    side, width = 8, 16
    table = table_of(side, side, width).view(side, side, 2, -1)
    q, k = torch.randn(2, 4, 4, 1, width, dtype=torch.float64)  # of a 4 x 4 grid

    def logits(down, right):
        at = table[down : down + 4, right : right + 4]
        queries, keys = (rotate(x, at).flatten(0, 1)[:, 0] for x in (q, k))
        return queries @ keys.T

    torch.testing.assert_close(logits(*shift), logits(0, 0), rtol=1e-12, atol=1e-12)
    queries, keys = (x.flatten(0, 1)[:, 0] for x in (q, k))
    assert not torch.allclose(logits(0, 0), queries @ keys.T, rtol=0.1)


def test_rows_and_columns_are_told_apart():
    table = table_of(3, 3, 8).view(3, 3, 2, 4)
    assert torch.equal(table[0, 0], torch.tensor([[1.0] * 4, [0.0] * 4], dtype=torch.float64))
    assert torch.equal(table[2, 0, :, :2], table[0, 2, :, 2:])
    assert not torch.allclose(table[2, 0], table[0, 2])


def test_gradients_and_norms():
    x, table = torch.randn(2, 6, 1, 8, dtype=torch.float64, requires_grad=True), table_of(2, 3, 8)
    assert torch.autograd.gradcheck(rotate, (x, table))
    torch.testing.assert_close(rotate(x, table).norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_is_rounded_once(dtype):
    x = torch.randn(4, 64, 2, 16).to(dtype)
    turned = rotate(x, table_of(8, 8, 16, torch.float32))
    assert turned.dtype == dtype
    exact = rotate(x.double(), table_of(8, 8, 16))
    steps = 4 if dtype == torch.float32 else 1
    assert_near(turned, exact, steps)
