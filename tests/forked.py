"""The trainer in processes forked from one that has imported it: a new interpreter would take seconds for that."""

import multiprocessing
import os
import runpy
import sys
from pathlib import Path

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    ["fastmask.train", "sklearn.datasets", "torch._dynamo", "torch.utils.tensorboard", "torch.distributed.fsdp"]
)


def train(arguments: list[str], log: Path, environment: dict[str, str]) -> None:
    """Do what `python -m fastmask.train` does, in a process of its own, and write what it says to a file."""
    os.environ.update(environment)
    with log.open("w") as out:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(out.fileno(), stream.fileno())
    sys.argv[1:] = arguments
    runpy.run_module("fastmask.train", run_name="__main__", alter_sys=True)


def start(arguments: list[str], log: Path, **environment: object) -> multiprocessing.Process:
    """Start the trainer with these arguments and variables of the environment."""
    process = FORKED.Process(target=train, args=(arguments, log, {k: str(v) for k, v in environment.items()}))
    process.start()
    return process
