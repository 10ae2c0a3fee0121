"""`python -m fastmask.train`: trains a masked diffusion transformer, or resumes from the last checkpoint."""

import contextlib
import dataclasses
import importlib.util
import os
import re
import shutil
import signal
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import FrameType

import torch

from fastmask.cli import parse, pick_device, run_command
from fastmask.console import say
from fastmask.cost.plan import print_plan
from fastmask.cost.work import RESERVE
from fastmask.cost.workload import workload_of
from fastmask.data import Dataset
from fastmask.evaluation.evaluator import Draws, Evaluator
from fastmask.evaluation.images import open_images
from fastmask.files import locked
from fastmask.help import show_help
from fastmask.models.counts import num_parameters
from fastmask.presets import PRESETS
from fastmask.ranks import Ranks, from_first, is_lost_rank, own_device, process_group, signal_if_torchrun_dies
from fastmask.training.align import Aligned, open_features
from fastmask.training.checkpoint import Checkpointer, checkpoints
from fastmask.training.config import (
    TrainConfig,
    build_model,
    fit_stages,
    preset_config,
    refuse_foreign_flags,
)
from fastmask.training.monitor import DivergedError
from fastmask.training.numerics import set_numerics
from fastmask.training.optim import resolve_optimizer
from fastmask.training.report import console
from fastmask.training.run import LOCK, Evaluate, Run, exit_code

_NAME = "python -m fastmask.train"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Action:
    """Actions that take the place of training."""

    dry_run: bool = False
    """Print the resolved configuration, the cost of a step and its memory, and exit."""
    profile: int = 0
    """Profile this many steps, print a breakdown and exit; only the trace is stored. 0: off."""


@dataclasses.dataclass(frozen=True)
class _Command:
    config: TrainConfig
    action: _Action = _Action()


def main(argv: Sequence[str]) -> None:
    """Parse the arguments, resolve the configuration and train."""
    ranks = Ranks.from_environment()
    console.quiet = ranks.rank > 0
    preset = preset_config(_preset_name(argv), PRESETS)
    refuse_foreign_flags(argv, preset)
    groups = {**preset.parts(), "action": _Action()}
    if show_help(argv, prog=_NAME, description=_help_of(preset), groups=groups):
        return
    command = parse(_Command, argv, prog=_NAME, description="", default=_Command(preset))
    action = command.action
    if action.profile < 0:
        raise ValueError(f"profile must be at least 0, not {action.profile}")
    # Fit the preset's stages to fewer steps, unless they were given.
    given = {word.split("=")[0].lstrip("-").replace("-", "_") for word in argv if word.startswith("--")}
    config = fit_stages(command.config, preset, given)
    if config != command.config:
        say(
            f"max_steps {config.max_steps} of the preset's {preset.max_steps}: unmask_steps "
            f"{config.masking.unmask_steps}, warmup_steps {config.optim.warmup_steps}"
        )
    config.check()
    config = resolve_machine(config, ranks)
    if action.dry_run:
        dry_run(config, preset, given)
        return
    # From here on a stop signal ends the run cleanly.
    with stop_signals() as signals:
        config, dataset = resolve_data(config, preset, given)
        with process_group(ranks, torch.device(config.machine.device)):
            train(config, dataset, ranks, profile=action.profile, signals=signals)


def _help_of(preset: TrainConfig) -> list[str]:
    """Return the first paragraphs of `--help`."""
    other = next(name for name in PRESETS if preset_config(name, PRESETS).process.name != preset.process.name)
    return [
        "Trains a masked diffusion transformer. The same command resumes the run from its last checkpoint.",
        f"--preset sets the defaults of all other flags: {', '.join(PRESETS)}.",
        f"--help GROUP explains the flags of a group below, with their defaults for the preset {preset.preset}, and "
        f"--help all explains every flag.",
        f"A preset also sets the diffusion process and the network, and each has its own flags. The preset "
        f"{preset.preset} trains the network {preset.network.name} with the process {preset.process.name}; the flags "
        f"of another process are shown with a preset of it, such as --preset {other} --help process.",
    ]


