"""The steps' bench: its table from fixed rows, what is timed in turn, and what a session prints and stores."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from bench import rows
from bench.instruments.preset_launches import with_blocks
from bench.instruments.progress import Progress
from bench.train import bench_step
from bench.train import steps as steps_module
from bench.train.steps import FORMS, Steps, config_of, has_preset, preset_of, stacks_of
from bench.train.table import Table, name_of

CPU = torch.device("cpu")
GMAC = {"dense": 6.0, "masked-0.5": 3.0, "masked-0.75": 1.5, "sprint-0.75": 2.0}
NO_COMPILE = "a CPU compiles one form alone"


def case_of(form, size="s2", batch=4):
    return {"preset": preset_of(size, form), "image_size": 256, "form": form, "batch": batch, "precision": "fp32"}


def table_of(*measured, turn="s2", size="s2", batch=4):
    """Return a table of forms, stacks and their medians."""
    table = Table()
    for form, stack, median in measured:
        times = {"median_ms": median, "p20_ms": 0.9 * median, "p80_ms": 1.25 * median, "rounds": 7}
        row = {"bench": "step", "case": case_of(form, size, batch), "variant": stack, "forward_gmac": GMAC[form]}
        table.add({**row, **times, "optimizer": True, "run": "r"}, turn if isinstance(turn, str) else turn[form])
    return table


MEASURED = [
    ("dense", "plain eager", 3000.0),
    ("dense", "ours", 2400.0),
    ("dense", "products", 2000.0),
    ("masked-0.5", "plain eager", 2000.0),
    ("masked-0.5", "plain compiled", 1600.0),
    ("masked-0.5", "ours", 1500.0),
    ("masked-0.5", "ours compiled", 1250.0),
    ("masked-0.5", "products", 1200.0),
]


def test_the_table_of_a_session():
    table = table_of(*MEASURED)
    for stack in ("plain compiled", "ours compiled"):
        table.left_out[name_of(case_of("dense")), stack] = NO_COMPILE
    lines = list(table.lines())
    expected = """\
s2 at 256x256, batch 4, fp32
                                         over plain    plain  FLOP  step /
                    ms [p20, p80] img/s dense eager compiled bound matmuls
dense, 7 rounds
 plain eager    3000 [2700, 3750]  1.33
 plain compiled                 -     -
 ours           2400 [2160, 3000]  1.67       1.25x        -         1.20x
 ours compiled                  -     -
 matmuls alone  2000 [1800, 2500]  2.00
masked-0.5, 7 rounds, FLOP bound 2.00x
 plain eager    2000 [1800, 2500]  2.00 1.50x                  75%
 plain compiled 1600 [1440, 2000]  2.50     - 1.25x              -
 ours           1500 [1350, 1875]  2.67 1.60x 1.33x    1.07x   80%   1.25x
 ours compiled  1250 [1125, 1562]  3.20     - 1.60x    1.28x     -   1.04x
 matmuls alone  1200 [1080, 1500]  3.33 1.67x                  83%"""
    assert "\n".join(lines[: lines.index("")]) == expected
    legend = "\n".join(lines)
    reasons = legend[legend.index("\n- ") :].replace("\n  ", " ")
    assert reasons == f"\n- plain compiled, ours compiled (s2 dense, batch 4): {NO_COMPILE}."
    for column in ("over dense", "plain eager, plain compiled", "FLOP bound", "step / matmuls"):
        assert f"\n{column}: " in legend
    assert "*" not in legend
    assert max(map(len, lines)) < 80


def test_a_recipe_stands_beside_dense_alone():
    """It has the bounds and the gain, and neither a plain baseline nor a line or a note for one."""
    lines = list(table_of(*MEASURED, ("sprint-0.75", "ours", 1000.0), ("sprint-0.75", "products", 800.0)).lines())
    start = lines.index("sprint-0.75, 7 rounds, FLOP bound 3.00x")
    expected = """\
 ours            1000 [900, 1250]  4.00 2.40x                  80%   1.25x
 matmuls alone    800 [720, 1000]  5.00 2.50x                  83%"""
    assert "\n".join(lines[start + 1 : lines.index("")]) == expected
    assert "s2 sprint-0.75" not in "\n".join(lines)


def test_the_forms_are_those_of_their_presets():
    found = {}
    for size in ("b2", "xl2"):
        for form in FORMS:
            config = config_of(size, 256, form)
            found[size, form] = config.preset, config.masking.mask_ratio, config.network.width
    widths = {"b2": 768, "xl2": 1152}
    assert found == {
        (size, form): (f"{prefix}{size}-in256", ratio, width)
        for size, width in widths.items()
        for form, prefix, ratio in (
            ("dense", "dit-", 0.0),
            ("masked-0.5", "", 0.5),
            ("masked-0.75", "", 0.75),
            ("tread-0.5", "tread-", 0.5),
            ("sprint-0.75", "sprint-", 0.75),
            ("deferred-0.75", "deferred-", 0.75),
        )
    }
    assert config_of("b2", 256, "sprint-0.75").masking.structured
    assert not has_preset("s2", "tread-0.5")
    with pytest.raises(ValueError, match=r"tread-0\.5 has no preset tread-s2-in256"):
        config_of("s2", 256, "tread-0.5")
    gpu = torch.device("cuda")
    assert stacks_of(gpu, "sprint-0.75", 8) == ["ours", "ours graphs"]
    assert stacks_of(CPU, "deferred-0.75", 8) == ["ours"]


@pytest.mark.parametrize("form", ["tread-0.5", "sprint-0.75", "deferred-0.75"])
def test_a_step_of_a_recipe(monkeypatch, form):
    """Both phases, and its matmuls, at the preset's masks and loss and a tiny width."""
    whole = config_of("b2", 256, form)
    changed = {"width": 16, "num_heads": 2} | ({"mixer_width": 8, "mixer_num_heads": 1} if "def" in form else {})
    small = whole.replace(network=dataclasses.replace(with_blocks(whole.network, 1), **changed))
    monkeypatch.setattr(steps_module, "config_of", lambda *_: small)
    made = steps_module.steps("b2", 256, form, 2, CPU, stacks=stacks_of(CPU, form, 2))
    assert [*made.makers] == ["ours", "products"]
    made.makers["ours"]()()
    made.makers["products"]()()
    assert made.case["preset"] == whole.preset


