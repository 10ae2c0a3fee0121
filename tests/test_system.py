"""On a system without Python's Unix modules, as Windows is: what works, and what says in one line that it does not."""

import subprocess
import sys

import pytest

# What Windows lacks of the standard library, as far as this package names it.
HIDDEN = """
import os, runpy, select, signal, sys
import torch, safetensors.torch
for module in ("fcntl", "resource", "termios", "pwd"):
    sys.modules[module] = None
for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGKILL"):
    delattr(signal, name)
for name in ("pread", "fork", "sysconf", "O_NONBLOCK", "O_CLOEXEC", "O_NOFOLLOW"):
    delattr(os, name)
del select.poll
"""


def run_hidden(code: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", HIDDEN + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_networks_and_weights_work_anywhere(tmp_path):
    code = """
from pathlib import Path
from fastmask import EDMPrecond, MaskDiT, kernels, load_maskdit
from fastmask.diffusion.weights import save_weights
from fastmask.diffusion import Sampling, draw_samples
import fastmask.sample
net = EDMPrecond(MaskDiT(8, 2, 3, 16, 1, 2, 5, 12, 1, 2))
save_weights(Path(sys.argv[1]), net)
print(draw_samples(load_maskdit(Path(sys.argv[1])), torch.tensor([1]), Sampling(sample_steps=2), seed=0).shape)
"""
    done = run_hidden(
        code.replace("sys.argv[1]", "__import__('pathlib').Path(sys.argv[1])"), str(tmp_path / "w.safetensors")
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "torch.Size([1, 3, 8, 8])\n"


@pytest.mark.parametrize("command", ["train", "prepare"])
def test_commands_say_what_they_need(command):
    done = run_hidden(f"sys.argv[1:] = []; runpy.run_module('fastmask.{command}', run_name='__main__', alter_sys=True)")
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    needs = "fastmask's trainer and data need Linux (Python has no fcntl and resource here)"
    assert line.startswith(f"fastmask.{command}: error: {needs}")


def test_the_data_say_what_they_need():
    done = run_hidden("try:\n    import fastmask.data\nexcept ImportError as error:\n    print(error)")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("fastmask's trainer and data need Linux (Python has no fcntl and resource here)")
