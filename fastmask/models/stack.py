"""Stacks: blocks of one width through which the kept tokens or all of them pass.

A network of the family is a list of stacks and how they meet. Counts, cost, parallel training, compilation and
checkpointing loop over `stacks` of a network, and know no more of it.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastmask.kernels import Impl, Mask
from fastmask.models.layers import ModulatedLinear, Packing, Stream


class Stack(NamedTuple):
    """Blocks of one width, and the modulated Linear that follows them.

    Attributes:
        blocks: of one width and number of heads.
        exit: the Linear to the next stack or to the patches' values.
        tokens: whether the kept tokens or all of them pass through.
    """

    blocks: nn.ModuleList
    exit: ModulatedLinear
    tokens: Literal["kept", "all"]

    @property
    def width(self) -> int:
        """Width of the tokens."""
        return self.exit.linear.in_features

    @property
    def num_heads(self) -> int:
        """Attention heads of a block."""
        heads: int = self.blocks[0].attn.num_heads  # type: ignore[assignment, union-attr]
        return heads

    def tokens_of(self, length: int, keep: int) -> int:
        """Return how many tokens of a sample pass through, when ``keep`` of ``length`` are kept."""
        return keep if self.tokens == "kept" else length


def run_stack(
    stack: Stack,
    parts: Sequence[Tensor],
    masks: Sequence[Mask | None],
    condition: Tensor,
    impl: Impl | None,
    checkpoint_blocks: bool,
) -> list[Tensor]:
    """Return the output of a stack for tokens of several sizes.

    Args:
        stack: the blocks and what follows them.
        parts: tokens of each size, (B1, K1, D), .., or packed (N1, D), ..
        masks: which positions each of them are; None is all.
        condition: of all samples, (B1 + B2 + .., condition width).
        impl: form of the ops.
        checkpoint_blocks: keep of each block its input alone for backward, and recompute the rest there.

    Returns:
        Tensors like ``parts``, of the width of the stack's exit.
    """
    x, packing = _pack(parts, masks)
    stream = Stream(x)
    for block in stack.blocks:
        if checkpoint_blocks and torch.is_grad_enabled():
            stream = checkpoint(block, stream, condition, packing, impl, use_reentrant=False, preserve_rng_state=False)
        else:
            stream = block(stream, condition, packing, impl)
    out: Tensor = stack.exit(stream, condition, packing, impl)
    if len(parts) == 1:
        return [out]
    rows = torch.split(out, [part.shape[:-1].numel() for part in parts])
    return [part.view(*shape.shape[:-1], -1) for part, shape in zip(rows, parts, strict=True)]


def _pack(parts: Sequence[Tensor], masks: Sequence[Mask | None]) -> tuple[Tensor, Packing]:
    """Return tokens as the blocks take them: dense if all samples have as many, else packed."""
    if len(parts) == 1 and parts[0].ndim == 3:
        return parts[0], Packing()
    longest, counts = 0, []
    for part, mask in zip(parts, masks, strict=True):
        if part.ndim == 3:
            batch, length = part.shape[:2]
            counts.append(torch.full((batch,), length, dtype=torch.int32, device=part.device))
        else:
            assert mask is not None
            assert mask.cu_seqlens is not None
            length = mask.ids_restore.shape[1]
            counts.append(mask.cu_seqlens.diff())
        longest = max(longest, length)
    cu_seqlens = F.pad(torch.cat(counts).cumsum(0, dtype=torch.int32), (1, 0))
    return torch.cat([part.flatten(0, -2) for part in parts]), Packing(cu_seqlens, longest)