def test_the_longest_figures_fit_a_narrow_terminal():
    slow = [(form, stack, 12.34 * median) for form, stack, median in MEASURED]
    lines = list(table_of(*slow, size="xl2", turn={"dense": "a", "masked-0.5": "b"}).lines())
    assert max(map(len, lines)) < 80


def test_what_was_not_timed_in_turn_is_marked_and_explained():
    lines = list(table_of(*MEASURED, turn={"dense": "xl2 dense", "masked-0.5": "xl2 masked-0.5"}).lines())
    masked = [line for line in lines if line.startswith(" ours  ")][1]
    assert masked.split()[-5:] == ["1.60x*", "1.33x", "1.07x", "80%*", "1.25x"]
    assert any(line.startswith("* not timed in turn") for line in lines)


def test_without_a_dense_form_the_reason_stands_once():
    lines = list(table_of(*MEASURED[3:]).lines())
    (ours,) = (line for line in lines if line.startswith(" ours  "))
    assert ours.split()[-5:] == ["-", "1.33x", "1.07x", "-", "1.25x"]
    assert "masked-0.5, 7 rounds" in lines
    text = " ".join(line.strip() for line in lines)
    stacks = "plain eager, plain compiled, ours, ours compiled, matmuls alone"
    assert text.endswith(f"- {stacks} (s2 dense, batch 4): not timed in this session.")


def test_packed_samples_stand_beside_ours():
    packed = [("masked-0.5", "ours", 100.0), ("masked-0.5", "ours packed", 125.0)]
    lines = list(table_of(*packed, batch=8).lines())
    assert " ours packed is 0.80x as fast as ours" in lines
    assert not any(line.startswith(" plain") for line in lines)


def test_a_session_without_steps_has_no_table():
    assert list(Table().lines()) == []


@pytest.fixture
def measured(monkeypatch):
    """Return a function that measures made-up stacks, whose makers it is given by form."""

    def run(makers, rounds=2):
        def made(size, image_size, form, batch, device, *, stacks, bf16):
            built = {stack: functools.partial(makers[form], form, stack) for stack in stacks}
            return Steps(case_of(form, size, batch), built, GMAC[form])

        monkeypatch.setattr(bench_step, "steps", made)
        screen = SimpleNamespace(seconds=0.0, show=said.append, end=said.append)
        stacks = {form: ["plain eager", "ours"] for form in makers}
        return bench_step.measure("s2", "s2", 4, stacks, CPU, rounds, Progress(screen)), said

    said = []
    return run


def test_all_stacks_of_all_forms_are_timed_in_turn(measured):
    called = []

    def maker(form, stack):
        phases = [lambda part=part: called.append((form, stack, part)) for part in ("gradients", "update")]
        return bench_step.Step(*phases)

    found, said = measured({"dense": maker, "masked-0.5": maker})
    calls = [(form, stack) for form in ("dense", "masked-0.5") for stack in ("plain eager", "ours")]
    one_round = [(*call, part) for call in calls for part in ("gradients", "update")]
    assert called == one_round * 3  # the warm-up and two rounds
    assert {form: list(one.phases) for form, one in found.items()} == {form: ["plain eager", "ours"] for form in found}
    assert [len(times) for times in found["dense"].phases["ours"]] == [2, 2]
    assert len(bench_step.whole_steps(found["dense"], "ours")) == 2
    assert "s2, batch 4: masked-0.5, ours: warm-up, 4 of 6" in said
    assert said.index("s2, batch 4: dense: making the networks") == 0


def test_a_form_is_compiled_for_its_own_shapes(measured):
    seen = []

    def backend(graph, inputs):
        seen.append([value for value in inputs if not isinstance(value, torch.Tensor)])
        return graph.forward

    def double(x):
        return x * 2

    compiled = torch.compile(double, backend=backend)
    lengths = {"dense": 8, "masked-0.5": 4, "masked-0.75": 2}
    measured({form: lambda form, stack: lambda: compiled(torch.ones(lengths[form])) for form in lengths})
    assert seen == [[], [], []]  # a length among the inputs is one that any may be


