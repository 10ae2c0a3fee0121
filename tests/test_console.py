import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastmask.console
from fastmask.console import get_console, printable, say, say_from_any_rank


def test_lines_are_said_as_they_are(capsys):
    line = "runs/[bold]3.5[/] " + "wide " * 60 + "."
    say(line)
    assert capsys.readouterr().out == line + "\n"


def test_what_every_process_says(capsys, monkeypatch):
    """Those too that leave the rest to the first one, and do so afterwards."""
    monkeypatch.setattr(get_console(), "quiet", True)
    say_from_any_rank("one")
    say("two")
    assert capsys.readouterr().out == "one\n"


def test_data_are_read_without_rich():
    """As on a GPU machine that lacks it: nothing but a line to say asks for it."""
    program = "import sys; sys.modules['rich'] = None; import fastmask.data, fastmask.training.step"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("encoding", "printed"),
    [("utf-8", "caf\\udce9 \u732b.png"), ("ascii", "caf\\udce9 \\u732b.png"), ("latin-1", "caf\\udce9 \\u732b.png")],
)
def test_no_name_stops_a_line(encoding, printed):
    """Whatever the terminal can show. The module runs alone: the package would import torch."""
    program = r"import runpy, sys; runpy.run_path(sys.argv[1])['say']('caf\udce9 \u732b.png')"
    path = Path(fastmask.console.__file__)
    command = [sys.executable, "-X", f"utf8={int(encoding == 'utf-8')}", "-c", program, path]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode(encoding) == printed + "\n"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a b/\u732b.png", "a b/\u732b.png"),
        ("caf\udce9", r"caf\udce9"),
        ("a\nb\x1b[2J", r"a\nb\x1b[2J"),
        ("\x00", r"\x00"),
    ],
)
def test_what_is_no_text_in_a_name_is_escaped(name, shown):
    assert printable(name) == shown
