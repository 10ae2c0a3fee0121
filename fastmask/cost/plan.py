"""Output of `--dry-run`: configuration, counts of the network, memory, predicted throughput."""

import torch
from rich.table import Table

from fastmask.console import printable, say
from fastmask.cost.predict import ASSUMED, predict_run
from fastmask.cost.work import RESERVE
from fastmask.cost.workload import Workload, workload_of
from fastmask.data.teacher import Teacher
from fastmask.diffusion.masking import kept_count
from fastmask.gpus import GPUS
from fastmask.models.counts import forward_macs, num_parameters
from fastmask.models.maskdit import MaskDiT
from fastmask.training.align import Aligned
from fastmask.training.config import TrainConfig
from fastmask.training.report import console


def print_plan(config: TrainConfig, model: MaskDiT, aligned: Aligned | None = None) -> None:
    """Print the configuration of a run, the counts of its network, memory and a prediction.

    Args:
        config: the resolved configuration.
        model: the network; its tensors can be on the meta device.
        aligned: the alignment of the run; None without one.
    """
    fields = Table(title=f"configuration of {config.preset}", show_header=False)
    names = [f"{name} = {value}" for name, value in config.recorded().items()]
    half = -(-len(names) // 2)
    for i in range(half):
        fields.add_row(names[i], names[half + i] if half + i < len(names) else "")
    console.print(fields)

    # Counts are for the initial mask ratio, memory for the lowest one, the prediction for the whole run.
    parameters = num_parameters(model)
    load, device = workload_of(config, aligned), config.machine.device
    kept = kept_count(model.length, config.masking.mask_ratio)
    full, masked = forward_macs(model), forward_macs(model, kept)
    trained = masked + (aligned.macs(kept, 0) if aligned else 0)
    counts = Table(title="counts", show_header=False)
    for _ in range(2):
        counts.add_column(no_wrap=True)
    counts.add_row("input", f"{model.in_channels} x {model.input_size} x {model.input_size}, {model.length} patches")
    counts.add_row("trainable parameters", f"{parameters / 1e6:.1f}M")
    if kept < model.length:
        counts.add_row(f"forward, {kept} of {model.length} patches kept", f"{masked / 1e9:.2f} GMAC per image")
    counts.add_row("forward, unmasked", f"{full / 1e9:.2f} GMAC per image")
    if aligned and aligned.projector:
        _add_alignment(counts, aligned, kept)
    counts.add_row("training, 6 FLOP per forward MAC", f"{6 * trained / 1e9:.1f} GFLOP per image")
    precision = "bf16" if config.machine.precision == "fp32" and device == "cpu" else config.machine.precision
    _add_memory(counts, load, model, precision, device)
    images = load.max_steps * load.batch_size
    counts.add_row(f"images seen, {load.max_steps:,} steps x {load.batch_size}", f"{images:,}")
    counts.add_row("whole run", f"{_mean_macs(load, model, aligned) * 6 * images:.3g} FLOP")
    _add_prediction(counts, load, model, precision)
    console.print(counts)
    say("Memory is an estimate for one process; more micro-batches per step or another AdamW take no more.")
    say(f"The prediction was not measured; {ASSUMED}.")


def _add_memory(counts: Table, load: Workload, model: MaskDiT, precision: str, device: str) -> None:
    """Add the peak memory by part, at the lowest mask ratio of the run, and the largest batches that fit."""
    memory, averages = load.memory(model, precision), load.averages
    counts.add_row("weights / gradients, fp32", f"{memory.weights / 1e9:.2f} GB each")
    moments = "Muon's momentum, AdamW's moments, fp32" if load.muon else "AdamW's two moments, fp32"
    counts.add_row(moments, f"{memory.moments / 1e9:.2f} GB")
    counts.add_row("EMA, fp32" if averages == 1 else f"{averages} EMAs, fp32", f"{memory.ema / 1e9:.2f} GB")
    if memory.copy:
        counts.add_row(f"copy of the weights, {precision}", f"{memory.copy / 1e9:.2f} GB")
    counts.add_row(f"kept for backward, {precision}", f"{memory.activations / 1e6:.1f} MB per image")
    if memory.recomputed:
        counts.add_row("recompute buffer (largest block)", f"{memory.recomputed / 1e6:.1f} MB per image")
    counts.add_row("peak workspace in backward", f"{memory.working / 1e6:.1f} MB per image")
    micro = load.micro_batch
    counts.add_row(f"peak memory, micro-batches of {micro}", f"{memory.high_water(micro) / 1e9:.2f} GB")
    here = [torch.cuda.get_device_properties(device).total_memory / 1e9] if device.startswith("cuda") else []
    for size in here or (24, 40, 80, 141):
        largest = memory.largest_batch(size * 1e9)
        shown = f"{largest}" if largest else "none"
        counts.add_row(f"largest batch in {size:.0f} GB, {RESERVE:.0%} free", shown)


def _add_prediction(counts: Table, load: Workload, model: MaskDiT, precision: str) -> None:
    """Add the prediction for one H100; on a CPU the precision fp32 means "auto", which is bf16 on an H100."""
    gpu = GPUS["h100"]
    try:
        run = predict_run(load, model, gpu, precision)
    except ValueError as error:
        counts.add_row(f"prediction, one {gpu.name}, {precision}", str(error))
        return
    shown = f"{run.images_per_s:,.0f} images/s, {run.gpu_hours:,.1f} hours"
    counts.add_row(f"prediction, one {gpu.name}, {precision}", shown)


def _add_alignment(counts: Table, aligned: Aligned, kept: int) -> None:
    """Add the projector, and a teacher that is run in each step; neither is part of the network."""
    assert aligned.projector is not None
    parameters = sum(p.numel() for p in aligned.projector.parameters())
    macs = f"{aligned.macs(kept, 0) / 1e9:.2f} GMAC per image"
    counts.add_row("projector of the alignment", f"{parameters / 1e6:.1f}M parameters, {macs}")
    if isinstance(aligned.features, Teacher):
        teacher = aligned.features
        said = f"{teacher.macs() / 1e9:.2f} GMAC per image, forward only, not in the counts below"
        counts.add_row(f"teacher {printable(teacher.name)}", said)


def _mean_macs(load: Workload, model: MaskDiT, aligned: Aligned | None) -> float:
    """Return the forward MACs per image in training, averaged over the run."""
    stages = load.masking.stages(model.length, load.max_steps)
    ends = [*(stage.first_step for stage in stages[1:]), load.max_steps]
    total = sum(
        (end - stage.first_step) * forward_macs(model, stage.keep) for stage, end in zip(stages, ends, strict=True)
    )
    if aligned:
        until = min(load.max_steps, aligned.steps_left(0))
        total += sum(
            max(0, min(end, until) - stage.first_step) * aligned.macs(stage.keep, 0)
            for stage, end in zip(stages, ends, strict=True)
        )
    return total / load.max_steps
