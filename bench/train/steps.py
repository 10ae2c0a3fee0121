"""Whole training steps of ours and the plain baseline, with the same network, batch and precision.

The forms of other recipes (`RECIPES`) have other networks, which only our stacks have.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from bench.baselines.plain import PlainDiT, PlainLoss, PlainTrainer
from bench.report.derived import RECIPES, SIZES
from fastmask.diffusion import Denoiser
from fastmask.diffusion.masking import GROUP, kept_count
from fastmask.models.counts import forward_macs
from fastmask.models.maskdit import MaskDiT
from fastmask.presets import PRESETS
from fastmask.ranks import Ranks
from fastmask.training.config import TrainConfig, build_model, build_step, preset_config
from fastmask.training.ema import EMA
from fastmask.training.numerics import set_numerics
from fastmask.training.optim import make_optimizer

# By form: the prefix of its preset's name, and the mask ratio.
FORMS = {"dense": ("dit-", 0.0), "masked-0.5": ("", 0.5), "masked-0.75": ("", 0.75)}
FORMS |= {"tread-0.5": ("tread-", 0.5), "sprint-0.75": ("sprint-", 0.75), "deferred-0.75": ("deferred-", 0.75)}
_PRODUCTS = ("fastmask::silu_linear_fwd", "fastmask::silu_linear_bwd")
_PRODUCTS += ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "_scaled_dot_product")


STACKS = ("plain eager", "plain compiled", "ours", "ours compiled", "ours packed", "ours graphs")
PACKED = "uniform(0.25,0.75)"  # the mask ratio of each sample of "ours packed"


class Step(NamedTuple):
    """A training step in two parts; a call runs both.

    Attributes:
        gradients: samples noise, label dropout and masks, and runs the forward and backward pass.
        update: updates the weights and their EMA, and frees the gradients.
    """

    gradients: Callable[[], Any]
    update: Callable[[], None]

    def __call__(self) -> None:
        """Run the whole step."""
        self.gradients()
        self.update()


class Steps(NamedTuple):
    """A case, and its stacks, which are not built yet.

    Attributes:
        case: preset, image size, form, batch, precision.
        makers: by name, functions that build the call to time, which allocates memory, and compiles at its first call:
            a `Step` of each stack, and "products", the lower bound of ours.
        forward_gmac: GMAC of the forward pass of one image.
    """

    case: dict[str, Any]
    makers: dict[str, Callable[[], Callable[[], Any]]]
    forward_gmac: float


def config_of(size: str, image_size: int, form: str) -> TrainConfig:
    """Return the configuration of a size ("s2", "b2", "l2", "xl2", "h2") in a form; the dense form is a DiT.

    Raises:
        ValueError: an unknown size or form, or a form without a preset of this size.
    """
    if size not in SIZES or form not in FORMS:
        raise ValueError(f"no such step: size {size!r}, form {form!r}; sizes s2, b2, l2, xl2, forms {', '.join(FORMS)}")
    if not has_preset(size, form):
        raise ValueError(f"{form} has no preset {preset_of(size, form)}")
    name, ratio = preset_of(size, form), FORMS[form][1]
    row = {**PRESETS[name], "image_size": image_size, "mask_ratio": ratio}
    return preset_config(name, {name: row})


def preset_of(size: str, form: str) -> str:
    """Return the name of the preset of a size in a form."""
    return f"{FORMS[form][0]}{size}-in256"


def has_preset(size: str, form: str) -> bool:
    """Return whether there is a preset of a size in a form: not every recipe has every size."""
    return preset_of(size, form) in PRESETS


def steps(
    size: str,
    image_size: int,
    form: str,
    batch: int,
    device: torch.device,
    *,
    stacks: Sequence[str] = STACKS,
    bf16: bool = False,
) -> Steps:
    """Return functions that build the training steps of a case.

    Ours run under the trainer's numerics, the plain baseline under PyTorch's defaults; deterministic algorithms would
    slow it down, since its gathers would sort their indices.

    Ours and the plain baseline share weights, moments and EMA, so that both fit where one does; except graphs, which
    hold addresses of gradients that the others free. A recipe has no plain baseline. Each stack samples its own noise
    and masks.

    Args:
        size: "s2", "b2", "l2", "xl2".
        image_size: side in pixels; the latents have an eighth of it.
        form: a key of `FORMS`.
        batch: number of images.
        device: device of the steps.
        stacks: a subset of `STACKS`; "products" comes with "ours".
        bf16: autocast to bfloat16; fp32 otherwise.
    """
    config = config_of(size, image_size, form)
    precision: Literal["bf16", "fp32"] = "bf16" if bf16 else "fp32"
    config = config.replace(device=str(device), precision=precision, batch_size=batch, micro_batch_size=0)
    side = image_size // 8
    with torch.device("meta"):
        model = build_model(config, 4, side)
    length = model.length
    keep = kept_count(length, config.masking.mask_ratio)

    # Shared by the stacks, and built when the first of them is.
    @functools.cache
    def batch_of() -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        images = torch.randn(batch, 4, side, side, device=device) / 2
        return images, torch.randint(config.data.num_classes, (batch,), device=device)

    @functools.cache
    def shared() -> tuple[_Trained, PlainTrainer | None]:
        trained = _Trained(config, device)
        if form in RECIPES:
            return trained, None
        trainer = _plain_trainer(trained.net.model, config, bf16)
        _share_state(trained, trainer)
        return trained, trainer

    # One builder for each of our stacks, and one for the baseline's.
    def ours(trained: _Trained, **how: Any) -> Step:
        changed = config.replace(**{"compile": "none", "cuda_graphs": "off", **how})
        step = build_step(changed, trained.net, _Held(), trained.optimizer, [trained.ema], Ranks())
        data, offset = itertools.repeat(batch_of()), itertools.count(0, batch)

        def update() -> None:
            step.update(keep)
            step.finish()

        numerics = as_trained(config)
        return Step(numerics(lambda: step.gradients(data, next(offset), keep)), numerics(update))

    def plain(*, compiled: bool) -> Step:
        trainer, (images, labels) = shared()[1], batch_of()
        assert trainer is not None
        trainer = trainer.compiled() if compiled else trainer
        return Step(lambda: trainer.gradients(images, labels, keep if keep < length else None), trainer.update)

    found: dict[str, Callable[[], Callable[[], Any]]] = {
        "plain eager": lambda: plain(compiled=False),
        "plain compiled": lambda: plain(compiled=True),
        "ours": lambda: ours(shared()[0]),
        "ours compiled": lambda: ours(shared()[0], compile="whole"),
        "ours packed": lambda: ours(shared()[0], mask_ratio_per_sample=PACKED),
        "ours graphs": lambda: ours(_Trained(config, device), compile="block", cuda_graphs="on"),
    }
    found = {name: make for name, make in found.items() if name in stacks}
    if "ours" in stacks:
        found["products"] = lambda: as_trained(config)(products(ours(shared()[0]), device))
    case = {
        "preset": config.preset,
        "image_size": image_size,
        "form": form,
        "batch": batch,
        "precision": precision,
    }
    return Steps(case, found, forward_macs(model, keep) / 1e9)


@contextlib.contextmanager
def as_trained(config: TrainConfig) -> Iterator[None]:
    """Context manager or decorator that applies the trainer's numerics."""
    precision = torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    set_numerics(config.machine.precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(deterministic, warn_only=only_warned)
        torch.utils.deterministic.fill_uninitialized_memory = filled


def stacks_of(device: torch.device, form: str, batch: int) -> list[str]:
    """Return the stacks available on a device, in a form and for a batch.

    Packed samples keep half of the patches on average, and need whole groups; graphs need a GPU. Recipes are timed in
    the two stacks that need no comparison: ours, and ours in graphs.
    """
    there = dict.fromkeys(("plain eager", "plain compiled", "ours compiled"), form not in RECIPES)
    there |= {"ours packed": form == "masked-0.5" and batch % GROUP == 0, "ours graphs": device.type == "cuda"}
    return [stack for stack in STACKS if there.get(stack, True)]


class _Trained:
    """A network of a configuration, with its EMA and optimizer."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        torch.manual_seed(0)  # the same weights whichever stack is built first
        with device:
            model = build_model(config, 4, config.data.image_size // 8)
        for parameter in model.parameters():  # zero-initialised layers would make part of the step trivial
            torch.nn.init.normal_(parameter, std=0.02)
        self.net = Denoiser(model, config.process)
        self.ema = EMA(self.net, config.ema.ema_decay)
        self.optimizer = make_optimizer(self.net, config.optim, [self.ema])


class _Held:
    """A dataset whose batches are already images, as far as `TrainingStep` needs one."""

    def to_images(self, stored: Tensor, seed: int, sample: Tensor) -> Tensor:
        return stored


def _plain_trainer(model: MaskDiT, config: TrainConfig, bf16: bool) -> PlainTrainer:
    """Return the plain baseline of a network, sharing its weights."""
    with torch.device("meta"):
        plain = PlainDiT(
            model.input_size,
            config.network.patch_size,
            model.in_channels,
            config.network.width,
            config.network.depth,
            config.network.num_heads,
            config.data.num_classes,
            config.network.decoder_width,
            config.network.decoder_depth,
            config.network.decoder_num_heads,
        )
    plain.load_state_dict(model.state_dict(), assign=True)
    return PlainTrainer(PlainLoss(plain, config.objective.mae_coef), autocast=bf16)


def _share_state(trained: _Trained, trainer: PlainTrainer) -> None:
    """Share our moments and EMA with the plain baseline."""
    optimizer, ema = trained.optimizer, trained.ema
    mine, averages = dict(trained.net.model.named_parameters()), dict(trainer.ema.named_parameters())
    for name, parameter in trainer.loss.model.named_parameters():
        averages[name].data = ema.weights[f"model.{name}"]
        state = {"step": torch.zeros((), device=parameter.device)}
        state |= {moment: torch.zeros_like(parameter) for moment in ("exp_avg", "exp_avg_sq")}
        optimizer.state[mine[name]] = trainer.optimizer.state[parameter] = state


def products(step: Callable[[], Any], device: torch.device) -> Callable[[], None]:
    """Return a call that repeats only the matmuls and attention of a step.

    Its time is a lower bound of the step's. It uses other values with the same shapes, strides and dtypes.
    """
    seen: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    buffers: dict[Any, Tensor] = {}

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
            name = func.name().removeprefix("aten::").split(".")[0]
            if name in _PRODUCTS or name.startswith("_scaled_dot_product"):
                stand_ins = [tree_map_only(Tensor, lambda t, i=i: buffer(t, i), arg) for i, arg in enumerate(args)]
                seen.append((func, tuple(stand_ins), kwargs or {}))
            return func(*args, **(kwargs or {}))

    def buffer(t: Tensor, position: int) -> Tensor:
        key = (t.shape, t.stride(), t.dtype, position)
        if key not in buffers:
            with torch.utils._python_dispatch._disable_current_modes():
                made = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
                buffers[key] = made.normal_(std=0.1) if made.is_floating_point() else made.zero_()
        return buffers[key]

    with Record():
        step()

    @torch.no_grad()
    def again() -> None:
        for func, args, kwargs in seen:
            func(*args, **kwargs)

    return again


@contextlib.contextmanager
def freed() -> Iterator[None]:
    """Free a case's memory after the block."""
    yield
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
