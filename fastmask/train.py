"""`python -m fastmask.train`: trains a masked diffusion transformer, and goes on where it stopped."""

import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from fastmask.checkpoint import checkpoints, load_checkpoint, load_initial, read_state, save_checkpoint, save_snapshots
from fastmask.cli import parse, pick_device, run_command
from fastmask.config import TrainConfig, build_model, check_config, check_resumable, preset_config
from fastmask.counts import trainable_parameters
from fastmask.data import DataSet, batches, open_data
from fastmask.diffusion import EDMLoss, EDMPrecond, TrainingObjective, draw_samples, training_draws
from fastmask.ema import EMA, PowerEMA
from fastmask.files import whole_file
from fastmask.masking import kept_count
from fastmask.optim import begin_step, clip_gradients, learning_rate, make_optimizer, resolve_optimizer
from fastmask.presets import PRESETS
from fastmask.report import Report, Tally, print_plan, say, versions

_NAME = "python -m fastmask.train"


@dataclasses.dataclass(frozen=True)
class _Command:
    config: TrainConfig
    dry_run: bool = False
    """Print the resolved configuration and the counts of the network, and stop."""


def main(argv: Sequence[str]) -> None:
    """Train as the arguments say."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("this version trains in one process: start it without torchrun")
    preset = preset_config(_preset_name(argv), PRESETS)
    command = parse(
        _Command,
        argv,
        prog=_NAME,
        description=f"Train a masked diffusion transformer. Presets: {', '.join(PRESETS)}.",
        default=_Command(preset),
    )
    config = resolve_machine(command.config)
    if command.dry_run:
        dry_run(config, preset)
        return
    config, dataset = resolve_data(config, preset)
    train(config, dataset)


def resolve_machine(config: TrainConfig) -> TrainConfig:
    """Return a configuration in which run folder, device, precision and optimizer are values, never "auto"."""
    device = pick_device(config.device)
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    optimizer = resolve_optimizer(config.optimizer, device)
    if config.optimizer == "auto":
        has = "a" if optimizer == "adamw_ema" else "no"
        say(f"optimizer {optimizer}, since adamw_ema has {has} kernel on {device.type}")
    run_dir = config.run_dir or f"runs/{config.preset}"
    return dataclasses.replace(config, device=str(device), precision=precision, optimizer=optimizer, run_dir=run_dir)


def resolve_data(config: TrainConfig, preset: TrainConfig) -> tuple[TrainConfig, DataSet]:
    """Open the data, and return the configuration with the number of classes that they have."""
    own = config.data != preset.data and config.data not in ("digits", "synthetic")
    from_data = own and config.num_classes == preset.num_classes
    dataset = open_data(
        config.data,
        image_size=config.image_size,
        num_classes=None if from_data else config.num_classes,
        mirror=config.mirror,
    )
    config = dataclasses.replace(config, num_classes=dataset.num_classes)
    check_config(config, dataset.shape[1])
    return config, dataset


def dry_run(config: TrainConfig, preset: TrainConfig) -> None:
    """Print what a run would be, without allocating its weights; data that are missing are assumed to be latents."""
    channels, size = 4, config.image_size // 8
    if config.data != preset.data or config.data == "digits" or Path(config.data).exists():
        config, dataset = resolve_data(config, preset)
        channels, size, _ = dataset.shape
    else:
        check_config(config, size)
    with torch.device("meta"):
        model = build_model(config, channels, size)
    print_plan(config, model)
    if config.data == preset.data and config.data != "digits" and not Path(config.data).exists():
        say(f"{config.data} does not exist yet; its shape was taken from the preset")


def train(config: TrainConfig, dataset: DataSet) -> None:
    """Train to the last step, from the newest checkpoint of the run folder if it has one.

    Args:
        config: the resolved configuration.
        dataset: what to train on.

    Raises:
        ValueError: the run folder holds another run, the machine is too small, or the loss stopped being finite.
        OSError: the run folder cannot be written.
        SystemExit: the process was told to stop; a checkpoint has been written.
    """
    run_dir, device = Path(config.run_dir), torch.device(config.device)
    earlier = checkpoints(run_dir)
    open_run(config, run_dir, earlier)
    set_numerics(config)

    torch.manual_seed(config.seed)
    channels, size, _ = dataset.shape
    check_memory(config, channels, size)
    net = EDMPrecond(build_model(config, channels, size), config.sigma_data).to(device)
    ema, profiles = EMA(net, config.ema_decay), [PowerEMA(net, width) for width in config.ema_widths]
    optimizer = make_optimizer(net, config, [ema, *profiles])
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    step = 0
    if earlier:
        state = load_checkpoint(earlier[-1], net, ema.weights, optimizer, profiles)
        step = int(state["step"])
        scaler.load_state_dict(state["scaler"])
        say(f"going on from {earlier[-1]}")
    elif config.init:
        load_initial(config.init, net, ema.weights)
    if step >= config.max_steps:
        say(f"{run_dir}: all {step} steps are done")
        return

    objective = TrainingObjective(net, EDMLoss(config.sigma_data, config.mae_coef))
    tally = Tally(device)
    data = batches(
        dataset,
        batch_size=config.micro_batch,
        seed=config.seed,
        start=step * config.batch_size,
        stop=config.max_steps * config.batch_size,
        num_workers=config.num_workers,
        device=device,
    )
    with Report(run_dir, step, config.max_steps) as report, stop_signals() as stopped:
        since, reported = time.perf_counter(), step
        while step < config.max_steps:
            lr, ratio = learning_rate(config, step), config.ratio_at(step)
            begin_step(optimizer, [ema, *profiles], lr, step)
            for offset in range(step * config.batch_size, (step + 1) * config.batch_size, config.micro_batch):
                loss = micro_step(objective, dataset, next(data), offset, ratio, config, tally)
                scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            if config.grad_clip:
                scaler.unscale_(optimizer)
                clip_gradients(optimizer, config.grad_clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            step += 1
            report.advance(step)

            stop_code = stopped()
            last = step == config.max_steps or stop_code > 0
            if last or step % config.report_every == 0:
                figures = {**tally.take(run_dir), "lr": lr, "mask_ratio": ratio}
                report.write(step, figures, images=(step - reported) * config.batch_size, since=since)
                since, reported = time.perf_counter(), step
            pause = time.perf_counter()
            if last or step % config.checkpoint_every == 0:
                tally.check_finite(run_dir)
                extra = {"config": dataclasses.asdict(config), "scaler": scaler.state_dict()}
                save_checkpoint(run_dir, step, net, ema.weights, optimizer, extra, config.keep_checkpoints, profiles)
            if last or step % (config.snapshot_every or config.checkpoint_every) == 0:
                save_snapshots(run_dir, step, net, profiles)
            if config.sample_every and (step % config.sample_every == 0 or step == config.max_steps):
                with ema.applied(net):
                    samples, columns = sample_grid(net, config)
                report.picture(step, run_dir / "samples" / f"step-{step:08d}.png", samples, columns)
            since += time.perf_counter() - pause
            if stop_code:
                say(f"stopped after step {step}: the same command goes on from there")
                raise SystemExit(stop_code)
    say(f"trained {config.max_steps} steps: {checkpoints(run_dir)[-1]}")


def micro_step(
    objective: TrainingObjective,
    dataset: DataSet,
    batch: tuple[Tensor, Tensor],
    offset: int,
    ratio: float,
    config: TrainConfig,
    tally: Tally,
) -> Tensor:
    """Return the loss of a part of a batch, scaled so that the parts' gradients add up to the batch's.

    Args:
        objective: the module to train.
        dataset: where the batch is from.
        batch: stored values and labels, as `fastmask.data.batches` yields them.
        offset: global index of the part's first sample in the run; chance is a function of it and the seed.
        ratio: mask ratio.
        config: the configuration.
        tally: collects the losses.
    """
    device = torch.device(config.device)
    stored, labels = (tensor.to(device, non_blocking=True) for tensor in batch)
    sample = torch.arange(offset, offset + len(labels), device=device)
    images = dataset.to_images(stored, config.seed, sample)
    length = objective.net.model.length
    draws = training_draws(
        images,
        labels,
        seed=config.seed,
        offset=offset,
        num_classes=config.num_classes,
        label_drop=config.label_drop,
        length=length,
        keep=kept_count(length, ratio),
        p_mean=config.p_mean,
        p_std=config.p_std,
    )
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        parts = objective(images, *draws)
    tally.add(offset // config.batch_size + 1, parts, draws.sigma)
    total: Tensor = parts.total.mean()
    return total * (len(labels) / config.batch_size)


def sample_grid(net: EDMPrecond, config: TrainConfig) -> tuple[Tensor, int]:
    """Return samples (N, C, H, W), from the same noise at every call, and how many to draw in a row.

    With at most 16 classes each column is a class; with more, the classes are spread evenly.
    """
    num_classes = net.model.num_classes
    columns = num_classes if 1 < num_classes <= 16 else 8
    index = torch.arange(8 * columns)
    labels = index % columns if columns == num_classes else index * num_classes // len(index)
    scale = config.cfg_scale if num_classes else None
    samples = draw_samples(net, labels, seed=config.seed, num_steps=config.sample_steps, cfg_scale=scale)
    return samples, columns


def open_run(config: TrainConfig, run_dir: Path, earlier: list[Path]) -> None:
    """Make the run folder and write what the run is to `run.json`; a run that is there must be the same one."""
    if earlier:
        stored = read_state(earlier[-1])["config"]
        check_resumable(stored, config, config.run_dir)
    with whole_file(run_dir / "run.json") as partial:
        said = {"config": dataclasses.asdict(config), "versions": versions(), "command": sys.argv}
        partial.write_text(json.dumps(said, indent=2) + "\n")


def set_numerics(config: TrainConfig) -> None:
    """Set the precision of fp32 matrix products, and make repeated runs give the same bits."""
    torch.set_float32_matmul_precision("high" if config.precision == "tf32" else "highest")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats its results with it alone
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a debugging aid that costs a pass over memory


def check_memory(config: TrainConfig, channels: int, size: int) -> None:
    """Raise a ValueError if not even weights, gradients, moments and EMA fit the device's memory."""
    with torch.device("meta"):
        needed = trainable_parameters(build_model(config, channels, size)) * 4 * 5
    if torch.device(config.device).type == "cuda":
        there = torch.cuda.mem_get_info(config.device)[1]
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ValueError(
            f"weights, gradients, AdamW's moments and EMA take {needed / 2**30:.1f} GiB, {config.device} has "
            f"{there / 2**30:.1f} GiB: choose a smaller network"
        )


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """Yield a function that tells the exit code to stop with once SIGINT or SIGTERM has arrived, and 0 before."""
    received = [0]

    def note(number: int, frame: FrameType | None) -> None:
        if received[0]:
            raise KeyboardInterrupt  # a second signal does not wait for the step
        received[0] = number

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: 128 + received[0] if received[0] else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _preset_name(argv: Sequence[str]) -> str:
    """Return the preset that the arguments name; the others are read with its values as defaults."""
    for i, argument in enumerate(argv):
        if argument.startswith("--preset="):
            return argument.removeprefix("--preset=")
        if argument == "--preset" and i + 1 < len(argv):
            return argv[i + 1]
    return TrainConfig().preset


if __name__ == "__main__":
    run_command("fastmask.train", main)
