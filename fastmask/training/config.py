"""Configuration of a training run: the run's own fields, and one member per part of the program that uses it.

Each member is declared and checked in its part's file. On the command line the fields of all members are flat, so every
name is that of one field; `TrainConfig.of` and `TrainConfig.replace` take these flat names too.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from fastmask.console import without_secrets
from fastmask.data import Dataset
from fastmask.data.config import DataConfig
from fastmask.diffusion import EDM, Denoiser, Masking, ObjectiveConfig, Sampling
from fastmask.diffusion.alignment import AlignConfig
from fastmask.diffusion.processes import PROCESSES, AnyProcess
from fastmask.fields import check_at_least, fixed, free, unknown
from fastmask.models.maskdit import MaskDiT, MaskDiTConfig
from fastmask.models.networks import NETWORKS, AnyNetwork
from fastmask.ranks import Ranks
from fastmask.training.align import Aligned
from fastmask.training.ema import EMA, EMAConfig
from fastmask.training.machine import MachineConfig
from fastmask.training.monitor import DivergenceConfig
from fastmask.training.optim import OptimConfig
from fastmask.training.step import TrainingStep

_KINDS: dict[str, Mapping[str, Any]] = {"process": PROCESSES, "network": NETWORKS}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Preset, folder, length, reports and checkpoints of the run."""

    preset: str = "digits"
    """Preset that supplies the defaults of all other flags."""
    run_dir: str = free("")
    """Run folder; the same command resumes from its last checkpoint. Empty: runs/PRESET, or runs/PRESET-DATA for
    other --data than the preset's."""
    seed: int = fixed(0, "it decides which samples come next")
    """Seed of the weights, data order, noise, masks and label dropout."""
    init: str = fixed("", "the weights come from the checkpoint")
    """Initial weights: a run folder, one of its checkpoints, or a .pt or .safetensors file with the published parameter
    names; of a DiT or a SiT as dit:FILE or sit:FILE; or a folder in diffusers' format. The label or position table is
    reinitialised for another number of classes or image size."""
    max_steps: int = 1000
    """Total number of optimizer steps."""
    batch_size: int = 128
    """Global batch size: images per step over all processes."""
    report_every: int = free(100)
    """Steps between reports (lines of stats.jsonl)."""
    checkpoint_every: int = free(1000)
    """Steps between checkpoints."""
    keep_checkpoints: int = free(2)
    """Number of checkpoints kept on disk."""
    sample_every: int = free(0)
    """Steps between sample grids drawn with the EMA weights; 0 disables them."""
    evaluate_every: int = free(0)
    """Steps between evaluations of the EMA weights, by the features of a classifier of the dataset; 0 disables them."""
    evaluate_samples: int = free(1000)
    """Number of samples of an evaluation."""
    keep_best: bool = free(False)
    """Write the EMA weights of the evaluation with the smallest Frechet distance to best.safetensors."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(RunConfig):
    """Configuration of a training run: the fields of `RunConfig`, and its members."""

    machine: MachineConfig = MachineConfig()  # noqa: RUF009  (immutable, as are the others)
    data: DataConfig = DataConfig()  # noqa: RUF009
    network: AnyNetwork = fixed(MaskDiTConfig(), "the checkpoint's weights are of that network")
    process: AnyProcess = fixed(EDM(), "the checkpoint's weights were trained with it")
    masking: Masking = Masking()  # noqa: RUF009
    objective: ObjectiveConfig = ObjectiveConfig()  # noqa: RUF009
    align: AlignConfig = AlignConfig()  # noqa: RUF009
    optim: OptimConfig = OptimConfig()  # noqa: RUF009
    ema: EMAConfig = EMAConfig()  # noqa: RUF009
    divergence: DivergenceConfig = DivergenceConfig()  # noqa: RUF009
    sampling: Sampling = free(Sampling())

    @classmethod
    def of(cls, **flat: Any) -> "TrainConfig":
        """Return the defaults with other values, given as to `replace`."""
        return cls().replace(**flat)

    def replace(self, **flat: Any) -> "TrainConfig":
        """Return a copy with other values.

        Args:
            flat: values by flag name, which each go to the member that has this field; ``process`` and ``network`` are
                replaced as a whole.

        Raises:
            ValueError: a name that no member has; suggests similar ones.
        """
        kinds = {name: flat.pop(name) for name in _KINDS if name in flat}
        config = dataclasses.replace(self, **kinds)
        changed: dict[str, Any] = {}
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if dataclasses.is_dataclass(value) and not isinstance(value, type):
                own = {each.name: flat.pop(each.name) for each in dataclasses.fields(value) if each.name in flat}
                changed[field.name] = dataclasses.replace(value, **own)
            elif field.name in flat:
                changed[field.name] = flat.pop(field.name)
        if flat:
            raise ValueError(unknown("field", next(iter(flat)), config.recorded()))
        return dataclasses.replace(config, **changed)

    def parts(self) -> dict[str, Any]:
        """Return the run's own fields as "run", and the members, by name."""
        own = RunConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(RunConfig)})
        members = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"run": own, **{name: value for name, value in members.items() if dataclasses.is_dataclass(value)}}

    def recorded(self) -> dict[str, Any]:
        """Return the values by flag name, safe to print and store.

        ``process`` and ``network`` hold their names. Passwords, tokens and the query are removed from a URL in
        ``data``.
        """
        values = {name: value for part in self.parts().values() for name, value in dataclasses.asdict(part).items()}
        return {**values, **self.kinds(), "data": without_secrets(self.data.data)}

    def kinds(self) -> dict[str, str]:
        """Return the names of the process and the network."""
        return {name: getattr(self, name).name for name in _KINDS}

    def on_resume(self) -> dict[str, Mapping[str, Any]]:
        """Return what a resumed run may change, by flag name: the metadata of `fastmask.fields`."""
        rules: dict[str, Mapping[str, Any]] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            rules[field.name] = field.metadata
            if dataclasses.is_dataclass(value):
                rules |= {own.name: own.metadata or field.metadata for own in dataclasses.fields(value)}
        return rules

    @property
    def micro_batch(self) -> int:
        """Images per forward pass."""
        return self.machine.micro_batch(self.batch_size)

    def check(self) -> None:
        """Raise a ValueError for the first invalid field, apart from what depends on the dataset."""
        check_at_least(self, max_steps=1, batch_size=1, report_every=1, checkpoint_every=1, keep_checkpoints=1)
        check_at_least(self, sample_every=0, evaluate_every=0, evaluate_samples=20, seed=0)
        if self.keep_best and not self.evaluate_every:
            raise ValueError("--keep-best keeps the best of the evaluations: give --evaluate-every")
        self.machine.check(self.batch_size)
        self.masking.check(max_steps=self.max_steps, micro_batch=self.micro_batch, can_mask=self.network.masked)
        self.align.check(self.network)
        for part in (self.data, self.objective, self.optim, self.ema, self.divergence, self.sampling):
            part.check()


