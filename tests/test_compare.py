"""Two sets of rows side by side: what is joined, and which difference is called real."""

import json
import sys

import pytest

from bench.report.compare import latest, main, of_commit, verdict

CASE = {"preset": "s2-in256", "image_size": 256, "form": "dense", "batch": 4, "precision": "fp32"}


def row(median, *, spread=0.05, device="card", commit="aaaa", variant="ours", **more):
    return {
        "bench": "step",
        "case": CASE,
        "variant": variant,
        "median_ms": median,
        "p20_ms": median * (1 - spread),
        "p80_ms": median * (1 + spread),
        "rounds": 5,
        "device": device,
        "torch": "2.11",
        "commit": commit,
        "date": "2026-11-24T10:00:00+00:00",
        **more,
    }


def write(path, *rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def run(monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", ["bench.report.compare", *argv])
    code = main()
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        (row(100.0), row(80.0), "B faster"),
        (row(80.0), row(100.0), "B slower"),
        (row(100.0), row(95.0), "within noise"),
        (row(95.0), row(100.0), "within noise"),
        (row(100.0, spread=0.01), row(95.0, spread=0.01), "B faster"),
        (row(100.0), row(10.0, rounds=1), "unknown: one round has no spread"),
        (row(100.0), row(10.0, device="another"), "other machine"),
        (row(100.0, threads=2), row(10.0, threads=1), "other machine"),
    ],
)
def test_verdicts(a, b, said):
    assert verdict(a, b) == said


def test_two_files(tmp_path, monkeypatch, capsys):
    a = write(
        tmp_path / "a.jsonl", row(999.0), row(100.0), row(50.0, variant="plain eager"), {**row(1.0), "bench": "x"}
    )
    b = write(tmp_path / "b.jsonl", row(80.0), row(50.0, variant="plain eager", optimizer=True))
    code, out, _ = run(monkeypatch, capsys, a, b)
    assert code == 0
    table = [line for line in out.splitlines() if line.startswith("| step")]
    assert len(table) == 1  # a step with the optimizer is another than one without
    assert "| ours | 100 (95 to 105) | 80 (76 to 84) | 1.250 | B faster |" in table[0]
    assert "only in A: step" in out
    assert "only in B: step" in out
    assert "DIFFERENT MACHINES" not in out


def test_other_machines_are_said_to_be(tmp_path, monkeypatch, capsys):
    a, b = write(tmp_path / "a", row(100.0)), write(tmp_path / "b", row(10.0, device="another"))
    _, out, _ = run(monkeypatch, capsys, a, b)
    assert "DIFFERENT MACHINES" in out
    assert "on another" in out
    assert "faster" not in out


def test_two_commits_of_one_file(tmp_path, monkeypatch, capsys):
    file = write(tmp_path / "a", row(100.0), row(80.0, commit="abcd"), row(70.0, commit="abcd-dirty"))
    code, out, _ = run(monkeypatch, capsys, file, "--commit-a", "aaa", "--commit-b", "abcd")
    assert code == 0
    assert "| 80 (76 to 84) |" in out
    assert "commit abcd on card" in out
    with pytest.raises(ValueError, match="names aaaa and abcd and abcd-dirty"):
        of_commit([row(1.0), row(1.0, commit="abcd"), row(1.0, commit="abcd-dirty")], "a")


def test_the_last_row_counts():
    found = latest([row(1.0), row(2.0), {**row(3.0), "variant": "loss"}, {"bench": "run"}])
    assert sorted(r["median_ms"] for r in found.rows.values()) == [2.0, 3.0]
    assert found.untimed == 1


def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys):
    good, bad = write(tmp_path / "a", row(100.0)), tmp_path / "b"
    other = write(tmp_path / "c", row(1.0, variant="else"))
    cases = [([good, str(tmp_path / "none")], "No such file"), ([good, other], "nothing was measured in both")]
    cases.append(([good, "--commit-a", "x", "--commit-b", "a"], "commit 'x' names no rows; there are aaaa"))
    for argv, said in cases:
        code, out, err = run(monkeypatch, capsys, *argv)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert said in err
    for text, said in (('{"bench": ', "b:1 is no row"), ('{"bench": "step", "median_ms": 1}', "no case, variant")):
        bad.write_text(text + "\n")
        code, _, err = run(monkeypatch, capsys, good, str(bad))
        assert code == 2
        assert said in err
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, capsys, good)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
