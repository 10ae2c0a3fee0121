"""Preparing in two processes on gloo: the same bytes as in one, whatever stops them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_prepare import broken, content, folder, has_ended, prepare  # noqa: F401  (a fixture)

from fastmask.data.store.manifest import read_manifest

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")

SMALL = ["--space", "pixel", "--image-size", "16", "--num-workers", "0", "--shard-size", "1", "--batch-size", "1"]


def torchrun(source, store, *flags):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "fastmask.prepare", str(source), str(store), *SMALL, *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(process):
    """Return what a command said, and its exit code."""
    try:
        out, _ = process.communicate(timeout=120)
    finally:
        process.terminate()  # torchrun ends its processes too
    return out, process.returncode


def test_two_ranks_go_on_with_what_one_began(folder, tmp_path):  # noqa: F811
    faults = broken(folder)
    alone = prepare(folder, tmp_path / "alone", "--shard-size", "1", "--on-bad", "skip")
    with pytest.raises(ValueError, match="--on-bad skip leaves such images out"):
        prepare(folder, tmp_path / "two", "--shard-size", "1")
    out, code = finished(torchrun(folder, tmp_path / "two", "--on-bad", "skip", "--num-workers", "1"))
    assert code == 0, out
    assert "6 of 18 images are done already" in out
    assert content(tmp_path / "two") == content(tmp_path / "alone")
    assert read_manifest(tmp_path / "two") == alone
    assert out.count("folder, 18 images, 2 classes") == 1, "one rank speaks"
    assert out.count("12 records, 2 classes, 6 images left out") == 1
    assert ("18/18 images" in out) != ("waiting for the others" in out)
    for name in faults:
        assert out.count(f"left out: {folder / name}") == 1, "a damaged image is told by the rank that meets it"


def test_a_damaged_image_stops_all_ranks_and_one_goes_on(folder, tmp_path):  # noqa: F811
    prepare(folder, tmp_path / "alone", "--shard-size", "1")
    damaged = sorted(folder.rglob("*.png"))[10]  # near the end of the first rank's, when the second may wait for it
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:200])
    out, code = finished(torchrun(folder, tmp_path / "store"))
    assert code != 0
    assert out.count(f"error: {damaged} cannot be read as an image") == 1
    assert "(--on-bad skip leaves such images out)" in out
    assert "RuntimeError" not in out, "no traceback of a rank that waits"
    assert not (tmp_path / "store" / "manifest.json").exists()
    damaged.write_bytes(whole)
    prepare(folder, tmp_path / "store", "--shard-size", "1")
    assert content(tmp_path / "store") == content(tmp_path / "alone")


def test_killed_ranks_leave_a_store_that_one_goes_on_with(tmp_path):
    for i in range(60):
        path = tmp_path / "images" / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((400, 300, 3), i, np.uint8)).save(path)
    prepare(tmp_path / "images", tmp_path / "alone", "--shard-size", "1")
    process = torchrun(tmp_path / "images", tmp_path / "store")
    while len(list((tmp_path / "store").glob("0*.json"))) < 3:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.001)
    ranks = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    for pid in (process.pid, *ranks):
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=60)
    while not all(map(has_ended, ranks)):
        time.sleep(0.01)
    assert len(ranks) == 2
    assert not (tmp_path / "store" / "manifest.json").exists()
    prepare(tmp_path / "images", tmp_path / "store", "--shard-size", "1")
    assert content(tmp_path / "store") == content(tmp_path / "alone")
