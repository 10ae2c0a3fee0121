"""Softmax attention: softmax(q k^T / sqrt(D/H)) v, per head."""

import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax attention over the tokens of each sample, by torch's scaled_dot_product_attention.

    Args:
        q: queries, shape (B, K, H, D/H).
        k: keys, shape (B, K, H, D/H).
        v: values, shape (B, K, H, D/H).

    Returns:
        Shape (B, K, H, D/H), in the dtype of ``q``.
    """
    if not q.shape == k.shape == v.shape or q.ndim != 4:
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
        raise ValueError(f"q, k and v must share one shape (B, K, H, D/H), not {shapes}")
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
