import pytest
import torch

from fastmask.kernels import gather_tokens, restore_tokens, sample_mask


def unsorted_mask(batch, length, keep):
    order = torch.stack([torch.randperm(length) for _ in range(batch)])
    return order[:, :keep], order.argsort(1)


def restored_by_loops(x, mask_token, position, ids_restore):
    rows = [
        [x[b, k] if k < x.shape[1] else mask_token for k in restore] for b, restore in enumerate(ids_restore.tolist())
    ]
    return torch.stack([torch.stack(row) for row in rows]) + position


# Odd sizes, one token kept, all kept, one sample.
SHAPES = [(3, 7, 4, 5), (2, 9, 1, 3), (2, 5, 5, 6), (1, 255, 127, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("batch", "length", "keep", "width"), SHAPES)
def test_tokens_are_copied_exactly(batch, length, keep, width, dtype):
    ids_keep, ids_restore = unsorted_mask(batch, length, keep)
    x, mask_token, position = (torch.randn(s, dtype=dtype) for s in ((batch, keep, width), width, (length, width)))
    out = restore_tokens(x, mask_token, position, ids_restore)
    assert out.dtype == dtype
    assert torch.equal(out, restored_by_loops(x, mask_token, position, ids_restore))
    assert torch.equal(restore_tokens(x, mask_token, position, ids_restore.int()), out)
    whole = torch.randn(batch, length, width, dtype=dtype)
    gathered = torch.stack([whole[b, ids_keep[b]] for b in range(batch)])
    assert torch.equal(gather_tokens(whole, ids_keep), gathered)
    assert torch.equal(gather_tokens(whole, ids_keep.int()), gathered)


def test_non_contiguous_input():
    ids_keep, ids_restore = unsorted_mask(3, 7, 4)
    whole, x, position = torch.randn(3, 5, 7).mT, torch.randn(3, 5, 4).mT, torch.randn(5, 7).mT
    mask_token = torch.randn(10)[::2]
    out = restore_tokens(x, mask_token, position, ids_restore)
    assert torch.equal(out, restored_by_loops(x, mask_token, position, ids_restore))
    assert torch.equal(gather_tokens(whole, ids_keep), gather_tokens(whole.contiguous(), ids_keep))


def test_a_wider_position_table_decides_the_dtype():
    mask = sample_mask(2, 6, 3, seed=0, device="cpu")
    x, mask_token, position = torch.randn(2, 3, 4, dtype=torch.bfloat16), torch.randn(4), torch.randn(6, 4)
    out = restore_tokens(x, mask_token, position, mask.ids_restore)
    assert out.dtype == torch.float32
    assert torch.equal(out, restored_by_loops(x.float(), mask_token.bfloat16().float(), position, mask.ids_restore))


@pytest.mark.parametrize(("batch", "length", "keep", "width"), SHAPES)
def test_gradients_go_where_the_values_came_from(batch, length, keep, width):
    ids_keep, ids_restore = unsorted_mask(batch, length, keep)
    # Whole numbers: the sums of gradients are exact in any order.
    x = torch.randn(batch, keep, width, requires_grad=True)
    mask_token = torch.randn(width, requires_grad=True)
    grad = torch.randint(-9, 10, (batch, length, width)).float()
    restore_tokens(x, mask_token, torch.randn(length, width), ids_restore).backward(grad)
    assert torch.equal(x.grad, torch.stack([grad[b, ids_keep[b]] for b in range(batch)]))
    dropped = ids_restore >= keep
    assert torch.equal(mask_token.grad, (grad * dropped[..., None]).sum((0, 1)))

    whole = torch.randn(batch, length, width, requires_grad=True)
    gather_tokens(whole, ids_keep).backward(x.grad)
    assert torch.equal(whole.grad, grad * ~dropped[..., None])


def test_gradcheck():
    ids_keep, ids_restore = unsorted_mask(2, 5, 3)
    x, mask_token, position = (
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 3), (3,), (5, 3))
    )
    assert torch.autograd.gradcheck(lambda *t: restore_tokens(*t, ids_restore), (x, mask_token, position))
    whole = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: gather_tokens(t, ids_keep), (whole,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids_restore": torch.zeros(2, 4, dtype=torch.int32)}, r"ids_restore must have shape \(2, 5\), not \(2, 4\)"),
        ({"ids_restore": torch.zeros(1, 5, dtype=torch.int32)}, r"ids_restore must have shape \(2, 5\), not \(1, 5\)"),
        ({"mask_token": torch.zeros(1, 4)}, r"mask_token and position must have shapes \(4,\).*not \(1, 4\)"),
        ({"mask_token": torch.zeros(3)}, r"mask_token and position must have shapes \(4,\).*not \(3,\)"),
        ({"position": torch.zeros(5, 3)}, r"mask_token and position .* \(L, 4\).*and \(5, 3\)"),
        ({"position": torch.zeros(6, 4)}, r"ids_restore must have shape \(2, 6\), not \(2, 5\)"),
    ],
)
def test_wrong_shapes_to_restore(change, message):
    fitting = {
        "x": torch.zeros(2, 3, 4),
        "mask_token": torch.zeros(4),
        "position": torch.zeros(5, 4),
        "ids_restore": torch.zeros(2, 5, dtype=torch.int32),
    }
    assert restore_tokens(**fitting).shape == (2, 5, 4)
    with pytest.raises(ValueError, match=message):
        restore_tokens(**{**fitting, **change})


@pytest.mark.parametrize("shape", [(3, 2), (2,), (2, 3, 4)])
def test_wrong_shapes_to_gather(shape):
    with pytest.raises(ValueError, match=r"ids_keep must have shape \(2, K\), not "):
        gather_tokens(torch.zeros(2, 5, 4), torch.zeros(shape, dtype=torch.int64))
