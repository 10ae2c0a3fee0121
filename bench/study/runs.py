"""Training and evaluation of the study's runs; what is there already is not done again."""

import contextlib
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

import fastmask
from bench import rows
from bench.study.recipes import DATASETS, SAMPLING, Job, config_of
from fastmask.data import Dataset
from fastmask.evaluation.evaluator import Draws, Evaluator
from fastmask.evaluation.images import open_images
from fastmask.train import resolve_data, resolve_machine, stop_signals, train
from fastmask.training.config import TrainConfig

_CPU = torch.device("cpu")
METRICS = ("frechet", "recall", "coverage", "precision", "agreement", "distance_ratio")


def rows_file(dataset: str, results: Path) -> Path:
    """Return the file with the rows of a dataset."""
    return results / f"study-{dataset}.jsonl"


def case_of(job: Job, images: int) -> dict[str, str | int | float]:
    """Return the case of the row of a run after a number of images."""
    return {"dataset": job.dataset, "process": job.process, "seed": job.seed, "start": job.start, "images": images}


def missing(jobs: Iterable[Job], results: Path) -> dict[Job, list[int]]:
    """Return the jobs that are not done, with the steps whose evaluation has no row."""
    found: dict[Job, list[int]] = {}
    measured = functools.cache(lambda dataset: list(_stored(rows_file(dataset, results))))
    for job in jobs:
        there = measured(job.dataset)
        steps = [step for step, images in job.marks.items() if (job.recipe, case_of(job, images)) not in there]
        if steps:
            found[job] = steps
    return found


def do(job: Job, steps: list[int], runs: Path, results: Path) -> None:
    """Train a run, or resume it, and store a row for each of these steps."""
    config = resolve_machine(config_of(job, runs))
    config, dataset = open_dataset(config)
    with stop_signals() as signals:
        train(config, dataset, signals=signals)
    data = DATASETS[job.dataset]
    evaluator = _evaluator(data.path, data.image_size)
    for step in steps:
        net = fastmask.load(runs / job.name / "checkpoints" / f"step-{step:08d}", device=_CPU).net
        found = evaluator.network(net, Draws(SAMPLING, data.samples)).metrics
        metrics = {name: round(found[name], 6) for name in METRICS}
        row = {"bench": "study", "case": case_of(job, job.marks[step]), "variant": job.recipe, "metrics": metrics}
        rows.append(
            {**row, "samples": data.samples, "steps": step, "batch": data.batch}, _CPU, rows_file(job.dataset, results)
        )


def open_dataset(config: TrainConfig) -> tuple[TrainConfig, Dataset]:
    """Return the configuration with its number of classes, and the dataset."""
    return resolve_data(config, config)


@functools.cache
def _evaluator(path: str, image_size: int) -> Evaluator:
    return Evaluator.of_dataset(open_images(path, image_size, 10, "", _CPU), _CPU)


def _stored(path: Path) -> Iterator[tuple[str, dict[str, str | int | float]]]:
    with contextlib.suppress(FileNotFoundError):
        for row in rows.read(path):
            if row["bench"] == "study":
                yield row["variant"], row["case"]
