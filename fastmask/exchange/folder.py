"""Writes a network as a folder that diffusers loads and samples without fastmask."""

import contextlib
import importlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fastmask.console import say
from fastmask.described import to_json
from fastmask.diffusion import EDM, VP, Denoiser, LatentSpace, RectifiedFlow
from fastmask.diffusion.weights import UNSEEN, save_weights
from fastmask.exchange.card import model_card
from fastmask.files import named
from fastmask.models.maskdit import MaskDiTConfig
from fastmask.rundir import DIFFUSERS_WEIGHTS

_HERE = Path(__file__).parent
_PIXELS = (1, 3)  # channels of pixels, where nothing says what a network was trained on


def write_folder(
    net: Denoiser, out: Path, *, vae: str = "", licence: str = "unknown", facts: Mapping[str, Any] | None = None
) -> None:
    """Write a network, its process and a sampler as a folder for `diffusers.DiffusionPipeline.from_pretrained`.

    The folder holds the code of both in plain PyTorch, the weights in the published names with fastmask's metadata (so
    that `load_maskdit` reads it too), a VAE or its name, and a model card.

    Args:
        net: the denoiser.
        out: the folder, which must not exist yet, or be empty.
        vae: folder of a diffusers VAE, which is copied, or the name of one, which is recorded. Empty: the name that the
            weights record.
        licence: licence of the weights, for the model card.
        facts: what is known of the training, see `fastmask.exchange.card.model_card`.

    Raises:
        ValueError: a network or a process that the folder's code does not have, a folder that is not empty, or no such
            VAE.
        OSError: the folder cannot be written.
    """
    check_expressible(net)
    space, vae_name, vae_folder = _vae(net, vae)
    with _new_folder(out) as partial:
        transformer = partial / "transformer"
        transformer.mkdir()
        weights = {name.removeprefix("model."): tensor for name, tensor in net.state_dict().items()}
        save_weights(transformer / DIFFUSERS_WEIGHTS[0], net, weights)
        _write_json(transformer / "config.json", {"_class_name": "MaskDiTModel", **_sizes(net)})
        shutil.copyfile(_HERE / "_network.py", transformer / "network.py")
        shutil.copyfile(_HERE / "_pipeline.py", partial / "pipeline.py")
        if vae_folder:
            shutil.copytree(vae_folder, partial / "vae")
        names = net.origin.class_names if net.origin else ()
        index = {
            "_class_name": ["pipeline", "MaskDiTPipeline"],
            "transformer": ["network", "MaskDiTModel"],
            "vae": ["diffusers", "AutoencoderKL"] if vae_folder else [None, None],
            "process": json.loads(to_json(net.process)),
            "latents": space,
            "vae_name": vae_name or None,
            "id2label": {str(number): name for number, name in enumerate(names)} or None,
        }
        _write_json(partial / "model_index.json", index)
        card = model_card(net, out.resolve().name, licence, facts or {}, vae=vae_name or ("vae" if vae_folder else ""))
        (partial / "README.md").write_text(card)


def check_expressible(net: Denoiser) -> None:
    """Raise a ValueError for a network or a process that the folder's code does not have."""
    config, process = net.model.config, net.process
    if type(config) is not MaskDiTConfig:
        raise ValueError(f"a folder for diffusers has the network maskdit alone, and this one is {config.name}")
    if type(process) not in (EDM, RectifiedFlow, VP):
        raise ValueError(f"a folder for diffusers has the processes edm, flow and vp, and this one is {process.name}")


def push(folder: Path, name: str) -> str:
    """Upload a folder to the Hugging Face hub as a model, and return its URL.

    Raises:
        ValueError: huggingface_hub is not installed, or the hub refuses.
    """
    try:
        hub = importlib.import_module("huggingface_hub")
    except ModuleNotFoundError as error:
        raise ValueError("--push-to-hub needs huggingface_hub: pip install huggingface_hub") from error
    try:
        hub.create_repo(name, exist_ok=True)
        return str(hub.upload_folder(repo_id=name, folder_path=str(folder)))
    except (OSError, ValueError) as error:  # HfHubHTTPError is an OSError, and names that cannot be are ValueErrors
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--push-to-hub {name}: {folder} is written, and was not uploaded: {reason}") from error


def _sizes(net: Denoiser) -> dict[str, Any]:
    """Return the arguments of the folder's network."""
    model = net.model
    sizes = {"sample_size": model.input_size, "in_channels": model.in_channels, "num_classes": model.num_classes}
    stated = json.loads(to_json(model.config))
    return {**sizes, **{name: value for name, value in stated.items() if name != "name"}}


def _vae(net: Denoiser, given: str) -> tuple[dict[str, Any] | None, str, Path | None]:
    """Return scale and shift of the latents (None for pixels, empty if unknown), the VAE's name, and its folder."""
    recorded = net.origin.latents if net.origin else None
    pixels = recorded is None if net.origin else net.model.in_channels in _PIXELS and not given
    if pixels:
        if given:
            raise ValueError("--vae: the network was trained on pixels, which need no VAE: leave it out")
        return None, "", None
    space = {"scale": recorded.scale, "shift": recorded.shift} if recorded else {}
    folder = Path(given)
    if not given and recorded and (Path(recorded.vae).is_absolute() or Path(recorded.vae).is_dir()):
        say(
            f"the weights record the folder {recorded.vae} as their VAE, which others lack: --vae {recorded.vae} "
            f"copies it"
        )
        return space, "", None
    if not given or not folder.is_dir():
        if given.startswith((".", "/", "~")) or given.count("/") > 1 or " " in given:
            raise ValueError(f"--vae {given}: there is no such folder")
        return space, given or (recorded or LatentSpace()).vae, None
    folder = folder / "vae" if (folder / "vae" / "config.json").is_file() else folder
    if not (folder / "config.json").is_file() or not any((folder / name).is_file() for name in DIFFUSERS_WEIGHTS):
        raise ValueError(f"--vae {given} holds no VAE of diffusers: a config.json and {DIFFUSERS_WEIGHTS[0]}")
    return space, "", folder


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``out`` if the block succeeds, and is removed otherwise."""
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise ValueError(f"--out {out} exists already: name another folder, or delete it")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".partial-{out.name}")
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
    try:
        with named(out):
            partial.mkdir()
            yield partial
            os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def save_published(path: Path, net: Denoiser) -> None:
    """Write weights in the published names as a `.pt` file, which states neither process nor network.

    Raises:
        ValueError: another process than the published one, EDM, another network than MaskDiT, as both of which such a
            file is read, or blocks with options.
    """
    if not isinstance(net.process, EDM):
        raise ValueError(
            f"a .pt file states no process and is read as EDM's, and these weights are of {net.process}: write "
            f".safetensors"
        )
    if net.model.config.name not in ("maskdit", "tread"):  # TREAD's weights are those of a DiT
        raise ValueError(
            f"a .pt file states no network and is read as MaskDiT's, and these weights are of {net.model.config.name}: "
            f"write .safetensors"
        )
    for field, published in UNSEEN.items():
        if (value := getattr(net.model.config, field, published)) != published:
            raise ValueError(
                f"a .pt file states no network and is read with {field} {published}, and these weights are of {field} "
                f"{value}: write .safetensors"
            )
    torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()}, path)
