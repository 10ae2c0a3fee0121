"""Whole training steps: dense DiT and masked, plain and ours, eager and compiled, beside their products alone.

On a CPU S/2 at 256x256, batch 4, fp32; `--full` adds B/2 and XL/2, which take minutes a case. Compiled stacks are left
to the form masked-0.5 there, since each compile takes minutes too. `--rows` stores the rows: each stack with the
optimizer and without, from the same calls.
"""

import pytest
import torch
from test_baselines import check_golden

from bench import rows
from bench.train.steps import FORMS, Step, freed, stacks_of, steps
from fastmask.masking import GROUP

ROUNDS = {"s2": 7, "b2": 5, "xl2": 3}
BATCH = 4


@pytest.fixture(scope="module", autouse=True)
def gate():
    """No time is taken of baselines that do not compute the published numbers."""
    check_golden()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", ["s2", "b2", "xl2"])
def bench_step(benchmark, run_id, request, size, form):
    if size != "s2" and not request.config.getoption("full"):
        pytest.skip(f"{size} takes minutes a case on a CPU: give --full")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with freed():
        stacks = stacks_of(device, form, BATCH)
        if device.type == "cpu" and form != "masked-0.5":
            stacks = [stack for stack in stacks if not stack.endswith("compiled")]
        case = steps(size, 256, form, BATCH, device, stacks=stacks, bf16=device.type == "cuda")
        calls = {}
        for name, step in case.variants.items():
            parts = {"gradients": step.gradients, "update": step.update} if isinstance(step, Step) else {"": step}
            calls |= {(name, part): call for part, call in parts.items()}
        times = {"rounds": ROUNDS[size], "warmup": 1}  # which compiles
        taken = benchmark.pedantic(rows.take, (calls, device), times, rounds=1)
    for name in case.variants:
        phases = [taken[key] for key in calls if key[0] == name]
        record(benchmark, request, case, name, phases, device, optimizer=True, run=run_id)
        record(benchmark, request, case, name, phases[:1], device, optimizer=False, run=run_id)


def bench_packed(benchmark, run_id, request):
    """Samples that keep unequal numbers of patches against the same number each: the same sum, packed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with freed():
        case = steps("s2", 256, "masked-0.5", GROUP, device, stacks=["ours", "ours packed"], bf16=device.type == "cuda")
        times = {"rounds": ROUNDS["s2"], "warmup": 1}
        taken = benchmark.pedantic(rows.take, (case.variants, device), times, rounds=1)
    for name in case.variants:
        record(benchmark, request, case, name, [taken[name]], device, optimizer=True, run=run_id)


def record(benchmark, request, case, name, phases, device, **what):
    """Note and store the figures of a stack, of the sum of some of its phases in each round."""
    timing = rows.timing([sum(parts) for parts in zip(*phases, strict=True)])
    figures = {
        **timing._asdict(),
        "images_per_s": round(case.case["batch"] / timing.median_ms * 1e3, 3),
        "forward_gmac": round(case.forward_gmac, 3),
        **what,
    }
    benchmark.extra_info[name if what["optimizer"] else f"{name}, no optimizer"] = figures
    if request.config.getoption("rows"):
        rows.append({"bench": "step", "case": case.case, "variant": name, **figures}, device)
