"""The networks that a configuration may name. To add one, write its file and its name here."""

from typing import TypeAlias

from fastmask.models.maskdit import MaskDiTConfig

AnyNetwork: TypeAlias = MaskDiTConfig
NETWORKS: dict[str, type[MaskDiTConfig]] = {kind.name: kind for kind in (MaskDiTConfig,)}
