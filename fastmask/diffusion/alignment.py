"""Representation alignment (REPA, arXiv 2410.06940): hidden states are brought near a frozen teacher's features.

    loss = -coef mean over tokens of cos(z, y),    z = MLP(h)

h is the residual stream of a token after a block of the network, y the teacher's feature of the same patch of the clean
image, MLP the projector Linear-SiLU-Linear-SiLU-Linear (equation 8 there). Where the block sees the kept tokens only,
the mean is over these, of each sample by itself. The term may end at a step of the run (HASTE, arXiv 2505.16792). The
projector is trained with the network, and is no part of it.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmask.diffusion.denoiser import Denoiser
from fastmask.diffusion.objective import Pass, Term
from fastmask.fields import check_at_least, fixed, recorded_within
from fastmask.kernels import Mask, gather_tokens
from fastmask.models.stack import NetworkConfig

CACHED = "cached"  # the teacher's name for the features of the store
_DEEPEST = 8  # block of the paper's L and XL
_PROJECTOR = "the checkpoint's projector was trained for it"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AlignConfig:
    """Representation alignment (REPA): a term that brings hidden states near a teacher's features; off by default."""

    align_coef: float = recorded_within(
        0.0, lambda coef: coef > 0, "a run is aligned from its beginning; --align-until ends it"
    )
    """Weight of the alignment loss; 0.5 in the paper. 0: off."""
    align_teacher: str = fixed("", _PROJECTOR)
    """Teacher: cached, the features in the store (fastmask.prepare --features); or, for pixels, a network that is run
    in each step: timm:NAME, transformers:NAME or MODULE:FUNCTION, which returns a network of your own."""
    align_block: int = fixed(0, _PROJECTOR)
    """Number of the block whose output is aligned, counted from 1, among the --depth blocks (not a decoder's or a
    mixer's). 0: a third of the depth, at most 8: 4 of 12, 8 of 28."""
    align_hidden: int = fixed(2048, _PROJECTOR)
    """Hidden width of the projector."""
    align_until: int = 0
    """Step from which on the term is gone and the projector is frozen. 0: never."""

    @property
    def on(self) -> bool:
        """Whether the run has the term."""
        return self.align_coef > 0

    def check(self, network: NetworkConfig) -> None:
        """Raise a ValueError for the first invalid field."""
        check_at_least(self, align_coef=0, align_block=0, align_hidden=1, align_until=0)
        if self.on and not self.align_teacher:
            raise ValueError("--align-coef aligns hidden states with a teacher's features: give --align-teacher")
        if not self.on and self.align_teacher:
            raise ValueError(f"--align-teacher {self.align_teacher} has no effect without --align-coef: give 0.5, say")
        for flag, value in (("--align-until", self.align_until), ("--align-block", self.align_block)):
            if not self.on and value:
                raise ValueError(f"{flag} {value} has no effect without --align-coef and --align-teacher")
        if self.align_block > network.depth:
            raise ValueError(f"--align-block {self.align_block} is not one of the {network.depth} blocks")

    def block(self, network: NetworkConfig) -> int:
        """Return the number of the aligned block, counted from 1."""
        return self.align_block or max(1, min(_DEEPEST, network.depth // 3))

    def active_at(self, step: int) -> bool:
        """Return whether a step, counted from 0, has the term."""
        return self.on and (not self.align_until or step < self.align_until)


class Alignment(Term):
    """The term, with its projector.

    Args:
        coef: weight of the loss.
        block: number of the aligned block, counted from 1 among the network's `blocks`.
        width: width of its tokens.
        hidden: hidden width of the projector.
        features: width W of the teacher's features.
    """

    def __init__(self, coef: float, block: int, width: int, hidden: int, features: int) -> None:
        super().__init__({"alignment": coef})
        self.block = block
        linears = nn.Linear(width, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, features)
        for linear in linears:
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        self.projector = nn.Sequential(linears[0], nn.SiLU(), linears[1], nn.SiLU(), linears[2])

    def forward(self, net: Denoiser, seen: Pass) -> dict[str, Tensor]:
        """Return the loss, -cos(z, y) in the mean over the tokens of each sample, of shape (B,).

        Raises:
            ValueError: features are missing, or have another shape than the grid of patches and the projector.
        """
        assert seen.tap is not None
        ((hidden,), (mask,)) = seen.tap.tokens, seen.tap.masks
        last = self.projector[-1]
        shape = (len(seen.raw), seen.raw.shape[1], last.out_features)
        if seen.features is None or seen.features.shape != shape:
            given = "missing" if seen.features is None else f"of shape {tuple(seen.features.shape)}"
            raise ValueError(f"features must have shape {shape}, one for each patch, and are {given}")
        target = seen.features
        if mask is not None:
            target = gather_tokens(target, mask.ids_keep, cu_seqlens=mask.cu_seqlens, impl="reference")
        z, y = _unit(self.projector(hidden)), _unit(target)
        return {"alignment": -_means((z * y).sum(-1), mask)}

    def macs(self, tokens: int) -> int:
        """Return the MACs of the projector for one image, of which the block sees this many tokens."""
        return tokens * sum(m.weight.numel() for m in self.projector if isinstance(m, nn.Linear))


def _unit(tokens: Tensor) -> Tensor:
    """Return tokens of norm 1, at least in fp32: the squares of a norm overflow in fp16."""
    return F.normalize(tokens.to(torch.promote_types(tokens.dtype, torch.float32)), dim=-1)


def _means(values: Tensor, mask: Mask | None) -> Tensor:
    """Return the mean over the tokens of each sample, (B,), of values (B, K), or packed (N,)."""
    if mask is None or mask.cu_seqlens is None:
        return values.mean(1)
    # Each token is read at its position, since sums by sample with atomics would not repeat their bits.
    rows = (mask.cu_seqlens[:-1, None] + mask.ids_restore).clamp(max=len(values) - 1)
    return values[rows.long()].masked_fill(mask.dropped, 0).sum(1) / mask.cu_seqlens.diff()
