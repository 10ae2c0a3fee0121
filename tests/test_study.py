"""The study: its configurations, a miniature from training to the report, and the arithmetic of its curves."""

import itertools
import json
import math
import re

import pytest

from bench import rows
from bench.study import __main__ as command
from bench.study import recipes, report, runs
from bench.study.curves import Point, ahead, curves, geometric_mean, mean, metric_at, seconds_per_image, time_to
from fastmask.data.in_memory import Digits

BATCH = recipes.DATASETS["digits"].batch


def power_law(scale, speed, marks=(0.25, 0.5, 1.0, 2.0)):
    """A curve whose Frechet distance is scale / time, and which sees speed times as many images per time."""
    return [Point(speed * t, t, {"frechet": scale / t, "recall": math.log(t)}) for t in marks]


def test_values_between_evaluations():
    points = power_law(3.0, 2.0)
    assert metric_at(points, "time", 0.7, "frechet") == pytest.approx(3.0 / 0.7)
    assert metric_at(points, "images", 1.4, "frechet") == pytest.approx(3.0 / 0.7)
    assert metric_at(points, "time", 0.7, "recall") == pytest.approx(math.log(0.7))
    assert metric_at(points, "time", 2.0, "frechet") == pytest.approx(1.5)
    assert math.isnan(metric_at(points, "time", 0.2, "frechet"))
    assert math.isnan(metric_at(points, "time", 2.1, "frechet"))


def test_the_time_to_a_distance():
    points = power_law(3.0, 1.0)
    assert time_to(points, 3.0 / 0.8) == pytest.approx(0.8)
    assert time_to(points, 1.0) == math.inf
    assert time_to(points, 20.0) == time_to(points, 12.0) == 0.25


@pytest.mark.parametrize("factor", [0.4, 0.8, 1.0, 1.5, 3.0])
def test_how_far_a_recipe_is_ahead(factor):
    """At scale s a recipe needs s times the time of the dense network, wherever the two are compared."""
    dense = power_law(1.0, 1.0, (0.25, 0.5, 0.75, 1.0))
    assert ahead(dense, power_law(1 / factor, 1.0)) == (pytest.approx(factor), "")


def test_a_recipe_that_is_off_the_curves():
    dense = power_law(1.0, 1.0, (0.25, 0.5, 0.75, 1.0))
    assert ahead(dense, power_law(5.0, 1.0)) == (0.25, "at most")
    assert ahead(dense, power_law(0.2, 1.0, (0.5, 1.0))) == (2.0, "at least")
    assert ahead(dense, power_law(0.2, 1.0, (1.5, 2.0))) == (pytest.approx(1 / 1.5), "at least")
    assert math.isnan(ahead(dense, power_law(9.0, 1.0, (0.25, 0.5))).ratio)


def test_a_dense_network_that_got_there_before_its_end():
    dense = power_law(1.0, 1.0, (0.25, 0.5, 0.75, 1.0))
    dense[2].metrics["frechet"] = 0.5
    assert ahead(dense, dense) == (1.0, "")


def test_rows_that_are_there_twice():
    cases = [{"dataset": "digits", "process": "edm", "seed": 0, "start": 0.0, "images": n} for n in (10, 5, 10)]
    listed = [
        {"bench": "study", "variant": "dense", "case": case, "metrics": {"frechet": float(i)}}
        for i, case in enumerate(cases, start=1)
    ]
    (points,) = curves(listed, "digits", "edm", {"dense": 1.0})["dense"].values()
    assert [(point.images, point.metrics["frechet"]) for point in points] == [(5, 2.0), (10, 3.0)]


def test_times_are_those_of_one_run():
    case = {"dataset": "digits", "batch": 64}
    listed = [
        {"bench": "study_step", "variant": name, "case": case, "median_ms": ms, "run": run}
        for name, ms, run in (("dense", 64.0, "a"), ("tread-0.5", 1.0, "a"), ("dense", 128.0, "b"))
    ]
    assert seconds_per_image(listed, "digits") == {"dense": 0.002}
    assert seconds_per_image(listed, "fashion") == {}


def test_confidence_intervals():
    assert mean([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.303 / math.sqrt(3)))
    assert mean([4.0]) == (4.0, math.inf)
    middle, low, high = geometric_mean([0.5, 1.0, 2.0])
    assert (middle, low * high) == pytest.approx((1.0, 1.0))
    assert geometric_mean([3.0]) == (pytest.approx(3.0), 0.0, math.inf)
    assert high == pytest.approx(math.exp(4.303 * math.log(2) / math.sqrt(3)))


def test_every_run_can_be_configured(tmp_path):
    jobs = list(recipes.jobs())
    assert len({job.name for job in jobs}) == len(jobs)
    for job in jobs:
        config = recipes.config_of(job, tmp_path)
        config.check()
        config.network.check(recipes.DATASETS[job.dataset].image_size)
        assert config.max_steps * recipes.DATASETS[job.dataset].batch <= 2 * recipes.DATASETS[job.dataset].images
        assert all(step % config.checkpoint_every == 0 for step in job.marks)
        assert config.keep_checkpoints > config.max_steps / config.checkpoint_every + 100  # and those of 100 stops


def test_a_recipe_that_is_tuned_later_is_evaluated_as_late():
    """Recipes with cheap steps see up to twice the images in equal time, and their curves have to reach there."""
    for recipe in recipes.RECIPES.values():
        if recipe.parent and max(recipe.starts) > 1:
            assert max(recipes.RECIPES[recipe.parent].evaluated_at) == 2.0


