"""The networks that a configuration may name. To add one, write its file and its name here."""

from typing import TypeAlias, get_args

from fastmask.models.deferred import DeferredConfig
from fastmask.models.maskdit import MaskDiTConfig
from fastmask.models.sprint import SprintConfig
from fastmask.models.stack import NetworkConfig
from fastmask.models.tread import TreadConfig

AnyNetwork: TypeAlias = MaskDiTConfig | TreadConfig | SprintConfig | DeferredConfig
NETWORKS: dict[str, type[NetworkConfig]] = {kind.name: kind for kind in get_args(AnyNetwork)}
