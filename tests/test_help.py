"""The pages of `--help` of a command with groups of flags."""

import dataclasses
from typing import Literal

import pytest

from fastmask import train
from fastmask.help import show_help
from fastmask.presets import PRESETS
from fastmask.training.config import preset_config


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Sides of the shape."""

    edge_length: float = 1.0
    """Length of an edge, in a sentence that is long enough to need a second line in the source, and a third one in the
    output. --round is something else."""
    round: bool = False
    """Round corners."""
    pair: tuple[float, float] = (0.5, 2.0)
    """Two."""
    many: tuple[int, ...] = ()
    """Any number."""
    kind: Literal["flat", "solid"] = "flat"
    """Kind."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Other:
    """Other flags."""

    count: int = 3
    """Number."""


GROUPS = {"shape": Shape(kind="solid"), "other": Other()}


def page(capsys, *argv, groups=GROUPS):
    assert show_help(argv, prog="prog", description=["Does it.", "And more."], groups=groups)
    return capsys.readouterr().out


def test_without_help_nothing_is_shown(capsys):
    assert not show_help(["--count", "3"], prog="prog", description=[], groups=GROUPS)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("argv", [["-h"], ["--help"], ["--count", "3", "--help"], ["--help", "--count", "3"]])
def test_the_groups_and_their_flags(argv, capsys):
    assert (
        page(capsys, *argv)
        == """usage: prog [--FLAG VALUE ...]

Does it.

And more.

shape: Sides of the shape.
    --edge-length --round --pair --many --kind
other: Other flags.
    --count
"""
    )


def test_a_group(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert (
        page(capsys, "--help", "shape")
        == """shape: Sides of the shape.

  --edge-length FLOAT
      Length of an edge, in a sentence that is long enough to need a second line
      in the source, and a third one in the output. --round is something else.
      (default: 1.0)
  --round, --no-round
      Round corners. (default: False)
  --pair FLOAT FLOAT
      Two. (default: 0.5 2.0)
  --many [INT ...]
      Any number. (default: empty)
  --kind {flat,solid}
      Kind. (default: solid)
"""
    )


def test_all_groups(capsys):
    out = page(capsys, "--help", "all")
    assert out.index("  --kind {flat,solid}") < out.index("other: Other flags.") < out.index("  --count INT")


def test_an_unknown_group():
    with pytest.raises(ValueError, match="unknown group of --help 'shap': did you mean shape"):
        show_help(["--help", "shap"], prog="prog", description=[], groups=GROUPS)


@pytest.mark.parametrize("preset", ["digits", "digits-flow"])
@pytest.mark.parametrize("columns", [80, 120])
def test_the_trainer_explains_every_flag_in_a_sentence(preset, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    train.main(["--preset", preset, "--help", "all"])
    explained = capsys.readouterr().out
    train.main(["--help", "--preset", preset])
    listed = capsys.readouterr().out
    config = preset_config(preset, PRESETS)
    names = [field.name for part in config.parts().values() for field in dataclasses.fields(part)]
    for name in [*names, "dry_run", "profile"]:
        flag = "--" + name.replace("_", "-")
        assert f"\n  {flag}" in explained
        assert flag in listed.split()
    assert max(map(len, (explained + listed).splitlines())) <= columns
    texts = " ".join(explained.split()).split(" (default: ")[:-1]
    assert all(text.endswith((".", ")")) for text in texts)


def test_the_flags_of_another_process_are_shown_by_what_help_says(capsys):
    train.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "such as --preset digits-flow --help process." in said
    train.main(["--preset", "digits-flow", "--help", "process"])
    shown = capsys.readouterr().out
    assert "--shift" in shown
    assert "--p-mean" not in shown
