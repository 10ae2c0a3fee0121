"""`python -m fastmask.evaluate SOURCE`: compares samples of a network, or a folder of images, with real images."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from fastmask.cli import check_out, fail, parse, pick_device, run_command
from fastmask.console import say
from fastmask.diffusion import Sampling
from fastmask.diffusion.foreign import split_kind
from fastmask.diffusion.weights import Kind
from fastmask.evaluation.compare import FEW, FEWEST
from fastmask.evaluation.evaluator import Draws, Evaluator, Outcome, check_shape, own_extractor
from fastmask.evaluation.features import Dinov2, Extractor, Inception
from fastmask.evaluation.images import ImageSet, Statistics, holds_statistics, is_there, open_images
from fastmask.files import atomic_write
from fastmask.generation.model import Model, load
from fastmask.ranks import Ranks, own_device, require_one_process
from fastmask.rundir import find_checkpoint, is_source, locate, read_state, step_of
from fastmask.training.report import read_stats, versions

try:
    from fastmask.evaluation.figures import draw_comparison, draw_loss
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    fail("fastmask.evaluate", f"{error.name} is not installed: pip install matplotlib scikit-learn")

_FID_SAMPLES = 50_000
_OWN_SAMPLES = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Arguments of the evaluation."""

    source: tyro.conf.Positional[str]
    """What to evaluate: a run folder, a checkpoint or weights, which are sampled; or a folder or .npz of images."""
    reference: str = ""
    """Real images: a dataset, as --data of training takes them, an .npz of ADM's evaluator, or statistics (`mu`,
    `sigma`). Default: the dataset of the run, with a part held out."""
    extractor: Literal["classifier", "inception", "dinov2"] = "classifier"
    """Features that are compared: of a classifier trained on the dataset itself, of Inception v3 (FID), or of
    DINOv2."""
    extractor_weights: str = ""
    """Weights of inception or dinov2. Default: their cache; nothing is downloaded."""
    num_samples: int = 0
    """Number of samples. 0: 50,000 for inception and dinov2; for classifier the number of held-out images."""
    weights: Kind = "ema"
    """Weights to sample with: the averaged weights (ema) or the trained ones (raw)."""
    sampling: Sampling = Sampling()  # noqa: RUF009  (immutable)
    """Solver and guidance."""
    seed: int = 0
    """Seed of the noise; sample i depends on the seed and i only."""
    batch_size: int = 256
    """Number of samples per batch."""
    vae: str = ""
    """Folder or name of a diffusers AutoencoderKL that decodes latents, for inception and dinov2. Default: the VAE that
    the run recorded."""
    extrapolate: bool = False
    """Add the Frechet distance extrapolated to infinitely many samples."""
    image_size: int = 0
    """Side to which images of a folder are resized and cropped. 0: their own, or the network's."""
    out: str = ""
    """File of the results. Default: evaluation.json in the run folder, or here."""
    device: str = "auto"
    """Device: cuda or cpu. auto: the GPU if there is one."""


@dataclasses.dataclass(frozen=True)
class _Subject:
    """The network under evaluation, and the run that it is from, if there is one."""

    model: Model
    decoded: bool
    checkpoint: Path | None = None
    run_dir: Path | None = None
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    trained_on: str | None = None  # fingerprint of the run's dataset; absent in earlier versions

    def batches(self, draws: Draws) -> Iterator[Tensor]:
        """Yield samples, as the extractor takes them."""
        model = self.model
        ids = list(range(max(model.num_classes, 1)))
        sampling = draws.sampling if model.num_classes else draws.sampling.unguided()

        def draw(first: int, count: int) -> Tensor:
            samples = model.draw(ids, first, count, sampling, seed=draws.seed)
            return model.decoder(samples) if self.decoded else samples

        return draws.batches(draw)


