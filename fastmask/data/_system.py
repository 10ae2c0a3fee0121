"""Platform check, imported first in `fastmask.data`: one error line on systems other than Linux."""

import importlib.util
import sys

LINE = (
    "fastmask's trainer and data need Linux (Python has no {missing} here); fastmask.kernels, the networks and "
    "sampling from their weights work anywhere"
)


def require() -> None:
    """Raise an ImportError if a standard module is missing that Windows lacks.

    A command of this package prints the line and exits with code 2 instead, as for every user error.
    """
    missing = [name for name in ("fcntl", "resource") if not _is_there(name)]
    if not missing:
        return
    line = LINE.format(missing=" and ".join(missing))
    command = getattr(getattr(sys.modules["__main__"], "__spec__", None), "name", None) or ""
    if command.startswith("fastmask."):
        sys.stderr.write(f"{command}: error: {line}\n")
        raise SystemExit(2)
    raise ImportError(line)


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # None in sys.modules
        return False


require()
