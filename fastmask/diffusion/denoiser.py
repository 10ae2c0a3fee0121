"""Denoiser: a network with the preconditioning of a process."""

from collections.abc import Sequence

from torch import Tensor, nn

from fastmask.diffusion.origin import Origin
from fastmask.diffusion.process import Coefficients, Process
from fastmask.kernels import Mask, unpatchify
from fastmask.models.condition import Condition
from fastmask.models.maskdit import MaskDiT
from fastmask.models.stack import Tap


class Denoiser(nn.Module):
    """D(x; t, y) = c_skip * x + c_out * F(c_in * x; c_noise, y), with the condition y.

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

    def raw_tokens(
        self,
        x: Tensor,
        coefficients: Coefficients,
        condition: Condition,
        mask: Mask | None = None,
        tap: Tap | None = None,
    ) -> Tensor:
        """Return the raw tokens of F, shape (B, L, P), for the coefficients of each sample; see `MaskDiT.forward`."""
        image_scale = coefficients.c_in.to(x.dtype)
        tokens: Tensor = self.model(x, coefficients.c_noise, condition, mask, image_scale=image_scale, tap=tap)
        return tokens

    def mixed_raw_tokens(
        self, images: Sequence[Tensor], coefficients: Coefficients, condition: Condition, masks: Sequence[Mask | None]
    ) -> list[Tensor]:
        """Return the raw tokens of F for noised images of several sizes; arguments as in `Objective.mixed`."""
        image_scale = coefficients.c_in.to(images[0].dtype)
        return self.model.forward_mixed(images, coefficients.c_noise, condition, masks, image_scale)

    def forward(self, x: Tensor, t: Tensor, condition: Condition, mask: Mask | None = None) -> Tensor:
        """Return the denoised images.

        Args:
            x: noised images, shape (B, C, H, W).
            t: time of each sample, shape (B,): EDM's noise level sigma.
            condition: what the network is told: labels, int64, shape (B,); ``num_classes`` means no label.
            mask: positions that the encoder sees; None is all.

        Returns:
            Shape (B, C, H, W), dtype of ``x``.

        Raises:
            ValueError: shapes that do not fit the network, a mask for a network without a decoder, or (on the CPU) a
                label outside [0, num_classes].
        """
        coefficients = self.process.coefficients(t)
        raw = unpatchify(self.raw_tokens(x, coefficients, condition, mask), self.model.patch_size, *x.shape[2:])
        c_skip, c_out = (c[:, None, None, None] for c in (coefficients.c_skip, coefficients.c_out))
        return (c_skip * x + c_out * raw).to(x.dtype)
