"""Training loop: state, stages, checkpointing, logging."""

import contextlib
import math
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastmask.console import get_console, say
from fastmask.data import Dataset, batches
from fastmask.data.dataset import origin_of
from fastmask.data.images.replacing import BadImages
from fastmask.data.loader import Batch
from fastmask.data.store.verify import verifier_of
from fastmask.diffusion import Denoiser, Sampling, draw_samples
from fastmask.files import Presence, locked
from fastmask.generation.decoding import Pictures
from fastmask.gpus import Gpu, gpu_named
from fastmask.models.counts import forward_macs
from fastmask.ranks import Ranks, all_max, all_sum
from fastmask.training.align import Aligned, open_features
from fastmask.training.checkpoint import (
    Checkpointer,
    checkpoints,
    load_checkpoint,
    load_initial,
    newest_good,
    read_state,
    step_of,
)
from fastmask.training.config import TrainConfig, build_model, build_step
from fastmask.training.ema import EMA, PowerEMA
from fastmask.training.monitor import DivergedError, check_spike
from fastmask.training.optim import learning_rate, make_optimizer
from fastmask.training.parallel import shard
from fastmask.training.profiling import profile_steps
from fastmask.training.report import Report
from fastmask.training.resume import open_run
from fastmask.training.step import DTYPES, eager

_ROLLBACKS = 3  # per checkpoint; after that, other samples are unlikely to help
_RECENT = 10  # number of reports whose median loss defines a spike
Evaluate = Callable[[Denoiser], dict[str, float]]
LOCK = ".lock"  # in the run folder, held by rank 0
_PATIENCE = 2.0  # seconds until the lock of a killed process is released
_FIRST_LOSSES = (1, 10)  # steps after the start that print a loss before the first report


