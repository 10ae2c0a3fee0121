"""The gate of the loaders' bench, and what a session of it stores and prints."""

import json
import os
import subprocess
import sys

import pytest
import torch

from bench import rows
from bench.data import bench_loaders

CPU = torch.device("cpu")


def first_batch(name, folder):
    source = bench_loaders.SOURCES[name](folder)
    dataset = bench_loaders.opened(source)
    return source, len(dataset), next(bench_loaders.training_batches(dataset, 0, CPU))


@pytest.mark.parametrize("name", ["moments", "jpg", "digits", "synthetic"])
def test_the_gate_is_red_for_a_wrong_batch(name, tmp_path):
    source, size, (stored, labels, images) = first_batch(name, tmp_path)
    bench_loaders.check(source, size, stored, labels, images)
    for wrong, said in (
        ((stored.roll(1, dims=0), labels, images), "stored values are not the source's"),
        ((stored.double(), labels, images), "stored values are not the source's"),
        ((stored, labels.roll(1), images), "labels are not the source's"),
        ((stored, labels, images[:-1]), "images"),
        ((stored, labels, images.double()), "images in torch.float64"),
        ((stored, labels, images * 1.1), "images are not those|noise of mean"),
        ((stored, labels, images + images.std() / 10), "images are not those|noise of mean"),
        ((stored, labels, torch.full_like(images, torch.nan)), "images are not those|noise of mean"),
    ):
        with pytest.raises(AssertionError, match=said):
            bench_loaders.check(source, size, *wrong)


def test_a_session_stores_and_prints_what_it_ran_and_a_red_gate_gives_no_number(tmp_path):
    (tmp_path / "sabotage.py").write_text(
        "from pathlib import Path\n"
        "from bench import rows\n"
        "from fastmask.data.in_memory import Digits\n"
        "rows.RESULTS = Path(__file__).parent / 'results'\n"
        "Digits.to_images = lambda self, stored, seed, sample: stored + 1e-3\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "sabotage", "--benchmark-only", "--rows", "-p", "no:cacheprovider"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{rows.ROOT}"
    done = subprocess.run(
        [*command, "bench/data", "-k", "digits or synthetic", f"--benchmark-json={tmp_path / 'stored.json'}"],
        cwd=rows.ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "digits 8x8: images are not those of the stored values" in done.stdout
    printed = done.stdout[done.stdout.index("loaders: images/s") :]
    assert "synthetic latents, batch 32, num_workers 1" in printed
    assert "images/s" in printed
    assert "digits 8x8, batch" not in printed
    (file,) = (tmp_path / "results").iterdir()
    stored = list(rows.read(file))
    assert [(row["bench"], row["variant"], row["case"]["num_workers"]) for row in stored] == [
        ("loader", "Synthetic", 0),
        ("loader", "Synthetic", 1),
    ]
    assert len({row["run"] for row in stored}) == 1
    for row in stored:
        images = row["case"]["batch"] * row["case"]["batches"]
        assert row["images_per_s"] == pytest.approx(images / row["median_ms"] * 1e3, rel=1e-3)
    entries = json.loads((tmp_path / "stored.json").read_text())["benchmarks"]
    assert {entry["name"]: entry["stats"]["median"] * 1e3 for entry in entries} == {
        f"bench_loader[synthetic-{row['case']['num_workers']}-Synthetic]": pytest.approx(row["median_ms"])
        for row in stored
    }
