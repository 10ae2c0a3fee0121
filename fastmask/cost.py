"""What training costs: operations, bytes, launches and memory by formula, and from them a prediction of speed.

The counts describe a step with the fused kernels, eager; tests hold them to what the operators of a step really do.
Speeds are predictions, never measurements: a roofline from a GPU's published peaks and the shares in `Assumptions`.
GB are 10^9 bytes.
"""

import re
from typing import NamedTuple

from fastmask.config import TrainConfig
from fastmask.counts import forward_macs, trainable_parameters
from fastmask.masking import kept_count
from fastmask.model import MaskDiT


class Gpu(NamedTuple):
    """Published peaks of a GPU, without sparsity.

    Attributes:
        name: in full.
        bf16: FLOP/s of matrix products in bf16 and fp16.
        tf32: of those in tf32.
        fp32: of those in fp32.
        bandwidth: bytes per second between it and its memory.
        memory: bytes.
        source: where the figures are from.
    """

    name: str
    bf16: float
    tf32: float
    fp32: float
    bandwidth: float
    memory: float
    source: str

    def peak(self, precision: str) -> float:
        """Return the FLOP/s of matrix products in a precision."""
        return {"fp32": self.fp32, "tf32": self.tf32}.get(precision, self.bf16)


# fmt: off
GPUS = {
    "a100": Gpu("A100 SXM 80 GB",   312e12,   156e12, 19.5e12, 2.039e12,  80e9, "NVIDIA A100 datasheet"),
    "h100": Gpu("H100 SXM 80 GB", 989.4e12, 494.7e12, 66.9e12,  3.35e12,  80e9, "NVIDIA H100 architecture whitepaper"),
    "h200": Gpu("H200 SXM 141 GB", 989.4e12, 494.7e12, 66.9e12,  4.8e12, 141e9, "NVIDIA H200 datasheet"),
    "b200": Gpu("B200 (HGX)",      2250e12,  1100e12,   80e12,     8e12, 180e9, "NVIDIA Blackwell architecture brief"),
}
# fmt: on
# Slower cards of the same names, slices of a card, and modules whose peaks are others.
_OTHERS = ("PCIe", "NVL", "MIG", "GB200", "GH200")


def gpu_named(device: str) -> Gpu | None:
    """Return the peaks of a device by the name that its driver gives, None where they are not known for sure."""
    if any(other in device for other in _OTHERS):
        return None
    return next((gpu for name, gpu in GPUS.items() if re.search(rf"\b{name.upper()}\b", device)), None)


