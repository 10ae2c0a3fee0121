"""What the study trains: recipes, datasets, processes and seeds, all with one network size and one learning rate.

Every recipe has the same blocks as the dense network, and besides them only what it adds (decoder, mixer). Its curve
is the EMA's quality at several numbers of images of one run at a constant learning rate, so no point depends on where
the run ends. Unmasked tuning branches from those checkpoints, as MaskDiT's second stage does.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fastmask.diffusion import EDM, RectifiedFlow, Sampling
from fastmask.models.deferred import DeferredConfig
from fastmask.models.maskdit import MaskDiTConfig
from fastmask.models.sprint import SprintConfig
from fastmask.models.tread import TreadConfig
from fastmask.training.config import TrainConfig

LR, TUNING_LR = 2e-3, 7e-4
TUNING_SEED = 1000  # added to the seed of a tuned run
SAMPLING = Sampling(solver="dpmpp-2m", sample_steps=20, cfg_scale=1.0)
SEEDS = (0, 1, 2)
PROCESSES = {"edm": EDM(), "flow": RectifiedFlow()}

_BLOCKS: dict[str, Any] = {"width": 64, "depth": 6, "num_heads": 2}
_DECODER: dict[str, Any] = {"decoder_width": 32, "decoder_depth": 2, "decoder_num_heads": 2}
_ROUTE: dict[str, Any] = {"route_start": 1, "route_end": 5}
_DENSE = MaskDiTConfig(**_BLOCKS, decoder_depth=0)
_MASKDIT = MaskDiTConfig(**_BLOCKS, **_DECODER)
_DEFERRED = DeferredConfig(**_BLOCKS, mixer_width=32, mixer_depth=2, mixer_num_heads=2)
_STRUCTURED: dict[str, Any] = {"mask_ratio": 0.75, "mask_pattern": "structured"}


class Recipe(NamedTuple):
    """A way to train.

    Attributes:
        what: description for the report.
        fields: fields of `TrainConfig` that differ from those of all recipes.
        evaluated_at: multiples of the dataset's N images at which the EMA is evaluated.
        parent: recipe whose checkpoints are trained on at a lower learning rate, without masking; none if empty.
        starts: multiples of N at which these checkpoints are.
    """

    what: str
    fields: dict[str, Any]
    evaluated_at: tuple[float, ...] = (0.5, 1.0, 1.5)
    parent: str = ""
    starts: tuple[float, ...] = (0.0,)


class Data(NamedTuple):
    """A dataset.

    Attributes:
        path: as `--data`.
        image_size: side in pixels.
        images: N, the number of images that the dense network is trained on.
        batch: images per step.
        samples: number of samples of an evaluation.
        what: description for the report.
    """

    path: str
    image_size: int
    images: int
    batch: int
    samples: int
    what: str


class Job(NamedTuple):
    """A training run and its evaluations.

    Attributes:
        dataset: a key of `DATASETS`.
        process: a key of `PROCESSES`.
        recipe: a key of `RECIPES`.
        seed: seed of the run.
        start: multiple of N at which a tuned recipe leaves its parent, 0 for the others.
    """

    dataset: str
    process: str
    recipe: str
    seed: int
    start: float = 0.0

    @property
    def name(self) -> str:
        """The name of its folder."""
        start = f"-{self.start:g}" if self.start else ""
        return f"{self.dataset}/{self.process}/{self.recipe}{start}/{self.seed}"

    @property
    def marks(self) -> dict[int, int]:
        """Its steps with an evaluation, and the number of images until then, the parent's included."""
        at, data = (TUNED_FOR,) if self.start else RECIPES[self.recipe].evaluated_at, DATASETS[self.dataset]
        return {round(share * data.images / data.batch): round((self.start + share) * data.images) for share in at}


def _tuned(parent: str, what: str, starts: tuple[float, ...]) -> Recipe:
    return Recipe(what, {"mask_ratio": 0.0, "lr": TUNING_LR, "warmup_steps": 0}, (), parent, starts)


TUNED_FOR = 0.25  # multiples of N
_CHEAP = (0.5, 1.0, 1.5, 2.0)  # recipes that see up to twice the images in the time of the dense network

