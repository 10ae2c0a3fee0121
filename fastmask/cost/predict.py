"""Predicted training throughput: a roofline model from the cost of a step and the peak rates of a GPU.

All speeds are predictions, not measurements, from published peak rates and the efficiencies in `Assumptions`.
"""

from typing import NamedTuple

from fastmask.cost.work import RESERVE, Work, work_of
from fastmask.cost.workload import Workload
from fastmask.gpus import Gpu
from fastmask.models.maskdit import MaskDiT


class Assumptions(NamedTuple):
    """Assumptions of a prediction; none of them is measured.

    Attributes:
        products: fraction of the peak FLOP/s reached by matmuls.
        bandwidth: fraction of the peak bandwidth reached by everything else.
        launch_s: seconds of CPU time to launch an operation, in eager mode without a CUDA graph.
        mfu: fraction of the peak FLOP/s reached by a whole step; replaces the other three. None uses the roofline.
    """

    products: float = 0.65
    bandwidth: float = 0.85
    launch_s: float = 5e-6
    mfu: float | None = None

    def __str__(self) -> str:
        if self.mfu is not None:
            return f"assuming {self.mfu:.1%} of the peak for whole steps"
        return (
            f"assuming {self.products:.0%} of the peak in matmuls, {self.bandwidth:.0%} of the bandwidth elsewhere, "
            f"{self.launch_s * 1e6:g} us per launch"
        )


ASSUMED = Assumptions()


def step_seconds(
    work: Work, gpu: Gpu, precision: str, batch: int, micro_batch: int, assumed: Assumptions = ASSUMED, gpus: int = 1
) -> float:
    """Return the predicted seconds of a training step on one GPU.

    Args:
        work: cost of a step, from `work_of`.
        gpu: a value of `GPUS`.
        precision: the precision given to `work_of`.
        batch: images per step and GPU.
        micro_batch: images per micro-batch.
        assumed: assumptions of the prediction.
        gpus: number of GPUs, which share Muon's matmuls.
    """
    peak = gpu.peak(precision)
    update_s = work.update_flops / gpus / gpu.peak("fp32" if precision == "fp16" else precision)
    if assumed.mfu is not None:
        return (batch * work.flops / peak + update_s) / assumed.mfu
    parts = -(-batch // micro_batch)
    rate = gpu.bandwidth * assumed.bandwidth
    products = max(
        batch * work.flops / (peak * assumed.products),
        (batch * work.matmul_bytes + parts * work.matmul_weight_bytes) / rate,
    )
    update = update_s / assumed.products + work.update_bytes / rate
    others = batch * work.other_bytes + parts * work.cast_bytes + (parts - 1) * work.accumulate_bytes
    return max(products + others / rate, parts * work.launches * assumed.launch_s) + update


class Run(NamedTuple):
    """Prediction for a whole run.

    Attributes:
        micro_batch: images per micro-batch and GPU.
        images_per_s: throughput of all GPUs, averaged over the run.
        hours: duration of the run.
        gpu_hours: `hours` times the number of GPUs.
    """

    micro_batch: int
    images_per_s: float
    hours: float
    gpu_hours: float


def predict_run(
    load: Workload,
    model: MaskDiT,
    gpu: Gpu,
    precision: str,
    gpus: int = 1,
    assumed: Assumptions = ASSUMED,
    points: int = 1000,
) -> Run:
    """Return the prediction for a run on ``gpus`` GPUs with equal shares of each batch.

    Gradient communication is assumed to overlap with backward, and data loading to keep up.

    Args:
        load: batch, mask ratios and steps of the run.
        model: the network; its tensors can be on the meta device.
        gpu: a value of `GPUS`.
        precision: precision of the matmuls.
        gpus: number of GPUs.
        assumed: assumptions of the prediction.
        points: number of evenly spaced steps at which the mask ratio is sampled.

    Raises:
        ValueError: a batch that is not divisible, or too little memory for one image.
    """
    if gpus < 1 or load.batch_size % gpus:
        raise ValueError(f"a batch of {load.batch_size} does not divide among {gpus} GPUs")
    steps = (int((i + 0.5) / points * load.max_steps) for i in range(points))
    ratios = [load.masking.ratio_at(step, load.max_steps) for step in steps]
    memory = load.memory(model, precision)
    largest = memory.largest_batch(gpu.memory)
    if not largest:
        raise ValueError(
            f"too little memory for any batch: {memory.fixed / 1e9:.1f} GB are taken before the first image, "
            f"{memory.per_image / 1e6:.1f} MB by each, and a {gpu.name} gives {gpu.memory * (1 - RESERVE) / 1e9:.0f} GB"
        )
    batch = load.batch_size // gpus
    parts = -(-batch // min(load.micro_batch, batch, largest))
    micro = -(-batch // parts)
    options = {"checkpoint_blocks": load.checkpoint_blocks, "muon": load.muon}
    works = {ratio: work_of(model, ratio, precision, **options) for ratio in set(ratios)}
    seconds = {ratio: step_seconds(work, gpu, precision, batch, micro, assumed, gpus) for ratio, work in works.items()}
    mean = sum(seconds[ratio] for ratio in ratios) / points
    hours = load.max_steps * mean / 3600
    return Run(micro, load.batch_size / mean, hours, hours * gpus)
