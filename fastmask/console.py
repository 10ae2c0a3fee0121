"""Console output. Rich is imported at the first line: data loading needs only torch and numpy."""

import functools
import importlib
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

# Secrets in a URL: passwords and tokens before the host, signatures in the query.
_PASSWORD = re.compile(r"(://[^/?#@:]*):[^/?#]*@")
_TOKEN = re.compile(r"(https?://)[^/?#@:]+@")
_QUERY = re.compile(r"([?&][^=&#\s]*=)[^&#\s]*")


@functools.cache
def get_console() -> "Console":
    """Return the shared console."""
    console: Console = importlib.import_module("rich.console").Console()
    return console


def say(message: str) -> None:
    """Print one line without secrets, highlighting, markup or wrapping."""
    console = get_console()
    message = without_secrets(message)
    # Escape characters that the terminal cannot encode, instead of raising.
    message = message.encode(console.encoding, "backslashreplace").decode(console.encoding)
    console.print(message, highlight=False, markup=False, soft_wrap=True)


def say_from_any_rank(message: str) -> None:
    """Print one line with `say`, on ranks other than 0 too."""
    console = get_console()
    quiet, console.quiet = console.quiet, False
    try:
        say(message)
    finally:
        console.quiet = quiet


def printable(name: str) -> str:
    """Escape the unprintable characters of a name: bytes that are not UTF-8, line breaks."""
    if name.isprintable():
        return name
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def without_secrets(text: str) -> str:
    """Redact passwords, tokens and query values of the URLs in a text."""
    if "://" not in text:
        return text
    return _QUERY.sub(r"\1***", _TOKEN.sub(r"\1***@", _PASSWORD.sub(r"\1:***@", text)))
