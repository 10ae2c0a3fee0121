"""Options of transformer blocks, which all networks share."""

import dataclasses
import typing
from typing import Any, Literal

from fastmask.kernels.modulate_norm import Norm


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BlockConfig:
    """Options of blocks; the defaults are the published DiT's and MaskDiT's."""

    qk_norm: bool = False
    """Normalise queries and keys of each head, which keeps attention from growing without bound."""
    norm: Norm = "layer"
    """Norm before attention, the MLP and the Linears that end a stack: LayerNorm, or RMSNorm, which subtracts no mean;
    both without weights of their own."""
    mlp: Literal["gelu", "swiglu"] = "gelu"
    """MLP of a block: GELU of 4 D hidden values, or SwiGLU of 8/3 D, which has as many weights."""
    rope: bool = False
    """Rotate queries and keys by their row and column (RoPE), so that attention depends on distances; the position
    table stays added to the patches."""

    def options(self) -> dict[str, Any]:
        """Return these options by name, without the other fields of a network's configuration."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(BlockConfig)}

    def check_options(self, name: str, head_width: int) -> None:
        """Raise a ValueError for an unknown option, or one that heads of this width cannot have.

        Args:
            name: prefix of the fields of the stack.
            head_width: width of a head.
        """
        for field in dataclasses.fields(BlockConfig):
            known, value = typing.get_args(field.type), getattr(self, field.name)
            if known and value not in known:
                raise ValueError(f"{field.name} must be {' or '.join(known)}, not {value!r}")
        if self.rope and head_width % 4:
            raise ValueError(
                f"rope rotates pairs of channels by the row and by the column, so {name}width / {name}num_heads must "
                f"be a multiple of 4, not {head_width}"
            )