def main(argv: Sequence[str]) -> None:
    """Evaluate, print the metrics, and write them with their protocol, and pictures, to files."""
    description = "Compare samples of a network, or a folder of images, with real images."
    config = parse(EvaluateConfig, argv, prog="python -m fastmask.evaluate", description=description)
    require_one_process("fastmask.evaluate")
    check(config)
    device = own_device(pick_device(config.device), Ranks())
    if is_source(config.source):
        subject = _subject(config, device)
        evaluator = _evaluator_of_network(config, subject, device)
        draws = Draws(config.sampling, _count(config, evaluator), config.seed, config.batch_size)
        batches, labels = subject.batches(draws), draws.labels(subject.model.num_classes)
    else:
        subject, images = None, open_images(config.source, config.image_size)
        reference = _reference(config, images.shape[1])
        if isinstance(reference, ImageSet):
            images = images.like(reference.shape[0], reference.name)
            reference = reference.like(images.shape[0], images.name)
            check_shape(images.shape, reference)
        labels = _known_labels(config, images.labels(), reference)
        learned = reference.split()[0] if isinstance(reference, ImageSet) else None
        _require_enough(images, reference)
        evaluator = Evaluator(_extractor(config, learned, device), _compared(config, reference))
        batches = (part for part, _ in images.batches(config.batch_size))
    outcome = evaluator.images(batches, labels, extrapolate=config.extrapolate)
    _write(config, subject, evaluator, outcome)


def check(config: EvaluateConfig) -> None:
    """Raise a ValueError for the first invalid argument, before anything is read."""
    config.sampling.check()
    for flag, value, lowest in (
        ("--num-samples", config.num_samples, 0),
        ("--batch-size", config.batch_size, 1),
        ("--image-size", config.image_size, 0),
        ("--seed", config.seed, 0),
    ):
        if value < lowest:
            raise ValueError(f"{flag} must be at least {lowest}, not {value}")
    if config.extractor_weights and config.extractor == "classifier":
        raise ValueError("--extractor-weights are those of inception or dinov2: give --extractor")
    if config.out:
        check_out("--out", Path(config.out))
    if 0 < config.num_samples < FEWEST:
        raise ValueError(f"--num-samples {config.num_samples}: a comparison needs at least {FEWEST} images")
    if is_source(config.source):
        return
    drawn = _drawing(config)
    foreign = sorted(name for name, value in _drawing(EvaluateConfig(source="")).items() if drawn[name] != value)
    if foreign:
        flag = "--" + foreign[0].replace("_", "-")
        raise ValueError(f"{flag} decides how samples are drawn, and {config.source} holds images: leave it out")
    if not config.reference:
        raise ValueError(f"{config.source} holds images, which are compared with real ones: name these by --reference")


def _drawing(config: EvaluateConfig) -> dict[str, Any]:
    """Return the arguments that only samples of a network depend on."""
    own = {name: getattr(config, name) for name in ("num_samples", "weights", "seed", "vae")}
    return {**own, **dataclasses.asdict(config.sampling)}


def _subject(config: EvaluateConfig, device: torch.device) -> _Subject:
    place = locate(split_kind(config.source)[1])
    checkpoint = None
    if not place.file and (place.run or place.checkpoint):
        name = f"{'ema' if config.weights == 'ema' else 'model'}.safetensors"
        checkpoint = find_checkpoint(place, (name, "state.json"), say)
    model = load(checkpoint or config.source, weights=config.weights, device=device, vae=config.vae, compile="auto")
    decoded = config.extractor != "classifier" and model.decoder.from_latents
    if decoded:
        model.decoder.load(device)  # what is missing is missed before the work
    if checkpoint is None:
        return _Subject(model, decoded)
    state = read_state(checkpoint)
    return _Subject(model, decoded, checkpoint, place.run, state.get("config", {}), state.get("fingerprint"))


