"""The campaign's training steps: a stack is stored before the next one is made, whatever ends the box."""

import contextlib
import itertools
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from bench import rows
from bench.campaign import __main__ as command
from bench.campaign import steps, table
from bench.campaign.clock import TimeUp
from bench.campaign.state import Campaign, DeviceLostError, peak_tflops
from bench.train import steps as made

CPU, GPU = torch.device("cpu"), torch.device("cuda")
HEADLINE = {"preset": "xl2-in256", "image_size": 256, "form": "masked-0.5"}
COMPILED = ["ours graphs", "plain compiled", "ours compiled"]
MASKED = ("xl2", 256, "masked-0.5")


class Clock:
    """A clock that moves when it is told to, and rings in a time box."""

    def __init__(self):
        self.now, self.rings_at = 10.0, float("inf")  # torch is imported

    def monotonic(self):
        return self.now

    def pass_by(self, seconds):
        self.now += seconds
        if self.now >= self.rings_at:
            self.now = self.rings_at
            raise TimeUp

    @contextlib.contextmanager
    def time_box(self, seconds):
        self.rings_at = self.now + seconds
        yield
        self.rings_at = float("inf")


class Machine:
    """A GPU that is made up, and stacks on it that take time to compile and memory to keep.

    Attributes:
        clock: of the machine.
        log: ("makes" or "compiles", stack, batch), in the order of what happened.
        capacity: images whose activations there is memory for, of all stacks together.
        compile_s: seconds that a compiled stack's first step takes; an eager one's takes a twentieth.
        alive: batches of the stacks that are held.
    """

    def __init__(self, monkeypatch):
        self.clock, self.log, self.capacity, self.compile_s = Clock(), [], 1e9, 100.0
        self.alive = {}
        for module in (command, steps):
            monkeypatch.setattr(module, "time", self.clock)
        monkeypatch.setattr("bench.campaign.state.time", self.clock)
        monkeypatch.setattr(command, "time_box", self.clock.time_box)
        monkeypatch.setattr(steps, "steps_of", self.steps)
        monkeypatch.setattr(steps, "stacks_of", lambda device, form, batch: made.stacks_of(GPU, form, batch))
        monkeypatch.setattr(steps, "network_is_right", lambda campaign: True)
        properties = SimpleNamespace(total_memory=150e9)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    def steps(self, size, image_size, form, batch, device, *, stacks, bf16):
        case = {"preset": made.config_of(size, image_size, form).preset, "image_size": image_size, "form": form}
        case |= {"batch": batch, "precision": "bf16"}
        found = {name: lambda name=name: self.made(name, batch) for name in [*stacks, "products"]}
        return made.Steps(case, found, 65.45)

    def made(self, name, batch):
        class Stack:
            compiled = False

            def __call__(stack):
                if not stack.compiled:
                    self.log.append(("compiles", name, batch))
                    self.clock.pass_by(self.compile_s / (1 if name in COMPILED else 20))
                    stack.compiled = True
                if sum(self.alive.values()) > self.capacity:
                    raise torch.OutOfMemoryError(f"{name} {batch}")
                self.clock.pass_by(0.2)

        self.log.append(("makes", name, batch))
        stack = Stack()
        self.alive[id(stack)] = batch
        weakref.finalize(stack, self.alive.pop, id(stack))
        return stack


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


@pytest.fixture
def campaign(tmp_path, machine):
    found = Campaign(CPU, tmp_path / "rows.jsonl")
    found.miniature = False
    found.until = 1e9
    return found


def measured(campaign, **case):
    """Return stack, batch and what it was timed in turn with, of the rows of a case in their order in the file."""
    found = (row for row in rows.read(campaign.path) if row["bench"] == "step" and case.items() <= row["case"].items())
    return [(row["variant"], row["case"]["batch"], row["in_turn_with"]) for row in found]


# The box


def nine_minutes(campaign, machine, monkeypatch):
    """Run all parts of a nine-minute box; but for the steps they use the time up that they have."""

    def use_up(campaign):
        machine.clock.pass_by(1e9)

    parts = {name: part._replace(run=part.run if name == "steps" else use_up) for name, part in command.PARTS.items()}
    command.run_parts(campaign, parts, 9 * 60 - 10)


def test_nine_minutes_hold_the_headline_first(campaign, machine, monkeypatch):
    """Each stack of XL/2 takes 100 s to compile; the box ends in the part after them."""
    nine_minutes(campaign, machine, monkeypatch)
    assert machine.clock.now == 9 * 60 - 10
    a, b, c = COMPILED
    assert measured(campaign)[:7] == [
        (a, 256, []),
        (b, 256, []),
        (a, 256, [b]),
        (b, 256, [a]),
        (c, 256, []),
        (a, 256, [b, c]),
        (b, 256, [a, c]),
    ]
    assert measured(campaign)[7] == (c, 256, [a, b])
    assert all(HEADLINE.items() <= row["case"].items() for row in list(rows.read(campaign.path))[:8])
    assert not campaign.find("failure")
    text = table.render(campaign.rows)
    assert text.index("| ours graphs |") < text.index("| plain compiled |") < text.index("| ours compiled |")


