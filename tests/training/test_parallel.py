"""Training in two processes on gloo: the same as in one, up to the order of summation, however it is split."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from test_train import SMALL, SPEED, assert_same_run, stats, weights

from fastmask.diffusion.weights import load_maskdit
from fastmask.train import main
from fastmask.training.checkpoint import checkpoints

FLAGS = [*SMALL, "--report-every", "1", "--checkpoint-every", "2", "--keep-checkpoints", "9", "--grad-clip", "1"]
FLAGS += ["--lr", "1e-2", "--max-steps", "6", "--unmask-steps", "2"]


def torchrun(run_dir: Path, *flags: str, ranks: int = 2) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "fastmask.train", "--run-dir", str(run_dir), *FLAGS, *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finished(process: "subprocess.Popen[str]") -> str:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return out


def variables(rank: int, port: int) -> dict[str, Any]:
    """Return what a rank finds in its environment, which torchrun or Slurm says."""
    return {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def two_ranks(run_dir: Path, *flags: str) -> "list[multiprocessing.Process]":
    """Start both ranks; each writes what it says to a file in the run's folder."""
    run_dir.mkdir(exist_ok=True)
    arguments, port = ["--run-dir", str(run_dir), *FLAGS, *flags], free_port()
    return [forked.start(arguments, run_dir / f"rank-{rank}.log", **variables(rank, port)) for rank in range(2)]


def train_on_two(run_dir: Path, *flags: str) -> None:
    """Train in two ranks; a test with torchrun itself, which takes much longer, holds that its ranks do the same."""
    ranks = two_ranks(run_dir, *flags)
    for rank in ranks:
        rank.join(timeout=300)
    said = [(run_dir / f"rank-{rank}.log").read_text() for rank in range(2)]
    assert [rank.exitcode for rank in ranks] == [0, 0], "\n".join(said)


