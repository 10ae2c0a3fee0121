"""Import this first to run as on a machine that has torch, triton, numpy and pytest, and what these ask for, alone.

fsspec is absent too: torch asks for it, but does not import it.
"""

import importlib.metadata
import re
import sys
from typing import Any

_ABSENT = {"fsspec", "dali"}


def _wanted(*names: str) -> set[str]:
    """Return some distributions and all that they require, in lower case with hyphens."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        found.add(name)
        try:
            required = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # for another platform
            continue
        waiting += [re.match(r"[\w.-]+", line)[0] for line in required if "extra ==" not in line]
    return found


class _Bare:
    """A finder of modules that does not find those of other distributions."""

    def __init__(self, finder: Any, hidden: set[str]):
        self._finder, self._hidden = finder, hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] in self._hidden or name.startswith("nvidia.dali"):
            return None
        return self._finder.find_spec(name, path, target)


def hidden() -> set[str]:
    """Return the names of the modules that such a machine lacks, of those that are installed here."""
    there = _wanted("torch", "triton", "numpy", "pytest")
    owners = importlib.metadata.packages_distributions()
    others = {m for m, dists in owners.items() if not {re.sub(r"[-_.]+", "-", d).lower() for d in dists} & there}
    return (others | _ABSENT) - {"fastmask"}


sys.meta_path[:] = [_Bare(finder, hidden()) for finder in sys.meta_path]
