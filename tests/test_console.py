import subprocess
import sys

from fastmask.console import say


def test_lines_are_said_as_they_are(capsys):
    line = "runs/[bold]3.5[/] " + "wide " * 60 + "."
    say(line)
    assert capsys.readouterr().out == line + "\n"


def test_data_are_read_without_rich():
    """As on a GPU machine that lacks it: nothing but a line to say asks for it."""
    program = "import sys; sys.modules['rich'] = None; import fastmask.data, fastmask.step"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
