"""A prediction of training speed from what a step costs and what a GPU can do.

Speeds are predictions, never measurements: a roofline from a GPU's published peaks and the shares in `Assumptions`.
"""

from typing import NamedTuple

from fastmask.cost.work import RESERVE, Work, memory_of, work_of
from fastmask.gpus import Gpu
from fastmask.models.maskdit import MaskDiT
from fastmask.training.config import TrainConfig


class Assumptions(NamedTuple):
    """What a prediction assumes; none of it is measured.

    Attributes:
        products: share of the peak that matmuls reach.
        bandwidth: share of the peak bandwidth that everything else reaches.
        launch_s: seconds that the host takes to launch an operation, in eager mode without a CUDA graph.
        mfu: share of the peak that a step as a whole reaches; replaces the other three. None is the roofline.
    """

    products: float = 0.65
    bandwidth: float = 0.85
    launch_s: float = 5e-6
    mfu: float | None = None

    def __str__(self) -> str:
        if self.mfu is not None:
            return f"assuming {self.mfu:.1%} of the peak for whole steps"
        return (
            f"assuming {self.products:.0%} of the peak in products, {self.bandwidth:.0%} of the bandwidth elsewhere, "
            f"{self.launch_s * 1e6:g} us per launch"
        )


ASSUMED = Assumptions()


def step_seconds(
    work: Work, gpu: Gpu, precision: str, batch: int, micro_batch: int, assumed: Assumptions = ASSUMED
) -> float:
    """Return the predicted seconds of a training step on one GPU.

    Args:
        work: from `work_of`.
        gpu: a value of `GPUS`.
        precision: as `work` was made for.
        batch: images per step and GPU.
        micro_batch: images at a time.
        assumed: what is taken for granted.
    """
    peak = gpu.peak(precision)
    if assumed.mfu is not None:
        return batch * work.flops / (assumed.mfu * peak)
    parts = -(-batch // micro_batch)
    rate = gpu.bandwidth * assumed.bandwidth
    products = max(
        batch * work.flops / (peak * assumed.products),
        (batch * work.matmul_bytes + parts * work.matmul_weight_bytes) / rate,
    )
    others = batch * work.other_bytes + parts * work.cast_bytes + (parts - 1) * work.accumulate_bytes
    return max(products + others / rate, parts * work.launches * assumed.launch_s) + work.update_bytes / rate


class Run(NamedTuple):
    """A prediction for the whole of a run.

    Attributes:
        micro_batch: images at a time and GPU.
        images_per_s: of all GPUs together, averaged over the run.
        hours: from the first step to the last.
        gpu_hours: `hours` times the number of GPUs.
    """

    micro_batch: int
    images_per_s: float
    hours: float
    gpu_hours: float


def predict_run(
    config: TrainConfig,
    model: MaskDiT,
    gpu: Gpu,
    precision: str,
    gpus: int = 1,
    assumed: Assumptions = ASSUMED,
    points: int = 1000,
) -> Run:
    """Return the prediction for a run on some GPUs, among which each batch is divided evenly.

    The exchange of gradients is taken to hide behind backward, data to arrive in time.

    Args:
        config: the configuration.
        model: its network; the tensors may be on the meta device.
        gpu: a value of `GPUS`.
        precision: of the matmuls.
        gpus: how many.
        assumed: what else is taken for granted.
        points: steps, evenly spaced, at which the mask ratio is looked at.

    Raises:
        ValueError: a batch that does not divide, or a memory that not even one image fits in.
    """
    if gpus < 1 or config.batch_size % gpus:
        raise ValueError(f"a batch of {config.batch_size} does not divide among {gpus} GPUs")
    ratios = [config.ratio_at(int((i + 0.5) / points * config.max_steps)) for i in range(points)]
    again = config.activation_checkpointing == "block"
    averages = 1 + len(config.ema_widths)
    memory = memory_of(model, min(ratios), precision, averages=averages, checkpoint_blocks=again)
    largest = memory.largest_batch(gpu.memory)
    if not largest:
        raise ValueError(
            f"too little memory for any batch: {memory.fixed / 1e9:.1f} GB are taken before the first image, "
            f"{memory.per_image / 1e6:.1f} MB by each, and a {gpu.name} gives {gpu.memory * (1 - RESERVE) / 1e9:.0f} GB"
        )
    batch = config.batch_size // gpus
    parts = -(-batch // min(config.micro_batch, batch, largest))
    micro = -(-batch // parts)
    works = {ratio: work_of(model, ratio, precision, checkpoint_blocks=again) for ratio in set(ratios)}
    seconds = {ratio: step_seconds(work, gpu, precision, batch, micro, assumed) for ratio, work in works.items()}
    mean = sum(seconds[ratio] for ratio in ratios) / points
    hours = config.max_steps * mean / 3600
    return Run(micro, config.batch_size / mean, hours, hours * gpus)
