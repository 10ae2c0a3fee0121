"""Registry of processes. To add one, write its module and list its class here."""

from typing import TypeAlias, get_args

from fastmask.diffusion.edm import EDM
from fastmask.diffusion.flow import RectifiedFlow
from fastmask.diffusion.process import Process
from fastmask.diffusion.vp import VP

AnyProcess: TypeAlias = EDM | RectifiedFlow | VP
PROCESSES: dict[str, type[Process]] = {kind.name: kind for kind in get_args(AnyProcess)}
