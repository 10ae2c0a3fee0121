"""Training objective: a weighted sum of terms, each of which returns named losses of shape (B,)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from fastmask.diffusion.denoiser import Denoiser
from fastmask.diffusion.process import Coefficients
from fastmask.fields import check_at_least, check_share, unknown
from fastmask.kernels import Mask, masked_loss
from fastmask.models.condition import Condition
from fastmask.models.stack import NetworkConfig, Tap

Target = Literal["noised", "clean"]
TOTAL = "loss"  # name of the weighted sum


class Pass(NamedTuple):
    """Inputs and outputs of a forward pass, from which the terms are computed.

    Attributes:
        images: clean images, shape (B, C, H, W).
        noised: noised images, the same shape.
        raw: raw tokens of the network, shape (B, L, P).
        coefficients: coefficients of the process, each (B,).
        mask: positions that the encoder saw; None is all.
        tap: the hidden state after the block that a term names; None if no term does.
        features: a teacher's features of the clean images, shape (B, L, W); None if no term needs them.
    """

    images: Tensor
    noised: Tensor
    raw: Tensor
    coefficients: Coefficients
    mask: Mask | None
    tap: Tap | None = None
    features: Tensor | None = None


class Term(nn.Module):
    """A term of the objective: forward takes the denoiser and a `Pass`, and returns losses by name.

    Args:
        weights: weight of each returned loss in the sum, by name.

    Attributes:
        active: whether the term is in the sum; a change makes a compiled objective compile anew.
        block: number of the block whose hidden state it reads, counted from 1 among the network's `blocks`; 0 is none.
    """

    active = True
    block = 0

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__()
        self.weights = dict(weights)


class MaskedDenoising(Term):
    """MaskDiT's loss (arXiv 2306.09305, equation 5): denoising of kept patches, reconstruction of dropped ones.

    Args:
        mae_coef: weight of the reconstruction loss.
        target: what dropped patches are reconstructed to: "noised", the normalised noised patches of the paper, or
            "clean", the clean patches, whose loss is the denoising loss of the dropped patches.
    """

    def __init__(self, mae_coef: float = 0.1, target: Target = "noised") -> None:
        super().__init__({"denoising": 1.0, "reconstruction": mae_coef})
        self._clean = target == "clean"

    def forward(self, net: Denoiser, seen: Pass) -> dict[str, Tensor]:
        """Return both losses, each of shape (B,)."""
        denoising, reconstruction = _masked_loss(net, seen)
        if self._clean and seen.mask is not None:
            reconstruction = _masked_loss(net, seen._replace(mask=_swapped(seen.mask)))[0]
        return {"denoising": denoising, "reconstruction": reconstruction}


class Denoising(Term):
    """Denoising of all tokens, whatever the network saw (TREAD, arXiv 2501.04765; SPRINT, arXiv 2510.21986)."""

    def __init__(self) -> None:
        super().__init__({"denoising": 1.0})

    def forward(self, net: Denoiser, seen: Pass) -> dict[str, Tensor]:
        """Return the loss, of shape (B,)."""
        return {"denoising": _masked_loss(net, seen._replace(mask=None))[0]}


class KeptDenoising(Term):
    """Denoising of the kept tokens alone, the only ones that the network returns (arXiv 2407.15811, equation 3)."""

    def __init__(self) -> None:
        super().__init__({"denoising": 1.0})

    def forward(self, net: Denoiser, seen: Pass) -> dict[str, Tensor]:
        """Return the loss, of shape (B,)."""
        return {"denoising": _masked_loss(net, seen)[0]}


def _masked_loss(net: Denoiser, seen: Pass) -> tuple[Tensor, Tensor]:
    c_skip, c_out, weight = seen.coefficients.c_skip, seen.coefficients.c_out, seen.coefficients.weight
    patch_size, impl = net.model.patch_size, net.model.impl
    denoising, reconstruction = masked_loss(
        seen.raw, seen.images, seen.noised, c_skip, c_out, weight, seen.mask, patch_size=patch_size, impl=impl
    )
    return denoising, reconstruction


def _swapped(mask: Mask) -> Mask:
    """Return the mask that keeps the dropped positions, as `masked_loss` needs it: without the values of ids_keep."""
    batch, length = mask.ids_restore.shape
    ids_restore = length - 1 - mask.ids_restore
    if mask.cu_seqlens is None:
        return Mask(mask.ids_keep.new_empty(batch, length - mask.ids_keep.shape[1]), ids_restore)
    starts = torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=ids_restore.device)
    return Mask(mask.ids_keep.new_empty(batch * length - len(mask.ids_keep)), ids_restore, starts - mask.cu_seqlens)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """Weights of the terms of the loss, and label dropout."""

    mae_coef: float = 0.1
    """Weight of the reconstruction (MAE) loss, for a network that has one (maskdit)."""
    mae_target: Target = "noised"
    """What dropped patches are reconstructed to: noised (the paper's normalised noised patches) or clean."""
    label_drop: float = 0.1
    """Probability of dropping the label of a sample, for classifier-free guidance."""

    def check(self) -> None:
        """Raise a ValueError for the first invalid field."""
        check_at_least(self, mae_coef=0)
        if self.mae_target not in get_args(Target):
            raise ValueError(unknown("mae_target", self.mae_target, get_args(Target)))
        check_share(self, "label_drop")

    def terms(self, network: NetworkConfig) -> list[Term]:
        """Return the terms of the loss for a network, which says what tokens the loss is on."""
        if network.loss_on == "split":
            return [MaskedDenoising(self.mae_coef, self.mae_target)]
        return [Denoising() if network.loss_on == "all" else KeptDenoising()]


class Objective(nn.Module):
    """The module that training compiles, wraps and calls: a denoiser whose forward returns the losses.

    Args:
        net: the denoiser.
        terms: at least one term; the names of their losses must differ. One of them may read a hidden state.

    Attributes:
        names: names of the returned losses, the weighted sum first.
        beside: weights of the losses on a hidden state, which say nothing of the denoiser's error.
    """

    def __init__(self, net: Denoiser, terms: Sequence[Term]) -> None:
        super().__init__()
        self.net = net
        self.terms = nn.ModuleList(terms)
        self._losses_of = [tuple(term.weights) for term in terms]
        self.weights = {name: weight for term in terms for name, weight in term.weights.items()}
        if not terms or len(self.weights) < sum(len(term.weights) for term in terms) or TOTAL in self.weights:
            names = [name for term in terms for name in term.weights]
            raise ValueError(f"an objective is a sum of terms whose losses have different names, not {names}")
        readers = [term for term in terms if term.block]
        if len(readers) > 1:
            raise ValueError(f"one term of an objective may read a hidden state, not {len(readers)}")
        # In a tuple, which keeps them from being registered as parts of this module once more.
        self._readers = tuple((term, net.model.blocks[term.block - 1]) for term in readers)
        self.names = (TOTAL, *self.weights)
        self.beside = {name: weight for term in readers for name, weight in term.weights.items()}

    def forward(
        self,
        images: Tensor,
        condition: Condition,
        mask: Mask | None,
        t: Tensor,
        noise: Tensor,
        features: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the losses of a batch by name, each of shape (B,), without those of terms that are not active.

        Args:
            images: clean images, shape (B, C, H, W).
            condition: what the network is told: labels, int64, shape (B,); ``num_classes`` means no label.
            mask: positions that the encoder sees; None is all.
            t: time of each sample, shape (B,).
            noise: unit noise, shape (B, C, H, W).
            features: a teacher's features of the images, shape (B, L, W), for a term that needs them.

        Raises:
            ValueError: shapes that do not fit the network, or a term whose losses differ from its weights.
        """
        process = self.net.process
        _check_shapes(t, len(images), [images], [noise])
        noised, coefficients = process.noised(images, noise, t), process.coefficients(t)
        tap = next((Tap(block) for term, block in self._readers if term.active), None)
        raw = self.net.raw_tokens(noised, coefficients, condition, mask, tap)
        return self._losses(Pass(images, noised, raw, coefficients, mask, tap, features))

    def mixed(
        self,
        images: Sequence[Tensor],
        condition: Condition,
        masks: Sequence[Mask | None],
        t: Tensor,
        noise: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """Return the losses of images of several sizes, processed in one packed forward pass.

        Args:
            images: clean images, each tensor of one size: (B1, C, H1, W1), (B2, C, H2, W2), ..
            condition: of the samples of all tensors of ``images``, one after the other; labels: shape (B1 + B2 + ..,).
            masks: a mask, or None, for each tensor of ``images``.
            t: times, concatenated over the tensors of ``images``, shape (B1 + B2 + ..,).
            noise: unit noise, same shapes as ``images``.

        Returns:
            The losses by name, each with the shape of ``t``.

        Raises:
            ValueError: empty lists, lists of different lengths, or shapes that do not fit the network.
        """
        if not images or not len(images) == len(noise) == len(masks):
            raise ValueError(
                f"a list of images needs lists of as much noise and as many masks, not {len(images)}, {len(noise)} and "
                f"{len(masks)}"
            )
        if any(term.active for term, _ in self._readers):
            raise ValueError("features of images of several sizes are not aligned: leave the term out")
        process, sizes = self.net.process, [len(image) for image in images]
        _check_shapes(t, sum(sizes), images, noise)
        coefficients = process.coefficients(t)
        split = [Coefficients(*parts) for parts in zip(*(torch.split(c, sizes) for c in coefficients), strict=True)]
        noised = [process.noised(*part) for part in zip(images, noise, torch.split(t, sizes), strict=True)]
        raw = self.net.mixed_raw_tokens(noised, coefficients, condition, masks)
        losses = [self._losses(Pass(*size)) for size in zip(images, noised, raw, split, masks, strict=True)]
        return {name: torch.cat([part[name] for part in losses]) for name in self.names}

    def _losses(self, seen: Pass) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        for term, names in zip(self.terms, self._losses_of, strict=True):
            if not term.active:
                continue
            given = term(self.net, seen)
            if given.keys() != set(names):
                raise ValueError(f"a term has weights of {sorted(names)}, and returned losses {sorted(given)}")
            losses.update(given)
        weights = {name: weight for name, weight in self.weights.items() if name in losses}
        weighted = [losses[name] if weight == 1 else weight * losses[name] for name, weight in weights.items()]
        return {TOTAL: sum(weighted[1:], start=weighted[0]), **losses}


def _check_shapes(t: Tensor, batch: int, images: Sequence[Tensor], noise: Sequence[Tensor]) -> None:
    if t.shape != (batch,):
        raise ValueError(f"t must have shape ({batch},), not {tuple(t.shape)}")
    for image, added in zip(images, noise, strict=True):
        if added.shape != image.shape:
            raise ValueError(f"noise must have the shape of its images, {tuple(image.shape)}, not {tuple(added.shape)}")
