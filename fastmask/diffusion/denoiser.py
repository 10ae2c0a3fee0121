"""Denoiser: a network with the preconditioning of a process."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastmask.diffusion.origin import Origin
from fastmask.diffusion.process import Coefficients, Process
from fastmask.kernels import Mask, unpatchify
from fastmask.models.maskdit import MaskDiT


class Denoiser(nn.Module):
    """D(x; t, y) = c_skip * x + c_out * F(c_in * x; c_noise, y).

    Args:
        model: the network F.
        process: the process, which gives the coefficients.

    Attributes:
        origin: what it was trained on; None if that is not known. Files of weights record it.
    """

    def __init__(self, model: MaskDiT, process: Process) -> None:
        super().__init__()
        self.origin: Origin | None = None
        self.model = model
        self.process = process

    def raw_tokens(self, x: Tensor, coefficients: Coefficients, labels: Tensor, mask: Mask | None = None) -> Tensor:
        """Return the raw tokens of F, shape (B, L, P), for the coefficients of each sample."""
        self._check_labels(labels)
        image_scale = coefficients.c_in.to(x.dtype)
        tokens: Tensor = self.model(x, coefficients.c_noise, labels, mask, image_scale=image_scale)
        return tokens

    def mixed_raw_tokens(
        self, images: Sequence[Tensor], coefficients: Coefficients, labels: Tensor, masks: Sequence[Mask | None]
    ) -> list[Tensor]:
        """Return the raw tokens of F for noised images of several sizes; arguments as in `Objective.mixed`."""
        self._check_labels(labels)
        image_scale = coefficients.c_in.to(images[0].dtype)
        return self.model.forward_mixed(images, coefficients.c_noise, labels, masks, image_scale)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor, mask: Mask | None = None) -> Tensor:
        """Return the denoised images.

        Args:
            x: noised images, shape (B, C, H, W).
            t: time of each sample, shape (B,): EDM's noise level sigma.
            labels: int64, shape (B,); a label equal to ``num_classes`` means no label.
            mask: positions that the encoder sees; None is all.

        Returns:
            Shape (B, C, H, W), dtype of ``x``.

        Raises:
            ValueError: shapes that do not fit the network, a mask for a network without a decoder, or (on the CPU) a
                label outside [0, num_classes].
        """
        coefficients = self.process.coefficients(t)
        raw = unpatchify(self.raw_tokens(x, coefficients, labels, mask), self.model.patch_size, *x.shape[2:])
        c_skip, c_out = (c[:, None, None, None] for c in (coefficients.c_skip, coefficients.c_out))
        return (c_skip * x + c_out * raw).to(x.dtype)

    def _check_labels(self, labels: Tensor) -> None:
        # Only on the CPU: elsewhere reading values is a host sync, and fake tensors (a subclass) have no values.
        real = type(labels) is Tensor and labels.device.type == "cpu" and not torch.compiler.is_compiling()
        if real and self.model.num_classes:
            check_labels(labels, self.model.num_classes)


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Raise a ValueError unless every label is in [0, num_classes]; num_classes means no label."""
    bad = labels[(labels < 0) | (labels > num_classes)]
    if bad.numel():
        raise ValueError(f"label {int(bad[0])} is outside 0 .. {num_classes - 1} (or {num_classes} for no label)")