@pytest.mark.parametrize(("compile_s", "there"), [(150, COMPILED[:2]), (250, COMPILED[:1])])
def test_a_slower_machine_keeps_what_was_timed_before_the_end(campaign, machine, monkeypatch, compile_s, there):
    """And does not begin what cannot end, but measures what it can in the time that is left."""
    machine.compile_s = compile_s
    nine_minutes(campaign, machine, monkeypatch)
    found = measured(campaign, **HEADLINE)
    assert list(dict.fromkeys(stack for stack, _, _ in found))[: len(there)] == there
    compiled = [name for what, name, _ in machine.log if what == "compiles" and name in COMPILED]
    assert compiled == there
    assert any(stack == "ours" for stack, _, _ in found)


def test_a_stack_that_the_box_cuts_leaves_the_rows_of_those_before(campaign, machine):
    """The guard knows no better than the prediction: here the first stack alone takes longer."""
    machine.compile_s = 1000
    with pytest.raises(TimeUp), machine.clock.time_box(1300):
        steps.run(campaign)
    assert measured(campaign) == [("ours graphs", 256, [])]


def test_in_a_short_time_eager_stacks_are_measured(campaign, machine):
    campaign.until = machine.clock.now + 30
    steps.run(campaign)
    assert "ours" in {stack for stack, _, _ in measured(campaign)}
    assert {name for _, name, _ in machine.log}.isdisjoint(COMPILED)


def test_nothing_is_made_before_the_row_of_the_stack_before_it(campaign, machine, monkeypatch):
    seen = []
    make = machine.made

    def noted(name, batch):
        seen.append((name, measured(campaign)))
        return make(name, batch)

    monkeypatch.setattr(machine, "made", noted)
    campaign.path.touch()
    steps.measure(campaign, *MASKED, True)
    assert [name for name, _ in seen] == COMPILED
    assert [list(dict.fromkeys(row[0] for row in found)) for _, found in seen] == [[], COMPILED[:1], COMPILED[:2]]


# Memory


def test_where_memory_is_short_a_stack_is_measured_without_those_before_and_nothing_compiles_twice(campaign, machine):
    machine.capacity = 400  # of 256 and 256
    steps.measure(campaign, *MASKED, True)
    assert measured(campaign) == [(name, 256, []) for name in COMPILED]
    assert [name for what, name, _ in machine.log if what == "compiles"] == COMPILED
    assert all(row["ready_s"] >= 100 for row in campaign.rows)  # the first try's compile counts
    assert not campaign.find("failure")
    assert not campaign.find("too large")


def test_a_stack_that_is_too_large_alone_gets_half_the_batch_and_no_row_is_lost(campaign, machine, monkeypatch):
    def larger(name, batch):
        return make(name, batch * 2.5 if name == "plain compiled" else batch)

    make = machine.made
    monkeypatch.setattr(machine, "made", larger)
    machine.capacity = 600
    steps.measure(campaign, *MASKED, True)
    a, b, c = COMPILED
    found = measured(campaign)
    assert found[0] == (a, 256, [])  # stays
    assert (b, 128, []) in found
    assert (c, 128, []) in found
    assert (a, 128, []) in found  # to compare with
    assert found[-1] == (a, 128, [b, c])
    (row,) = campaign.find("too large")
    assert (row["variant"], row["case"]["batch"]) == (b, 256)
    compiled = [event for event in machine.log if event[0] == "compiles"]
    assert len(compiled) == len(set(compiled))


def test_where_too_little_memory_cuts_a_capture_the_next_process_begins_with_half_the_batch(campaign, machine):
    def lost(what):
        raise DeviceLostError(what)

    machine.capacity, campaign.recover = 200, lost
    with pytest.raises(DeviceLostError, match="too little memory for ours graphs"):
        steps.measure(campaign, *MASKED, True)
    following = Campaign(CPU, campaign.path, run=campaign.run)
    following.miniature, following.until = False, 1e9
    steps.measure(following, *MASKED, True)
    assert measured(campaign)[0] == ("ours graphs", 128, [])


