"""Whole training steps: dense and masked DiT, plain and ours, eager and compiled, and their matmuls alone; other
recipes (TREAD, SPRINT, deferred masking), ours and their matmuls alone.

On a CPU: S/2 at 256x256, batch 4, fp32; `--full` adds B/2 and XL/2, which take minutes per case. Only the form
masked-0.5 is compiled there, since each compile takes minutes too. All stacks of all forms of a size in a session are
timed in turn, so that a drift of the machine affects all of them; for XL/2 only the stacks of one form, since all its
networks do not fit in memory together. `--rows` stores the rows: each stack with and without the optimizer, from the
same calls. `--stacks ours` times our form alone, beside its matmuls.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from test_baselines import check_golden

from bench import rows
from bench.instruments.progress import Measurement, Progress
from bench.train.steps import FORMS, STACKS, Step, freed, has_preset, preset_of, stacks_of, steps
from bench.train.table import PRODUCTS, name_of, shown
from fastmask.diffusion.masking import GROUP

ROUNDS = {"s2": 7, "b2": 5, "xl2": 3}
IN_TURN = ("s2", "b2")  # the networks of all forms fit in memory together, about 14 GB for b2
IMAGE_SIZE, BATCH = 256, 4
NOT_COMPILED = "on a CPU masked-0.5 alone is compiled, as each compile takes minutes"
PACKED_ALONE = f"batch {GROUP} compares packed samples with ours alone"


class Form(NamedTuple):
    """The measurements of a form.

    Attributes:
        case: the case of its rows.
        forward_gmac: GMAC of the forward pass of one image.
        phases: milliseconds of gradients and update in each round, by stack.
        turn: name of the group that was timed in turn.
    """

    case: dict[str, Any]
    forward_gmac: float
    phases: dict[str, list[list[float]]]
    turn: str


class Shared:
    """Measurements shared by several tests: the first test measures, and if that fails, all of them fail."""

    def __init__(self) -> None:
        self._found: dict[str, dict[str, Form] | str] = {}  # or the error message: an exception would hold the networks

    def get(self, turn: str, measure: Callable[[], dict[str, Form]]) -> dict[str, Form]:
        """Return the result of ``measure``, called once per ``turn``."""
        if turn not in self._found:
            try:
                self._found[turn] = measure()
            except Exception as error:
                self._found[turn] = str(error)
                raise
        found = self._found[turn]
        if isinstance(found, str):
            raise RuntimeError(f"{turn} are timed in turn, and that failed: {found}")
        return found


@pytest.fixture(scope="module", autouse=True)
def gate():
    """Check the baselines against the published numbers before timing."""
    check_golden()


@pytest.fixture(scope="module")
def shared():
    return Shared()


@pytest.fixture
def recorded(benchmark, entries, step_table, run_id, request):
    """Record and store the measurements of a form, if benchmarks are enabled."""

    def record(form: Form, device: torch.device, *, without_optimizer: bool = True) -> None:
        for stack in form.phases:
            made = rows_of(form, stack, run_id)
            about = {name: value for name, value in made[0].items() if name not in ("bench", "optimizer")}
            size, side, batch, precision, _ = name_of(form.case)
            group = f"training steps, {size} at {side}x{side}, batch {batch}, {precision}"
            entries.add(shown(stack), whole_steps(form, stack), group=group, about=about)
            if benchmark.disabled:
                continue
            step_table.add(made[0], form.turn)
            if request.config.getoption("rows"):
                # Rows of some stacks stand in a table of their own, and do not take the place of those of all stacks.
                bench = "recipe_step" if request.config.getoption("stacks") else "step"
                for row in made if without_optimizer else made[:1]:
                    rows.append({**row, "bench": bench}, device)

    return record


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", ["s2", "b2", "xl2"])
def bench_step(benchmark, recorded, shared, step_table, progress, request, size, form):
    if size != "s2" and not request.config.getoption("full"):
        pytest.skip(f"{size} takes minutes a case on a CPU: give --full")
    if not has_preset(size, form):
        pytest.skip(f"there is no preset {preset_of(size, form)}")
    selected = {item.name for item in request.session.items}
    forms = [form]
    if size in IN_TURN:
        forms = [f for f in FORMS if f"bench_step[{size}-{f}]" in selected and has_preset(size, f)]
    device = rows.default_device()
    only = [name for name in request.config.getoption("stacks").split(",") if name]
    stacks = {form: chosen(device, form, only) for form in forms}
    rounds = 0 if benchmark.disabled else ROUNDS[size]
    turn = f"{size} {', '.join(forms)}"
    measured = shared.get(turn, lambda: measure(turn, size, BATCH, stacks, device, rounds, progress))[form]
    for stack in STACKS:
        if stack.endswith("compiled") and stack not in stacks[form]:
            step_table.left_out[name_of(measured.case), stack] = NOT_COMPILED
        if only and stack not in only:
            step_table.left_out[name_of(measured.case), stack] = "left out by --stacks"
    recorded(measured, device)


def bench_packed(benchmark, recorded, step_table, progress):
    """Samples with unequal numbers of kept patches, packed, compared with equal numbers of the same sum."""
    device = rows.default_device()
    rounds = 0 if benchmark.disabled else ROUNDS["s2"]
    stacks = {"masked-0.5": ["ours", "ours packed"]}
    turn = f"s2 masked-0.5, batch {GROUP}"
    measured = measure(turn, "s2", GROUP, stacks, device, rounds, progress)["masked-0.5"]
    name = name_of(measured.case)
    for stack in (*STACKS, PRODUCTS):
        for absent in (name, name._replace(form="dense")):
            step_table.left_out[absent, stack] = PACKED_ALONE
    recorded(measured, device, without_optimizer=False)


def chosen(device: torch.device, form: str, only: Sequence[str] = ()) -> list[str]:
    """Return the stacks to time in a form, of those in ``only`` if it names any."""
    if not set(only) <= set(STACKS):
        raise pytest.UsageError(f"--stacks takes of {', '.join(STACKS)}, not {', '.join(only)}")
    there = stacks_of(device, form, BATCH)
    compiles = device.type != "cpu" or form == "masked-0.5"
    return [stack for stack in there if (compiles or not stack.endswith("compiled")) and (not only or stack in only)]


def measure(
    turn: str,
    size: str,
    batch: int,
    stacks: Mapping[str, Sequence[str]],
    device: torch.device,
    rounds: int,
    progress: Progress,
) -> dict[str, Form]:
    """Time the stacks of some forms in turn, and return the measurements of each form.

    Args:
        turn: name of the group.
        size: network size.
        batch: number of images.
        stacks: stacks of each form.
        device: device of the steps.
        rounds: number of rounds; 0 calls each once, without a warm-up.
        progress: the progress display.
    """
    # The warm-up compiles for the static shapes of each form.
    static = torch._dynamo.config.patch(automatic_dynamic_shapes=False)
    warmups = sum(len(names) + ("ours" in names) for names in stacks.values())
    with freed(), static, progress.of(f"{size}, batch {batch}", warmups, long=True) as told:
        return _measured(turn, size, batch, stacks, device, rounds, told)


def _measured(
    turn: str,
    size: str,
    batch: int,
    stacks: Mapping[str, Sequence[str]],
    device: torch.device,
    rounds: int,
    told: Measurement,
) -> dict[str, Form]:
    cases = {}
    for form, names in stacks.items():
        told.prepare(f"{form}: making the networks")
        cases[form] = steps(size, IMAGE_SIZE, form, batch, device, stacks=names, bf16=device.type == "cuda")
    calls: dict[tuple[str, str, str], Callable[[], Any]] = {}
    for form, case in cases.items():
        for stack, make in case.makers.items():
            step = make()
            parts = {"gradients": step.gradients, "update": step.update} if isinstance(step, Step) else {"": step}
            calls |= {(form, stack, part): call for part, call in parts.items()}

    def tell(call: tuple[str, str, str], number: int, rounds: int) -> None:
        form, stack, part = call
        if part != "update":
            told(f"{form}, {shown(stack)}", number, rounds)

    times = {"rounds": rounds, "warmup": 1} if rounds else {"rounds": 1, "warmup": 0}
    taken = rows.take(calls, device, progress=tell, **times)
    phases = {
        form: {stack: [taken[key] for key in calls if key[:2] == (form, stack)] for stack in case.makers}
        for form, case in cases.items()
    }
    return {form: Form(case.case, case.forward_gmac, phases[form], turn) for form, case in cases.items()}


def rows_of(form: Form, stack: str, run_id: str) -> list[rows.Row]:
    """Return the rows of a stack, with and without the optimizer."""
    made = []
    for optimizer, times in ((True, whole_steps(form, stack)), (False, form.phases[stack][0])):
        timing = rows.timing(times)
        figures = {
            **timing._asdict(),
            "images_per_s": round(form.case["batch"] / timing.median_ms * 1e3, 3),
            "forward_gmac": round(form.forward_gmac, 3),
            "optimizer": optimizer,
            "run": run_id,
        }
        made.append({"bench": "step", "case": form.case, "variant": stack, **figures})
    return made


def whole_steps(form: Form, stack: str) -> list[float]:
    """Return the milliseconds of a stack's steps, the sums of their phases."""
    return [sum(parts) for parts in zip(*form.phases[stack], strict=True)]
