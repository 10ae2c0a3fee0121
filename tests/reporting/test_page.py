import re

from run_folders import Page, report, write_run

from fastmask.reporting.load import load_runs
from fastmask.reporting.page import page_of


def test_the_sections_of_one_and_of_several_runs(tmp_path):
    changed = {"changes": [{"step": 5, "field": "lr", "from": 1, "to": 2}]}
    folders = [
        write_run(tmp_path / "a", said=changed, pictures=[10], evaluation={"fid": 1.0}),
        write_run(tmp_path / "b"),
    ]
    common = ["Loss", "Loss by noise level", "Samples", "Evaluation", "Schedule", "Speed", "Configuration"]
    for runs, first in ((folders[:1], ["Summary", "Changed on resume"]), (folders, ["Summary", "Differences"])):
        text = page_of(load_runs([str(folder) for folder in runs]))
        assert re.findall(r"<h2>(.*?)</h2>", text) == [*first, *common]
        page = Page(text)
        targets = {own["href"] for tag, own in page.tags if tag == "a"}
        assert targets == {f"#{own['id']}" for tag, own in page.tags if tag == "section"}
        assert text.count("<h1>") == 1
        assert "Changed on resume" in page.text


def test_one_axis_of_each_chart_is_shown(tmp_path):
    """The switch and the style sheet name the same axes."""
    text = page_of(load_runs([str(write_run(tmp_path / "run"))]))
    page = Page(text)
    switches = [own for tag, own in page.tags if own.get("type") == "radio"]
    assert [own["id"] for own in switches if "checked" in own] == ["x-steps"]
    for own in switches:
        key = own["id"].removeprefix("x-")
        assert page.all("div", f"by-{key}")
        assert key == "steps" or f":root:has(#{own['id']}:checked) .by-{key}" in text


def test_a_long_run_has_a_small_page(tmp_path):
    lines = [report(step, loss=1.0 + step % 7) for step in range(1, 5001)]
    text = page_of(load_runs([str(write_run(tmp_path / "run", lines))]))
    assert len(text) < 800_000
    assert "highest 7" in text


def test_a_rollback_is_said(tmp_path):
    lines = [report(10), report(20), report(20), report(10), report(20)]
    assert "run: 3 reports of steps that a rollback undid" in page_of(
        load_runs([str(write_run(tmp_path / "run", lines))])
    )
