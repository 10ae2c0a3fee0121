import base64
import itertools

import pytest
from run_folders import PNG, Page, write_run

from fastmask.reporting import pictures
from fastmask.reporting.load import load_runs
from fastmask.reporting.pictures import sample_grids, spread


@pytest.mark.parametrize("count", [1, 2, 11, 12, 13, 1000])
@pytest.mark.parametrize("most", [1, 2, 12])
def test_the_last_is_always_among_the_chosen(count, most):
    chosen = spread(count, most)
    assert chosen[-1] == count - 1
    assert len(set(chosen)) == len(chosen) == min(count, most)
    gaps = [b - a for a, b in itertools.pairwise(chosen)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_grids_are_embedded_by_step(tmp_path):
    run = write_run(tmp_path / "run", pictures=range(100, 4001, 100))
    (run / "samples" / "step-last.png").write_bytes(PNG)  # a name of the user's
    page = Page(sample_grids(load_runs([str(run)])))
    images = [own for tag, own in page.tags if tag == "img"]
    assert len(images) == 12
    assert images[-1]["alt"] == "Samples of run at step 4,000"
    assert base64.b64decode(images[0]["src"].removeprefix("data:image/png;base64,")) == PNG
    assert "12 of 40 sample grids are shown." in page.text


def test_large_grids_are_fewer(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run", pictures=range(10, 101, 10))
    for most, shown in ((5 * len(PNG), 5), (len(PNG) // 2, 1)):
        monkeypatch.setattr(pictures, "MOST_BYTES", most)
        assert f"{shown} of 10 sample grids are shown." in sample_grids(load_runs([str(run)]))
    monkeypatch.setattr(pictures, "_LARGEST", 10)
    assert sample_grids(load_runs([str(run)])) == ""
    assert "above the limit of 10: the picture is left out" in capsys.readouterr().out
