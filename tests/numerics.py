"""Runs the numeric tests as other processors would: `make numerics`, or `python tests/numerics.py build`.

Each setting is the instruction set of PyTorch's own operations (ATen, oneDNN and MKL), that of the native kernels, the
number of threads, and some seeds. Prints for each how much of its bound the largest error takes, and fails where a test
fails or an error is above `LIMIT` of its bound: a processor that nobody tried here needs room too.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parent.parent
LIMIT = 0.7
OPS = ("adamw_ema", "add_gated_norm", "attention", "embed_kept_patches", "gelu_linear", "masked_loss", "modulate_norm")
OPS += ("native", "norm_linear", "norms", "philox", "restore_tokens", "silu_linear")
NETWORKS = ("diffusion/test_denoiser", "diffusion/test_objective", "diffusion/test_process", "diffusion/test_sampling")
NETWORKS += ("models/test_maskdit", "test_baselines", "test_golden", "test_packed")
NETWORKS += ("training/test_ema", "training/test_optim", "training/test_step")
FILES = [f"tests/kernels/test_{name}.py" for name in OPS] + [f"tests/{name}.py" for name in NETWORKS]
NATIVE_ONLY = "tests/training/test_step.py"  # as in the Makefile: the trainer is tested with the native kernels

# What each library calls an instruction set, and the level of x86 of the native kernels.
TORCH = {
    "SSE": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "AVX-512": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
}
TORCH["SSE"] |= {"MKL_CBWR": "COMPATIBLE"}  # which processors of other makers than Intel obey too
TORCH["AVX2"] |= {"MKL_CBWR": "AVX2"}
LEVELS = {"SSE": "x86-64", "AVX2": "x86-64-v3", "AVX-512": "x86-64-v4"}
CAPABILITIES = {"DEFAULT": ("SSE",), "AVX2": ("SSE", "AVX2"), "AVX512": ("SSE", "AVX2", "AVX-512")}


class Setting(NamedTuple):
    """How the tests run; kernels are "interpreted" Triton's, or the native ones of an instruction set."""

    torch: str
    kernels: str
    threads: int
    seeds: range


class Outcome(NamedTuple):
    """What runs of a setting found."""

    tests: int
    errors: int
    largest: float
    failed: int


def settings() -> list[Setting]:
    """Return those that this processor can run."""
    here = CAPABILITIES.get(torch.backends.cpu.get_cpu_capability(), ())
    found = [Setting(sets, sets, 1, range(20)) for sets in here]
    found += [Setting(sets, kernels, 1, range(5)) for sets in here for kernels in here if sets != kernels]
    found += [Setting(sets, sets, 2, range(5)) for sets in here]
    return found + [Setting(sets, "interpreted", 1, range(2)) for sets in here]


def environment(setting: Setting, build: Path) -> dict[str, str]:
    """Return the variables of a setting, in those of this process."""
    chosen = {name for sets in TORCH.values() for name in sets}
    variables = {name: value for name, value in os.environ.items() if name not in chosen}
    variables |= TORCH[setting.torch] | {"TRITON_INTERPRET": str(int(setting.kernels == "interpreted"))}
    if setting.kernels in LEVELS:
        variables["FASTMASK_NATIVE"] = str(build / LEVELS[setting.kernels] / "_native.so")
    return variables


def run(setting: Setting, seed: int, build: Path, only: list[str]) -> tuple[Outcome, dict[str, float]]:
    """Return what the tests find with a seed, and the largest error over its bound of each that measured one.

    Args:
        setting: how they run.
        seed: of every test.
        build: folder of the native kernels by level.
        only: the tests to run; all of `FILES` if it is empty.
    """
    listed = build / "numerics.txt"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:benchmark", "-p", "no:cacheprovider", "--margins"]
    command += ["--margins-list", str(listed), f"--seed={seed}", f"--threads={setting.threads}"]
    command += only or [file for file in FILES if setting.kernels != "interpreted" or file != NATIVE_ONLY]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(setting, build), capture_output=True, text=True, check=False
    )
    found = re.search(r"^margins: (\d+) errors in (\d+) tests, the largest (\S+) of its bound$", done.stdout, re.M)
    failed = re.search(r"(\d+) (?:failed|errors?)", done.stdout.splitlines()[-1] if done.stdout else "")
    if not found or (done.returncode and not failed):
        raise SystemExit(f"{' '.join(command[:9])} did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    outcome = Outcome(int(found[2]), int(found[1]), float(found[3]), int(failed[1]) if failed else 0)
    if failed or outcome.largest > LIMIT:
        worst = re.findall(r"^(?:FAILED .*|E  .*times its bound.*| *\d\.\d\d  tests/.*::.*)$", done.stdout, re.M)
        sys.stdout.write("".join(f"    seed {seed}: {line.strip()[:150]}\n" for line in worst[:6]))
    lines = (line.split(" ", 1) for line in listed.read_text().split("\n"))
    return outcome, {test: float(largest) for largest, test in lines}


def main(build: Path) -> int:
    """Run every setting; return 1 if one fails or comes too near to a bound."""
    measuring: dict[bool, list[str]] = {}  # the tests that measure an error, of native kernels and of interpreted ones
    bad = False
    sys.stdout.write("PyTorch  kernels      threads  seeds  tests  errors  failed  largest error over its bound\n")
    for setting in settings():
        interpreted = setting.kernels == "interpreted"
        outcomes, only, before = [], measuring.get(interpreted, []), {}
        for seed in setting.seeds:
            outcome, by_test = run(setting, seed, build, only)
            measuring.setdefault(interpreted, list(by_test))
            # Further seeds run what depends on them: no error of zero, and none that the last seed had as well.
            only = [test for test, largest in by_test.items() if largest and largest != before.get(test)]
            before = by_test
            outcomes.append(outcome)
        largest, failed = max(one.largest for one in outcomes), sum(one.failed for one in outcomes)
        bad = bad or failed > 0 or not largest <= LIMIT
        tests, errors = max(one.tests for one in outcomes), sum(one.errors for one in outcomes)
        sys.stdout.write(
            f"{setting.torch:<8} {setting.kernels:<12} {setting.threads:>7} {len(setting.seeds):>6} {tests:>6} "
            f"{errors:>7} {failed:>7}  {largest:.3f}\n"
        )
        sys.stdout.flush()
    return int(bad)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
