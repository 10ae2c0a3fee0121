import json
import math
import re

import pytest
from run_folders import Page, report, write_run

from fastmask.reporting.figures import Figures, metric_name
from fastmask.reporting.load import load_runs


def figures_of(*folders):
    return Figures(load_runs([str(folder) for folder in folders]))


def titles(text):
    return re.findall(r"<h3>([^<]*?)(?: <span|</h3>)", text)


def test_each_key_of_the_reports_has_a_chart(tmp_path):
    others = {"alignment": 0.3, "mfu": 0.4, "bad_images": 2, "eval/fid": 9.0, "eval/recall": 0.5, "router/share": 0.2}
    figures = figures_of(write_run(tmp_path / "run", [report(10, **others), report(20, **others)]))
    assert titles(figures.loss()) == ["Loss", "Denoising", "Reconstruction", "Alignment"]
    assert titles(figures.noise()) == ["At the last report", "By log-SNR"]
    assert titles(figures.evaluation()) == ["FID", "Recall"]
    names = ["Learning rate", "Mask ratio", "Gradient norm", "Update norm / weight norm", "router/share"]
    assert titles(figures.schedule()) == names
    names = ["Throughput", "Waiting for data", "MFU", "Peak memory", "Substituted images"]
    assert titles(figures.speed()) == names


def test_a_chart_is_drawn_over_steps_images_and_time(tmp_path):
    figures = figures_of(write_run(tmp_path / "run", [report(10), report(20, train_s=180.0)]))
    page = Page(figures.loss())
    plots = [own["class"] for own in page.all("div", "plot")]
    assert plots == ["plot by-steps", "plot by-images", "plot by-time"] * 3
    assert "training time, minutes" in page.text
    labels = re.findall(r'<span class="x" style="[^"]*">([^<]*)', figures.loss())
    assert {"10", "20", "500", "1k", "0", "1", "2", "3"} <= {*labels}, "steps, images, minutes"


def test_an_evaluation_without_a_time_has_that_of_the_report_before(tmp_path):
    lines = [report(10), {"step": 15, "eval/fid": 5.0}, report(20), {"step": 25, "eval/fid": 4.0}]
    page = Page(figures_of(write_run(tmp_path / "run", lines)).evaluation())
    paths = [own["d"] for tag, own in page.tags if own.get("data-label") == "run"]
    assert [path.split("L")[0].split()[0] for path in paths] == ["M60000", "M60000", "M50000"]


def test_times_and_values_that_are_not_finite_are_left_out(tmp_path):
    lines = [report(10), report(20, train_s=math.inf, loss=math.nan), report(30, train_s=math.nan), report(40)]
    page = Page(figures_of(write_run(tmp_path / "run", lines)).loss())
    paths = [own["d"].count("L") + 1 for tag, own in page.tags if own.get("data-label")]
    assert paths == [3, 3, 2, 4, 4, 2, 4, 4, 2]


def test_noise_levels_stand_in_order_and_missing_ones_are_gaps(tmp_path):
    last = report(20)
    del last["loss_at_log_snr/-2.0..0.0"]
    page = Page(figures_of(write_run(tmp_path / "a", [report(10), last]), write_run(tmp_path / "b")).noise())
    ranges = json.loads(page.all("div", "by-bins")[0]["data-ranges"])
    assert ranges["bins"] == ["< \N{MINUS SIGN}2", "\N{MINUS SIGN}2 to 0", "> 6"]
    paths = {own["data-label"]: own["d"] for tag, own in page.tags if own.get("data-label") in ("a", "b")}
    assert [path.count("L") for path in (paths["a"], paths["b"])] == [1, 2]
    assert {"v0", "v2", "v5"} <= {own["class"].split()[-1] for tag, own in page.tags if tag == "path"}


def test_runs_of_different_length_share_an_axis(tmp_path):
    figures = figures_of(write_run(tmp_path / "a", [report(10), report(50)]), write_run(tmp_path / "b"))
    paths = [own for tag, own in Page(figures.loss()).tags if own.get("data-label")]
    assert [path["d"].split("L")[-1].split()[0] for path in paths[:2]] == ["50000", "100000"]


@pytest.mark.parametrize(
    ("key", "name"), [("is", "inception score"), ("fid_bias", "FID bias"), ("distance_ratio", "distance ratio")]
)
def test_metrics_have_names(key, name):
    assert metric_name(key) == name