def resolve_machine(config: TrainConfig, ranks: Ranks = Ranks()) -> TrainConfig:  # noqa: B008  (immutable)
    """Return the configuration with "auto" and empty fields resolved: run folder, device, precision, micro-batch, .."""
    device = own_device(pick_device(config.machine.device), ranks)
    machine = config.machine.resolved(device, ranks, config.batch_size)
    optimizer = resolve_optimizer(config.optim.optimizer, device)
    if config.optim.optimizer == "auto":
        has = "a" if optimizer == "adamw_ema" else "no"
        say(f"optimizer {optimizer}, since adamw_ema has {has} kernel on {device.type}")
    run_dir = config.run_dir or f"runs/{_run_name(config)}"
    return dataclasses.replace(config, machine=machine).replace(run_dir=run_dir, optimizer=optimizer)


def _run_name(config: TrainConfig) -> str:
    """Return a name for the run folder: the preset, followed by the name of the data unless it is the preset's."""
    name = config.data.data
    if name == preset_config(config.preset, PRESETS).data.data:
        return config.preset
    path = re.split(r"[?#]", name)[0] if "://" in name else name  # no signature in a name
    data = re.sub(r"[^A-Za-z0-9._-]+", "-", path.rstrip("/").rpartition("/")[2]).strip("-.")
    return f"{config.preset}-{data}" if data else config.preset


def resolve_data(
    config: TrainConfig, preset: TrainConfig, given: Collection[str] = (), *, fetch: bool = True
) -> tuple[TrainConfig, Dataset]:
    """Open the dataset, and return the configuration with its number of classes.

    Args:
        config: the configuration.
        preset: the preset's configuration, see `DataConfig.open`.
        given: fields set on the command line, which the dataset does not override.
        fetch: whether to download a dataset at a URL, instead of reading its description only.
    """
    device = torch.device(config.machine.device)
    data, dataset = config.data.open(preset.data, given, seed=config.seed, device=device, fetch=fetch)
    config = dataclasses.replace(config, data=data)
    config.network.check(dataset.shape[1])
    return config, dataset


def dry_run(config: TrainConfig, preset: TrainConfig, given: Collection[str] = ()) -> None:
    """Print the plan of a run without allocating weights; a missing dataset is assumed to hold latents.

    Args:
        config: the resolved configuration.
        preset: as in `resolve_data`.
        given: as in `resolve_data`.
    """
    channels, size = 4, config.data.image_size // 8
    name = config.data.data
    is_missing = name == preset.data.data and name != "digits" and not Path(name).exists()
    if is_missing:
        config.network.check(size)
    else:
        config, dataset = resolve_data(config, preset, given, fetch=False)
        channels, size, _ = dataset.shape
    with torch.device("meta"):
        model = build_model(config, channels, size)
    aligned = None
    if not is_missing:
        features = open_features(
            config.align, config.data, config.network, dataset, torch.device(config.machine.device)
        )
        aligned = Aligned(config.align, features, model)
    print_plan(config, model, aligned)
    if is_missing:
        lacks = "; the projector of the alignment is not counted" if config.align.on else ""
        say(f"{name} does not exist yet; its shape was taken from the preset{lacks}")


