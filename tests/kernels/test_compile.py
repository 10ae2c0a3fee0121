"""Every kernel as the presets launch it, compiled ahead of time for a GPU that is not here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.compile import Compiled, complaint

ROOT = Path(__file__).parent.parent.parent


def run(*arguments, **environment):
    command = [sys.executable, "-m", "bench.compile", *arguments]
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        command, cwd=ROOT, env={**inherited, **environment}, capture_output=True, text=True, check=False
    )


def test_the_largest_preset_compiles_without_spills_or_narrow_loads():
    """`make kernels` does the same for every width and architecture."""
    done = run("--arch", "90", "--width", "1152", "512")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    for name in (
        "add_gated_norm_bwd",
        "embed_kept_patches_fwd",
        "restore_tokens_bwd",
        "masked_loss_bwd",
        "sample_mask",
    ):
        assert f"| {name}" in done.stdout
    assert " 0 wrong" in done.stdout


def test_what_is_wrong_is_said():
    fine = Compiled(registers=40, shared=0, spilled=0, loads={128: 4, 32: 2})
    assert complaint(fine, wide=True, scalars=2) == ""
    assert complaint(fine._replace(spilled=8), wide=False, scalars=0) == "spills 8 bytes"
    assert "narrow" in complaint(fine._replace(loads={128: 4, 32: 3}), wide=True, scalars=2)
    assert "narrow" in complaint(fine._replace(loads={64: 8}), wide=True, scalars=8)


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [(["--arch", "70"], {}, "invalid choice"), ([], {"TRITON_INTERPRET": "1"}, "unset TRITON_INTERPRET")],
)
def test_mistakes_get_code_2(arguments, environment, message):
    done = run(*arguments, **environment)
    assert done.returncode == 2
    assert message in done.stderr
