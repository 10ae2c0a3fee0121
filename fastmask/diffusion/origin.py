"""What a network was trained on, as stored with its weights: the VAE of its latents, and the names of its classes."""

import dataclasses
import json
import math
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LatentSpace:
    """The latents of a VAE, as a network is trained on them: (latent - shift) * scale."""

    vae: str = ""
    """Folder or name of the VAE; "" if it is not known."""
    sha256: str = ""
    """SHA-256 of its weights, as `fastmask.data.vae` computes it; "" if it is not known."""
    scale: float | list[float] = 1.0
    """One number for all channels, or one for each."""
    shift: float | list[float] = 0.0
    """See scale."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """The data of a training run."""

    latents: LatentSpace | None = None
    """Of latents; None for pixels."""
    class_names: tuple[str, ...] = ()
    """One name per class; empty if the classes have only numbers."""

    def to_json(self) -> str:
        """Return the origin as JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Origin":
        """Return the origin of a JSON text; a ValueError that says what is wrong, since it may be anyone's."""
        stored = json.loads(text)
        if not isinstance(stored, dict) or stored.keys() != {"latents", "class_names"}:
            raise ValueError("it holds no latents and class_names")
        names, latents = stored["class_names"], stored["latents"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("class_names is no list of names")
        return cls(latents=None if latents is None else _space(latents), class_names=tuple(names))


def _space(stored: Any) -> LatentSpace:
    fields = {field.name for field in dataclasses.fields(LatentSpace)}
    if not isinstance(stored, dict) or stored.keys() != fields:
        raise ValueError(f"latents has other fields than {', '.join(sorted(fields))}")
    for name in ("vae", "sha256"):
        if not isinstance(stored[name], str):
            raise ValueError(f"{name} is no text")
    for name in ("scale", "shift"):
        values = stored[name] if isinstance(stored[name], list) and stored[name] else [stored[name]]
        numbers = all(type(value) in (int, float) and math.isfinite(value) for value in values)
        if not numbers or (name == "scale" and 0 in values):
            raise ValueError(f"{name} is no number, nor one for each channel")
    return LatentSpace(**stored)
