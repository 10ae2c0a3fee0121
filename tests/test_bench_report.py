"""A figure without a row cannot be printed, nor drawn."""

import json
import re
import subprocess
import sys

import pytest

from bench.instruments.model import network
from bench.report import __main__ as report
from bench.report import plots, sections
from bench.report.__main__ import committed
from bench.report.derived import Rows
from bench.report.sections import NOT_MEASURED, PUBLISHED, cell, kernels, loaders, steps, summary
from fastmask.diffusion.masking import kept_count
from fastmask.models.counts import forward_macs
from fastmask.presets import PRESETS
from fastmask.training.config import preset_config

H100 = "NVIDIA H100 80GB HBM3"
GMAC = {"dense": 120.0, "masked-0.5": 60.0, "sprint-0.75": 40.0}


def base(median, device, **more):
    times = {"median_ms": median, "p20_ms": median * 0.9, "p80_ms": median * 1.1, "rounds": 5}
    machine = {"device": device, "torch": "2.11", "commit": "aaaa", "date": "2026-11-24T10:00:00+00:00"}
    return {**times, **machine, **more}


def step(median, form="masked-0.5", variant="ours", *, device=H100, run="r", side=256, **more):
    recipe = {"dense": "dit-", "sprint-0.75": "sprint-"}.get(form, "")
    preset = f"{recipe}xl2-in256"
    case = {"preset": preset, "image_size": side, "form": form, "batch": 100, "precision": "bf16"}
    figures = {"images_per_s": 1e5 / median, "forward_gmac": GMAC[form], "optimizer": True, "run": run}
    return {"bench": "step", "case": case, "variant": variant, **base(median, device), **figures, **more}


def kernel(median, variant="fused", **more):
    case = {"op": "modulate_norm", "direction": "forward", "dtype": "bf16", "shape": "B=2 K=3 D=4"}
    figures = {"least_bytes": 10**9, "flops": 0, "copy_bandwidth": 2.5e12, "run": "k"}
    return {"bench": "kernel", "case": case, "variant": variant, **base(median, H100), **figures, **more}


def loader(median, device=H100, side=256, **more):
    """Time two batches of 100 images."""
    case = {"data": "folder", "image_size": side, "shape": f"3x{side}x{side}", "batch": 100, "batches": 2}
    case["num_workers"] = 1
    return {"bench": "loader", "case": case, "variant": "ImageFolder", **base(median, device), "run": "l", **more}


def tables(lines):
    """Cells by their column, for each row of each table."""
    found, columns = [], []
    for line in lines:
        cells = [part.strip() for part in line.split("|")[1:-1]]
        if not line.startswith("|"):
            columns = []
        elif not columns:
            columns = cells
        elif set(line) - set("|- "):
            found.append(dict(zip(columns, cells, strict=True)))
    return found


MEASURED = [
    step(200.0, "dense"),
    step(125.0),
    step(250.0, variant="plain eager"),
    step(100.0, variant="products"),
    kernel(0.5),
    kernel(1.0, "reference"),
    loader(500.0),
]


def test_the_figures_are_those_of_the_rows():
    rows = Rows(MEASURED)
    by_stack = {(row["form"], row["stack"]): row for row in tables(steps(rows))}
    mine = by_stack["masked-0.5", "ours"]
    assert mine["ms (p20 to p80)"] == "125 (112.5 to 137.5)"
    assert mine["images/s"] == "800"
    assert mine["against plain eager"] == "2.00x"
    assert mine["against plain compiled"] == NOT_MEASURED
    assert mine["against dense, same stack"] == "1.60x"
    assert mine["FLOP bound"] == "2.00x"
    assert mine["share of it"] == "80%"
    assert mine["products alone"] == "80% of the time"
    assert mine["MFU"] == f"{6 * 60e9 * 800 / 989.4e12:.1%}"
    assert by_stack["dense", "ours"]["against plain eager"] == NOT_MEASURED
    assert by_stack["dense", "ours"]["FLOP bound"] == ""
    norm = next(row for row in tables(kernels(rows)) if row["variant"] == "fused")
    assert norm["GB/s of minimum traffic"] == "2000"
    assert norm["of copy bandwidth"] == "80.0%"
    assert norm["against reference"] == "2.00x"