def test_a_tuned_run_begins_at_a_checkpoint_of_its_parent(tmp_path):
    by_name = {job.name: job for job in recipes.jobs()}
    tuned = [job for job in by_name.values() if job.start]
    assert tuned
    for job in tuned:
        run, _, step = (
            recipes.config_of(job, tmp_path).init.removeprefix(f"{tmp_path}/").rpartition("/checkpoints/step-")
        )
        assert by_name[run].recipe == recipes.RECIPES[job.recipe].parent
        images = recipes.DATASETS[job.dataset].images
        assert by_name[run].marks[int(step)] == round(job.start * images)
        assert list(job.marks.values()) == [round((job.start + recipes.TUNED_FOR) * images)]


@pytest.fixture
def miniature(monkeypatch, tmp_path):
    """Runs of two to eight steps on the digits, with their rows in a folder."""
    digits = recipes.DATASETS["digits"]._replace(images=4 * BATCH, samples=20)
    monkeypatch.setitem(recipes.DATASETS, "digits", digits)
    monkeypatch.setattr(runs, "SAMPLING", recipes.SAMPLING.__class__(sample_steps=2, cfg_scale=1.0))
    runs._evaluator.cache_clear()
    return lambda *flags: command.main([*flags, "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "rows")])


def rows_of(tmp_path):
    return [json.loads(line) for line in (tmp_path / "rows" / "study-digits.jsonl").read_text().splitlines()]


def test_a_miniature_from_training_to_the_report(miniature, tmp_path, capsys, monkeypatch):
    only = "digits/edm/(dense|maskdit-0.5|maskdit-0.5-tuned-1)/0"
    assert miniature("--only", only) == 0
    rows = rows_of(tmp_path)
    done = [(row["variant"], row["case"]["images"] // BATCH) for row in rows]
    assert done == [
        *itertools.product(["dense"], [1, 2, 3, 4]),
        *itertools.product(["maskdit-0.5"], [2, 4, 6]),
        ("maskdit-0.5-tuned", 5),
    ]
    assert all(math.isfinite(row["metrics"]["frechet"]) and row["samples"] == 20 for row in rows)
    # Nothing is done twice, and a row that is missing is evaluated again, to the same numbers.
    assert miniature("--only", only) == 0
    assert rows_of(tmp_path) == rows
    path = tmp_path / "rows" / "study-digits.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    assert miniature("--only", only, "--plan") == 0
    assert "2 of 3 runs are done" in (out := capsys.readouterr().out)
    assert out.endswith("digits/edm/dense/0\n")
    assert miniature("--only", only) == 0
    assert rows_of(tmp_path)[-1]["metrics"] == rows[0]["metrics"]
    # Without times there is no report.
    monkeypatch.setattr(command.rows, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    assert miniature("--report") == 2
    assert "no rows of the study" in capsys.readouterr().err
    assert miniature("--only", only, "--time") == 0
    assert miniature("--report") == 0
    text = (tmp_path / "docs" / "study.md").read_text()
    assert (tmp_path / "docs" / "study-digits.png").stat().st_size > 10_000
    assert "| `dense`: DiT, all patches | 1.00 | " in text
    assert text.count("\n| ") == 5  # two lines of the header, and three recipes
    assert "1 of 3 seeds" in text


def test_wrong_arguments(miniature, capsys, monkeypatch, tmp_path):
    assert miniature("--only", "digits/ddpm") == 2
    assert "--only 'digits/ddpm' matches no run: the first of them is digits/edm/dense/0" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert miniature("--only", "fashion/edm/dense/0") == 2
    assert "there is no fm-store: make it from Fashion-MNIST's" in capsys.readouterr().err
    assert miniature("--only", "(") == 2
    assert "--only '(' is no regular expression: missing ), unterminated subpattern" in capsys.readouterr().err


def test_the_report_of_two_seeds():
    """The dense network ends at 1; the other gets there in half the time with one seed, in a third with the other."""
    of = {
        "dense": {seed: power_law(1.0, 100, (0.25, 0.5, 0.75, 1.0)) for seed in (0, 1)},
        "tread-0.5": {seed: power_law(1 / speed, 100) for seed, speed in ((0, 2.0), (1, 3.0))},
    }
    for points in itertools.chain.from_iterable(seeds.values() for seeds in of.values()):
        for point in points:
            point.metrics.update(coverage=0.5, agreement=0.25)
    lines = report.table(of, {"dense": 2.0, "tread-0.5": 1.0})
    assert lines[2].startswith(
        "| `dense`: DiT, all patches | 1.00 | 1.00 ± 0.00 | 1.00 ± 0.00 | 0.000 ± 0.000 | 0.500 ± 0.000 |"
    )
    assert lines[3].startswith("| `tread-0.5`: TREAD, middle on half | 0.50 | 0.417 ± 1.059 | 0.417 ± 1.059 |")
    assert lines[3].endswith("| 2.45x [0.19, 32.19] |")


def test_digits_have_as_many_positions_as_the_report_says():
    assert f"{Digits(8, 10, False).shape[1] ** 2 // 4} positions" in recipes.DATASETS["digits"].what


def test_the_page_is_that_of_the_committed_rows(tmp_path):
    report.write(rows.RESULTS, tmp_path)
    assert (tmp_path / "study.md").read_text() == (rows.ROOT / "docs" / "study.md").read_text()


def test_the_ratios_of_the_readme_are_on_the_page():
    section = (rows.ROOT / "README.md").read_text().split("## Does masking pay?")[1].split("\n## ")[0]
    page, found = (rows.ROOT / "docs" / "study.md").read_text(), re.findall(r"\d+\.\d+x", section)
    assert found
    assert [ratio for ratio in found if ratio not in page] == []