def train(
    config: TrainConfig,
    dataset: Dataset,
    ranks: Ranks = Ranks(),  # noqa: B008  (immutable)
    *,
    profile: int = 0,
    signals: "StopSignals | None" = None,
) -> None:
    """Train to the last step, resuming from the newest checkpoint of the run folder if there is one.

    Args:
        config: the resolved configuration.
        dataset: the training data.
        ranks: rank and world size.
        profile: profile this many steps instead of training; 0 trains.
        signals: signal handlers that end the run after a step, with a checkpoint; None handles no signals.

    Raises:
        ValueError: the run folder holds another run or is in use, the memory is too small, or the loss diverged.
        OSError: the run folder cannot be written.
        SystemExit: a signal stopped the run; a checkpoint has been written.
    """
    set_numerics(config.machine.precision)
    torch.manual_seed(config.seed)
    channels, size, _ = dataset.shape
    check_memory(config, channels, size, ranks)
    check_tools(config)
    run_dir, signals = Path(config.run_dir), signals or StopSignals()
    if profile:
        Run(config, dataset, ranks, fresh=True).profile(profile)
        return
    # The lock is held until the last checkpoint is on disk.
    with contextlib.ExitStack() as held:
        from_first(ranks, lambda: held.enter_context(locked(run_dir / LOCK)))
        run = Run(config, dataset, ranks, evaluate=evaluation_of(config, ranks))
        if run.step >= config.max_steps:
            say(f"{run_dir}: all {run.step} steps are done")
            return
        introduce(run, dataset)
        signals.at_once = False
        checkpointer = held.enter_context(Checkpointer(run_dir, config.keep_checkpoints))
        # Each iteration but the last ends in a rollback after a loss spike.
        while run.step < config.max_steps:
            try:
                run.train(checkpointer, lambda: signals.received)
            except DivergedError as error:  # noqa: PERF203  (a step is what costs)
                checkpointer.wait()
                run.roll_back(error)
            except RuntimeError as error:
                if ranks.count == 1 or not is_lost_rank(error):
                    raise
                raise ValueError(
                    f"process {ranks.rank} of {ranks.count} lost another one: see what that one printed last; the same "
                    f"command resumes from the last checkpoint"
                ) from error
    if not ranks.rank:  # only rank 0 has waited for the last checkpoint to be written
        say(f"trained {config.max_steps} steps: {checkpoints(run_dir)[-1]}")


def evaluation_of(config: TrainConfig, ranks: Ranks) -> Evaluate | None:
    """Return the evaluation of a run, None without one. Rank 0 evaluates; sharded weights take all ranks to sample."""
    if not config.evaluate_every or (ranks.rank and config.machine.parallel == "ddp"):
        return None
    data, device = config.data, torch.device(config.machine.device)
    draws = Draws(config.sampling, config.evaluate_samples, config.seed)
    if ranks.rank:
        return lambda net: draws.discard(net)
    vae = data.vae if data.data_source == "images" else ""
    images = open_images(data.data, data.image_size, data.num_classes or None, vae, device)
    evaluator = Evaluator.of_dataset(images, device)
    return lambda net: evaluator.network(net, draws).metrics


def introduce(run: Run, dataset: Dataset) -> None:
    """Print the dataset, the network, the device and the TensorBoard command."""
    config = run.config
    shape = " x ".join(map(str, dataset.shape))
    data = config.data.data
    if data in ("digits", "synthetic"):
        names = list(map(str, dataset.class_names[:4]))
        shown = f" ({', '.join(names)}{', ...' if dataset.num_classes > len(names) else ''})" if names else ""
        classes = f"{dataset.num_classes} classes{shown}" if dataset.num_classes else "no classes"
        say(f"data {data}: {len(dataset):,} images of {shape}, {classes}")
    else:  # opening the dataset has printed its number of images and classes
        say(f"data {data}: trained on as {shape}")
    count = num_parameters(run.net.model)
    parameters = f"{count / 1e6:.1f}M" if count >= 1e6 else f"{count / 1e3:.0f}k"
    say(
        f"network of {parameters} parameters, precision {config.machine.precision}, on "
        f"{run.ranks.count} x {config.machine.device}: {config.run_dir}"
    )
    if importlib.util.find_spec("tensorboard"):
        say(f"figures: tensorboard --logdir {run.run_dir / 'tensorboard'}")


