"""Whole training steps to compare: ours and the plain baseline's, on the same network, batch and precision."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from bench.baselines.plain import PlainDiT, PlainLoss, PlainTrainer
from fastmask.config import TrainConfig, build_model, preset_config
from fastmask.counts import forward_macs
from fastmask.diffusion import EDMLoss, EDMPrecond, TrainingObjective, training_draws
from fastmask.ema import EMA
from fastmask.masking import kept_count
from fastmask.optim import make_optimizer
from fastmask.presets import PRESETS

FORMS = {"dense": None, "masked-0.5": 0.5, "masked-0.75": 0.75}
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "_scaled_dot_product")


class Steps(NamedTuple):
    """What a row says of a case, and the calls to time.

    Attributes:
        case: preset, image size, form, batch, precision.
        variants: by name, one whole training step each: data drawn, forward, backward, and with ``optimizer`` the
            weights and their average moved.
        forward_gmac: of one image.
        optimizer: whether the steps end in the optimizer's.
    """

    case: dict[str, Any]
    variants: dict[str, Callable[[], Any]]
    forward_gmac: float
    optimizer: bool


def config_of(size: str, image_size: int, form: str) -> TrainConfig:
    """Return the configuration of a size ("s2", "b2", "l2", "xl2") in a form; the dense one is a DiT."""
    if size not in ("s2", "b2", "l2", "xl2", "h2") or form not in FORMS:
        raise ValueError(f"no such step: size {size!r}, form {form!r}; sizes s2, b2, l2, xl2, forms {', '.join(FORMS)}")
    prefix = "dit-" if form == "dense" else ""
    changed = {"image_size": image_size, "mask_ratio": FORMS[form] or 0.0}
    row = {**PRESETS[f"{prefix}{size}-in256"], **changed}
    return preset_config(f"{prefix}{size}-in256", {f"{prefix}{size}-in256": row})


def steps(
    size: str,
    image_size: int,
    form: str,
    batch: int,
    device: torch.device,
    *,
    bf16: bool = False,
    compiled: bool = False,
    optimizer: bool = True,
) -> Steps:
    """Return the steps of a case, eager or compiled, of ours and of the plain baseline.

    Args:
        size: "s2", "b2", "l2", "xl2".
        image_size: in pixels; the latents have an eighth of it.
        form: a key of `FORMS`.
        batch: images.
        device: where they run.
        bf16: autocast to bfloat16; fp32 otherwise.
        compiled: compile both; the bound by products is the same and is left out.
        optimizer: let the steps end in the optimizer's and the EMA's.
    """
    config = config_of(size, image_size, form)
    side = image_size // 8
    torch.manual_seed(0)
    images = torch.randn(batch, 4, side, side, device=device) * config.sigma_data
    labels = torch.randint(config.num_classes, (batch,), device=device)
    with device:
        model = build_model(config, 4, side)
    for parameter in model.parameters():  # zero-initialised layers would make part of the step trivial
        torch.nn.init.normal_(parameter, std=0.02)
    keep = kept_count(model.length, config.mask_ratio)
    mine = _ours(model, config, images, labels, keep, bf16, compiled, optimizer)
    plain = _plain(model, config, images, labels, keep, bf16, compiled, optimizer)
    name = " compiled" if compiled else ""
    variants = {f"plain{name or ' eager'}": plain, f"ours{name}": mine}
    if not compiled:
        variants["products"] = products(mine, device)
    case = {
        "preset": config.preset,
        "image_size": image_size,
        "form": form,
        "batch": batch,
        "precision": "bf16" if bf16 else "fp32",
    }
    return Steps(case, variants, forward_macs(model, keep) / 1e9, optimizer)


def _ours(
    model: Any,
    config: TrainConfig,
    images: Tensor,
    labels: Tensor,
    keep: int,
    bf16: bool,
    compiled: bool,
    optimizer: bool,
) -> Callable[[], Tensor]:
    objective = TrainingObjective(EDMPrecond(model, config.sigma_data), EDMLoss(config.sigma_data, config.mae_coef))
    run = torch.compile(objective) if compiled else objective
    adamw, ema = (
        (make_optimizer(objective.net, config), EMA(objective.net, config.ema_decay)) if optimizer else (None,) * 2
    )
    counter = iter(range(0, 2**62, len(images)))

    def step() -> Tensor:
        draws = training_draws(
            images,
            labels,
            seed=0,
            offset=next(counter),
            num_classes=config.num_classes,
            label_drop=config.label_drop,
            length=model.length,
            keep=keep,
            p_mean=config.p_mean,
            p_std=config.p_std,
        )
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=bf16):
            loss = run(images, *draws).total.mean()
        loss.backward()
        if optimizer:
            adamw.step()
            ema.update(objective.net)
        objective.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def _plain(
    model: Any,
    config: TrainConfig,
    images: Tensor,
    labels: Tensor,
    keep: int,
    bf16: bool,
    compiled: bool,
    optimizer: bool,
) -> Callable[[], Tensor]:
    with images.device:
        plain = PlainDiT(
            model.input_size,
            config.patch_size,
            model.in_channels,
            config.width,
            config.depth,
            config.num_heads,
            config.num_classes,
            config.decoder_width,
            config.decoder_depth,
            config.decoder_num_heads,
        )
    plain.load_state_dict(model.state_dict())
    trainer = PlainTrainer(PlainLoss(plain, config.mae_coef, config.sigma_data), autocast=bf16, optimizer=optimizer)
    if compiled:
        trainer.compile()
    return lambda: trainer.step(images, labels, keep if keep < model.length else None)


def products(step: Callable[[], Any], device: torch.device) -> Callable[[], None]:
    """Return a call that does the matrix products and the attention of a step again, and nothing else.

    Its time bounds that of the step. The products run on other numbers of the same shapes, strides and dtypes.
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
    """Give a case's memory back when it is done."""
    yield
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
