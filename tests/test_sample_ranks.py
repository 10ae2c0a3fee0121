"""Sampling in two processes on gloo: the same bytes as in one."""

import os
import socket

import pytest
from util import run_ranks, small_net

from fastmask.diffusion.weights import save_weights
from fastmask.generation.model import Model
from fastmask.sample import main

FLAGS = ["--sample-steps", "2", "--num-samples", "11", "--batch-size", "2", "--device", "cpu"]


def sample_as(rank, arguments, port):
    """Sample in one of two processes, as torchrun starts them, and see that each draws its share."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    drawn, draw = [], Model.draw
    Model.draw = lambda self, ids, first, *args, **kwargs: (
        drawn.append(first) or draw(self, ids, first, *args, **kwargs)
    )
    main(arguments)
    assert drawn == [[4, 8], [6, 10]][rank]


def free_port():
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return made.getsockname()[1]


@pytest.mark.parametrize("name", ["a.npz", "folder"])
def test_two_processes_resume_what_one_began(tmp_path, monkeypatch, name):
    weights = tmp_path / "weights.safetensors"
    save_weights(weights, small_net(depth=1, decoder_depth=0))
    main([str(weights), "--out", str(tmp_path / "alone" / name), *FLAGS])
    arguments = [str(weights), "--out", str(tmp_path / "two" / name), *FLAGS]
    draw = Model.draw

    def interrupted(self, ids, first, *args, **kwargs):
        if first == 4:
            raise KeyboardInterrupt
        return draw(self, ids, first, *args, **kwargs)

    monkeypatch.setattr(Model, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(arguments)
    assert (tmp_path / "two" / f"{name}.parts" / "settings.json").exists()
    run_ranks(sample_as, arguments, free_port(), processes=2)
    assert content(tmp_path / "two") == content(tmp_path / "alone")


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