def test_a_recipe_is_compared_with_dense_alone():
    rows = Rows([*MEASURED, step(80.0, "sprint-0.75"), step(60.0, "sprint-0.75", "products")])
    mine = next(row for row in tables(steps(rows)) if row["form"] == "sprint-0.75")
    assert (mine["network"], mine["against plain eager"], mine["products alone"]) == ("xl2", "", "75% of the time")
    assert (mine["against dense, same stack"], mine["share of it"]) == ("2.50x", f"{2.5 / 3:.0%}")
    short = {row["form"]: row for row in tables(summary(rows))}["sprint-0.75"]
    assert (short["plain eager"], short["ours compiled"], short["ours / plain eager"]) == ("", "", "")
    assert (short["ours"], short["ours masked / dense"]) == ("1,250", "2.50x")


def test_the_summary_compares_the_best_of_ours(tmp_path):
    mine, dense = step(125.0), step(200.0, "dense")
    compiled, plain = step(100.0, variant="ours compiled"), step(150.0, variant="plain compiled")
    found = {row["form"]: row for row in tables(summary(Rows([mine, dense, compiled, plain])))}
    masked = found["masked-0.5"]
    assert (masked["ours"], masked["ours compiled"], masked["plain eager"]) == ("800", "1,000", NOT_MEASURED)
    assert masked["ours / plain compiled"] == "1.50x"
    assert (masked["ours masked / dense"], masked["FLOP bound"], masked["share of it"]) == ("1.60x", "2.00x", "80%")
    assert found["dense"]["ours masked / dense"] == ""
    readme = tmp_path / "README.md"
    readme.write_text("before\n" + "\nold\n".join(report.README_MARKS) + "\nafter\n")
    report.write_readme(readme, Rows([mine]))
    text = readme.read_text()
    assert text.startswith("before\n<!--")
    assert text.endswith("-->\nafter\n")
    assert "old" not in text
    assert "| 800 |" in text
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="has no lines"):
        report.write_readme(readme, Rows([mine]))


def test_the_readme_says_what_the_committed_rows_say():
    text = (report.ROOT / "README.md").read_text()
    start, end = (text.index(mark) for mark in report.README_MARKS)
    found, _ = committed(report.RESULTS)
    assert text[start:end] == "\n".join([report.README_MARKS[0], *summary(Rows(found)), "", ""])


def test_a_loader_stands_beside_the_fastest_step_of_its_machine_and_side():
    known = tables(loaders(Rows(MEASURED)))[0]
    assert known["ms of a batch"] == "250"
    assert known["images/s"] == "400.0"
    assert known["fastest step, images/s"] == "800.0"
    assert known["loader / fastest step"] == "0.50x"
    assert known["fastest step"] == "xl2 masked-0.5, ours, batch 100, bf16, aaaa"
    faster = step(100.0, variant="ours compiled", run="another", commit="bbbb")
    (row,) = tables(loaders(Rows([*MEASURED, faster])))
    assert (row["loader / fastest step"], row["fastest step"][-4:]) == ("0.40x", "bbbb")
    no_training = (
        step(10.0, device="NVIDIA A100-SXM4-80GB"),
        step(10.0, side=512),
        step(10.0, optimizer=False),
        step(10.0, variant="products"),
        step(10.0, miniature=True),
    )
    for other in no_training:
        assert tables(loaders(Rows([*MEASURED, other]))) == [known]
        (row,) = tables(loaders(Rows([loader(500.0), other])))
        assert row["images/s"] == "400.0"
        assert {row[name] for name in row if "step" in name} == {NOT_MEASURED}


def reading(images_per_s, variant, bench="store", **more):
    """Time one batch of 100 images."""
    case = {"data": "moments", "image_size": 256, "shape": "8x32x32", "batch": 100, "batches": 1, "num_workers": 2}
    row = {"bench": bench, "case": case, "variant": variant, "run": "s", **base(1e5 / images_per_s, H100)}
    return {**row, **more}