def _evaluator_of_network(config: EvaluateConfig, subject: _Subject, device: torch.device) -> Evaluator:
    """Open the real images, and return the evaluator; a ValueError if something is missing or does not fit."""
    run, model = subject.config, subject.model.net.model
    encodes = run.get("data_source") == "images"  # the run's dataset are images, which a VAE encodes
    training = None
    if "data" in run and not is_there(run["data"]):
        lost = f"the dataset of {config.source}, {run['data']}, is not there any more"
        if not config.reference:
            raise ValueError(f"{lost}: name the real images by --reference")
        say(f"{lost}: its samples are compared with {config.reference} alone")
    elif "data" in run and (encodes or not subject.decoded):
        vae = run["vae"] if encodes and not subject.decoded else ""
        training = open_images(run["data"], run["image_size"], run["num_classes"] or None, vae, device)
        # The fingerprint is of the dataset as the run opened it: with its labels, and encoded if a VAE encodes it.
        same_form = run["num_classes"] and not (encodes and subject.decoded)
        if same_form and subject.trained_on not in (None, training.dataset.fingerprint()):
            say(f"{run['data']} has changed since {config.source} was trained on it: it is compared with other images")
    if config.reference:
        reference = _reference(config, config.image_size or run.get("image_size") or model.input_size)
        if not subject.decoded and isinstance(reference, ImageSet):
            reference = reference.like(model.in_channels, config.source)
        learned = training or (reference.split()[0] if isinstance(reference, ImageSet) else None)
    elif training is not None:
        training, reference = training.split()
        learned = training
    elif subject.decoded:
        raise ValueError(f"{config.source} was trained on latents: name the real images by --reference")
    else:
        raise ValueError(f"{config.source} names no dataset to compare its samples with: name one by --reference")
    if not subject.decoded and isinstance(reference, ImageSet):
        check_shape((model.in_channels, model.input_size, model.input_size), reference)
    _require_enough(reference)
    return Evaluator(_extractor(config, learned, device), _compared(config, reference), training)


def _reference(config: EvaluateConfig, side: int) -> ImageSet | Statistics:
    path = Path(config.reference)
    if holds_statistics(path) and config.extractor == "inception":
        return Statistics(path)
    return open_images(config.reference, side if path.is_dir() else 0)


def _compared(config: EvaluateConfig, reference: ImageSet | Statistics) -> ImageSet | Statistics:
    """Return the real images that are compared: by the classifier at most 10,000, whose distances take a minute."""
    if config.extractor == "classifier" and isinstance(reference, ImageSet):
        return reference.some(_OWN_SAMPLES)
    return reference


def _require_enough(*sets: ImageSet | Statistics) -> None:
    """Raise a ValueError for a set of too few images, before a classifier is trained."""
    for images in sets:
        if isinstance(images, ImageSet) and len(images) < FEWEST:
            held = "1 image" if len(images) == 1 else f"{len(images)} images"
            raise ValueError(f"{images.name} holds {held}, and a comparison needs at least {FEWEST}")


def _known_labels(config: EvaluateConfig, labels: Tensor | None, reference: ImageSet | Statistics) -> Tensor | None:
    """Return the classes of images as the classifier of the reference knows them.

    The number of classes stands for no label where the sampler drew without labels.

    Raises:
        ValueError: the classifier does not know a class.
    """
    if labels is None or config.extractor != "classifier" or isinstance(reference, Statistics):
        return labels
    classes, highest = reference.num_classes, int(labels.max())
    if (labels == classes).all():
        return None
    if classes and not 0 <= int(labels.min()) <= highest < classes:
        raise ValueError(
            f"{config.source} names class {highest}, and {reference.name} has the classes 0 .. {classes - 1}"
        )
    return labels


def _extractor(config: EvaluateConfig, training: ImageSet | None, device: torch.device) -> Extractor:
    if config.extractor == "inception":
        return Inception(config.extractor_weights, device)
    if config.extractor == "dinov2":
        return Dinov2(config.extractor_weights, device)
    if training is None:
        raise ValueError("--extractor classifier learns from images, not from statistics: name images by --reference")
    return own_extractor(training, device)


def _count(config: EvaluateConfig, evaluator: Evaluator) -> int:
    if config.num_samples:
        return config.num_samples
    if config.extractor != "classifier":
        return _FID_SAMPLES
    assert isinstance(evaluator.reference, ImageSet)
    return min(len(evaluator.reference), _OWN_SAMPLES)


