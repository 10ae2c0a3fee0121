"""Stacks: sequences of blocks of one width, over the kept tokens or over all tokens.

A network is a sequence of stacks and the connections between them. Counts, cost, parallel training, compilation and
activation checkpointing only use the `stacks` of a network.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastmask.described import Described
from fastmask.kernels import Impl, Mask
from fastmask.models.block_config import BlockConfig
from fastmask.models.layers import ModulatedLinear, Packing, Stream
from fastmask.models.rotary import rotary_table

Grid = tuple[int, int]  # rows and columns of patches


LossOn = Literal["split", "all", "kept"]


class NetworkConfig(Described, Protocol):
    """The sizes of a network: a frozen dataclass of numbers, stored with its weights.

    Attributes:
        loss_on: what the loss is in masked steps: "split" is denoising of the kept tokens and reconstruction of the
            dropped ones, "all" is denoising of all tokens, "kept" is denoising of the kept tokens.
    """

    loss_on: ClassVar[LossOn]

    @property
    def masked(self) -> bool:
        """Whether it can be trained on a part of the tokens."""

    @property
    def depth(self) -> int:
        """Number of blocks, without those of a decoder."""

    def check(self, input_size: int) -> None:
        """Raise a ValueError that names the first invalid size, for images of this side."""

    def build(self, channels: int, input_size: int, num_classes: int) -> Any:
        """Return a freshly initialised network for images of (channels, input_size, input_size)."""


def check_width(name: str, width: int, num_heads: int, options: BlockConfig) -> None:
    """Raise a ValueError for a width or options that a stack cannot have; ``name`` is a prefix of its field."""
    if width < 4 or width % 4:
        raise ValueError(
            f"{name}width must be a multiple of 4 and at least 4, not {width}: the position table has four parts"
        )
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"{name}width {width} does not divide into {name}num_heads {num_heads}")
    options.check_options(name, width // num_heads)


def check_patches(patch_size: int, input_size: int) -> None:
    """Raise a ValueError unless the side of the images divides into patches."""
    if patch_size < 1 or input_size < patch_size or input_size % patch_size:
        raise ValueError(f"an image side of {input_size} does not divide into patches of {patch_size}")


def check_route(start: int, end: int, depth: int) -> None:
    """Raise a ValueError unless blocks precede a route, are in it, and follow it."""
    if not 0 < start < end < depth:
        raise ValueError(
            f"a route needs blocks before it, in it and after it: 0 < route_start < route_end < depth, not "
            f"route_start {start}, route_end {end} and depth {depth}"
        )


class Stack(NamedTuple):
    """A sequence of blocks of one width, and what follows it.

    Attributes:
        blocks: blocks with the same width and number of heads, at least one.
        exit: the modulated Linear to the next stack or to the patch values; None leaves the residual stream as it is.
        tokens: whether the stack processes the kept tokens or all tokens.
        linears: Linears of this width that the network applies to each token after the stack, for the counts.
    """

    blocks: nn.ModuleList
    exit: ModulatedLinear | None
    tokens: Literal["kept", "all"]
    linears: tuple[nn.Linear, ...] = ()

    @property
    def width(self) -> int:
        """Width of the tokens."""
        return self.blocks[0].attn.qkv.in_features  # type: ignore[union-attr, return-value]

    @property
    def num_heads(self) -> int:
        """Number of attention heads of a block."""
        heads: int = self.blocks[0].attn.num_heads  # type: ignore[assignment, union-attr]
        return heads

    @property
    def mlp_widths(self) -> tuple[int, int]:
        """Numbers of values per token after the first Linear of a block's MLP, and before its second."""
        mlp = self.blocks[0].mlp
        return mlp.fc1.out_features, mlp.fc2.in_features  # type: ignore[union-attr, return-value]

    @property
    def options(self) -> BlockConfig:
        """Options of the blocks."""
        options: BlockConfig = self.blocks[0].options  # type: ignore[assignment]
        return options

    @property
    def linear_macs(self) -> int:
        """MACs per token of `linears`."""
        return sum(linear.in_features * linear.out_features for linear in self.linears)

    def tokens_of(self, length: int, keep: int) -> int:
        """Return the number of tokens per sample in this stack, when ``keep`` of ``length`` are kept."""
        return keep if self.tokens == "kept" else length


def all_blocks(stacks: Iterable[Stack]) -> Iterator[nn.Module]:
    """Yield the blocks of all stacks, in their order."""
    return itertools.chain.from_iterable(stack.blocks for stack in stacks)


class Tap:
    """Collects the hidden state after a block: the residual stream of the tokens that the block saw.

    Args:
        block: the block, one of a network's stacks.

    Attributes:
        tokens: once the network has run, tokens of each size, (B1, K1, D), .., or packed (N1, D), ..
        masks: the mask of each of ``tokens``; None is all positions.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.tokens: list[Tensor] = []
        self.masks: list[Mask | None] = []


def run_stack(
    stack: Stack,
    parts: Sequence[Tensor],
    masks: Sequence[Mask | None],
    condition: Tensor,
    impl: Impl | None,
    checkpoint_blocks: bool,
    grids: Sequence[Grid],
    tap: Tap | None = None,
) -> list[Tensor]:
    """Return the output of a stack for tokens of several sizes.

    Args:
        stack: the stack.
        parts: tokens of each size, (B1, K1, D), .., or packed (N1, D), ..
        masks: the mask of each tensor of ``parts``; None is all positions.
        condition: condition of all samples, (B1 + B2 + .., condition width).
        impl: form of the ops.
        checkpoint_blocks: keep only the input of each block for backward, and recompute the rest.
        grids: rows and columns of the patches of all positions, for each tensor of ``parts``.
        tap: collects the hidden state after its block, if this stack has it.

    Returns:
        Tensors shaped like ``parts``, with the output width of the stack's exit, or its own width without one.
    """
    x, packing = _pack(parts, masks)
    if stack.options.rope:
        packing = packing._replace(rotation=_rotation(stack, parts, masks, grids))
    stream = Stream(x)
    for block in stack.blocks:
        if checkpoint_blocks and torch.is_grad_enabled():
            stream = checkpoint(block, stream, condition, packing, impl, use_reentrant=False, preserve_rng_state=False)
        else:
            stream = block(stream, condition, packing, impl)
        if tap is not None and block is tap.block:
            tap.tokens, tap.masks = _unpack(stream.settle(packing), parts), list(masks)
    out: Tensor = stream.settle(packing) if stack.exit is None else stack.exit(stream, condition, packing, impl)
    return _unpack(out, parts)


def _unpack(out: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
    """Return the tokens of each size, shaped like ``parts`` but for their width."""
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


def _rotation(stack: Stack, parts: Sequence[Tensor], masks: Sequence[Mask | None], grids: Sequence[Grid]) -> Tensor:
    """Return cosines and sines of the angles of all tokens, laid out as `_pack` lays out the tokens."""
    found, head_width = [], stack.width // stack.num_heads
    for part, mask, grid in zip(parts, masks, grids, strict=True):
        table = rotary_table(*grid, head_width, torch.promote_types(part.dtype, torch.float32), part.device)
        if mask is None:
            found.append(table[None])
        else:
            gathered = F.embedding(mask.ids_keep, table.flatten(1))
            found.append(gathered.view(*gathered.shape[:-1], *table.shape[1:]))
    if len(parts) == 1 and parts[0].ndim == 3:
        return found[0]
    samples = zip(parts, found, strict=True)
    return torch.cat([t.expand(len(part), -1, -1, -1).flatten(0, 1) if part.ndim == 3 else t for part, t in samples])