def test_a_store_stands_beside_files_and_a_copy():
    rows = [reading(600, "StoreDataset"), reading(100, "DataLoader over .npy"), reading(2400, "copy")]
    by_reader = {row["reader"]: row for row in tables(sections.stores(Rows(rows)))}
    ours = by_reader["StoreDataset"]
    assert (ours["images/s"], ours["against files of .npy"], ours["of a plain copy"]) == ("600", "6.00x", "25.0%")
    assert by_reader["copy"]["of a plain copy"] == ""
    (alone,) = tables(sections.stores(Rows(rows[:1])))
    assert (alone["against files of .npy"], alone["of a plain copy"]) == (NOT_MEASURED, NOT_MEASURED)
    (long,) = tables(sections.stores(Rows([reading(600, "StoreDataset", own_mib=494.3, grown_mib=0.2)])))
    assert (long["memory"], long["grown by"], long["of a plain copy"]) == ("494 MiB", "0.2 MiB", "")


def test_preparing_stands_beside_its_decoder():
    rows = [reading(100, "Pillow", "decoding"), reading(90, "prepare, Pillow", "decoding")]
    (row,) = tables(sections.decoding(Rows(rows)))
    assert (row["decoder"], row["images/s"], row["prepare, images/s"]) == ("Pillow", "100", "90")
    assert row["prepare / decoder"] == "0.90x"
    (row,) = tables(sections.decoding(Rows(rows[:1])))
    assert row["prepare / decoder"] == NOT_MEASURED


def test_samplers_stand_beside_the_plain_loop_of_their_run():
    case = {"size": "b2", "image_size": 256, "batch": 4, "precision": "fp32", "solver": "heun", "sample_steps": 6}
    rows = [
        {"bench": "sampling", "case": case, "variant": name, **base(median, H100), "run": "s"}
        for name, median in (("plain", 3000.0), ("ours", 2000.0), ("ours interval", 1500.0))
    ]
    plain, ours, interval = tables(sections.sampling(Rows(rows)))
    assert (plain["images/s"], plain["against the plain loop"]) == ("1.33", "")
    assert (ours["against the plain loop"], interval["against the plain loop"]) == ("1.50x", "2.00x")
    assert interval["steps"] == "6 of heun"
    (alone,) = tables(sections.sampling(Rows(rows[1:2])))
    assert alone["against the plain loop"] == NOT_MEASURED


def test_loaders_have_a_table_per_machine():
    lines = list(loaders(Rows([loader(500.0), loader(250.0, device="NVIDIA A100-SXM4-80GB"), step(125.0)])))
    assert [text for text in lines if text.startswith("###")] == [
        "### Loaders: NVIDIA H100 80GB HBM3",
        "### Loaders: NVIDIA A100-SXM4-80GB",
    ]
    assert [row["loader / fastest step"] for row in tables(lines)] == ["0.50x", NOT_MEASURED]


