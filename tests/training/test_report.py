import json
import shutil
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastmask.training.report import Report, read_stats, versions

FIGURES = {"loss": 0.5, "denoising": 0.4, "reconstruction": 1.0, "lr": 1e-3, "mask_ratio": 0.5}


def write_steps(run_dir, *steps, first=0):
    with Report(run_dir, first, 100) as report:
        for step in steps:
            report.write(step, FIGURES, images=64, since=time.perf_counter() - 0.5)


def lines(run_dir):
    return (run_dir / "stats.jsonl").read_text().splitlines()


def test_a_line_per_report(tmp_path, capsys):
    write_steps(tmp_path, 10, 20)
    first, second = map(json.loads, lines(tmp_path))
    assert (first["step"], second["step"]) == (10, 20)
    assert {name: first[name] for name in FIGURES} == FIGURES
    assert first["images_per_s"] == pytest.approx(128, rel=0.1)
    assert first["train_s"] == pytest.approx(0.5, abs=0.1)
    assert second["train_s"] == pytest.approx(1.0, abs=0.2)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split()[:3] == ["step", "10/100", "masked"]
    assert shown[1].endswith("4 s left")


def test_resuming_drops_later_steps(tmp_path):
    write_steps(tmp_path, 10, 20, 30)
    before = lines(tmp_path)
    write_steps(tmp_path, 25, first=20)
    after = lines(tmp_path)
    assert after[:2] == before[:2]
    assert [json.loads(line)["step"] for line in after] == [10, 20, 25]
    assert json.loads(after[2])["train_s"] == pytest.approx(1.5, abs=0.3)


def test_resuming_drops_a_half_written_line(tmp_path):
    write_steps(tmp_path, 10, 20)
    before = lines(tmp_path)
    for cut in (1, 5, len(before[1]) - 1, len(before[1])):
        (tmp_path / "stats.jsonl").write_text(before[0] + "\n" + before[1][:cut])
        with Report(tmp_path, 50, 100):
            assert lines(tmp_path) == before[:1]


def test_a_fresh_run_drops_all(tmp_path):
    write_steps(tmp_path, 10)
    with Report(tmp_path, 0, 100):
        assert lines(tmp_path) == []


def test_tensorboard_drops_later_steps_too(tmp_path):
    write_steps(tmp_path, 10, 20, 30)
    write_steps(tmp_path, 25, first=20)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [10, 20, 25]
    assert events.Scalars("mask_ratio")[0].value == 0.5


def test_without_tensorboard(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    write_steps(tmp_path, 10)
    assert "pip install tensorboard" in capsys.readouterr().out
    assert not (tmp_path / "tensorboard").exists()
    assert len(lines(tmp_path)) == 1


def test_a_picture_is_drawn_and_shown(tmp_path):
    with Report(tmp_path, 0, 100) as report:
        report.picture(7, tmp_path / "samples" / "a.png", torch.zeros(2, 1, 32, 32), 2)
    assert (tmp_path / "samples" / "a.png").exists()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(image.step, image.width, image.height) for image in events.Images("samples")] == [(7, 64, 32)]


def test_reading_figures(tmp_path):
    assert read_stats(tmp_path, 100) == []
    write_steps(tmp_path, 10, 20, 30)
    assert [line["step"] for line in read_stats(tmp_path, 20)] == [10, 20]


DAMAGE = [b"{", b"\0\0\0", b"\xff", b"3", b"{}", b'{"step": null}', b'{"step": 5, "loss": "x"}', b"[" * 10**5]


@pytest.mark.parametrize("content", DAMAGE, ids=lambda content: repr(content[:20]))
def test_damaged_figures_are_said_and_left_out(tmp_path, capsys, content):
    good = json.dumps({"step": 1, "loss": 2.0, "train_s": 1.0}).encode()
    (tmp_path / "stats.jsonl").write_bytes(good + b"\n" + content + b"\n" + good + b"\n")
    assert [line["loss"] for line in read_stats(tmp_path, 100)] == [2.0, 2.0]
    assert capsys.readouterr().out == f"{tmp_path / 'stats.jsonl'}:2 is damaged: left out\n"


def test_versions(monkeypatch):
    found = versions()
    assert found["torch"] == torch.__version__
    assert len(found.get("commit", "0" * 40)) in (40, len("unknown"))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "commit" not in versions()
