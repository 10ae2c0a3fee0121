"""`python -m bench.instruments.model`: operations, bytes and memory of a preset, predicted throughput and cost on GPUs.

The formulas are in `fastmask/cost/work.py`. `--count` compares them with the operators of a step on tensors without
data. Nothing here is measured.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from bench.instruments.memory import fake_forward
from bench.instruments.operators import Operators
from bench.ops import pixels_of
from bench.report.tables import header, line
from fastmask.cost.predict import ASSUMED, Assumptions, predict_run
from fastmask.cost.work import RESERVE, memory_of, work_of
from fastmask.cost.workload import workload_of
from fastmask.diffusion.masking import kept_count
from fastmask.gpus import GPUS, Gpu
from fastmask.models.counts import forward_macs, num_parameters
from fastmask.models.maskdit import MaskDiT
from fastmask.presets import PRESETS
from fastmask.training.config import TrainConfig, build_model, preset_config


class Count(NamedTuple):
    """Launches and traffic of a forward and backward pass; bytes as in `fastmask.cost.work.Work`."""

    launches: int
    matmul_bytes: float
    other_bytes: float


def count_step(preset: str, precision: str, checkpoint_blocks: bool = False) -> Count:
    """Count the operators of a training step with fused kernels, from batches of four and eight images.

    Args:
        preset: name of a preset of latents.
        precision: "fp32", or "bf16" for autocast.
        checkpoint_blocks: recompute the blocks in backward.
    """
    four, eight = (_operators(preset, precision, batch, checkpoint_blocks) for batch in (4, 8))
    products, others = ((eight.moved[kind] - four.moved[kind]) / 4 for kind in (True, False))
    return Count(four.launches, products, others)


def network(config: TrainConfig) -> MaskDiT:
    """Return the network of a preset, without its weights."""
    with torch.device("meta"):
        return build_model(config, *pixels_of(config))


def counts(config: TrainConfig, model: MaskDiT, precision: str, size: float) -> Iterator[tuple[str, str]]:
    """Yield name and value of each counted quantity."""
    keep = kept_count(model.length, config.masking.mask_ratio)
    work, memory = (f(model, config.masking.mask_ratio, precision) for f in (work_of, memory_of))
    yield "parameters", f"{num_parameters(model) / 1e6:.1f}M"
    yield "patches kept", f"{keep} of {model.length}"
    yield "training, per image", f"{work.flops / 1e9:.1f} GFLOP"
    if keep < model.length:
        yield "training, per image, unmasked", f"{6 * forward_macs(model) / 1e9:.1f} GFLOP"
    yield "matmul traffic, per image", f"{work.matmul_bytes / 1e6:.1f} MB"
    yield "other traffic, per image", f"{work.other_bytes / 1e6:.1f} MB"
    weights = work.matmul_weight_bytes + work.cast_bytes
    yield "weight traffic, per micro-batch", f"{weights / 1e9:.2f} GB"
    yield "gradient accumulation traffic, per micro-batch after the first", f"{work.accumulate_bytes / 1e9:.2f} GB"
    yield "traffic of AdamW and EMA, per step", f"{work.update_bytes / 1e9:.2f} GB"
    yield "launches per micro-batch (an estimate: one per operation)", f"{work.launches:,}"
    for part in ("weights", "gradients", "moments", "ema", "copy"):
        yield f"memory: {part}", f"{getattr(memory, part) / 1e9:.2f} GB"
    yield "memory: saved for backward, per image", f"{memory.activations / 1e6:.1f} MB"
    yield "memory: peak workspace in backward, per image (an estimate)", f"{memory.working / 1e6:.1f} MB"
    largest = memory.largest_batch(size)
    yield f"largest micro-batch in {size / 1e9:g} GB, {RESERVE:.0%} in reserve", f"{largest}" if largest else "none"


def recipe(preset: str) -> list[TrainConfig]:
    """Return the runs of a preset's recipe: its own, and the unmasked stage if that is another preset."""
    names = [preset, *(name for name in (f"{preset}-unmask",) if name in PRESETS)]
    return [preset_config(name, PRESETS) for name in names]


def predictions(
    preset: str, precision: str | None, gpus: Sequence[Gpu], count: int, assumed: Assumptions, price: float | None
) -> Iterator[list[str]]:
    """Yield the rows of the table: run, GPUs, precision, micro-batch, images/s, MFU, hours, GPU-hours and price."""
    for gpu in gpus:
        hours = 0.0
        runs = recipe(preset)
        for config in runs:
            model, used = network(config), precision_of(config, precision)
            run = predict_run(workload_of(config), model, gpu, used, count, assumed)
            hours += run.gpu_hours
            flops = work_of(model, config.masking.mask_ratio, used).flops
            mfu = flops * run.images_per_s / count / gpu.peak(used)
            yield [
                config.preset,
                f"{count} x {gpu.name}",
                used,
                f"{run.micro_batch}",
                f"{run.images_per_s:,.0f}",
                f"{mfu:.1%}" if _one_ratio(config) else "",
                f"{run.hours:,.1f}",
                f"{run.gpu_hours:,.1f}",
                _money(run.gpu_hours, price),
            ]
        if len(runs) > 1:
            total = ["whole recipe", f"{count} x {gpu.name}", "", "", "", ""]
            yield [*total, f"{hours / count:,.1f}", f"{hours:,.1f}", _money(hours, price)]


