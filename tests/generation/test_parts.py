"""Jobs in one process; with two, and killed, they are tested by `tests/test_sample_ranks.py` and `.._latents.py`."""

import itertools

import numpy as np
import pytest
import torch

from fastmask.generation import parts
from fastmask.generation.model import Batches
from fastmask.generation.outputs import Arrays
from fastmask.generation.parts import run_job, working_folder
from fastmask.ranks import Ranks


def output_of(tmp_path, total=5, size=2):
    return Arrays(tmp_path / "a.npz", Batches(total, size), np.zeros(total, np.int64), (), 1)


def values(batch):
    return torch.full((2, 1, 1, 3), batch, dtype=torch.uint8)


def failing_at(last):
    def draw(batch):
        if batch == last:
            raise KeyboardInterrupt
        return values(batch)

    return draw


def test_a_job_draws_what_is_missing_and_clears_up(tmp_path, capsys):
    output, folder = output_of(tmp_path), tmp_path / "a.npz.parts"
    assert working_folder(output.out) == folder
    with pytest.raises(KeyboardInterrupt):
        run_job(output, {"seed": 0, "classes": [1, 2]}, Ranks(), failing_at(1))
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "part-000000.npy", "settings.json"]
    with pytest.raises(ValueError, match=r"a\.npz\.parts holds parts that were drawn with other settings \(classes, s"):
        run_job(output, {"seed": 1, "classes": [1]}, Ranks(), values)
    drawn = []
    run_job(output, {"seed": 0, "classes": (1, 2)}, Ranks(), lambda batch: drawn.append(batch) or values(batch))
    assert drawn == [1, 2]
    assert f"{folder}: 1 of 3 batches are drawn already" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz"]
    with np.load(tmp_path / "a.npz") as file:
        assert file["arr_0"][:, 0, 0, 0].tolist() == [0, 0, 1, 1, 2]


def test_two_jobs_do_not_share_a_folder(tmp_path):
    output, folder = output_of(tmp_path), tmp_path / "a.npz.parts"
    with pytest.raises(KeyboardInterrupt):
        run_job(output, {}, Ranks(), failing_at(0))
    (folder / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings\.json cannot be read .*: delete .*a\.npz\.parts to start over"):
        run_job(output, {}, Ranks(), values)


def test_a_folder_in_use_is_refused(tmp_path, monkeypatch):
    """A lock is of a process, so that another one is needed to find it held."""

    def held(path):
        raise ValueError(f"{path.parent} is in use by process 7")

    monkeypatch.setattr(parts, "locked", held)
    with pytest.raises(ValueError, match=r"a\.npz\.parts is in use by process 7"):
        run_job(output_of(tmp_path), {}, Ranks(), values)


def test_progress_is_told_from_time_to_time(tmp_path, monkeypatch, capsys):
    clock = itertools.count(step=16.0)
    monkeypatch.setattr(parts.time, "monotonic", lambda: next(clock))
    run_job(output_of(tmp_path, total=9), {}, Ranks(), values)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["4 of 9 images  0.1 images/s  40 s left", "8 of 9 images  0.1 images/s  8 s left"]