def test_without_rows_nothing_is_a_figure(tmp_path):
    lines = sections.report(Rows([]))
    text = "\n".join(lines)
    start = text.index("### Published")
    goals = tables(text[:start].splitlines())
    assert [row["measured, images/s"] for row in goals] == [NOT_MEASURED] * 4
    assert [row["goal, images/s"] for row in goals] == ["1,219", "673", "285", "152"]
    # Of all numbers above the published ones none is left without the goals, the device and the percentiles.
    above = re.sub(r"^\| .*|.*### Goals.*|\(20th to 80th percentile\)", "", text[:start], flags=re.MULTILINE)
    assert re.findall(r"\d", above) == []
    assert tables(text[start:].splitlines())[0]["figure"] == PUBLISHED[0][2]
    drawn = plots.draw(Rows([]), tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert all("there is no row for it" in note for note in drawn)


@pytest.mark.parametrize("gone", range(len(MEASURED)))
def test_a_row_that_is_gone_takes_its_figures_with_it(gone):
    """Each figure that differs between two rows' reports is missing where the row is."""
    missing = MEASURED[gone]
    rest = "\n".join(sections.report(Rows(MEASURED[:gone] + MEASURED[gone + 1 :])))
    other = "\n".join(sections.report(Rows([*MEASURED[:gone], _scaled(missing), *MEASURED[gone + 1 :]])))
    whole = "\n".join(sections.report(Rows(MEASURED)))
    changed = set(whole.splitlines()) - set(other.splitlines())
    assert changed  # the row is used
    assert not changed & set(rest.splitlines())
    assert sections.time_of(missing) not in rest


def _scaled(row):
    return {**row, **{name: row[name] * 1.37 for name in ("median_ms", "p20_ms", "p80_ms")}}


def test_a_cell_needs_all_its_rows():
    assert cell("{:.1f}", lambda a, b: 1.0, step(1.0), None) == NOT_MEASURED
    assert cell("{:.1f}", lambda a: a["median_ms"], step(1.0)) == "1.0"


def test_only_what_belongs_together_is_compared():
    def against(dense):
        return next(r for r in tables(steps(Rows([dense, step(125.0)]))) if r["form"] != "dense")[
            "against dense, same stack"
        ]

    assert against(step(200.0, "dense", run="another")) == "1.60x"  # the same commit
    for other in (
        step(200.0, "dense", run="another", commit="bbbb"),
        step(200.0, "dense", run="another", code="x"),
        step(200.0, "dense", device="NVIDIA A100-SXM4-80GB"),
        step(200.0, "dense", variant="ours compiled"),
        step(200.0, "dense", optimizer=False),
        step(200.0, "dense", side=512),
        step(200.0, "dense", miniature=True),
    ):
        assert against(other) == NOT_MEASURED
    unknown = [step(200.0, "dense", run="a", commit="unknown"), step(125.0, commit="unknown")]
    assert tables(steps(Rows(unknown)))[-1]["against dense, same stack"] == NOT_MEASURED


def test_goals_take_the_best_row_of_an_h100():
    rows = [step(125.0), step(100.0, variant="ours compiled"), step(50.0, variant="plain eager")]
    rows += [step(10.0, device="NVIDIA H100 PCIe"), step(10.0, optimizer=False)]
    goal = next(r for r in tables(sections.goals(Rows(rows))))
    assert goal["measured, images/s"] == "1,000"
    assert goal["of the goal"] == "82%"
    assert goal["row"] == "ours compiled, batch 100, aaaa"


def test_goals_know_the_operations():
    for form, side, _, gmac in sections.GOALS:
        config = preset_config(f"{'dit-' if form == 'dense' else ''}xl2-in{side}", PRESETS)
        model = network(config)
        assert forward_macs(model, kept_count(model.length, config.masking.mask_ratio)) / 1e9 == pytest.approx(
            gmac, abs=0.005
        )


def test_plots_are_drawn_of_rows(tmp_path):
    notes = plots.draw(Rows(MEASURED), tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"{name}-nvidia-h100-80gb-hbm3.png" for name in ("kernels", "speedup", "throughput")]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())
    assert len(notes) == 3


def test_rows_that_are_not_committed_are_left_out(tmp_path, monkeypatch, capsys):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    file = tmp_path / "card.jsonl"
    file.write_text(json.dumps(step(125.0)) + "\n")
    assert len(committed(tmp_path)[0]) == 1  # no git: all there is
    subprocess.run([*git, "init", "--quiet"], check=True)
    assert committed(tmp_path)[0] == []
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message", "rows"], check=True)
    with file.open("a") as lines:
        lines.write(json.dumps(step(77.0, variant="ours compiled")) + "\n")
    out = tmp_path / "out.md"
    monkeypatch.setattr(sys, "argv", ["report", "--results", str(tmp_path), "--out", str(out), "--no-plots"])
    assert report.main() == 0
    assert "125 (112.5" in out.read_text()
    assert "77 (" not in out.read_text()
    assert "card.jsonl: 1 of 2 rows are not committed, left out" in capsys.readouterr().err


def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys):
    row = step(125.0)
    del row["forward_gmac"]
    cases = [
        (json.dumps(row), "a row has no 'forward_gmac'"),
        ('{"bench": "step"}', "card.jsonl:1 is no row"),
        ("", ""),
    ]
    for text, said in cases:
        folder = tmp_path if said else tmp_path / "none"
        (tmp_path / "card.jsonl").write_text(text + "\n")
        monkeypatch.setattr(sys, "argv", ["report", "--results", str(folder), "--no-plots"])
        assert report.main() == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert said in captured.err
