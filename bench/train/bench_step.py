"""Whole training steps: dense DiT and masked, plain and ours, eager and compiled, beside their products alone.

On a CPU S/2 and B/2 at 256x256, batch 4, fp32; `--full` adds XL/2. `--rows` stores the rows.
"""

import pytest
import torch
from test_baselines import check_golden

from bench import rows
from bench.train.steps import FORMS, freed, steps

ROUNDS = {"s2": 5, "b2": 3, "xl2": 3}
BATCH = 4


@pytest.fixture(scope="module", autouse=True)
def gate():
    """No time is taken of baselines that do not compute the published numbers."""
    check_golden()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", ["s2", "b2", "xl2"])
def bench_step(benchmark, run_id, request, size, form, compiled):
    if size == "xl2" and not request.config.getoption("full"):
        pytest.skip("XL/2 takes minutes a case on a CPU: give --full")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with freed():
        case = steps(size, 256, form, BATCH, device, bf16=device.type == "cuda", compiled=compiled)
        warmup = 2 if compiled else 1
        timings = benchmark.pedantic(
            rows.measure, (case.variants, device), {"rounds": ROUNDS[size], "warmup": warmup}, rounds=1
        )
        for variant, timing in timings.items():
            figures = {
                **timing._asdict(),
                "images_per_s": round(BATCH / timing.median_ms * 1e3, 3),
                "forward_gmac": round(case.forward_gmac, 3),
                "optimizer": case.optimizer,
                "run": run_id,
            }
            benchmark.extra_info[variant] = figures
            if request.config.getoption("rows"):
                rows.append({"bench": "step", "case": case.case, "variant": variant, **figures}, device)
