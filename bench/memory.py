"""`python -m bench.memory`: bytes that a network keeps for backward, per image, by part; exact, with no data or GPU.

The forward pass runs on fake tensors, whose ops give shapes alone. What autograd saves is counted once per storage,
without the parameters and what is made of them, as the difference between a batch of eight images and one of four.
"""

import argparse
import collections
import sys
from collections.abc import Iterator

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from fastmask.config import build_model, preset_config
from fastmask.diffusion import EDMLoss, EDMPrecond, TrainingObjective
from fastmask.kernels import Impl, Mask
from fastmask.masking import kept_count
from fastmask.presets import PRESETS

# The published implementation's, measured the same way at XL/2, 256x256, half the patches masked, in MB per image.
PUBLISHED = {"bf16": 256.4, "fp32": 423.3}


def saved_tensors(preset: str, impl: Impl, precision: str, batch: int) -> list[Tensor]:
    """Return what one training forward pass saves, one (fake) tensor per storage, in the order of saving.

    Args:
        preset: a row of the preset table.
        impl: form of the ops.
        precision: "fp32", or "bf16" for autocast.
        batch: images.
    """
    config = preset_config(preset, PRESETS)
    size = config.image_size // 8
    with FakeTensorMode():
        model = build_model(config, 4, size)
        model.impl = impl
        objective = TrainingObjective(EDMPrecond(model, config.sigma_data), EDMLoss(config.sigma_data))
        own = {t.untyped_storage()._cdata for t in (*objective.parameters(), *objective.buffers())}
        keep = kept_count(model.length, config.mask_ratio)
        mask = None
        if keep < model.length:
            ids_keep = torch.zeros(batch, keep, dtype=torch.int32)
            mask = Mask(ids_keep, torch.zeros(batch, model.length, dtype=torch.int32))
        images, sigma = torch.randn(batch, 4, size, size), torch.rand(batch)
        labels = torch.zeros(batch, dtype=torch.int64)
        kept: dict[int, Tensor] = {}

        def keep_one(t: Tensor) -> Tensor:
            kept.setdefault(t.untyped_storage()._cdata, t)
            return t

        with (
            saved_tensors_hooks(keep_one, lambda t: t),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"),
        ):
            objective(images, labels, mask, sigma, torch.randn_like(images))
        return [t for key, t in kept.items() if key not in own]


def per_image(preset: str, impl: Impl, precision: str) -> dict[str, int]:
    """Return the bytes saved per image, by kind: what grows from a batch of four images to one of eight."""
    four, eight = (saved_tensors(preset, impl, precision, batch) for batch in (4, 8))
    kinds: collections.Counter[str] = collections.Counter()
    for small, large in zip(four, eight, strict=True):
        grown = (large.untyped_storage().nbytes() - small.untyped_storage().nbytes()) // 4
        kinds[f"{grown // large.element_size()} x {str(large.dtype).removeprefix('torch.')}"] += grown
    return {kind: size for kind, size in kinds.most_common() if size}


def table(preset: str) -> Iterator[str]:
    """Yield the lines of a report on a preset."""
    yield f"{preset}: bytes kept for backward, MB (10^6) per image"
    for precision in ("bf16", "fp32"):
        forms: tuple[Impl, ...] = ("reference", "fused")
        for impl in forms:
            kinds = per_image(preset, impl, precision)
            yield f"{precision} {impl:<9} {sum(kinds.values()) / 1e6:8.1f}"
            if impl == "fused":
                yield from (f"    {size / 1e6:8.2f}  as {kind}" for kind, size in kinds.items())
        if preset == "xl2-in256":
            yield f"{precision} published {PUBLISHED[precision]:8.1f}"


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="xl2-in256", choices=PRESETS)
    sys.stdout.write("\n".join(table(parser.parse_args().preset)) + "\n")


if __name__ == "__main__":
    main()
