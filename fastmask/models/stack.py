"""Stacks: sequences of blocks of one width, over the kept tokens or over all tokens.

A network is a sequence of stacks and the connections between them. Counts, cost, parallel training, compilation and
activation checkpointing only use the `stacks` of a network.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastmask.kernels import Impl, Mask
from fastmask.models.layers import ModulatedLinear, Packing, Stream


class Stack(NamedTuple):
    """A sequence of blocks of one width, followed by a modulated Linear.

    Attributes:
        blocks: blocks with the same width and number of heads.
        exit: the Linear to the next stack or to the patch values.
        tokens: whether the stack processes the kept tokens or all tokens.
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
        """Number of attention heads of a block."""
        heads: int = self.blocks[0].attn.num_heads  # type: ignore[assignment, union-attr]
        return heads

    def tokens_of(self, length: int, keep: int) -> int:
        """Return the number of tokens per sample in this stack, when ``keep`` of ``length`` are kept."""
        return keep if self.tokens == "kept" else length


def all_blocks(stacks: Iterable[Stack]) -> Iterator[nn.Module]:
    """Yield the blocks of all stacks, in their order."""
    return itertools.chain.from_iterable(stack.blocks for stack in stacks)


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
        stack: the stack.
        parts: tokens of each size, (B1, K1, D), .., or packed (N1, D), ..
        masks: the mask of each tensor of ``parts``; None is all positions.
        condition: condition of all samples, (B1 + B2 + .., condition width).
        impl: form of the ops.
        checkpoint_blocks: keep only the input of each block for backward, and recompute the rest.

    Returns:
        Tensors shaped like ``parts``, with the output width of the stack's exit.
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
    """Return the tokens as input of the blocks: dense for a single dense part, otherwise packed."""
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
