"""Model cards: the README.md of a network's folder."""

from collections.abc import Iterator, Mapping
from typing import Any

from fastmask.described import to_json
from fastmask.diffusion import Denoiser
from fastmask.models.counts import num_parameters

# Fields of a run's configuration that describe its recipe, if they are there.
_RECIPE = (
    *("preset", "data", "image_size", "max_steps", "unmask_steps", "batch_size", "lr", "unmask_lr", "betas"),
    *("weight_decay", "mask_ratio", "mask_schedule", "label_drop", "ema_decay", "precision", "seed", "init"),
)
_MOST_CLASSES = 20  # that are listed


def model_card(net: Denoiser, title: str, licence: str, facts: Mapping[str, Any], *, vae: str = "") -> str:
    """Return the model card as Markdown.

    Args:
        net: the denoiser.
        title: name of the model.
        licence: licence of the weights, as the hub spells it.
        facts: what is known of the training, each optional: `config` and `step` of the run, `versions`, and its
            `evaluation`, the content of `evaluation.json`.
        vae: the VAE that decodes samples; empty for pixels, or if it is not known.
    """
    model = net.model
    lines = ["---", f"license: {licence}", "library_name: diffusers", "pipeline_tag: unconditional-image-generation"]
    lines += ["tags:", "- masked-diffusion-transformer", "- fastmask", "---", "", f"# {title}", ""]
    kind = "masked diffusion transformer (MaskDiT)" if model.decoder_blocks else "diffusion transformer (DiT)"
    size = f"{model.in_channels} x {model.input_size} x {model.input_size}"
    count = num_parameters(model)
    parameters = f"{count / 1e6:.1f}M" if count >= 1e6 else f"{count / 1e3:.0f}k"
    classes = f"{model.num_classes} classes" if model.num_classes else "no classes"
    lines += [
        f"A {kind} of {parameters} parameters that draws samples of {size}, of {classes}.",
        "",
        *_usage(net, vae),
        "## Network and process",
        "",
        f"- network: `{to_json(model.config)}`",
        f"- process: `{to_json(net.process)}`",
        *([f"- VAE: `{vae}`"] if vae else []),
        "",
    ]
    lines += _table("Training", _recipe(facts))
    lines += _table("Evaluation", dict(_flat(facts.get("evaluation", {}))))
    return "\n".join(lines).rstrip() + "\n"


def _usage(net: Denoiser, vae: str) -> Iterator[str]:
    yield "```python"
    yield "from diffusers import DiffusionPipeline"
    yield ""
    yield "pipe = DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True)"
    classes = "class_labels=[0, 0]" if net.model.num_classes else "num_images=2"
    latents = not vae and net.model.in_channels not in (1, 3)
    shown = ', output_type="latent"' if latents else ""
    yield f"images = pipe({classes}{shown}).images"
    yield "```"
    yield ""
    yield "The code of the network and of the sampler, plain PyTorch, is in the folder: `trust_remote_code` runs it."
    names = net.origin.class_names if net.origin else ()
    if names:
        more = f" and {len(names) - _MOST_CLASSES} more" if len(names) > _MOST_CLASSES else ""
        yield f"Classes, by name or number: {', '.join(names[:_MOST_CLASSES])}{more}."
    yield ""


def _recipe(facts: Mapping[str, Any]) -> dict[str, Any]:
    config = facts.get("config", {})
    rows = {name: config[name] for name in _RECIPE if config.get(name) not in (None, "", [])}
    for name in rows.keys() & {"data", "init"}:  # without the folders of somebody's machine
        rows[name] = str(rows[name]).rstrip("/").rpartition("/")[2]
    return rows | {name: facts[name] for name in ("step",) if name in facts} | dict(facts.get("versions", {}))


def _table(title: str, rows: Mapping[str, Any]) -> list[str]:
    """Return a section with a table of names and values; nothing without rows."""
    if not rows:
        return []
    body = [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items()]
    return [f"## {title}", "", "| | |", "| --- | --- |", *body, ""]


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the numbers and texts of nested mappings, with dotted names."""
    for name, value in values.items() if isinstance(values, Mapping) else ():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, str | int | float):
            yield f"{prefix}{name}", value


def _cell(value: Any) -> str:
    shown = f"{value:.6g}" if isinstance(value, float) else str(value)
    return " ".join(shown.split()).replace("|", "\\|")
