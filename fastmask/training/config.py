"""Training configuration: one flat dataclass, from which the command line is generated."""

import dataclasses
import difflib
from collections.abc import Collection, Sequence
from typing import Any, Literal

from fastmask.console import without_secrets
from fastmask.diffusion import EDM
from fastmask.diffusion.masking import (
    GROUP,
    SCHEDULES,
    RatioPerSample,
    Stage,
    check_ratio,
    mask_ratio_at,
    parse_per_sample,
    ratio_stages,
)
from fastmask.diffusion.processes import PROCESSES, AnyProcess
from fastmask.models.maskdit import MaskDiT, MaskDiTConfig
from fastmask.models.networks import NETWORKS, AnyNetwork
from fastmask.training.ema import gamma_of


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Configuration of a training run. Steps are optimizer steps, sizes are in pixels."""

    preset: str = "digits"
    """Preset that supplies the defaults of all other fields."""
    run_dir: str = ""
    """Run folder; the same command resumes from its last checkpoint. Empty: runs/PRESET, or runs/PRESET-DATA for
    other --data than the preset's."""
    seed: int = 0
    """Seed of the weights, data order, noise, masks and label dropout."""
    device: str = "auto"
    """Device: cuda, cuda:1 or cpu. auto: the GPU if there is one."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """Compute precision of matmuls; weights stay in fp32. auto: bf16 on GPUs that support it, fp16 on others, fp32 on a
    CPU."""

    compile: Literal["auto", "none", "block", "whole"] = "auto"
    """Scope of torch.compile: each block (faster startup) or the whole network. auto: block on a GPU, none on a CPU."""
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    """Replay the step as CUDA graphs, on a single GPU. auto: on where supported."""
    parallel: Literal["ddp", "fsdp2", "fsdp2-grad-op"] = "ddp"
    """Parallelism under torchrun: replicated weights (DDP), or weights sharded by FSDP2 and gathered per pass, or kept
    gathered from forward to backward (grad-op)."""

    data: str = "digits"
    """Dataset: digits, synthetic, a store (fastmask.prepare) or its URL (s3://bucket/store), an .npz, or any source of
    fastmask.prepare: an image folder (class = sub-folder), tars, parquet."""
    data_source: Literal["auto", "images"] = "auto"
    """auto: train on the stored form, images as pixels; images: encode images with --vae on the fly."""
    vae: str = "stabilityai/sd-vae-ft-mse"
    """Folder or name of the diffusers AutoencoderKL that encodes images with --data-source images."""
    decoder: Literal["auto", "dali", "pil"] = "auto"
    """JPEG decoder: DALI (on the GPU when training on one) or Pillow. auto: DALI if it is installed."""
    on_bad: Literal["stop", "skip"] = "stop"
    """Unreadable images: stop the run, with a checkpoint, or substitute another image, chosen by the seed and the same
    in every epoch."""
    image_size: int = 8
    """Side of the images. Images are trained on as pixels, VAE moments as latents of side image_size / 8. Default for
    pixels of an .npz or IDX file: their own side."""
    num_classes: int = 10
    """Number of classes; labels are below it, and 0 trains without labels. Default for your own --data: read from the
    dataset."""
    flip: bool = False
    """Random horizontal flip (p = 0.5)."""
    num_workers: int = 0
    """Number of processes that read and decode images, and of DALI threads; 0 reads in the training process."""

    network: AnyNetwork = MaskDiTConfig()  # noqa: RUF009  (immutable)
    """Network, set by the preset."""

    mask_ratio: float = 0.5
    """Fraction of the patches dropped before the encoder, in [0, 1)."""
    mask_ratio_end: float = 0.0
    """Final mask ratio of a decaying schedule."""
    mask_schedule: str = "constant"
    """Schedule of the mask ratio over the masked steps: constant, linear, exp, cosine2 .. cosine6."""
    mask_levels: int = 8
    """Number of distinct kept counts of a decaying schedule."""
    mask_ratio_per_sample: str = "constant"
    """Mask ratio per sample: constant, uniform(a,b), noise(a,b) with b at the highest noise, or noise around
    mask_ratio."""
    mae_coef: float = 0.1
    """Weight of the reconstruction (MAE) loss."""
    label_drop: float = 0.1
    """Probability of dropping the label of a sample, for classifier-free guidance."""
    process: AnyProcess = EDM()  # noqa: RUF009  (immutable)
    """Diffusion process, set by the preset."""

    max_steps: int = 1000
    """Total number of steps."""
    batch_size: int = 128
    """Global batch size: images per step over all processes."""
    micro_batch_size: int = 0
    """Images per forward pass of a process, with gradient accumulation. 0: the process's whole share of the batch."""
    activation_checkpointing: Literal["none", "block"] = "none"
    """Activation checkpointing: none, or keep only the input of each block and recompute the rest in backward."""
    lr: float = 1e-4
    """Learning rate."""
    warmup_steps: int = 0
    """Number of linear warm-up steps of the learning rate."""
    unmask_steps: int = 0
    """Number of final steps without masking (unmasked tuning)."""
    unmask_lr: float = 5e-5
    """Learning rate of the unmasked steps."""
    optimizer: Literal["auto", "adamw_ema", "torch", "apex"] = "auto"
    """AdamW implementation; adamw_ema fuses the EMA update. auto: adamw_ema where it has a kernel, else torch."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's first and second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    grad_clip: float = 0.0
    """Maximum gradient norm; 0 disables clipping."""
    ema_decay: float = 0.9999
    """EMA decay per step; it warms up, so that a short run forgets the random initial weights too."""
    ema_widths: tuple[float, ...] = ()
    """Relative widths of additional power-function EMAs for post-hoc EMA, such as 0.05 0.1."""
    snapshot_every: int = 0
    """Steps between snapshots of these EMAs, all of which are kept. 0: with every checkpoint."""
    init: str = ""
    """Initial weights: a run folder, one of its checkpoints, or a .pt or .safetensors file with the published parameter
    names. The label or position table is reinitialised for another number of classes or image size."""

    on_divergence: Literal["stop", "rollback"] = "stop"
    """After a loss spike: stop, or roll back to the last checkpoint and skip the samples since then."""
    divergence_factor: float = 5.0
    """Loss spike threshold: multiple of the median of the last ten reports; 0 disables it."""
    loss_limit: float = 100.0
    """Absolute loss spike threshold, from the first report on; 0 disables it."""

    report_every: int = 100
    """Steps between reports (lines of stats.jsonl)."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Number of checkpoints kept on disk."""
    sample_every: int = 0
    """Steps between sample grids drawn with the EMA weights; 0 disables them."""
    sample_steps: int = 18
    """Number of solver steps for sample grids."""
    cfg_scale: float = 1.5
    """Guidance scale of sample grids; 1 disables guidance."""

    def recorded(self) -> dict[str, Any]:
        """Return the values by flag name, safe to print and store.

        The fields of process and network are merged in, and ``process`` and ``network`` hold their names. Passwords,
        tokens and the query are removed from a URL in ``data``.
        """
        values = dataclasses.asdict(self)
        members = {**values.pop("process"), **values.pop("network")}
        names = {"process": self.process.name, "network": self.network.name}
        return {**values, **members, **names, "data": without_secrets(self.data)}

    @property
    def masked_steps(self) -> int:
        """Number of steps before the unmasked stage."""
        return self.max_steps - self.unmask_steps

    def ratio_at(self, step: int) -> float:
        """Return the mask ratio of a step, counted from 0."""
        if step >= self.masked_steps:
            return 0.0
        return mask_ratio_at(self.mask_schedule, step / self.masked_steps, self.mask_ratio, self.mask_ratio_end)

    def stages(self, length: int) -> tuple[Stage, ...]:
        """Return the stages of the run, with K for ``length`` positions; the last may be unmasked."""
        masked = ratio_stages(
            self.mask_schedule, self.masked_steps, self.mask_ratio, self.mask_ratio_end, length, self.mask_levels
        )
        is_over = bool(masked) and masked[-1].keep == length
        return masked if is_over or not self.unmask_steps else (*masked, Stage(self.masked_steps, length))

    def kept_at(self, step: int, length: int) -> int:
        """Return the number of kept positions of a step, counted from 0; the mean with a ratio per sample."""
        return [stage.keep for stage in self.stages(length) if stage.first_step <= step][-1]

    @property
    def per_sample(self) -> RatioPerSample | None:
        """Distribution of the per-sample mask ratio in the masked steps; None for a constant ratio."""
        return parse_per_sample(self.mask_ratio_per_sample, self.mask_ratio)

    @property
    def micro_batch(self) -> int:
        """Images per forward pass."""
        return min(self.micro_batch_size or self.batch_size, self.batch_size)


def check_config(config: TrainConfig, input_size: int) -> None:
    """Raise a ValueError for the first invalid field.

    Args:
        config: the configuration.
        input_size: side of the network's input, in pixels or latent pixels.
    """
    config.network.check(input_size)
    check_ranges(config)


def check_ranges(config: TrainConfig) -> None:
    """Raise a ValueError for the first field out of range, independent of the dataset."""
    check_ratio("mask_ratio", config.mask_ratio)
    check_ratio("mask_ratio_end", config.mask_ratio_end)
    if config.mask_schedule not in SCHEDULES:
        raise ValueError(_unknown("mask_schedule", config.mask_schedule, SCHEDULES))
    if not config.network.masked and (config.mask_ratio or config.mask_ratio_end):
        raise ValueError("a network without a decoder (decoder_depth 0) trains unmasked: set mask_ratio 0")
    # Lower bounds of single fields, then constraints between fields.
    for name, lowest in [
        ("mask_levels", 1),
        ("max_steps", 1),
        ("batch_size", 1),
        ("micro_batch_size", 0),
        ("warmup_steps", 0),
        ("unmask_steps", 0),
        ("num_workers", 0),
        ("report_every", 1),
        ("checkpoint_every", 1),
        ("keep_checkpoints", 1),
        ("snapshot_every", 0),
        ("sample_every", 0),
        ("sample_steps", 2),
        ("seed", 0),
        ("lr", 0),
        ("unmask_lr", 0),
        ("mae_coef", 0),
        ("weight_decay", 0),
        ("grad_clip", 0),
        ("divergence_factor", 0),
        ("loss_limit", 0),
        ("cfg_scale", 0),
    ]:
        value = getattr(config, name)
        if not lowest <= value < float("inf"):
            raise ValueError(f"{name} must be at least {lowest}, not {value}")
    for name, value in [("label_drop", config.label_drop), ("ema_decay", config.ema_decay)]:
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], not {value}")
    if not all(0 <= beta < 1 for beta in config.betas):
        raise ValueError(f"betas must be in [0, 1), not {config.betas}")
    for width in config.ema_widths:
        gamma_of(width)
    if len(set(config.ema_widths)) < len(config.ema_widths):
        raise ValueError(f"ema_widths must differ from one another, not {config.ema_widths}")
    if config.unmask_steps > config.max_steps:
        raise ValueError(f"unmask_steps {config.unmask_steps} is more than max_steps {config.max_steps}")
    if config.batch_size % config.micro_batch:
        raise ValueError(
            f"batch_size {config.batch_size} does not divide into parts of micro_batch_size {config.micro_batch_size}"
        )
    _check_per_sample(config)


