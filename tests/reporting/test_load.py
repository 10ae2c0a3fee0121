import json
import math

import pytest
from run_folders import report, write_run
from safetensors.torch import save_file
from torch import zeros

from fastmask.reporting.load import distinct_labels, load_runs, read_json


def test_the_images_follow_changes_of_the_batch(tmp_path):
    changes = [
        {"step": 20, "field": "batch_size", "from": 64, "to": 32},
        {"step": 30, "field": "lr", "from": 1, "to": 2},
        {"step": 50, "field": "batch_size", "from": 32, "to": 16},
        "damaged",
    ]
    run = load_runs([str(write_run(tmp_path / "run", config={"batch_size": 16}, said={"changes": changes}))])[0]
    assert [run.images(step) for step in (10, 20, 30, 100)] == [640, 1280, 1600, 1280 + 960 + 800]


def test_reports_that_a_rollback_undid_are_left_out(tmp_path):
    lines = [report(step, loss=loss) for step, loss in ((10, 1.0), (20, 9.0), (30, 8.0), (20, 0.8), (30, 0.7))]
    run = load_runs([str(write_run(tmp_path / "run", lines))])[0]
    assert [(line["step"], line["loss"]) for line in run.lines] == [(10, 1.0), (20, 0.8), (30, 0.7)]
    assert run.undone == 2


def test_lines_of_the_same_step_are_one_report(tmp_path):
    lines = [report(10), {"step": 10, "eval/fid": 3.0}, report(20, loss=math.nan)]
    run = load_runs([str(write_run(tmp_path / "run", lines))])[0]
    assert [line.get("eval/fid") for line in run.lines] == [3.0, None]
    assert run.lines[0]["loss"] == 0.2


def test_the_parameters_are_those_of_the_newest_checkpoint(tmp_path):
    run = write_run(tmp_path / "run")
    for step, width in ((5, 3), (20, 4)):
        folder = run / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        save_file(
            {"model.w": zeros(width, 5), "model.b": zeros(()), "model.pos_embed": zeros(7)},
            folder / "model.safetensors",
        )
    assert load_runs([str(run)])[0].parameters == 21
    (folder / "model.safetensors").write_bytes(b"damaged")
    assert load_runs([str(run)])[0].parameters is None


def test_device_time_is_training_time_by_world_size(tmp_path):
    run = load_runs([str(write_run(tmp_path / "run", [report(10, train_s=1800.0)], said={"world_size": 8}))])[0]
    assert run.device_hours == 4.0
    for size in (None, 0, "8", True):
        write_run(tmp_path / "run", [report(10)], said={"world_size": size})
        assert load_runs([str(tmp_path / "run")])[0].device_hours is None


def test_labels_are_as_long_as_they_must_be(tmp_path, monkeypatch):
    folders = [tmp_path / name for name in ("a/x/run", "b/x/run", "b/y/run", "other")]
    assert distinct_labels(folders) == ["a/x/run", "b/x/run", "y/run", "other"]
    monkeypatch.chdir(tmp_path)
    assert distinct_labels([type(tmp_path)(".")]) == [tmp_path.name]
    with pytest.raises(ValueError, match="is given twice"):
        distinct_labels([tmp_path / "a", tmp_path / "b" / ".." / "a"])


def test_parts_of_run_json_of_another_kind_are_taken_as_missing(tmp_path):
    said = {"config": [1], "versions": 3, "changes": {"a": 1}, "world_size": "x", "command": 5}
    run = load_runs([str(write_run(tmp_path / "run", said=said))])[0]
    assert (run.config, run.versions, run.changes, run.world_size, run.images(5)) == ({}, {}, [], None, None)


def test_a_json_file_can_be_missing_or_damaged(tmp_path, capsys):
    assert read_json(tmp_path / "none.json") == {}
    assert capsys.readouterr().out == ""
    for content in ("[1]", "{", "[" * 100_000, "\xff"):
        (tmp_path / "some.json").write_text(content, encoding="latin-1")
        assert read_json(tmp_path / "some.json") == {}
        assert "some.json is damaged" in capsys.readouterr().out
    (tmp_path / "some.json").write_text(json.dumps({"a": 1}))
    assert read_json(tmp_path / "some.json") == {"a": 1}
