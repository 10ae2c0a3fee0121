"""The Triton launches of the presets' training steps, found by running the steps on fake tensors.

A step runs with the preset's micro-batch and one block per stack, since further blocks have the same launches; the
update runs over all parameters. Each op of this library that the step calls is then launched on tensors without data.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from bench.instruments.calls import Calls, OpCall
from bench.ops import pixels_of
from fastmask.diffusion import Denoiser, Objective, training_draws
from fastmask.diffusion.masking import kept_count, parse_per_sample
from fastmask.diffusion.objective import TOTAL
from fastmask.kernels import sample_mask
from fastmask.models.networks import AnyNetwork
from fastmask.presets import PRESETS
from fastmask.training.adamw import AdamWEMA
from fastmask.training.config import TrainConfig, build_model, preset_config

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Samples with unequal numbers of kept tokens, packed: the launches are the same for any such range.
_PER_SAMPLE = "uniform(0.25,0.75)"


def preset_cases(widths: list[int]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield a label and a launcher call for each launch of the presets with these widths."""
    updated = set()
    for name in PRESETS:
        config = preset_config(name, PRESETS)
        sizes = config.network
        with torch.device("meta"):
            model = build_model(config, *pixels_of(config))
        if not {stack.width for stack in model.stacks} <= {*widths}:
            continue
        # "auto" is bf16 on GPUs that support it, and fp32 on others.
        for precision in ("bf16", "fp32") if config.machine.precision == "auto" else (config.machine.precision,):
            for form, calls in _passes(config, precision):
                for call in _distinct(calls):
                    yield f"{name} {precision} {form}", with_precision(call, precision)
        if sizes not in updated:
            updated.add(sizes)
            for form, calls in _updates(config):
                for call in _distinct(calls):
                    yield f"{name} {form}", with_precision(call, "fp32")


def with_blocks(network: AnyNetwork, blocks: int) -> AnyNetwork:
    """Return a network with at most this number of blocks in each stack."""
    if network.name == "maskdit":
        fewer = {"depth": blocks, "decoder_depth": min(blocks, network.decoder_depth)}
    elif network.name == "deferred":
        fewer = {"depth": blocks, "mixer_depth": min(blocks, network.mixer_depth)}
    else:
        first, last = min(blocks, network.route_start), min(blocks, network.depth - network.route_end)
        end = first + min(blocks, network.route_end - network.route_start)
        fewer = {"route_start": first, "route_end": end, "depth": end + last}
    return dataclasses.replace(network, **fewer)


def with_precision(call: OpCall, precision: str) -> Callable[[], Any]:
    """Return the launch of a call under the precision of fp32 matmuls."""

    def launch() -> Any:
        matmul = torch.backends.cuda.matmul
        before, matmul.fp32_precision = matmul.fp32_precision, "tf32" if precision == "tf32" else "ieee"
        try:
            return call.launch()
        finally:
            matmul.fp32_precision = before

    return launch


def _distinct(calls: Calls) -> Iterator[OpCall]:
    """Yield each call once, with tensors without data in place of fake ones."""
    seen = set()
    for call in calls.calls:
        bare = OpCall(call.name, tree_map_only(Tensor, _without_data, call.args))
        if repr(bare) not in seen:
            seen.add(repr(bare))
            yield bare


def _passes(config: TrainConfig, precision: str) -> Iterator[tuple[str, Calls]]:
    """Yield the calls of a micro-batch that keeps all positions, the preset's number, and unequal numbers."""
    length = (pixels_of(config)[1] // config.network.patch_size) ** 2
    for keep in sorted({length, kept_count(length, config.masking.mask_ratio)}, reverse=True):
        yield f"K={keep}", _pass(config, precision, keep, "constant")
        if keep < length:
            yield "packed", _pass(config, precision, keep, _PER_SAMPLE)


def _pass(config: TrainConfig, precision: str, keep: int, per_sample: str) -> Calls:
    config = dataclasses.replace(config, network=with_blocks(config.network, 1))
    batch, dtype = config.micro_batch, _DTYPES.get(precision)
    with FakeTensorMode(), Calls() as calls:
        model = build_model(config, *pixels_of(config))
        model.impl = "fused"
        objective = Objective(Denoiser(model, config.process), config.objective.terms(model.config))
        images = torch.empty(batch, model.in_channels, model.input_size, model.input_size)
        seed = offset = torch.empty((), dtype=torch.int64)
        ratios = parse_per_sample(per_sample, config.masking.mask_ratio)
        draws = training_draws(
            config.process,
            images,
            torch.empty(batch, dtype=torch.int64),
            seed=seed,
            offset=offset,
            drop=model.drop,
            label_drop=config.objective.label_drop,
            drop_path=model.drop_path,
            path_drop=model.path_drop,
            structured=config.masking.structured and ratios is None,
            length=model.length,
            keep=keep,
            per_sample=ratios,
        )
        if keep < model.length and (ratios or not config.masking.structured):  # also sample the mask as on a GPU
            counts = ratios.keep(seed, torch.arange(batch), draws.t, model.length) if ratios else keep
            total = ratios.total(batch, model.length) if ratios else None
            options: dict[str, Any] = {"seed": seed, "offset": offset, "device": "cpu", "impl": "fused"}
            sample_mask(batch, model.length, counts, total=total, **options)
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            objective(images, *draws)[TOTAL].sum().backward()
    return calls


def _updates(config: TrainConfig) -> Iterator[tuple[str, Calls]]:
    """Yield the calls of the optimizer steps, with a gradient of the mask token in masked ones."""
    for masked in (True, False) if config.network.masked else (False,):
        with FakeTensorMode(), Calls() as calls:
            model = build_model(config, *pixels_of(config))
            for name, parameter in model.named_parameters():
                parameter.grad = torch.empty_like(parameter) if masked or name != "mask_token" else None
            averages = [(config.ema.ema_decay, [torch.empty_like(p) for p in model.parameters()])]
            AdamWEMA(model.parameters(), averages=averages, impl="fused").step()
        yield "masked update" if masked else "update", calls


def _without_data(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
