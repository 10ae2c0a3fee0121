"""The command of the cost model: what it prints, and that it never calls a prediction measured."""

import re
import sys

import pytest

from bench.instruments import model
from fastmask.cli import run_command
from fastmask.train import main as train
from fastmask.training.report import console


def said(monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", ["bench.instruments.model", *argv])
    model.main()
    return capsys.readouterr().out


def rows(out):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")]


def test_a_recipe_has_its_price(monkeypatch, capsys):
    out = said(monkeypatch, capsys, "--preset", "xl2-in256", "--gpu", "h100", "--gpus", "8", "--price", "2.5")
    assert "PREDICTION, not measured, assuming 65% of the peak" in out
    table = {row[0]: row[1:] for row in rows(out)}
    number = lambda cell: float(cell.replace(",", ""))  # noqa: E731
    stages = [table["xl2-in256"], table["xl2-in256-unmask"], table["whole recipe"]]
    for stage in stages:
        assert number(stage[-2]) == pytest.approx(8 * number(stage[-3]), rel=0.01)
        assert number(stage[-1]) == pytest.approx(2.5 * number(stage[-2]), rel=0.01)
    assert number(stages[2][-2]) == pytest.approx(number(stages[0][-2]) + number(stages[1][-2]), abs=0.11)
    assert stages[1][1] == "tf32"
    assert table["training, per image"] == ["392.7 GFLOP"]
    assert table["memory: moments"] == ["5.84 GB"]


def test_an_assumed_share_of_the_peak(monkeypatch, capsys):
    table = rows(said(monkeypatch, capsys, "--preset", "dit-xl2-in512", "--mfu", "0.5", "--precision", "bf16"))
    shown = {row[1]: row[4] for row in table if row[0] == "dit-xl2-in512"}
    hopper = {"1 x H100 SXM 80 GB": "157", "1 x H200 SXM 141 GB": "157"}  # the same peak
    assert shown == {"1 x A100 SXM 80 GB": "50", **hopper, "1 x B200 (HGX)": "357"}


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--preset", "xl3"], "invalid choice: 'xl3'"),
        (["--gpus", "7"], "a batch of 1024 does not divide among 7 GPUs"),
        (["--mfu", "1.5"], "--mfu is a share in"),
        (["--price", "nan"], "--price must be at least 0"),
        (["--preset", "digits", "--count"], "--count counts presets of latents"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, argv, said):
    monkeypatch.setattr(sys, "argv", ["bench.instruments.model", *argv])
    with pytest.raises(SystemExit) as stop:
        model.main()
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert said in captured.err


def test_too_little_memory(monkeypatch, capsys):
    monkeypatch.setitem(model.GPUS, "h100", model.GPUS["h100"]._replace(memory=16e9))
    monkeypatch.setattr(sys, "argv", ["bench.instruments.model", "--gpu", "h100"])
    with pytest.raises(SystemExit):
        model.main()
    assert "too little memory for any batch: 16.1 GB are taken before the first image" in capsys.readouterr().err


def test_the_dry_run_shows_the_same(monkeypatch, capsys):
    monkeypatch.setattr(console, "width", 200)
    monkeypatch.setattr(sys, "argv", ["train", "--preset", "xl2-in256", "--dry-run", "--device", "cpu"])
    run_command("fastmask.train", train)
    out = capsys.readouterr().out
    assert re.search(r"kept for backward, bf16 .* 147\.0 MB per image", out)
    assert re.search(r"largest batch in 80 GB, 10% free .* 368 ", out)
    shown = re.search(r"prediction, one H100 SXM 80 GB, bf16 .* ([\d,]+) images/s, ([\d,.]+) hours", out)
    table = {row[0]: row for row in rows(said(monkeypatch, capsys, "--gpu", "h100"))}["xl2-in256"]
    assert shown.groups() == (table[4], table[7])
    assert re.search(r"not measured; assuming 65% of the peak", out)