class Run:
    """State of a training run: network, EMAs, optimizer, position in the data, and the loop over the steps.

    Args:
        config: the resolved configuration.
        dataset: the training data.
        ranks: rank and world size.
        fresh: ignore checkpoints and write nothing (for profiling).
        evaluate: returns the metrics of the denoiser, one of which is the Frechet distance.

    Attributes:
        step: number of optimizer steps done.
        samples: global index of the next sample; it includes samples skipped after a loss spike.
        bad_images: number of substitutions of unreadable images on all ranks, as of the last `add_up_bad_images`.
        recent: mean losses of the last reports.
        changes: fields changed on resume, with their steps.
        fingerprint: hash of the dataset's content.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: Dataset,
        ranks: Ranks,
        fresh: bool = False,
        evaluate: Evaluate | None = None,
    ) -> None:
        self.config, self.dataset, self.ranks, self._evaluate_net = config, dataset, ranks, evaluate
        self.run_dir, device = Path(config.run_dir), torch.device(config.machine.device)
        newest = None if fresh else newest_good(self.run_dir, say)
        features = open_features(config.align, config.data, config.network, dataset, device)
        self.fingerprint = dataset.fingerprint()
        self.changes = [] if fresh else open_run(config, newest, ranks, self.fingerprint, origin_of(dataset))
        self._verifier = None if fresh else verifier_of(dataset, ranks)
        channels, size, _ = dataset.shape
        self.net = Denoiser(build_model(config, channels, size), config.process).to(device)
        self.net.origin = origin_of(dataset)
        self._pictures = Pictures(self.net, config.run_dir)
        self.aligned, precision = Aligned(config.align, features, self.net.model), config.machine.precision
        projector = self.aligned.projector
        shard(self.net.model, config.machine.parallel, DTYPES.get(precision), device, ranks, projector)
        self.ema = EMA(self.net, config.ema.ema_decay, warmup=not config.init)
        self.profiles = [PowerEMA(self.net, width) for width in config.ema.ema_widths]
        averages = [self.ema, *self.profiles]
        self.optimizer = make_optimizer(self.net, config.optim, averages, projector, precision=precision)
        self.training = build_step(config, self.net, dataset, self.optimizer, averages, ranks, self.aligned)
        self.stages = config.masking.stages(self.net.model.length, config.max_steps)
        self.step, self.samples = 0, 0
        self.recent: list[float] = []
        self.bad_images, self._bad = 0, BadImages()
        self._bad_seen = self._bad_added = 0  # on this rank: in completed steps, and already in the sum
        self._rollbacks, self._rolled_back_to = 0, -1
        self._stored = 0  # step of the last checkpoint
        self._lock = Presence(self.run_dir / LOCK)
        if newest:
            self._load(newest)
            self._bad.resume(self.samples // ranks.count, self.bad_images // ranks.count)
            say(f"resuming from {newest}")
        elif config.init:
            # Without warm-up the EMA forgets slowly, as trained weights need; a freshly drawn label table would stay in
            # it just as long. The other weights adapt to the new table, so the whole EMA warms up as in a new run.
            self.ema.warmup = not load_initial(config.init, self.net, self.ema.weights)

    def train(self, checkpointer: Checkpointer, stopped: Callable[[], int]) -> None:
        """Train to the last step or a stop signal; an error leaves a checkpoint of the last completed step."""
        config = self.config
        with (
            Report(self.run_dir, self.step, config.max_steps, self.ranks.rank == 0) as report,
            contextlib.closing(self._batches(config.max_steps)) as data,  # also ends the workers
        ):
            try:
                self._train(data, report, checkpointer, stopped)
            except DivergedError:
                raise
            except Exception as error:
                self._save_what_is_done(checkpointer)
                if not is_lost_worker(error):
                    raise
                raise ValueError(f"a process that reads the data is gone ({error}): is the memory enough?") from error

    def _train(
        self, data: Iterator[Batch], report: Report, checkpointer: Checkpointer, stopped: Callable[[], int]
    ) -> None:
        config, keep, watch, first = self.config, 0, Watch(self, report), self.step
        while self.step < config.max_steps:
            keep = self._enter_stage(keep)
            self._do_step(data, keep)
            report.advance(self.step)
            if not self.ranks.rank and self._lock.is_lost():
                raise ValueError(f"{self.run_dir} was removed, moved or replaced while a run trained in it")

            # All ranks agree on whether to stop, then report, checkpoint and sample at the same step.
            signaled = all_max(stopped(), self.ranks)
            last = self.step == config.max_steps or signaled > 0
            due = self._is_due(config.evaluate_every)
            with watch.paused():
                evaluation = self._evaluate(checkpointer) if due else {}
            if last or due or self.step % config.report_every == 0:
                watch.write(keep, evaluation)
            elif self.step - first in _FIRST_LOSSES:
                watch.show_loss()
            self.training.finish()
            with watch.paused():
                self._store(checkpointer, last)
                self._draw_samples(report)
            if last and self.bad_images:
                say(f"--on-bad skip: {self.bad_images:,} times an image could not be read, and another took its place")
            if signaled:
                checkpointer.wait()
                say(f"stopped after step {self.step}: the same command resumes from there")
                raise SystemExit(exit_code(signaled))

    def roll_back(self, error: DivergedError) -> None:
        """Reload the last checkpoint and skip the samples since then, or raise a ValueError, as configured."""
        newest = newest_good(self.run_dir, say)
        again = newest is not None and step_of(newest) <= self._rolled_back_to
        if (
            self.config.divergence.on_divergence == "stop"
            or newest is None
            or (again and self._rollbacks == _ROLLBACKS)
        ):
            raise ValueError(f"{error}; {self._advice(newest)}") from error
        bad_step, samples, bad_images = self.step, self.samples, self.bad_images
        if not again:
            self._rollbacks, self._rolled_back_to = 0, step_of(newest)
        self._rollbacks += 1
        self._load(newest)
        self.samples, self.bad_images = samples, bad_images
        say(f"{error}: going back from step {bad_step} to {newest}, and past the samples of these steps")

    def _advice(self, newest: Path | None) -> str:
        """Return the advice printed with a loss spike that ends the run."""
        ways = "a lower --lr, --grad-clip 1 or --precision fp32"
        if newest is None:
            return f"there is no checkpoint yet: start again with {ways}, or a shorter --checkpoint-every"
        rollback = "" if self.config.divergence.on_divergence == "rollback" else ", or --on-divergence rollback"
        return f"the same command with {ways}{rollback} resumes from {newest} and records the change"

    def profile(self, count: int) -> None:
        """Profile ``count`` steps and print a breakdown of their time."""
        config, keep = self.config, self._enter_stage(0)
        data = self._batches(steps=sys.maxsize // config.batch_size)  # not limited by max_steps
        gpu = gpu_of(config.machine.device)

        def run_step() -> None:
            self._do_step(data, keep)
            self.training.finish()

        profile_steps(
            run_step,
            count,
            self.run_dir,
            torch.device(config.machine.device),
            data_wait_s=lambda: self.training.data_wait_s,
            flops_per_step=6 * self.macs(keep) * config.batch_size / self.ranks.count,
            peak_flops=gpu.peak(config.machine.precision) if gpu else None,
            rank=self.ranks.rank,
        )

    def _do_step(self, data: Iterator[Batch], keep: int) -> None:
        self.training(data, self.samples, keep, self.learning_rate(self.step), self.step)
        self.step += 1
        self.samples += self.config.batch_size
        self._bad_seen = self._bad.count

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        config = self.config
        return learning_rate(config.optim, step, config.masking.masked_steps(config.max_steps))

    def macs(self, keep: int) -> int:
        """Return the MACs of a forward pass in training of one image, of which ``keep`` patches are kept."""
        return forward_macs(self.net.model, keep) + self.aligned.macs(keep, max(0, self.step - 1))

    def add_up_bad_images(self, ranks: Ranks) -> None:
        """Update `bad_images` by an all-reduce; every rank must call it."""
        if self.config.data.on_bad == "skip":
            self.bad_images += int(all_sum(torch.tensor(self._bad_seen - self._bad_added), ranks))
            self._bad_added = self._bad_seen

    def _batches(self, steps: int) -> Generator[Batch, None, None]:
        config = self.config
        data = batches(
            self.dataset,
            batch_size=config.micro_batch,
            seed=config.seed,
            start=self.samples,
            stop=self.samples + (steps - self.step) * config.batch_size,
            num_workers=config.data.num_workers,
            device=torch.device(config.machine.device),
            step_size=config.batch_size,
            rank=self.ranks.rank,
            ranks=self.ranks.count,
            verifier=self._verifier,
            bad_images=self._bad,
            features=self.aligned.reader,
            features_stop=self.samples + self.aligned.steps_left(self.step) * config.batch_size,
        )
        return unsignaled(data)

    def _enter_stage(self, before: int) -> int:
        """Return the number of kept patches of the next step, and print it when it changes."""
        keep = next(stage.keep for stage in reversed(self.stages) if stage.first_step <= self.step)
        if keep != before and len(self.stages) > 1:
            say(f"from step {self.step + 1} on {keep} of {self.net.model.length} patches are kept")
        return keep

    def _store(self, checkpointer: Checkpointer, last: bool) -> None:
        config, step = self.config, self.step
        snapshot = bool(self.profiles) and (last or step % (config.ema.snapshot_every or config.checkpoint_every) == 0)
        if last or step % config.checkpoint_every == 0:
            self.training.tally.check_finite(self.ranks)
            self.add_up_bad_images(self.ranks)
            self._save(checkpointer, snapshot)
        elif snapshot:
            checkpointer.save_snapshots(step, self.net, self.profiles)

    def _save(self, checkpointer: Checkpointer, snapshot: bool = False) -> None:
        state = {
            "config": self.config.recorded(),
            "scaler": self.training.scaler.state_dict(),
            "samples": self.samples,
            "bad_images": self.bad_images,
            "recent": self.recent,
            "changes": self.changes,
            "fingerprint": self.fingerprint,
            "features": self.aligned.identity,
            "ema_warms_up": self.ema.warmup,
            "ema_warmup": True,  # absent in checkpoints of earlier versions, whose EMA had no warm-up
        }
        weights = self.ema.weights
        values = self.net, weights, self.optimizer, state, self.profiles
        checkpointer.save(self.step, *values, snapshot=snapshot, projector=self.aligned.projector)
        self._stored = self.step

    def _save_what_is_done(self, checkpointer: Checkpointer) -> None:
        """Write a checkpoint after an error, if this process holds the full weights of a completed step."""
        sharded = self.ranks.count > 1 and self.config.machine.parallel != "ddp"
        if self.step == self._stored or self.training.updating or sharded:
            return
        try:
            with self._writing_alone(checkpointer) as writes:
                if not writes:
                    return
                if self._lock.is_another():
                    raise ValueError(f"{self.run_dir} is another run's by now")
                self.training.tally.check_finite(Ranks())  # this rank alone: the others may be gone
                self.add_up_bad_images(Ranks())
                self._save(checkpointer)
                checkpointer.wait()
        except (ValueError, OSError, RuntimeError) as error:
            say(f"no checkpoint of step {self.step} could be written: {error}")
        else:
            say(
                f"after an error a checkpoint of step {self.step} was written to {self.run_dir}: the same command "
                f"resumes from there"
            )

    @contextlib.contextmanager
    def _writing_alone(self, checkpointer: Checkpointer) -> Iterator[bool]:
        """Yield whether this process should write the checkpoint.

        Rank 0 writes. If it is gone, the other ranks take its lock of the run folder in turn, until one has stored the
        step.
        """
        if not self.ranks.rank:
            yield True
            return
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(locked(self.run_dir / LOCK, patience=_PATIENCE))
            except (ValueError, OSError):
                yield False  # rank 0 is alive, or the run has been restarted
                return
            stored = checkpoints(self.run_dir)
            if stored and step_of(stored[-1]) >= self.step:
                yield False
                return
            get_console().quiet, checkpointer.writes = False, True
            yield True

    def _load(self, folder: Path) -> None:
        self.aligned.check_same(read_state(folder), folder)
        values = self.net, self.ema.weights, self.optimizer, self.profiles
        state = load_checkpoint(folder, *values, self.aligned.projector)
        self.step = self._stored = int(state["step"])
        # Checkpoints of earlier versions count skipped samples only, and have no recent losses.
        seen = self.step * int(state["config"]["batch_size"]) + int(state.get("skipped", 0))
        self.samples = int(state.get("samples", seen))
        self.bad_images = int(state.get("bad_images", 0))
        self.recent = list(state.get("recent", []))
        self.ema.warmup = bool(state.get("ema_warms_up", not self.config.init))
        if state["scaler"]:  # empty unless the precision was fp16
            self.training.scaler.load_state_dict(state["scaler"])
        self.training.reset()

    def _is_due(self, every: int) -> bool:
        """Return whether something is due at this step: every so many steps, if any, and at the last."""
        return every > 0 and (self.step % every == 0 or self.step == self.config.max_steps)

    def _evaluate(self, checkpointer: Checkpointer) -> dict[str, float]:
        """Return the metrics of the EMA weights, and store them as the best if they are."""
        metrics: dict[str, float] = {}
        try:
            if self._evaluate_net:
                with self.ema.applied(self.net), eager():
                    metrics = self._evaluate_net(self.net)
        except (ValueError, OSError, RuntimeError) as error:  # a failed evaluation must not end the run
            say(f"step {self.step} was not evaluated: {error}")
        if self.config.keep_best:
            distance = metrics.get("frechet", math.inf)
            if all_max(int(distance < checkpointer.best()), self.ranks):  # known to rank 0
                checkpointer.save_best(self.step, self.net, self.ema.weights, distance)
        return {f"eval/{name}": value for name, value in metrics.items()}

    def _draw_samples(self, report: Report) -> None:
        config = self.config
        if not self._is_due(config.sample_every):
            return
        if self.ranks.rank and config.machine.parallel == "ddp":
            return  # DDP samples on rank 0 only; FSDP needs every rank for its shard
        try:
            with self.ema.applied(self.net), eager():
                samples, columns = sample_grid(self.net, config.sampling, config.seed)
            if not self.ranks.rank:
                images, kind = self._pictures(samples, torch.device(config.machine.device))
                name = f"step-{self.step:08d}{kind}.png"
                report.picture(self.step, self.run_dir / "samples" / name, images, columns)
        except (ValueError, OSError, RuntimeError) as error:  # a failed grid must not end the run
            say(f"no samples of step {self.step} were drawn: {error}")


class Watch:
    """Collects the figures of a report, and its time, which excludes checkpoints and sampling."""

    def __init__(self, run: Run, report: Report) -> None:
        self._run, self._report = run, report
        self._since, self._step, self._waited = time.perf_counter(), run.step, run.training.data_wait_s

    def write(self, keep: int, evaluation: Mapping[str, float]) -> None:
        """Report the steps since the last call, and an evaluation; raises a `DivergedError` at a loss spike."""
        run, config = self._run, self._run.config
        figures = {
            **run.training.tally.take(run.ranks),
            **run.training.norms(),
            "lr": run.learning_rate(run.step - 1),
            "mask_ratio": 1 - keep / run.net.model.length,
            "memory_gb": memory_used(torch.device(config.machine.device)) / 1e9,
        }
        if config.data.on_bad == "skip":
            run.add_up_bad_images(run.ranks)
            figures["bad_images"] = run.bad_images
        loss = run.training.tally.own_loss(figures)
        check_spike(loss, run.recent, config.divergence.divergence_factor, config.divergence.loss_limit)
        run.recent = [*run.recent, loss][-_RECENT:]
        images, seconds = (run.step - self._step) * config.batch_size, time.perf_counter() - self._since
        figures["data_wait"] = (run.training.data_wait_s - self._waited) / seconds
        gpu = gpu_of(config.machine.device)
        if gpu:
            flops = 6 * run.macs(keep) * images / seconds
            figures["mfu"] = flops / (gpu.peak(config.machine.precision) * run.ranks.count)
        self._report.write(run.step, {**figures, **evaluation}, images=images, since=self._since)
        self._since, self._step, self._waited = time.perf_counter(), run.step, run.training.data_wait_s

    def show_loss(self) -> None:
        """Print the mean loss of the first steps; raises a `DivergedError` above ``loss_limit``."""
        loss = self._run.training.tally.mean_loss(self._run.ranks)
        check_spike(loss, [], 0.0, self._run.config.divergence.loss_limit)
        self._report.show(self._run.step, f"loss {loss:.4f}")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside the block from the throughput."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began


def is_lost_worker(error: Exception) -> bool:
    """Return whether an error means that a DataLoader worker died: torch's own error, or a broken pipe."""
    if isinstance(error, OSError):
        return isinstance(error, ConnectionError) or (isinstance(error, FileNotFoundError) and error.filename is None)
    return isinstance(error, EOFError) or "DataLoader worker" in str(error)


