import re

from run_folders import Page, report, write_run

from fastmask.reporting.load import load_runs
from fastmask.reporting.tables import changes, configuration, differences, evaluation, flattened, summary


def loaded(*folders):
    return load_runs([str(folder) for folder in folders])


def test_only_rows_that_differ_are_differences(tmp_path):
    first = write_run(tmp_path / "a", config={"sigma_data": 0.5})
    second = write_run(tmp_path / "b", config={"lr": 0.001, "run_dir": "runs/b", "process": "flow", "t_mean": 0.0})
    page = Page(differences(loaded(first, second)))
    assert page.tables == [
        [
            ["", "a", "b"],
            ["--lr", "0.003", "0.001"],
            ["process", "edm", "flow"],
            ["--sigma-data", "0.5", "no such flag"],
            ["--t-mean", "no such flag", "0"],
        ]
    ]
    assert differences(loaded(first, write_run(tmp_path / "c", config={"sigma_data": 0.5}))) == (
        "<p>The configurations are the same.</p>"
    )


def test_changes_are_listed_with_their_first_step(tmp_path):
    entries = [{"step": 1200, "field": "ema_decay", "from": 0.9, "to": 0.99}, {"field": "no step"}]
    page = Page(changes(loaded(write_run(tmp_path / "a", said={"changes": entries}), write_run(tmp_path / "b"))))
    assert page.tables[0][1:] == [["a", "1,201", "--ema-decay", "0.9", "0.99"]]
    assert changes(loaded(write_run(tmp_path / "b"))) == ""


def test_the_whole_configuration_and_the_command_are_there(tmp_path):
    text = configuration(loaded(write_run(tmp_path / "a", said={"command": ["train.py", "--lr", "1"]})))
    assert Page(text).row("--batch-size") == ["64"]
    assert "<pre>train.py --lr 1</pre>" in text


def test_the_summary_says_what_a_run_is_and_cost(tmp_path):
    lines = [report(10, images_per_s=1.0, train_s=7200.0), report(50, images_per_s=3.0, train_s=14_400.0)]
    said = {"world_size": 4, "versions": {"gpu": "NVIDIA H100", "torch": "2.13"}}
    folder = write_run(tmp_path / "a", lines, config={"device": "cuda"}, said=said)
    page = Page(summary(loaded(folder), 2.5))
    assert page.row("Network") == ["maskdit: width 96, depth 4; decoder 64, 2; patch 2"]
    assert page.row("Device") == ["4 x NVIDIA H100"]
    assert page.row("Steps") == ["50 of 10050%"]  # the bar's text for browsers without bars
    assert page.row("Images seen") == ["3,200"]
    assert page.row("Last loss") == ["0.0400"]
    assert page.row("Throughput, median") == ["2 images/s"]
    assert page.row("Training time") == ["4 hours"]
    assert page.row("Device time") == ["16 GPU-hours"]
    assert page.row("Cost at 2.5 per hour and device") == ["40.00"]
    assert "Cost" not in Page(summary(loaded(folder), 0.0)).text
    assert re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d", page.row("Last report")[0])


def test_metrics_stand_beside_their_protocol(tmp_path):
    first = {
        "fid": 12.3456,
        "step": 1000,
        "train_s": 3.0,
        "names": ["x"],
        "protocol": {"source": "a", "samples": 5, "v": {"t": 1}},
    }
    second = {"fid": 3, "recall": 0.5, "protocol": {"source": "b", "samples": 5, "v": {"t": 1}}}
    folders = [write_run(tmp_path / name, evaluation=each) for name, each in (("a", first), ("b", second))]
    page = Page(evaluation(loaded(*folders, write_run(tmp_path / "c"))))
    assert page.tables[0] == [
        ["", "a", "b"],
        ["step", "1,000", "not measured"],
        ["FID lower is better", "12.35", "3"],
        ["recall higher is better", "not measured", "0.5"],
    ]
    assert page.row("v.t") == ["1", "1"]
    assert "protocols differ" not in page.text
    second["protocol"]["samples"] = 50
    write_run(folders[1], evaluation=second)
    assert "The protocols differ in samples: compare" in Page(evaluation(loaded(*folders))).text
    assert evaluation(loaded(tmp_path / "c")) == ""


def test_nested_mappings_become_flat():
    assert flattened({"a": {"b": {"c": 1}, "d": 2}, "e": []}) == {"a.b.c": 1, "a.d": 2, "e": []}
    assert flattened("text") == {}
