"""The report page, by its command."""

import json
import re

import pytest
from run_folders import Page, report, write_run

from fastmask.report import main
from fastmask.train import main as train

SMALL = ["--width", "16", "--depth", "1", "--num-heads", "2", "--decoder-width", "16", "--decoder-depth", "1"]
SMALL += [
    "--decoder-num-heads",
    "2",
    "--batch-size",
    "8",
    "--sample-every",
    "3",
    "--sample-steps",
    "2",
    "--device",
    "cpu",
]
SMALL += ["--max-steps", "3", "--unmask-steps", "1", "--report-every", "1"]


def written(tmp_path, *runs, flags=()):
    """Write the page of runs, and return its text and its tags."""
    out = tmp_path / "report.html"
    main([*map(str, runs), "--out", str(out), *flags])
    assert not list(tmp_path.glob(".partial*"))
    text = out.read_text(encoding="utf-8")
    return text, Page(text)


def test_the_page_of_a_run_that_was_trained(tmp_path, capsys):
    train(["--run-dir", str(tmp_path / "own"), *SMALL])
    text, page = written(tmp_path, tmp_path / "own")
    for title in ("Loss", "Denoising", "Reconstruction", "Learning rate", "Gradient norm", "Throughput", "Peak memory"):
        assert f"<h3>{title}" in text, title
    assert page.row("Steps")[0].startswith("3 of 3")
    assert page.row("Images seen") == ["24"]
    assert page.row("Device") == ["1 x CPU"], "the world size is recorded"
    assert re.fullmatch(r"[\d.]+k", page.row("Parameters")[0])
    assert len([own for tag, own in page.tags if tag == "img"]) == 1
    assert re.search(r"1 run, 0\.\d MB: .*report\.html", capsys.readouterr().out)


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    run = write_run(
        tmp_path / "run", config={"data": "https://host/store"}, pictures=[50, 100], evaluation={"fid": 1.0}
    )
    text, page = written(tmp_path, run)
    links = [own[name] for _, own in page.tags for name in ("src", "href") if name in own]
    assert links
    assert all(link.startswith(("data:", "#")) for link in links)
    assert not re.search(r"url\(|@import|fetch\(|XMLHttp|import\(", text)
    policy = next(own["content"] for tag, own in page.tags if own.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_names_and_values_are_escaped(tmp_path):
    hostile = "<script>alert('x')</script>\"&"
    run = write_run(
        tmp_path / "<script>alert(1)<",
        [report(10, **{"</svg><script>": 1.0, "eval/<b>": 2.0, "loss_at_log_snr/<i>": 3.0})],
        config={"preset": hostile, "data": hostile, "<b>": hostile, "lr": [hostile, "\ud800"], "precision": None},
        said={"command": [hostile], "versions": {"torch": hostile, "gpu": hostile, "commit": hostile},
              "changes": [{"step": 3, "field": hostile, "from": hostile, "to": {"a": hostile}}]},
        pictures=[10],
        evaluation={hostile: 1.0, "protocol": {hostile: {hostile: hostile}}},
    )  # fmt: skip
    text, page = written(tmp_path, run, write_run(tmp_path / "other"))
    assert text.count("<script>") == 1
    assert not {"b", "i"} & {tag for tag, own in page.tags if "class" not in own}
    assert "<script>alert('x')</script>\"&" in page.text
    assert all("alert" not in name for _, own in page.tags for name in own)


def test_secrets_are_not_shown(tmp_path):
    url = "https://user:hunter2@host/store?sig=hunter2"
    run = write_run(tmp_path / "run", config={"data": url}, said={"command": ["train.py", "--data", url]})
    assert "hunter2" not in written(tmp_path, run)[0]


def test_several_runs_share_the_charts(tmp_path):
    runs = [write_run(tmp_path / place / "run") for place in ("one", "two")]
    other = write_run(tmp_path / "other", config={"lr": 0.001, "device": "cuda"}, said={"world_size": 8})
    _, page = written(tmp_path, *runs, other, flags=("--price-per-hour", "3600"))
    labels = ["one/run", "two/run", "other"]
    assert page.tables[0][0] == ["", *labels]
    assert page.row("--lr") == ["0.003", "0.003", "0.001"]
    assert page.row("Device time")[2] == "0.0222 GPU-hours"  # 10 s by 8
    assert page.row("Cost at 3600 per hour and device") == ["10.00", "10.00", "80.00"]
    for style, label in zip(("c0", "c1", "c2"), labels, strict=True):
        assert {own["data-label"] for own in page.all("path", style) if "data-label" in own} == {label}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_run_of_an_earlier_version_has_a_page(tmp_path, device, capsys):
    """Without a world size neither device time nor cost are known."""
    lines = [{"step": step, "loss": 1.0 / step} for step in (1, 2)]
    run = write_run(tmp_path / "run", lines)
    (run / "run.json").write_text(json.dumps({"config": {"device": device, "lr": 0.1}}))
    text, page = written(tmp_path, run, flags=("--price-per-hour", "2"))
    assert page.row("Device time") == page.row("Cost at 2 per hour and device") == ["unknown"]
    assert page.row("Parameters") == page.row("Images seen") == ["unknown"]
    assert "number of processes not recorded" in text
    assert "images seen: not recorded" in text
    for name in ("Samples", "Evaluation", "Loss by noise level", "Speed", "Changed on resume"):
        assert f"<h2>{name}</h2>" not in text
    (run / "run.json").unlink()
    assert "--lr" not in written(tmp_path, run)[0]
    assert "run has no run.json: its configuration is not shown" in capsys.readouterr().out


def test_damaged_files_are_left_out_with_a_line(tmp_path, capsys):
    run = write_run(tmp_path / "run", pictures=[10, 20], evaluation={"fid": 1.0})
    with (run / "stats.jsonl").open("a") as file:
        file.write("{damaged\n")
    for name in ("evaluation.json", "run.json", "samples/step-00000020.png"):
        (run / name).write_text("[damaged")
    text, page = written(tmp_path, run)
    out = capsys.readouterr().out
    for name in ("stats.jsonl:11 is damaged", "evaluation.json is damaged", "run.json is damaged", "020.png is no PNG"):
        assert name in out
    assert "1 of 2 sample grids are shown" in text
    assert page.row("Steps") == ["100"]


def test_what_cannot_be_done_is_one_line(tmp_path):
    run = write_run(tmp_path / "run")
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    (tmp_path / "link").symlink_to(run)
    out = ["--out", str(tmp_path / "report.html")]
    for arguments, message in (
        ([str(tmp_path / "none")], r"none does not exist: name the --run-dir"),
        ([str(run / "run.json")], r"run\.json is a file: name the --run-dir"),
        ([str(tmp_path / "folder")], r"folder is no run folder, and holds inside: name the --run-dir"),
        ([str(write_run(tmp_path / "empty", []))], r"empty has reported nothing yet"),
        ([str(run), str(tmp_path / "link")], r"link is given twice"),
        ([], r"no run is given"),
        ([str(run), "--out", "report.pdf"], r"--out report\.pdf: the page is written as \.html"),
        ([str(run), "--price-per-hour", "-1"], r"--price-per-hour must be a number of at least 0, not -1"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            main([*out, *arguments] if "--out" not in arguments else arguments)
        assert "\n" not in str(error.value)
    (tmp_path / "taken.html").mkdir()
    for place in (run / "run.json" / "report.html", tmp_path / "taken.html"):
        with pytest.raises(OSError, match=r"^--out \S+\.html cannot be written: "):
            main([str(run), "--out", str(place)])
    assert not (tmp_path / "report.html").exists()