def unsignaled(data: Generator[Batch, None, None]) -> Generator[Batch, None, None]:
    """Yield batches, and raise the death of a worker only when the next batch is requested.

    torch's SIGCHLD handler would raise it anywhere in the main thread: during the weight update, or in the checkpoint
    that follows. Without the handler torch polls the workers every few seconds while it waits for a batch.
    """
    has_handlers = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD)
    try:
        with contextlib.closing(data):
            for batch in data:
                if has_handlers:
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                yield batch
    finally:
        if has_handlers:
            signal.signal(signal.SIGCHLD, before)


def exit_code(number: int) -> int:
    """Return the exit code after a stop signal: 128 + n for Ctrl-C and a dead torchrun, 0 for a requested stop."""
    return 128 + number if number in (signal.SIGINT, signal.SIGUSR2) else 0


def gpu_of(device: str) -> Gpu | None:
    """Return the peak rates of a GPU; None for an unknown GPU or a CPU."""
    return gpu_named(torch.cuda.get_device_name(device)) if device.startswith("cuda") else None


def memory_used(device: torch.device) -> int:
    """Return the peak memory in bytes: of allocated tensors on a GPU, else the resident set of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def sample_grid(net: Denoiser, sampling: Sampling, seed: int) -> tuple[Tensor, int]:
    """Return samples (N, C, H, W), from the same noise at every call, and the number of columns of the grid.

    With at most 16 classes each column is a class; with more, the classes are spread evenly. A network
    without classes draws without a condition.
    """
    num_classes = net.model.num_classes
    columns = num_classes if 1 < num_classes <= 16 else 8
    index = torch.arange(8 * columns)
    if not num_classes:
        return draw_samples(net, net.model.no_condition(len(index)), sampling.unguided(), seed=seed), columns
    labels = index % columns if columns == num_classes else index * num_classes // len(index)
    return draw_samples(net, labels, sampling, seed=seed), columns