def _check_per_sample(config: TrainConfig) -> None:
    per_sample = config.per_sample
    if per_sample is None:
        return
    text = f"mask_ratio_per_sample {config.mask_ratio_per_sample}"
    if config.mask_schedule != "constant":
        raise ValueError(f"{text} goes with mask_schedule constant, not {config.mask_schedule}")
    if abs(per_sample.mean - config.mask_ratio) > 1e-6:
        raise ValueError(
            f"{text} has a mean of {per_sample.mean:g}, and mask_ratio is {config.mask_ratio:g}: give the same to both"
        )
    if config.micro_batch % GROUP:
        raise ValueError(
            f"{text} is drawn for groups of {GROUP} samples: the images computed at a time (batch_size or "
            f"micro_batch_size), {config.micro_batch}, must be a multiple"
        )


def build_model(config: TrainConfig, channels: int, size: int) -> MaskDiT:
    """Return a freshly initialised network for inputs of shape (channels, size, size)."""
    return config.network.build(channels, size, config.num_classes)


def fit_stages(config: TrainConfig, preset: TrainConfig, given: Collection[str] = ()) -> TrainConfig:
    """Scale the preset's warm-up and unmasked steps down in proportion if ``max_steps`` is too small for them.

    Nothing changes if they fit, differ from the preset, or were set on the command line.
    """
    stages = ("unmask_steps", "warmup_steps")
    fits = config.unmask_steps + config.warmup_steps <= config.max_steps
    chosen = any(name in given or getattr(config, name) != getattr(preset, name) for name in stages)
    if fits or config.max_steps < 1 or chosen:
        return config
    share = config.max_steps / preset.max_steps
    unmask, warmup = int(preset.unmask_steps * share), int(preset.warmup_steps * share)
    return dataclasses.replace(config, unmask_steps=unmask, warmup_steps=warmup)


def preset_config(name: str, presets: dict[str, dict[str, Any]]) -> TrainConfig:
    """Return the configuration of a preset; a ValueError suggests similar names for an unknown one."""
    if name not in presets:
        raise ValueError(_unknown("preset", name, presets))
    return TrainConfig(preset=name, **presets[name])


def refuse_foreign_flags(arguments: Sequence[str], config: TrainConfig) -> None:
    """Raise a ValueError for a flag of another process or network than the preset's; it names both."""
    for what, member, kinds in (("process", config.process, PROCESSES), ("network", config.network, NETWORKS)):
        own = {field.name for field in dataclasses.fields(member)}
        owners = {field.name: kind.name for kind in kinds.values() for field in dataclasses.fields(kind)}
        for argument in arguments:
            flag = argument.split("=")[0]
            name = flag.removeprefix("--").replace("-", "_")
            if flag.startswith("--") and name in owners and name not in own:
                raise ValueError(
                    f"{flag} is a flag of {what} {owners[name]}, and preset {config.preset} trains {what} {member.name}"
                )


def _unknown(what: str, name: str, known: dict[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or list(known)
    return f"unknown {what} {name!r}: did you mean {' or '.join(near)}?"
