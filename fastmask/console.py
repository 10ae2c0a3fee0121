"""What commands print. Rich is imported with the first line: what reads data needs torch and numpy alone."""

import functools
import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@functools.cache
def get_console() -> "Console":
    """Return the console that all lines go to."""
    console: Console = importlib.import_module("rich.console").Console()
    return console


def say(message: str) -> None:
    """Print one line as it is: not styled by what it holds, not broken where the terminal ends."""
    get_console().print(message, highlight=False, markup=False, soft_wrap=True)
