"""The configuration of a training run: one flat dataclass, from which the command line is made."""

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
    """All there is to say about a training run. Steps are optimizer steps, sides are in pixels."""

    preset: str = "digits"
    """Row of the preset table that every other field starts from."""
    run_dir: str = ""
    """Folder of the run; the same command resumes from its last checkpoint. Empty: runs/PRESET, with the name of --data
    where that is not the preset's."""
    seed: int = 0
    """Seed of weights, data order, noise, masks and dropped labels."""
    device: str = "auto"
    """Where to train: cuda, cuda:1, cpu; auto is the GPU if there is one."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """Compute precision of matmuls; weights stay in fp32. auto: bf16 on a GPU that has it, fp16 on another, fp32 on a
    CPU."""

    compile: Literal["auto", "none", "block", "whole"] = "auto"
    """What torch.compile builds: blocks, which starts sooner, or the whole network. auto: block on a GPU, else none."""
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    """Replay the step as CUDA graphs, on one GPU. auto: where that can be done."""
    parallel: Literal["ddp", "fsdp2", "fsdp2-grad-op"] = "ddp"
    """Under torchrun: every rank has all weights, or a part of them, gathered for each pass or (grad-op) for both."""

    data: str = "digits"
    """digits, synthetic, a store (fastmask.prepare) or its URL (s3://bucket/store), an .npz, or what fastmask.prepare
    takes: an image folder (class = sub-folder), tars, parquet."""
    data_source: Literal["auto", "images"] = "auto"
    """auto: train on --data as they are, images as pixels; images: encode images with --vae at each visit."""
    vae: str = "stabilityai/sd-vae-ft-mse"
    """Folder or name of the AutoencoderKL of diffusers that encodes images, with --data-source images."""
    decoder: Literal["auto", "dali", "pil"] = "auto"
    """JPEG decoder: DALI (on the GPU if training is), or Pillow. auto: DALI if it is installed."""
    on_bad: Literal["stop", "skip"] = "stop"
    """What an image that cannot be read does: stop the run, with a checkpoint, or be skipped: another takes its place,
    the same one at each visit, which the seed decides."""
    image_size: int = 8
    """Side of the images. Own images are trained on as pixels, VAE moments as latents of a side of image_size / 8.
    Without it pixels of an .npz or IDX file keep their own side, whatever the preset's is."""
    num_classes: int = 10
    """Labels are below it; 0 trains without labels. With --data of your own it is read from the data."""
    flip: bool = False
    """Flip each image left to right with probability one half."""
    num_workers: int = 0
    """Processes that read and decode images, and threads of DALI; 0 reads in the training process."""

    network: AnyNetwork = MaskDiTConfig()  # noqa: RUF009  (immutable)
    """The network, which the preset picks."""

    mask_ratio: float = 0.5
    """Share of the patches that the encoder does not see, in [0, 1)."""
    mask_ratio_end: float = 0.0
    """Ratio that a falling schedule ends at."""
    mask_schedule: str = "constant"
    """How the ratio falls over the masked steps: constant, linear, exp, cosine2 .. cosine6."""
    mask_levels: int = 8
    """Kept counts that a falling schedule is made of."""
    mask_ratio_per_sample: str = "constant"
    """Ratio of each sample: constant, uniform(a,b), noise(a,b) with b at the highest noise, noise around mask_ratio."""
    mae_coef: float = 0.1
    """Weight of the reconstruction loss."""
    label_drop: float = 0.1
    """Probability of training a sample without its label, for guidance."""
    process: AnyProcess = EDM()  # noqa: RUF009  (immutable)
    """The diffusion process, which the preset picks."""

    max_steps: int = 1000
    """Steps of the whole run."""
    batch_size: int = 128
    """Images per step."""
    micro_batch_size: int = 0
    """Images that a process computes at a time, the gradients of its share accumulated. 0: its whole share."""
    activation_checkpointing: Literal["none", "block"] = "none"
    """What is kept for backward: everything, or of each block its input, recomputed there."""
    lr: float = 1e-4
    """Learning rate."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    unmask_steps: int = 0
    """Steps at the end of the run that are trained without masking."""
    unmask_lr: float = 5e-5
    """Learning rate of those steps."""
    optimizer: Literal["auto", "adamw_ema", "torch", "apex"] = "auto"
    """Whose AdamW: adamw_ema is ours, in one pass with the average. auto: ours where it has a kernel, else torch's."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay of the first and the second moment."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    grad_clip: float = 0.0
    """Largest norm of the gradient; 0 does not clip."""
    ema_decay: float = 0.9999
    """Decay of the averaged weights per step; lower in the first steps, so that a short run has an average as well."""
    ema_widths: tuple[float, ...] = ()
    """Relative widths of averages with a power-function profile to keep besides, for post-hoc EMA: 0.05 0.1."""
    snapshot_every: int = 0
    """Steps between snapshots of those averages, all of which stay on the disk; 0: with every checkpoint."""
    init: str = ""
    """Weights to start from: a run folder or one of its checkpoints, or a .pt or .safetensors file in the published
    names. For other classes or another image size they get tables of their own."""

    on_divergence: Literal["stop", "rollback"] = "stop"
    """After a loss spike: stop, or go back to the last checkpoint and continue with other samples."""
    divergence_factor: float = 5.0
    """A mean loss so many times the median of the ten before is a loss spike; 0 does not compare."""
    loss_limit: float = 100.0
    """A mean loss above it is a loss spike, from the first report on; 0 is no limit."""

    report_every: int = 100
    """Steps between lines of stats.jsonl."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Number of checkpoints that stay on the disk."""
    sample_every: int = 0
    """Steps between grids of samples drawn with the averaged weights; 0 draws none."""
    sample_steps: int = 18
    """Noise levels of the sampler for those grids."""
    cfg_scale: float = 1.5
    """Guidance of those grids; 1 is none."""

    def recorded(self) -> dict[str, Any]:
        """Return the values by the names of their flags, as they may be printed and stored.

        The fields of process and network stand beside the others, ``process`` and ``network`` are their names; a URL of
        data has no passwords, tokens and query.
        """
        values = dataclasses.asdict(self)
        members = {**values.pop("process"), **values.pop("network")}
        names = {"process": self.process.name, "network": self.network.name}
        return {**values, **members, **names, "data": without_secrets(self.data)}

    @property
    def masked_steps(self) -> int:
        """Steps before the unmasked stage."""
        return self.max_steps - self.unmask_steps

    def ratio_at(self, step: int) -> float:
        """Return the mask ratio of a step, counted from 0."""
        if step >= self.masked_steps:
            return 0.0
        return mask_ratio_at(self.mask_schedule, step / self.masked_steps, self.mask_ratio, self.mask_ratio_end)

    def stages(self, length: int) -> tuple[Stage, ...]:
        """Return the stages of the run, each with its kept count of ``length`` positions; the last may be unmasked."""
        masked = ratio_stages(
            self.mask_schedule, self.masked_steps, self.mask_ratio, self.mask_ratio_end, length, self.mask_levels
        )
        is_over = bool(masked) and masked[-1].keep == length
        return masked if is_over or not self.unmask_steps else (*masked, Stage(self.masked_steps, length))

    def kept_at(self, step: int, length: int) -> int:
        """Return how many of ``length`` positions a step keeps, counted from 0; with a ratio per sample their mean."""
        return [stage.keep for stage in self.stages(length) if stage.first_step <= step][-1]

    @property
    def per_sample(self) -> RatioPerSample | None:
        """How each sample draws its own ratio in the masked steps; None where all samples have the same."""
        return parse_per_sample(self.mask_ratio_per_sample, self.mask_ratio)

    @property
    def micro_batch(self) -> int:
        """Images computed at a time."""
        return min(self.micro_batch_size or self.batch_size, self.batch_size)


def check_config(config: TrainConfig, input_size: int) -> None:
    """Raise a ValueError that names the first field that cannot be, and why.

    Args:
        config: the configuration.
        input_size: side of what the network sees, in pixels or latent pixels.
    """
    config.network.check(input_size)
    check_ranges(config)


def check_ranges(config: TrainConfig) -> None:
    """Raise a ValueError that names the first field that cannot be, whatever the data are."""
    check_ratio("mask_ratio", config.mask_ratio)
    check_ratio("mask_ratio_end", config.mask_ratio_end)
    if config.mask_schedule not in SCHEDULES:
        raise ValueError(_unknown("mask_schedule", config.mask_schedule, SCHEDULES))
    if not config.network.masked and (config.mask_ratio or config.mask_ratio_end):
        raise ValueError("a network without a decoder (decoder_depth 0) trains unmasked: set mask_ratio 0")
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
    """Return the freshly initialised network of a configuration, for images of (channels, size, size)."""
    return config.network.build(channels, size, config.num_classes)


def fit_stages(config: TrainConfig, preset: TrainConfig, given: Collection[str] = ()) -> TrainConfig:
    """Return a configuration whose warm-up and unmasked steps fit fewer steps than the preset has, in its proportions.

    Where they fit, are not the preset's, or are among the fields that were given, nothing changes.
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
    """Return the configuration of a preset; a ValueError names the near ones where there is none."""
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
