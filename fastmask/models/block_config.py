"""Options of transformer blocks, which all networks share."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BlockConfig:
    """Options of blocks; the defaults are the published DiT's and MaskDiT's."""

    qk_norm: bool = False
    """Normalise queries and keys of each head, which keeps attention from growing without bound."""

    def options(self) -> dict[str, Any]:
        """Return these options by name, without the other fields of a network's configuration."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(BlockConfig)}