def test_a_failed_measurement_fails_each_of_its_forms_once():
    shared, calls = bench_step.Shared(), []

    def measure():
        calls.append(1)
        raise torch.OutOfMemoryError("too large")

    with pytest.raises(torch.OutOfMemoryError, match="too large"):
        shared.get("b2 dense, masked-0.5", measure)
    with pytest.raises(RuntimeError, match=r"b2 dense, masked-0\.5 are timed in turn, and that failed: too large"):
        shared.get("b2 dense, masked-0.5", measure)
    assert len(calls) == 1
    assert shared.get("another", dict) == {}


TINY = """
import dataclasses
from pathlib import Path
from bench import rows
from bench.train import steps

whole = steps.config_of

def tiny(size, image_size, form):
    config = whole(size, image_size, form)
    sizes = {"width": 16, "depth": 1, "num_heads": 2}
    if config.network.name == "sprint":
        sizes |= {"depth": 3, "route_start": 1, "route_end": 2}
    elif config.network.decoder_depth:
        sizes |= {"decoder_width": 16, "decoder_depth": 1, "decoder_num_heads": 2}
    return config.replace(network=dataclasses.replace(config.network, **sizes))

steps.config_of = tiny
rows.RESULTS = Path(__file__).parent / "results"

def pytest_collection_modifyitems():
    from bench.train import bench_step
    bench_step.ROUNDS["s2"] = 3
"""


@pytest.fixture
def session(tmp_path):
    """Return a function that runs the steps' bench on a tiny network, and returns what it printed."""
    (tmp_path / "tiny.py").write_text(TINY)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": f"{tmp_path}{os.pathsep}{rows.ROOT}", "COLUMNS": "80"}
    command = [sys.executable, "-m", "pytest", "-p", "tiny", "-p", "no:cacheprovider", "bench/train"]

    def run(selected, *options):
        called = [*command, "-k", selected, *options]
        done = subprocess.run(called, cwd=rows.ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_a_session_prints_a_table_and_stores_the_times_of_each_stack(session, tmp_path):
    stored = tmp_path / "stored.json"
    out = session("s2 and (dense or masked-0.75)", "--benchmark-only", "--rows", f"--benchmark-json={stored}")
    found = json.loads(stored.read_text())["benchmarks"]
    (file,) = (tmp_path / "results").iterdir()
    whole = {(row["case"]["form"], row["variant"]): row for row in rows.read(file) if row["optimizer"]}
    forms, stacks = ("dense", "masked-0.75"), ("plain eager", "ours", "products")
    assert set(whole) == {(form, stack) for form in forms for stack in stacks}
    assert len(list(rows.read(file))) == 2 * len(whole)  # without the optimizer too
    medians = {entry["name"]: entry["stats"]["median"] * 1e3 for entry in found}
    assert medians == {
        f"bench_step[s2-{form}-{'matmuls alone' if stack == 'products' else stack}]": pytest.approx(row["median_ms"])
        for (form, stack), row in whole.items()
    }
    assert all(entry["stats"]["rounds"] == 3 for entry in found)
    assert {entry["extra_info"]["variant"] for entry in found} == set(stacks)
    # The table is the last that is said, but for pytest's own summary, and nothing of it was not timed in turn.
    table = out[out.index("= training steps on ") :]
    assert out.index("bench_step[s2-dense-ours]") < out.index("= training steps on ")
    assert "masked-0.75, 3 rounds, FLOP bound" in table
    assert "matmuls alone" in table
    assert "*" not in table
    # Progress is seen, with pytest's capture on.
    assert "s2, batch 4: masked-0.75, ours: warm-up, 5 of 6\n" in out
    assert "s2, batch 4: measured in " in out


def test_a_session_of_recipes(session):
    """A size that a recipe does not have is skipped, and the others are timed in turn with dense."""
    out = session("s2 and (dense or sprint or tread)", "--benchmark-only")
    assert "2 passed, 1 skipped" in out
    table = out[out.index("= training steps on ") :]
    assert "sprint-0.75, 3 rounds, FLOP bound" in table
    assert "*" not in table
    assert "s2 sprint-0.75" not in table


def test_where_benches_are_off_a_session_calls_each_step_once_and_stores_nothing(session, tmp_path):
    out = session("s2 and dense", "--benchmark-disable", "--rows")
    assert "1 passed" in out
    assert not (tmp_path / "results").exists()
    assert "training steps on" not in out


def test_stacks_that_are_asked_for():
    device = torch.device("cpu")
    assert bench_step.chosen(device, "dense") == ["plain eager", "ours"]
    assert bench_step.chosen(device, "dense", ["ours"]) == ["ours"]
    assert bench_step.chosen(device, "dense", ["ours compiled"]) == []
    with pytest.raises(pytest.UsageError, match=r"--stacks takes of plain eager, .*, not our$"):
        bench_step.chosen(device, "dense", ["our"])