def check_tools(config: TrainConfig) -> None:
    """Raise a ValueError if Pillow (for sample grids) or a compiler is needed and missing."""
    if config.sample_every and not importlib.util.find_spec("PIL"):
        raise ValueError("drawing samples needs pillow: pip install pillow, or train with --sample-every 0")
    if config.machine.compile == "none":
        return
    on_gpu = config.machine.device.startswith("cuda")
    language, variable, names = ("C", "CC", ("cc", "gcc", "clang")) if on_gpu else ("C++", "CXX", ("g++", "clang++"))
    if not any(map(shutil.which, (os.environ.get(variable) or names[0], *names))):
        raise ValueError(
            f"--compile {config.machine.compile} needs a {language} compiler, and there is none of {', '.join(names)}: "
            f"install one, or give --compile none"
        )


def check_memory(config: TrainConfig, channels: int, size: int, ranks: Ranks) -> None:
    """Raise a ValueError that suggests a smaller micro-batch if a step needs more memory than the device has."""
    with torch.device("meta"):
        model = build_model(config, channels, size)
    memory = workload_of(config).memory(model, config.machine.precision)
    fixed = memory.fixed if config.machine.parallel == "ddp" else memory.fixed // ranks.count
    device = torch.device(config.machine.device)
    if device.type == "cuda":
        there = torch.cuda.mem_get_info(device)[1]
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    micro = min(config.micro_batch, config.batch_size // ranks.count)
    needed = fixed + micro * memory.per_image
    if needed <= there:
        return
    fits = int((there - fixed) * (1 - RESERVE) // memory.per_image)
    has = f"{config.machine.device} has {there / 2**30:.1f} GiB"
    if fits < 1:
        raise ValueError(
            f"weights, gradients, AdamW's moments and averages take {fixed / 2**30:.1f} GiB, {has}: choose a smaller "
            f"network, or --parallel fsdp2 on more devices"
        )
    micro = max(part for part in range(1, fits + 1) if (config.batch_size // ranks.count) % part == 0)
    raise ValueError(
        f"a step takes {needed / 2**30:.1f} GiB with {config.micro_batch} images at a time, {has}: give "
        f"--micro-batch-size {micro}, which trains the same"
    )


class StopSignals:
    """Records a stop signal: SIGINT, SIGTERM, SIGHUP (closed terminal), SIGUSR1 (Slurm) or SIGUSR2 (torchrun died).

    SIGUSR2 ends the workers when torchrun dies; otherwise they would keep running.

    Attributes:
        received: number of the signal received, 0 if none.
        at_once: whether a signal exits immediately (before the first step) or after the current step.
    """

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self) -> None:
        self.received, self.at_once = 0, True

    def note(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if self.received and number == signal.SIGUSR2:
            return  # Linux sends it once per exiting thread of torchrun, maybe after a forwarded signal
        if self.received:
            raise KeyboardInterrupt  # a second signal does not wait for the step
        self.received = number
        name = "torchrun is gone" if number == signal.SIGUSR2 else signal.Signals(number).name
        if self.at_once:
            say(f"{name}: stopped before the first step; the same command starts again")
            raise SystemExit(exit_code(number))
        say(f"{name}: stopping after this step, with a checkpoint; a second signal does not wait")


@contextlib.contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Install the handlers of stop signals inside the block, and restore the previous ones after it."""
    signals = StopSignals()
    before = {number: signal.signal(number, signals.note) for number in signals.NUMBERS}
    try:
        signal_if_torchrun_dies(signal.SIGUSR2)
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _preset_name(argv: Sequence[str]) -> str:
    """Return the value of --preset, whose row supplies the defaults of all other flags."""
    for i, argument in enumerate(argv):
        if argument.startswith("--preset="):
            return argument.removeprefix("--preset=")
        if argument == "--preset" and i + 1 < len(argv):
            return argv[i + 1]
    return TrainConfig().preset


if __name__ == "__main__":
    run_command("fastmask.train", main)