def _write(config: EvaluateConfig, subject: _Subject | None, evaluator: Evaluator, outcome: Outcome) -> None:
    """Write the metrics with their protocol and the figures, and print what was found."""
    run_dir = subject.run_dir if subject else None
    out = Path(config.out) if config.out else (run_dir or Path()) / "evaluation.json"
    results: dict[str, Any] = {**outcome.metrics}
    figures = [out.with_name("comparison.png")]
    if subject and subject.checkpoint and run_dir:
        step = step_of(subject.checkpoint)
        results["step"] = step
        stats = read_stats(run_dir, step)
        if stats:
            results["images_per_s"] = round(float(np.median([line["images_per_s"] for line in stats])), 1)
            results["train_s"] = round(stats[-1]["train_s"], 1)
            figures.append(out.with_name("loss.png"))
            draw_loss(figures[-1], stats)
    results["protocol"] = _protocol(config, subject, evaluator, outcome.samples)
    with atomic_write(out) as partial:
        partial.write_text(json.dumps(results, indent=2) + "\n")
    if outcome.images.shape[1] in (1, 3) and isinstance(evaluator.reference, ImageSet):
        real, real_labels = next(evaluator.reference.batches(len(outcome.images)))
        known = real_labels if evaluator.reference.num_classes else None
        names = evaluator.reference.dataset.class_names
        draw_comparison(figures[0], outcome.images, outcome.labels, real, known, names)
    else:
        figures.pop(0)
    for line in lines_of(outcome.metrics, evaluator, outcome.samples):
        say(line)
    for path in (out, *figures):
        say(f"wrote {path}")


def lines_of(metrics: dict[str, float], evaluator: Evaluator, count: int) -> list[str]:
    """Return the metrics in sentences for the console."""
    names = evaluator.extractor.names
    frechet = names["frechet"]
    title = "Frechet distance" if frechet == "frechet" else frechet.upper().replace("_", " ")
    first = f"{title} {metrics[frechet]:.2f} of {count:,} images to {evaluator.reference.name}"
    if "frechet_held_out" in metrics:
        first += f" (of training images: {metrics['frechet_held_out']:.2f})"
    lines = [first]
    if count < FEW:
        bias = metrics[f"{frechet}_bias"]
        lines.append(
            f"with fewer than {FEW:,} images this distance is too large, here by about {bias:.2g}: compare it at equal "
            f"numbers only (--extrapolate estimates its limit)"
        )
    if f"{frechet}_infinity" in metrics:
        lines.append(f"extrapolated to infinitely many images: {metrics[f'{frechet}_infinity']:.2f}")
    if "agreement" in metrics:
        line = f"agreement {metrics['agreement']:.1%} of generated images with their class"
        if "classifier_accuracy" in metrics:  # which takes real images with labels
            line += f" (the classifier reads {metrics['classifier_accuracy']:.1%} of real ones)"
        lines.append(line)
    if "distance_ratio" in metrics:
        lines.append(
            f"distance ratio {metrics['distance_ratio']:.2f} (1: as far from the training images as held-out ones are; "
            f"near 0: copies)"
        )
    others = [
        name
        for name in ("sfid", "is", names["kernel"], "precision", "recall", "density", "coverage")
        if name in metrics
    ]
    if others:
        lines.append("  |  ".join(f"{name.replace('_', ' ')} {metrics[name]:.4g}" for name in others))
    return lines


def _protocol(config: EvaluateConfig, subject: _Subject | None, evaluator: Evaluator, count: int) -> dict[str, Any]:
    """Return everything that another evaluation must have in common for its numbers to be comparable."""
    reference = evaluator.reference
    protocol: dict[str, Any] = {
        "source": str(subject.checkpoint or config.source) if subject else config.source,
        "samples": count,
        "extractor": evaluator.extractor.name,
        "extractor_sha256": evaluator.extractor.sha256,
        "reference": reference.name,
        "reference_images": len(reference) if isinstance(reference, ImageSet) else None,
        "reference_fingerprint": reference.fingerprint(),
        "images": "8-bit, resized and centre-cropped as in ADM",
        "versions": versions(),
    }
    if subject:
        protocol |= {"weights": config.weights, "seed": config.seed, **dataclasses.asdict(config.sampling)}
        if subject.decoded:
            protocol["vae_sha256"] = subject.model.decoder.digest
    return protocol


if __name__ == "__main__":
    run_command("fastmask.evaluate", main, "--batch-size or --num-samples")
