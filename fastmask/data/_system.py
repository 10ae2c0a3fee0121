"""Imported before all else of `fastmask.data`: says in one line that a system is not one that data are read on."""

import importlib.util
import sys

LINE = (
    "fastmask's trainer and data need Linux (Python has no {missing} here); fastmask.kernels, the networks and "
    "sampling from their weights work anywhere"
)


def require() -> None:
    """Raise an ImportError where a module of Python is missing that Windows lacks.

    A command of this package ends with the line and exit code 2, as with every error that is not the program's.
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
