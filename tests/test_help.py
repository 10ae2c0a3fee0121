"""The pages of `--help` of a command with groups of flags."""

import dataclasses
from typing import Literal

import pytest
import tyro

from fastmask import convert, evaluate, prepare, report, sample, train
from fastmask.help import show_help, show_page
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


@pytest.mark.parametrize("preset", ["digits", "digits-flow", "digits-sprint"])
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """A command."""

    source: tyro.conf.Positional[str]
    """What is read."""
    more: tyro.conf.Positional[tuple[str, ...]] = ()
    """Others."""
    size: float
    """Size of the result."""
    side: int | None = None
    """Side. Default: the source's."""
    undescribed: str = ""
    shape: Shape = dataclasses.field(default_factory=Shape)


def test_the_page_of_a_command(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "64")
    assert not show_page(["x", "--size", "1"], Command, prog="prog", description="Does it.")
    assert capsys.readouterr().out == ""
    assert show_page(["--size", "-h"], Command, prog="prog", description="Does it.")
    assert capsys.readouterr().out.startswith(
        """usage: prog SOURCE [MORE ...] --size FLOAT [--FLAG VALUE ...]

Does it.

  SOURCE
      What is read. (required)
  MORE ...
      Others. (default: empty)
  --size FLOAT
      Size of the result. (required)
  --side INT
      Side. Default: the source's.
  --undescribed STR
      (default: empty)

shape: Sides of the shape.

  --edge-length FLOAT
      Length of an edge, in a sentence that is long enough to
"""
    )
    default = Command(source="a", size=2.0, side=3, shape=Shape(pair=(1.0, 4.0)))
    assert show_page(["--help"], Command, prog="prog", description="Does it.", default=default)
    shown = capsys.readouterr().out
    for part in ("read. (default: a)", "result. (default: 2.0)", "Default: the source's. (default: 3)", "1.0 4.0)"):
        assert part in shown


COMMANDS = [
    (sample, sample.SampleConfig),
    (evaluate, evaluate.EvaluateConfig),
    (report, report.ReportConfig),
    (prepare, prepare.PrepareConfig),
    (convert, convert.ConvertConfig),
]


@pytest.mark.parametrize(("module", "kind"), COMMANDS, ids=lambda value: value.__name__)
def test_every_command_explains_each_of_its_flags_in_sentences(module, kind, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    texts, name = {}, ""
    for line in lines:  # flags are indented by two, and their texts by six
        if line.startswith("      "):
            texts[name] = f"{texts[name]} {line.strip()}".strip()
        elif line.startswith("  "):
            name = line.split()[0].rstrip(",")
            texts[name] = ""
    fields = [field for field in dataclasses.fields(kind) if field.name != "sampling"]
    for field in [*fields, *(dataclasses.fields(kind.sampling) if hasattr(kind, "sampling") else ())]:
        text = texts.get("--" + field.name.replace("_", "-")) or texts[field.name.upper()]
        assert text.split(" (default: ")[0].removesuffix(" (required)").endswith("."), text
