"""What commands print. Rich is imported with the first line: what reads data needs torch and numpy alone."""

import functools
import importlib
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

# What stands before the host in a URL and after its path: passwords, tokens, signatures.
_PASSWORD = re.compile(r"(://[^/?#@:]*):[^/?#]*@")
_TOKEN = re.compile(r"(https?://)[^/?#@:]+@")
_QUERY = re.compile(r"([?&][^=&#\s]*=)[^&#\s]*")


@functools.cache
def get_console() -> "Console":
    """Return the console that all lines go to."""
    console: Console = importlib.import_module("rich.console").Console()
    return console


def say(message: str) -> None:
    """Print one line as it is but for secrets: not styled by what it holds, not broken where the terminal ends."""
    console = get_console()
    message = without_secrets(message)
    # A name that the terminal cannot show must not end what prints it.
    message = message.encode(console.encoding, "backslashreplace").decode(console.encoding)
    console.print(message, highlight=False, markup=False, soft_wrap=True)


def say_from_any_rank(message: str) -> None:
    """Print one line as `say` does, by a process too that leaves what concerns all of them to the first one."""
    console = get_console()
    quiet, console.quiet = console.quiet, False
    try:
        say(message)
    finally:
        console.quiet = quiet


def printable(name: str) -> str:
    """Return a file's or class's name with what is no text in it escaped: bytes that are not UTF-8, line breaks."""
    if name.isprintable():
        return name
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def without_secrets(text: str) -> str:
    """Return a URL, or a line that holds one, without passwords, tokens and the values of a query."""
    if "://" not in text:
        return text
    return _QUERY.sub(r"\1***", _TOKEN.sub(r"\1***@", _PASSWORD.sub(r"\1:***@", text)))