def test_the_next_call_does_not_begin_with_a_batch_that_was_too_large(campaign, machine):
    case = steps.key(*MASKED, campaign)
    campaign.store("step", {**case, "batch": 256}, "ours graphs", {"ready_s": 1.0})
    campaign.store("too large", {**case, "batch": 256}, "plain compiled", {})
    assert steps.first_batch(campaign, *MASKED, ["plain compiled"]) == 128
    assert steps.first_batch(campaign, *MASKED, ["ours"]) == 256


@pytest.mark.parametrize(("memory", "batch"), [(150e9, 256), (80e9, 256), (40e9, 128), (24e9, 32), (1e9, 1)])
def test_the_first_batch_is_one_that_should_fit(campaign, machine, monkeypatch, memory, batch):
    properties = SimpleNamespace(total_memory=memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert steps.first_batch(campaign, *MASKED, COMPILED) == batch


def test_no_batch_fits(campaign, machine):
    machine.capacity = 0
    with pytest.raises(ValueError, match="too little memory for a batch of one image: ours graphs"):
        steps.measure(campaign, *MASKED, True)


class Allocator:
    """PyTorch's bytes on a GPU: those in use, and those that are held for them or in the pool of a graph."""

    def __init__(self, monkeypatch):
        self.used = self.most = self.cached = self.pool = 0
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: setattr(self, "cached", 0))
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: self.used)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.most)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: self.used + self.cached + self.pool)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: setattr(self, "most", self.used))

    def take(self, size, of_pool=False):
        """Use bytes for a moment."""
        self.most = max(self.most, self.used + size)
        self.pool, self.cached = (self.pool + size, self.cached) if of_pool else (self.pool, self.cached + size)


@pytest.mark.parametrize(("name", "peak"), [("ours graphs", 10.8 + 2.7 + 40), ("ours compiled", 10.8 + 40)])
def test_memory_is_all_that_training_takes(campaign, machine, monkeypatch, name, peak):
    """Weights, moments and average take 10.8 GB here; activations 40, and gradients that graphs keep 2.7."""
    allocator = Allocator(monkeypatch)
    allocator.used = 5e9  # of something else
    called = itertools.count()

    def make():
        allocator.used += 10.8e9
        return step

    def step():
        if name != "ours graphs":
            allocator.take(40e9)
            return
        match next(called):
            case 0:  # warms up, and makes the gradients
                allocator.used += 2.7e9
                allocator.take(40e9)
            case 1:
                allocator.take(40e9, of_pool=True)  # later ones are replayed there

    group = steps.Together(campaign, *MASKED, 256, True)
    group.device, group.resident = GPU, int(10.8e9)
    group.made.makers[name] = make
    monkeypatch.setattr(rows, "measure", lambda calls, device, **_: {n: rows.Timing(1.0, 1.0, 1.0, 7) for n in calls})
    monkeypatch.setattr(steps, "launches", lambda step: 100)
    assert group.measure([name]) == []
    first, last = campaign.find("step", name)
    assert first["peak_gb"] == pytest.approx(peak)
    assert first["step_gb"] == pytest.approx(peak - 10.8)
    assert "launches" not in first  # the profiler comes after the row
    assert last["launches"] == 100


# What is measured again


def test_the_published_size_with_compiled_stacks_comes_first(campaign):
    wanted = list(steps.wanted(campaign))
    assert len(wanted) == 4 * 2 * 3 * 2 == len(set(wanted))
    assert wanted[:4] == [
        ("xl2", 256, "masked-0.5", True),
        ("xl2", 256, "masked-0.5", False),
        ("xl2", 256, "dense", False),
        ("xl2", 256, "dense", True),
    ]
    case = {**steps.key("xl2", 256, "dense", campaign), "batch": 64}
    for stack in ("ours", "plain eager", "products"):
        assert ("xl2", 256, "dense", False) in list(steps.wanted(campaign))
        campaign.store("step", case, stack, {"ready_s": 1.0})
    assert ("xl2", 256, "dense", False) not in list(steps.wanted(campaign))


def test_the_next_call_measures_what_is_missing_first_and_then_in_turn(campaign, machine):
    machine.compile_s = 150
    campaign.until = 350.0
    steps.measure(campaign, *MASKED, True)
    assert {stack for stack, _, _ in measured(campaign)} == set(COMPILED[:2])
    again = Campaign(CPU, campaign.path)
    again.miniature, again.until = False, 1e9
    machine.log.clear()
    steps.measure(again, *MASKED, True)
    a, b, c = COMPILED
    assert [name for what, name, _ in machine.log if what == "makes"] == [c, a, b]
    assert measured(campaign)[-1] == (b, 256, [c, a])


