"""Step times of the study's recipes, measured in turn on a machine with nothing else to do."""

import itertools
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from bench import rows
from bench.study.recipes import DATASETS, Job, config_of
from bench.study.runs import open_dataset, rows_file
from bench.train.steps import as_trained
from fastmask.console import say
from fastmask.data import Dataset
from fastmask.diffusion import Denoiser
from fastmask.ranks import Ranks
from fastmask.train import resolve_machine
from fastmask.training.config import TrainConfig, build_model, build_step
from fastmask.training.ema import EMA
from fastmask.training.optim import make_optimizer

ROUNDS = 15
_CPU = torch.device("cpu")


def measure(chosen: Iterable[Job], runs: Path, out: Path) -> None:
    """Time a step of every recipe among these runs, those of a dataset in turn, and store a row for each."""
    of: dict[str, dict[str, Job]] = {}
    for job in chosen:
        of.setdefault(job.dataset, {}).setdefault(job.recipe, job)
    run = uuid.uuid4().hex[:12]
    for dataset, recipes in of.items():
        calls = {recipe: _step(job, runs) for recipe, job in recipes.items()}
        for recipe, timing in rows.measure(calls, _CPU, rounds=ROUNDS).items():
            case = {"dataset": dataset, "batch": DATASETS[dataset].batch}
            row = {"bench": "study_step", "case": case, "variant": recipe, **timing._asdict(), "run": run}
            rows.append(row, _CPU, rows_file(dataset, out))
            say(f"{dataset} {recipe}: {timing.median_ms:.1f} ms")


def _step(job: Job, runs: Path) -> Callable[[], None]:
    """Return a call of one training step of a recipe, from the samples of its dataset to the updated EMA."""
    config = resolve_machine(config_of(job, runs))
    config, dataset = open_dataset(config)
    channels, side, _ = dataset.shape
    net = Denoiser(build_model(config, channels, side), config.process)
    return _step_of(config, net, dataset)


def _step_of(config: TrainConfig, net: Denoiser, dataset: Dataset) -> Callable[[], None]:
    ema = EMA(net, config.ema.ema_decay)
    optimizer = make_optimizer(net, config.optim, [ema])
    step = build_step(config, net, dataset, optimizer, [ema], Ranks())
    batches = itertools.repeat(dataset.read(np.arange(config.batch_size)))
    numbers = itertools.count()
    keep = config.masking.kept_at(0, net.model.length, config.max_steps)

    def call() -> None:
        number = next(numbers)
        step(batches, number * config.batch_size, keep, config.optim.lr, number)
        step.finish()

    return as_trained(config)(call)
