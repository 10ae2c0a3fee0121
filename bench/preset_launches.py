"""The Triton launches of the presets' training steps, found by running the steps on fake tensors.

A step runs with the preset's micro-batch and one block per stack, since further blocks have the same launches; the
update runs over all parameters. Each op of this library that the step calls is then launched on tensors without data.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from fastmask.diffusion import Denoiser, MaskedDenoising, Objective, training_draws
from fastmask.diffusion.masking import kept_count, parse_per_sample
from fastmask.diffusion.objective import TOTAL
from fastmask.kernels import sample_mask
from fastmask.kernels._dispatch import _TRITON_OPS, _launcher
from fastmask.models.maskdit import MaskDiT
from fastmask.presets import PRESETS
from fastmask.training.config import TrainConfig, build_model, preset_config
from fastmask.training.optim import AdamWEMA

Case = tuple[str, Callable[[], Any]]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Samples with unequal numbers of kept tokens, packed: the launches are the same for any such range.
_PER_SAMPLE = "uniform(0.25,0.75)"


class _Calls(TorchDispatchMode):
    """Records the distinct calls of this library's ops that have a Triton kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[str, tuple[Any, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("fastmask::")
        if name in _TRITON_OPS:
            with unset_fake_temporarily():
                bare = tree_map(lambda t: _without_data(t) if isinstance(t, Tensor) else t, args)
            self.calls.setdefault(f"{name}{bare}", (name, bare))
        return func(*args, **(kwargs or {}))

    def launches(self, precision: str) -> Iterator[Callable[[], Any]]:
        """Yield a call of each op's launcher."""
        for name, args in self.calls.values():
            yield functools.partial(_launch, name, args, precision)


def preset_cases(widths: list[int]) -> Iterator[Case]:
    """Yield a label and a launcher call for each launch of the presets with these widths."""
    updated = set()
    for name in PRESETS:
        config = preset_config(name, PRESETS)
        sizes = config.network
        if not {sizes.width, *([sizes.decoder_width] if sizes.decoder_depth else [])} <= {*widths}:
            continue
        # "auto" is bf16 on GPUs that support it, and fp32 on others.
        for precision in ("bf16", "fp32") if config.machine.precision == "auto" else (config.machine.precision,):
            for form, calls in _passes(config, precision):
                for call in calls.launches(precision):
                    yield f"{name} {precision} {form}", call
        if sizes not in updated:
            updated.add(sizes)
            for form, calls in _updates(config):
                for call in calls.launches("fp32"):
                    yield f"{name} {form}", call


def _passes(config: TrainConfig, precision: str) -> Iterator[tuple[str, _Calls]]:
    """Yield the calls of a micro-batch that keeps all positions, the preset's number, and unequal numbers."""
    length = (_side(config) // config.network.patch_size) ** 2
    for keep in sorted({length, kept_count(length, config.masking.mask_ratio)}, reverse=True):
        yield f"K={keep}", _pass(config, precision, keep, "constant")
        if keep < length:
            yield "packed", _pass(config, precision, keep, _PER_SAMPLE)


def _pass(config: TrainConfig, precision: str, keep: int, per_sample: str) -> _Calls:
    network = dataclasses.replace(config.network, depth=1, decoder_depth=min(1, config.network.decoder_depth))
    config = config.replace(network=network)
    batch, dtype = config.micro_batch, _DTYPES.get(precision)
    with FakeTensorMode(), _Calls() as calls:
        model = _network(config)
        model.impl = "fused"
        objective = Objective(Denoiser(model, config.process), [MaskedDenoising()])
        images = torch.empty(batch, model.in_channels, model.input_size, model.input_size)
        seed = offset = torch.empty((), dtype=torch.int64)
        ratios = parse_per_sample(per_sample, config.masking.mask_ratio)
        draws = training_draws(
            config.process,
            images,
            torch.empty(batch, dtype=torch.int64),
            seed=seed,
            offset=offset,
            num_classes=config.data.num_classes,
            label_drop=config.objective.label_drop,
            length=model.length,
            keep=keep,
            per_sample=ratios,
        )
        if keep < model.length:  # also sample the mask as on a GPU
            counts = ratios.keep(seed, torch.arange(batch), draws.t, model.length) if ratios else keep
            total = ratios.total(batch, model.length) if ratios else None
            options: dict[str, Any] = {"seed": seed, "offset": offset, "device": "cpu", "impl": "fused"}
            sample_mask(batch, model.length, counts, total=total, **options)
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            objective(images, *draws)[TOTAL].sum().backward()
    return calls


def _updates(config: TrainConfig) -> Iterator[tuple[str, _Calls]]:
    """Yield the calls of the optimizer steps, with a gradient of the mask token in masked ones."""
    for masked in (True, False) if config.network.decoder_depth else (False,):
        with FakeTensorMode(), _Calls() as calls:
            model = _network(config)
            for name, parameter in model.named_parameters():
                parameter.grad = torch.empty_like(parameter) if masked or name != "mask_token" else None
            averages = [(config.ema.ema_decay, [torch.empty_like(p) for p in model.parameters()])]
            AdamWEMA(model.parameters(), averages=averages, impl="fused").step()
        yield "masked update" if masked else "update", calls


def _side(config: TrainConfig) -> int:
    return config.data.image_size // 8 if _of_latents(config) else config.data.image_size


def _network(config: TrainConfig) -> MaskDiT:
    return build_model(config, 4 if _of_latents(config) else 1, _side(config))


def _of_latents(config: TrainConfig) -> bool:
    return config.data.data != "digits"  # the digits are pixels


def _without_data(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def _launch(name: str, args: tuple[Any, ...], precision: str) -> None:
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32" if precision == "tf32" else "ieee"
    try:
        _launcher(name, _TRITON_OPS[name])(*args)
    finally:
        matmul.fp32_precision = before