def test_a_stack_that_fails_is_a_failure_and_the_others_are_measured(campaign, machine, monkeypatch):
    def make(name, batch):
        if name == "plain compiled":
            raise RuntimeError("no such luck")
        return made_up(name, batch)

    made_up = machine.made
    monkeypatch.setattr(machine, "made", make)
    steps.measure(campaign, *MASKED, True)
    a, _, c = COMPILED
    assert measured(campaign)[-2:] == [(a, 256, [c]), (c, 256, [a])]
    (row,) = campaign.find("failure")
    assert row["variant"] == "plain compiled"
    machine.log.clear()
    steps.measure(campaign, *MASKED, True)  # as in a process that takes over
    assert "plain compiled" not in {name for _, name, _ in machine.log}


def test_packed_samples_need_whole_groups(campaign, machine):
    machine.capacity = 4
    campaign.store("step", {**steps.key(*MASKED, campaign), "batch": 4}, "ours graphs", {"ready_s": 1.0})
    steps.measure(campaign, *MASKED, False)
    (row,) = campaign.find("absent")
    assert (row["variant"], row["reason"]) == ("ours packed", "a batch of 4 is not made of groups of 8")
    assert not steps.missing(campaign, *MASKED, False)


def test_how_long_a_stack_takes_is_predicted_and_then_known(campaign):
    predicted = steps.ready_after(campaign, "plain compiled", "xl2-in256")
    assert 105 <= predicted <= 165
    assert steps.ready_after(campaign, "ours compiled", "s2-in256") == pytest.approx(predicted * 15 / 36)
    campaign.store("step", {**steps.key(*MASKED, campaign), "batch": 256}, "plain compiled", {"ready_s": predicted / 2})
    assert steps.ready_after(campaign, "ours compiled", "s2-in256") == pytest.approx(predicted * 15 / 36 / 2)
    assert steps.ready_after(campaign, "ours graphs", "xl2-in256") == 40


def test_steps_are_stored_with_what_they_are_worth(campaign):
    steps.measure(campaign, "s2", 256, "dense", False)
    last = {row["variant"]: row for row in campaign.rows}
    assert list(last) == ["ours", "plain eager", "products"]
    assert all(row["images_per_s"] > 0 and row["forward_gmac"] == 65.45 and "mfu" not in row for row in last.values())
    text = table.render(campaign.rows)
    assert "| dit-s2-in256 | 256 | dense | 1024 | bf16 | ours |" in text
    assert "~" not in text.split("`x plain`")[0]


def test_the_table_marks_a_ratio_of_two_that_were_not_timed_in_turn(campaign, machine):
    machine.capacity = 400
    steps.measure(campaign, *MASKED, True)
    lines = [line for line in table.render(campaign.rows).splitlines() if "| ours graphs |" in line]
    assert len(lines) == 1
    assert "| ~" in lines[0]


def test_ours_run_under_the_numerics_of_the_trainer_and_plain_under_pytorchs(monkeypatch):
    seen = {}

    def note(name, *results):
        settings = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
        seen.setdefault(name, set()).add(settings)

    class Ours:
        def __init__(self, *_):
            pass

        def gradients(self, data, offset, keep):
            note("ours")

        def update(self, keep):
            note("ours")

        def finish(self):
            pass

    monkeypatch.setattr(made, "build_step", Ours)
    monkeypatch.setattr(made.PlainTrainer, "gradients", lambda *_: note("plain"))
    monkeypatch.setattr(made.PlainTrainer, "update", lambda *_: note("plain"))
    monkeypatch.setattr(made, "products", lambda step, device: note("made") or (lambda: note("products")))
    found = made.steps("s2", 32, "masked-0.5", 2, CPU, stacks=["plain eager", "ours"])
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    for make in found.makers.values():
        make()()
    trainer = {(True, False)}
    assert seen == {"ours": trainer, "products": trainer, "made": {before}, "plain": {before}}
    assert before != (True, False)


def test_mfu_is_of_a_peak_that_is_known():
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989
    assert peak_tflops("NVIDIA A100-SXM4-80GB") == 312
    for unknown in ("NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA A100 MIG 1g.5gb", "NVIDIA GB200", "AMD EPYC"):
        assert peak_tflops(unknown) is None
    # The goal for XL/2 at 256x256 with half the patches: 1,219 images/s of an H100 are about half its peak.
    assert steps.mfu(65.45, 1219, 989) == pytest.approx(0.484, abs=1e-3)


def test_launches_are_kernels_and_not_copies():
    names = [("gemm", DeviceType.CUDA), ("Memcpy HtoD", DeviceType.CUDA), ("aten::mm", DeviceType.CPU)]
    events = [SimpleNamespace(name=name, device_type=kind) for name, kind in names]
    events.append(SimpleNamespace(name="step", device_type=DeviceType.CUDA, is_user_annotation=True))
    assert steps.count_kernels(events) == 1
    assert steps.count_kernels(events[2:]) is None