def assert_alike(a: Path, b: Path) -> None:
    """Two runs learned the same but for the order of summation."""
    for ours, theirs in zip(stats(a), stats(b), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            if name not in SPEED:
                assert value == pytest.approx(theirs[name], rel=2e-4, abs=1e-6), f"step {ours['step']}: {name}"
    for name in ("model", "ema"):
        for key, tensor in weights(a, name).items():
            torch.testing.assert_close(tensor, weights(b, name)[key], rtol=1e-3, atol=2e-4, msg=lambda m, k=key: k + m)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run in one process that the others are compared with."""
    folder = tmp_path_factory.mktemp("alone")
    main(["--run-dir", str(folder), *FLAGS])
    return folder


def test_ddp_with_accumulation_equals_one_process(alone, tmp_path):
    out = finished(torchrun(tmp_path, "--micro-batch-size", "4"))
    assert out.count("step       6/6") == 1, "one rank speaks"
    assert "Warning" not in out
    assert_alike(tmp_path, alone)


@pytest.mark.parametrize("parallel", ["fsdp2", "fsdp2-grad-op"])
def test_sharded_training_equals_one_process(alone, tmp_path, parallel):
    train_on_two(tmp_path, "--parallel", parallel, "--sample-every", "6", "--sample-steps", "2", "--ema-widths", "0.1")
    assert_alike(tmp_path, alone)
    assert (tmp_path / "samples" / "step-00000006.png").exists()
    assert len(list((tmp_path / "snapshots").iterdir())) == 3


def test_sharded_weights_are_evaluated_by_all_ranks(tmp_path):
    flags = ["--evaluate-every", "3", "--evaluate-samples", "30", "--keep-best", "--sample-steps", "2"]
    main(["--run-dir", str(tmp_path / "alone"), *FLAGS, *flags])
    train_on_two(tmp_path / "two", *flags, "--parallel", "fsdp2")
    for ours, theirs in zip(stats(tmp_path / "two"), stats(tmp_path / "alone"), strict=True):
        assert ours.keys() == theirs.keys()
        assert ("eval/frechet" in ours) == (ours["step"] % 3 == 0)
        assert ours.get("eval/frechet", 0) == pytest.approx(theirs.get("eval/frechet", 0), rel=1e-2)
    best = [load_maskdit(tmp_path / name / "best.safetensors").state_dict() for name in ("two", "alone")]
    for key, tensor in best[0].items():
        torch.testing.assert_close(tensor, best[1][key], rtol=1e-3, atol=2e-4, msg=lambda m, k=key: k + m)


def test_accumulation_equals_the_whole_batch(alone, tmp_path):
    main(["--run-dir", str(tmp_path), *FLAGS, "--micro-batch-size", "2"])
    assert_alike(tmp_path, alone)


def test_ranks_draw_the_same_ratios_per_sample(tmp_path):
    flags = ["--mask-ratio-per-sample", "uniform(0.25,0.75)", "--unmask-steps", "0"]
    main(["--run-dir", str(tmp_path / "alone"), *FLAGS, *flags])
    train_on_two(tmp_path / "two", *flags)
    assert_alike(tmp_path / "two", tmp_path / "alone")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_ranks_killed_go_on_in_the_same_bits_and_one_rank_alike(tmp_path, alone, parallel):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train_on_two(whole, "--parallel", parallel)
    ranks = two_ranks(killed, "--parallel", parallel)
    while len(checkpoints(killed)) < 2:
        assert all(rank.is_alive() for rank in ranks), (killed / "rank-0.log").read_text()
        time.sleep(0.02)
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.join()
    for later in checkpoints(killed)[1:]:
        shutil.rmtree(later)
    train_on_two(killed, "--parallel", parallel)
    assert_same_run(whole, killed)
    # The same run resumes with another number of ranks.
    for later in checkpoints(killed)[1:]:
        shutil.rmtree(later)
    main(["--run-dir", str(killed), *FLAGS])
    assert_alike(killed, alone)


def test_a_stop_signal_reaches_all_ranks(tmp_path):
    process = torchrun(tmp_path, "--max-steps", "100000", "--unmask-steps", "0", "--checkpoint-every", "100000")
    while not (tmp_path / "stats.jsonl").exists() or len(stats(tmp_path)) < 3:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 1  # torchrun's, which was told to stop
    assert "the same command resumes from there" in out
    step = int(checkpoints(tmp_path)[-1].name.removeprefix("step-"))
    assert json.loads((checkpoints(tmp_path)[-1] / "state.json").read_text())["step"] == step


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", "15"], "batch_size 15 does not divide among 2 processes"),
        (
            ["--batch-size", "24", "--micro-batch-size", "8"],
            "a process's share of 12 images does not divide into parts of micro_batch_size 8",
        ),
        (["--parallel", "fsdp2", "--compile", "whole"], "give --compile block"),
        (["--cuda-graphs", "on"], "--cuda-graphs on works on one GPU"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, flags, message):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=message):
        main(["--run-dir", str(tmp_path), *FLAGS, *flags])


def without_torchrun(run_dir: Path, rank: int, port: int, *flags: str) -> "subprocess.Popen[str]":
    """Start a rank as Slurm does, which watches over none."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    environment |= {name: str(value) for name, value in variables(rank, port).items()}
    command = [sys.executable, "-m", "fastmask.train", "--run-dir", str(run_dir), *FLAGS, *flags]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_lost_rank_ends_the_other(tmp_path):
    """With a line and with a checkpoint, though it has workers that do not listen to signals."""
    port = free_port()
    flags = ["--max-steps", "100000", "--unmask-steps", "0", "--checkpoint-every", "100000", "--num-workers", "1"]
    ranks = [without_torchrun(tmp_path, rank, port, *flags) for rank in range(2)]
    while not (tmp_path / "stats.jsonl").exists() or len(stats(tmp_path)) < 3:
        assert ranks[0].poll() is None, ranks[0].communicate()
        time.sleep(0.05)
    ranks[1].kill()
    ranks[1].communicate()
    out, errors = ranks[0].communicate(timeout=30)
    assert ranks[0].returncode == 2
    assert "fastmask.train: error: process 0 of 2 lost another one" in errors.splitlines()[-1]
    assert "after an error a checkpoint of step" in out
    assert int(checkpoints(tmp_path)[-1].name.removeprefix("step-")) >= 3