RECIPES: dict[str, Recipe] = {
    "dense": Recipe("DiT, all patches", {"network": _DENSE, "mask_ratio": 0.0}, (0.25, 0.5, 0.75, 1.0)),
    "maskdit-0.5": Recipe("MaskDiT, half the patches dropped", {"network": _MASKDIT, "mask_ratio": 0.5}),
    "maskdit-0.75": Recipe("MaskDiT, three of four dropped", {"network": _MASKDIT, "mask_ratio": 0.75}, _CHEAP),
    "dense-tuned": _tuned("dense", "DiT, then a lower learning rate", (0.25, 0.5, 0.75)),
    "maskdit-0.5-tuned": _tuned("maskdit-0.5", "MaskDiT 0.5, then unmasked", (0.5, 1.0)),
    "maskdit-0.75-tuned": _tuned("maskdit-0.75", "MaskDiT 0.75, then unmasked", (0.5, 1.0, 1.5)),
    "maskdit-0.5-no-mae": Recipe(
        "MaskDiT 0.5 without reconstruction", {"network": _MASKDIT, "mask_ratio": 0.5, "mae_coef": 0.0}
    ),
    "maskdit-0.5-clean": Recipe(
        "MaskDiT 0.5, reconstruction of clean patches",
        {"network": _MASKDIT, "mask_ratio": 0.5, "mae_target": "clean"},
    ),
    "maskdit-noise": Recipe(
        "MaskDiT, 0.25 to 0.75 per sample, more at more noise",
        {"network": _MASKDIT, "mask_ratio": 0.5, "mask_ratio_per_sample": "noise(0.25,0.75)"},
    ),
    "sprint-0.75": Recipe(
        "SPRINT, middle on a quarter", {"network": SprintConfig(**_BLOCKS, **_ROUTE), **_STRUCTURED}, _CHEAP
    ),
    "sprint-0.75-tuned": _tuned("sprint-0.75", "SPRINT 0.75, then unmasked", (0.5, 1.0, 1.5)),
    "deferred-0.75": Recipe(
        "Deferred masking, three of four dropped", {"network": _DEFERRED, "mask_ratio": 0.75}, _CHEAP
    ),
    "deferred-0.75-tuned": _tuned("deferred-0.75", "Deferred masking 0.75, then unmasked", (0.5, 1.0, 1.5)),
    "tread-0.5": Recipe("TREAD, middle on half", {"network": TreadConfig(**_BLOCKS, **_ROUTE), "mask_ratio": 0.5}),
}

DATASETS = {
    "digits": Data("digits", 8, 98_304, 64, 2000, "handwritten digits, 1 x 8 x 8, patch 2, 16 positions"),
    "fashion": Data("fm-store", 28, 49_152, 16, 1000, "Fashion-MNIST, 1 x 28 x 28, patch 2, 196 positions"),
}


def jobs() -> Iterator[Job]:
    """Yield all runs, seed by seed, each after its parent."""
    for seed in SEEDS:
        for dataset in DATASETS:
            for process in PROCESSES:
                for name, recipe in RECIPES.items():
                    for start in recipe.starts:
                        yield Job(dataset, process, name, seed, start)


def config_of(job: Job, runs: Path) -> TrainConfig:
    """Return the configuration of a run below the folder ``runs``."""
    recipe, data, steps = RECIPES[job.recipe], DATASETS[job.dataset], max(job.marks)
    parent = RECIPES[recipe.parent] if recipe.parent else recipe
    config = TrainConfig.of(
        data=data.path,
        image_size=data.image_size,
        num_classes=10,
        process=PROCESSES[job.process],
        max_steps=steps,
        batch_size=data.batch,
        lr=LR,
        warmup_steps=100,
        betas=(0.9, 0.99),
        ema_decay=0.995,
        seed=job.seed,
        run_dir=str(runs / job.name),
        checkpoint_every=min(job.marks),
        keep_checkpoints=1000,  # all, also those of a run that was stopped in between
    ).replace(**parent.fields)
    if not recipe.parent:
        return config
    branch = round(job.start * data.images / data.batch)
    folder = runs / job._replace(recipe=recipe.parent, start=0.0).name / "checkpoints" / f"step-{branch:08d}"
    unmasked: dict[str, Any] = {"mask_pattern": "random", "mask_ratio_per_sample": "constant", "init": str(folder)}
    unmasked |= {"seed": TUNING_SEED + job.seed}  # other samples than the parent began with
    return config.replace(**unmasked).replace(**recipe.fields)