def build_model(config: TrainConfig, channels: int, size: int) -> MaskDiT:
    """Return a freshly initialised network for inputs of shape (channels, size, size)."""
    return config.network.build(channels, size, config.data.num_classes)


def build_step(
    config: TrainConfig,
    net: Denoiser,
    dataset: Dataset,
    optimizer: torch.optim.Optimizer,
    emas: Sequence[EMA],
    ranks: Ranks,
    aligned: Aligned | None = None,
) -> TrainingStep:
    """Return the training step; the other arguments are those of `TrainingStep`."""
    return TrainingStep(
        net,
        dataset,
        optimizer,
        emas,
        ranks,
        machine=config.machine,
        objective=config.objective,
        per_sample=config.masking.per_sample,
        structured=config.masking.structured,
        batch_size=config.batch_size,
        grad_clip=config.optim.grad_clip,
        seed=config.seed,
        alignment=aligned.term if aligned else None,
        features=aligned.features if aligned else None,
        align_until=config.align.align_until,
    )


def fit_stages(config: TrainConfig, preset: TrainConfig, given: Collection[str] = ()) -> TrainConfig:
    """Scale the preset's warm-up and unmasked steps down in proportion to a ``max_steps`` below the preset's.

    Nothing changes if they differ from the preset, or were set on the command line.
    """
    steps, usual = ((each.masking.unmask_steps, each.optim.warmup_steps) for each in (config, preset))
    chosen = steps != usual or "unmask_steps" in given or "warmup_steps" in given
    if not 1 <= config.max_steps < preset.max_steps or chosen:
        return config
    share = config.max_steps / preset.max_steps
    return config.replace(unmask_steps=int(usual[0] * share), warmup_steps=int(usual[1] * share))


def preset_config(name: str, presets: dict[str, dict[str, Any]]) -> TrainConfig:
    """Return the configuration of a preset; a ValueError suggests similar names for an unknown one."""
    if name not in presets:
        raise ValueError(unknown("preset", name, presets))
    return TrainConfig.of(preset=name, **presets[name])


def refuse_foreign_flags(arguments: Sequence[str], config: TrainConfig) -> None:
    """Raise a ValueError for a flag of another process or network than the preset's; it names both."""
    own = config.recorded()
    for what, kinds in _KINDS.items():
        owners: dict[str, list[str]] = {}
        for kind, each in kinds.items():
            for field in dataclasses.fields(each):
                owners.setdefault(field.name, []).append(kind)
        for argument in arguments:
            flag = argument.split("=")[0]
            name = flag.removeprefix("--").replace("-", "_")
            if flag.startswith("--") and name in owners and name not in own:
                raise ValueError(
                    f"{flag} is a flag of {what} {' or '.join(owners[name])}, and preset {config.preset} trains {what} "
                    f"{config.kinds()[what]}"
                )
    loss_on = config.network.loss_on
    if loss_on != "split":
        patches = {"all": "all patches", "kept": "the kept patches"}[loss_on]
        for flag in {argument.split("=")[0] for argument in arguments} & {"--mae-coef", "--mae-target"}:
            raise ValueError(
                f"{flag} is of the reconstruction of dropped patches, which network {config.network.name} of preset "
                f"{config.preset} does not have: its loss is denoising of {patches}"
            )