class Assumptions(NamedTuple):
    """What a prediction assumes; none of it is measured.

    Attributes:
        products: share of the peak that matrix products reach.
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
RESERVE = 0.1  # share of a GPU's memory left to context, workspaces and fragmentation; assumed as well


class Work(NamedTuple):
    """What a training step does.

    Attributes:
        flops: of matrix products and attention, per image, those of blocks computed again included.
        product_bytes: that the matrix products read and write, per image.
        other_bytes: that attention and all else reads and writes, per image.
        product_weight_bytes: that products read and write of weights and their gradients, per micro-batch.
        cast_bytes: moved to cast weights and gradients between fp32 and 16 bits, per micro-batch.
        accumulate_bytes: moved to add gradients up, per micro-batch after a step's first.
        update_bytes: moved by `adamw_ema` with one average, per step.
        launches: operations per micro-batch, each taken as one launch; kernels can be more.
    """

    flops: float
    product_bytes: float
    other_bytes: float
    product_weight_bytes: float
    cast_bytes: float
    accumulate_bytes: float
    update_bytes: float
    launches: int


class Memory(NamedTuple):
    """Bytes by part: the first five whatever the batch, the others per image of a micro-batch.

    Gradients are counted whole beside all activations: so they lie while a step has further micro-batches, in DDP's
    buckets and in a CUDA graph. A lone micro-batch without those takes less, its gradients coming while its activations
    go; more than two take no more than two. No form of AdamW takes more than its state: each is one fused pass.

    Attributes:
        weights: fp32.
        gradients: fp32.
        moments: AdamW's two, fp32.
        ema: all averages of the weights, fp32.
        copy: the weights in 16 bits, which autocast makes and backward reads; where blocks are computed again, those
            that autocast holds until forward ends.
        activations: kept for backward.
        working: held for a moment in backward, at the widest place.
        recomputed: what the largest block keeps while backward goes through it, where blocks are computed again.
    """

    weights: int
    gradients: int
    moments: int
    ema: int
    copy: int
    activations: int
    working: int
    recomputed: int = 0

    @property
    def fixed(self) -> int:
        """Bytes that are there before the first image."""
        return sum(self[:5])

    @property
    def per_image(self) -> int:
        """Bytes of each image of a micro-batch."""
        return self.activations + self.working + self.recomputed

    def high_water(self, images: int) -> int:
        """Return the most bytes that a step takes at once, with micro-batches of some images."""
        return self.fixed + images * self.per_image

    def largest_batch(self, size: float) -> int:
        """Return how many images fit at a time into a memory of ``size`` bytes; 0 is none."""
        return max(0, int((size * (1 - RESERVE) - self.fixed) // self.per_image))


class _Stack(NamedTuple):
    """Blocks of one width, and the tokens that pass through them."""

    tokens: int
    width: int
    heads: int
    depth: int


def work_of(model: MaskDiT, ratio: float, precision: str, *, checkpoint_blocks: bool = False) -> Work:
    """Return what a training step does at a mask ratio.

    Args:
        model: the network; its tensors may be on the meta device.
        ratio: the mask ratio.
        precision: "bf16", "fp16", "tf32" or "fp32".
        checkpoint_blocks: whether backward computes the blocks again, as `MaskDiT.checkpoint_blocks` says.
    """
    low = _bytes_of(precision)
    stacks = _stacks(model, ratio)
    wide = sum(stack.depth * stack.tokens * stack.width for stack in stacks)  # values of a token-wide tensor per block
    blocks = sum(stack.depth for stack in stacks)
    parameters = trainable_parameters(model)
    again = int(checkpoint_blocks)  # forward passes of the blocks beside the first
    # Per block, in token widths. Products: qkv 1 + 3, proj 1 + 1, fc1 1 + 4, fc2 4 + 1; forward and two in backward.
    products = (3 + again) * 16 * low
    # fp32 residuals: two norms read and write them; backward reads them and their gradient and writes a gradient.
    residuals = (1 + again) * 2 * 2 * 4 + 2 * 3 * 4
    # Norms 2 (2), GELU 8, attention 4; back 2 (4), 16 and 8, gradient of qkv 6, bias sums 9.
    rest = ((1 + again) * (4 + 8 + 4) + 8 + 16 + 8 + 6 + 9) * low
    ends = sum(stack.tokens * stack.width for stack in stacks) * (20 + 3 * low)  # a stack's input and its first norm
    # Per block, for one that is computed again, around them, and around a decoder.
    launches = (55, 21, 86, 29) if low == 2 else (33, 10, 66, 19)
    return Work(
        flops=6 * forward_macs(model, stacks[0].tokens) + 2 * again * sum(map(_products_of, stacks)),
        product_bytes=products * wide,
        other_bytes=(residuals + rest) * wide + ends,
        product_weight_bytes=(3 + again) * low * parameters,
        cast_bytes=(12 + 6 * again) * parameters if low == 2 else 0,  # 4 + 2 each way
        accumulate_bytes=12 * parameters,
        update_bytes=(20 + 16) * parameters,  # p, g, m, v and the average read; all but g written, in one pass
        launches=(launches[0] + again * launches[1]) * blocks + launches[2] + (launches[3] if len(stacks) > 1 else 0),
    )


def memory_of(
    model: MaskDiT, ratio: float, precision: str, *, averages: int = 1, checkpoint_blocks: bool = False
) -> Memory:
    """Return the bytes that training takes at a mask ratio.

    Args:
        model: the network; its tensors may be on the meta device.
        ratio: the mask ratio; the lowest of a run takes most.
        precision: "bf16", "fp16", "tf32" or "fp32".
        averages: how many averages of the weights are kept.
        checkpoint_blocks: whether backward computes the blocks again, as `MaskDiT.checkpoint_blocks` says.
    """
    low, parameters = _bytes_of(precision), trainable_parameters(model)
    stacks = _stacks(model, ratio)
    kept, copied, recomputed = 0, parameters, 0
    for tokens, width, heads, depth in stacks:
        # Attention's qkv and result, two branches and the MLP's hidden values; two fp32 residuals.
        per_token = width * (10 * low + 2 * 4) + 4 * heads + 16  # and softmax's and the norms' statistics
        block = tokens * per_token + (6 * width + stacks[0].width) * low  # and its modulation
        if checkpoint_blocks:
            recomputed = max(recomputed, block)
            # The branch that enters, and the modulation that its gate is a part of; the residual, fp32.
            block = tokens * width * (low + 4) + 6 * width * low
            copied -= depth * 11 * width**2  # qkv, fc1 and fc2 are cast by the ops that multiply with them
        kept += depth * block + 4 * tokens * width  # and the residual that enters the first, or leaves the last
    # In the MLP's backward: its hidden values, their gradient and that of its input, and what the norms hand over.
    working = max(16 * low * tokens * width for tokens, width, _, _ in stacks)
    copy = 2 * copied if low == 2 else 0
    fixed = (4 * parameters, 4 * parameters, 8 * parameters, 4 * averages * parameters)
    return Memory(*fixed, copy, kept, working, recomputed)


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
        (batch * work.product_bytes + parts * work.product_weight_bytes) / rate,
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
        precision: of the matrix products.
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


def _bytes_of(precision: str) -> int:
    return 2 if precision in ("bf16", "fp16") else 4


def _products_of(stack: _Stack) -> int:
    """Return the MACs of a stack's blocks, without those of their modulations."""
    return stack.depth * stack.tokens * stack.width * (12 * stack.width + 2 * stack.tokens)


def _stacks(model: MaskDiT, ratio: float) -> list[_Stack]:
    keep = kept_count(model.length, ratio)
    stacks = [_Stack(keep, model.pos_embed.shape[2], model.num_heads, len(model.blocks))]
    if model.decoder_blocks:
        width = model.decoder_pos_embed.shape[2]
        stacks.append(_Stack(model.length, width, model.decoder_num_heads, len(model.decoder_blocks)))
    return stacks