def precision_of(config: TrainConfig, asked: str | None) -> str:
    """Return the precision of a run: the requested one, or the preset's; "auto" is bf16 on these GPUs."""
    return asked or ("bf16" if config.machine.precision == "auto" else config.machine.precision)


def main() -> None:
    """Print counts and predictions as Markdown."""
    options, assumed = _arguments()
    config = preset_config(options.preset, PRESETS)
    model, precision = network(config), precision_of(config, options.precision)
    gpus = [GPUS[options.gpu]] if options.gpu else list(GPUS.values())
    size = gpus[0].memory if options.memory is None else options.memory * 1e9
    try:
        table = list(predictions(options.preset, options.precision, gpus, options.gpus, assumed, options.price))
    except ValueError as error:
        sys.stderr.write(f"bench.instruments.model: error: {options.preset}: {error}\n")
        sys.exit(2)
    lines = [f"{options.preset}, {precision}, with the fused kernels, counted by formula (GB = 10^9 bytes):", ""]
    lines += header(["quantity", "value"])
    lines += [line([name, value]) for name, value in counts(config, model, precision, size)]
    lines += [
        "",
        f"PREDICTION, not measured, {assumed}; gradient communication is assumed to overlap with backward:",
        "",
    ]
    columns = ["run", "GPUs", "precision", "micro-batch", "images/s", "MFU", "hours", "GPU-hours", "price"]
    lines += [*header(columns), *map(line, table)]
    if options.price is not None:
        lines += ["", f"Price at {options.price:g} per GPU-hour, in the same currency."]
    lines += ["", "Peaks, without sparsity:"]
    for gpu in gpus:
        peaks = ", ".join(f"{name} {gpu.peak(name) / 1e12:g}" for name in ("bf16", "tf32", "fp32"))
        lines.append(f"{gpu.name}: {peaks} TFLOP/s, {gpu.bandwidth / 1e9:,.0f} GB/s ({gpu.source})")
    sys.stdout.write("\n".join(lines) + "\n")
    if options.count:
        work, counted = work_of(model, config.masking.mask_ratio, precision), count_step(options.preset, precision)
        sys.stdout.write("\nformula, and the operators of a step:\n")
        for name, value in counted._asdict().items():
            sys.stdout.write(f"{name}: {getattr(work, name):,.0f} by formula, {value:,.0f} counted\n")


def _arguments() -> tuple[argparse.Namespace, Assumptions]:
    parser = argparse.ArgumentParser(
        prog="python -m bench.instruments.model", description=__doc__.splitlines()[0], usage=argparse.SUPPRESS
    )
    parser.add_argument("--preset", default="xl2-in256", choices=PRESETS)
    parser.add_argument(
        "--precision", choices=("bf16", "fp16", "tf32", "fp32"), help="compute precision; default: the preset's"
    )
    parser.add_argument("--gpu", choices=GPUS, help="GPU to predict; default: all")
    parser.add_argument("--gpus", type=int, default=1, help="number of GPUs")
    parser.add_argument("--price", type=float, help="price per GPU-hour, in any currency")
    parser.add_argument("--memory", type=float, help="GPU memory in GB for the largest batch; default: the GPU's")
    parser.add_argument(
        "--products", type=float, default=ASSUMED.products, help="assumed fraction of peak FLOP/s in matmuls"
    )
    parser.add_argument("--bandwidth", type=float, default=ASSUMED.bandwidth, help="assumed fraction of peak bandwidth")
    parser.add_argument("--mfu", type=float, help="assume this MFU for whole steps instead")
    parser.add_argument("--count", action="store_true", help="also count the operators of a step")
    options = parser.parse_args()
    for name in ("products", "bandwidth", "mfu"):
        if (value := getattr(options, name)) is not None and not 0 < value <= 1:
            parser.error(f"--{name} is a share in (0, 1], not {value}")
    for name in ("price", "memory"):
        if (value := getattr(options, name)) is not None and not 0 <= value < float("inf"):
            parser.error(f"--{name} must be at least 0, not {value}")
    if options.count and (options.preset == "digits" or options.precision in ("tf32", "fp16")):
        parser.error("--count counts presets of latents, in bf16 or fp32")
    return options, ASSUMED._replace(products=options.products, bandwidth=options.bandwidth, mfu=options.mfu)


def _operators(preset: str, precision: str, batch: int, checkpoint_blocks: bool) -> Operators:
    with fake_forward(preset, "fused", precision, batch, checkpoint_blocks) as (_, forward), Operators() as counted:
        forward().backward()  # type: ignore[no-untyped-call]
    return counted


def _one_ratio(config: TrainConfig) -> bool:
    return config.masking.mask_schedule == "constant" and config.masking.unmask_steps == 0


def _money(hours: float, price: float | None) -> str:
    return "" if price is None else f"{hours * price:,.0f}"


if __name__ == "__main__":
    main()
