"""Whole training steps on random latents at the largest batch that fits, in order of importance.

Each stack is built and timed alone, and its row is stored before the next one is built, which can take minutes, so a
time box that ends keeps finished results. The stacks that fit in memory together are then timed in turn, and their rows
are stored again; each row lists the stacks that it was timed in turn with.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench import rows
from bench.campaign.gate import network_is_right
from bench.campaign.state import Campaign, peak_tflops, release
from bench.train.steps import config_of, stacks_of
from bench.train.steps import steps as steps_of
from fastmask.cost.work import memory_of
from fastmask.diffusion.masking import GROUP
from fastmask.models.counts import num_parameters
from fastmask.models.maskdit import MaskDiT
from fastmask.presets import PRESETS
from fastmask.training.config import build_model

_SIZES = (("xl2", 256), ("xl2", 512), ("b2", 256), ("l2", 256), ("s2", 256), ("b2", 512), ("l2", 512), ("s2", 512))
# The project's headline case comes first, though it takes longest.
_FORMS = (("masked-0.5", True), ("masked-0.5", False), ("dense", False), ("dense", True))
_FORMS += (("masked-0.75", False), ("masked-0.75", True))
_STACKS = {  # by whether they are compiled
    True: ("ours graphs", "plain compiled", "ours compiled"),
    False: ("ours", "plain eager", "products", "ours packed"),
}
_START = {"s2": 1024, "b2": 512, "l2": 256, "xl2": 256}  # images at 256x256; a quarter at 512x512
# Predicted seconds until a stack's first step is done: per block of the network, and fixed.
_READY = {"ours graphs": (0.0, 40.0), "plain compiled": (4.0, 0.0), "ours compiled": (4.0, 0.0)}
_READY_EAGER = (0.0, 5.0)
_TIMING = 5.0  # and further seconds until its row is stored


def wanted(campaign: Campaign) -> Iterator[tuple[str, int, str, bool]]:
    """Yield the outstanding cases: size, image size, form, compiled."""
    sizes, forms = (_SIZES, _FORMS) if not campaign.miniature else ([("s2", 32)], [("masked-0.5", False)])
    for size, image_size in sizes:
        for form, compiled in forms:
            if missing(campaign, size, image_size, form, compiled):
                yield size, image_size, form, compiled


def missing(campaign: Campaign, size: str, image_size: int, form: str, compiled: bool) -> list[str]:
    """Return the stacks of a case that have no row."""
    case = key(size, image_size, form, campaign)
    return [s for s in stacks(campaign, form, compiled) if not campaign.is_done("step", s, **case)]


def stacks(campaign: Campaign, form: str, compiled: bool) -> list[str]:
    """Return the stacks of a form, the most important first."""
    there = {*stacks_of(campaign.device, form, GROUP), "products"}
    return [stack for stack in _STACKS[compiled] if stack in there]


def key(size: str, image_size: int, form: str, campaign: Campaign) -> dict[str, Any]:
    """Return the case of a row, without the batch."""
    precision = "fp32" if campaign.miniature else "bf16"
    preset = config_of(size, image_size, form).preset
    return {"preset": preset, "image_size": image_size, "form": form, "precision": precision}


def todo(campaign: Campaign) -> list[str]:
    """Return the outstanding cases."""
    return [f"{size} {side} {form}{' compiled' if compiled else ''}" for size, side, form, compiled in wanted(campaign)]


def run(campaign: Campaign) -> None:
    """Measure the outstanding cases, unless the network fails its accuracy check."""
    if not network_is_right(campaign):
        campaign.say("  no step is timed: the network failed its check")
        return
    for size, image_size, form, compiled in list(wanted(campaign)):
        case = key(size, image_size, form, campaign)
        soonest = min(ready_after(campaign, stack, case["preset"]) for stack in stacks(campaign, form, compiled))
        if not campaign.miniature and campaign.left() < soonest + _TIMING:
            continue  # a smaller one can still fit
        with campaign.attempt("step", "case", **case):
            measure(campaign, size, image_size, form, compiled)


def measure(campaign: Campaign, size: str, image_size: int, form: str, compiled: bool) -> None:
    """Time the stacks of a case at the largest batch that fits, and store their rows.

    Stacks without a row come first. If a stack does not fit alone, it and the following ones are measured at half the
    batch, and if time permits also the ones before it, for comparison.
    """
    first = missing(campaign, size, image_size, form, compiled)
    waiting = first + [stack for stack in stacks(campaign, form, compiled) if stack not in first]
    batch = first_batch(campaign, size, image_size, form, first)
    while waiting and batch:
        release()
        waiting = Together(campaign, size, image_size, form, batch, compiled).measure(waiting)
        batch //= 2
    if waiting:
        raise ValueError(f"too little memory for a batch of one image: {waiting[0]}")


def first_batch(campaign: Campaign, size: str, image_size: int, form: str, waiting: Sequence[str]) -> int:
    """Return the first batch to try: the batch of the case's rows or the predicted one, unless it proved too large.

    Args:
        campaign: the campaign with the rows.
        size: network size.
        image_size: side in pixels.
        form: masked or dense.
        waiting: the stacks to measure.
    """
    if campaign.miniature:
        return 2
    case = key(size, image_size, form, campaign)
    too_large = [row["case"]["batch"] for row in campaign.find("too large", **case) if row["variant"] in waiting]
    earlier = [row["case"]["batch"] for row in campaign.find("step", **case)]
    needed = memory_of(network(size, image_size, form), config_of(size, image_size, form).masking.mask_ratio, "bf16")
    fits = needed.largest_batch(torch.cuda.get_device_properties(campaign.device).total_memory)
    batch = _START[size] * 256**2 // image_size**2
    while batch > 1 and batch > fits:
        batch //= 2
    batch = earlier[-1] if earlier else batch
    while batch > 1 and batch >= min(too_large, default=batch + 1):
        batch //= 2
    return batch


@functools.cache
def network(size: str, image_size: int, form: str) -> MaskDiT:
    """Return the network of a case on the meta device."""
    with torch.device("meta"):
        return build_model(config_of(size, image_size, form), 4, image_size // 8)


def ready_after(campaign: Campaign, stack: str, preset: str) -> float:
    """Return the seconds until the first step of a stack is done, predicted or scaled from the last similar stack."""
    base = _predicted(stack, preset)
    alike = [row for row in campaign.find("step") if _READY.get(row["variant"]) == _READY.get(stack)]
    if not alike:
        return base
    return base * alike[-1]["ready_s"] / _predicted(alike[-1]["variant"], alike[-1]["case"]["preset"])


def _predicted(stack: str, preset: str) -> float:
    per_block, besides = _READY.get(stack, _READY_EAGER)
    network = PRESETS[preset]["network"]
    return per_block * (network.depth + network.decoder_depth) + besides


class Together:
    """The stacks of a case at one batch; those that fit in memory together are kept.

    Args:
        campaign: the campaign of the rows.
        size: network size.
        image_size: side in pixels.
        form: masked or dense.
        batch: number of images.
        compiled: whether these stacks are compiled.
    """

    def __init__(self, campaign: Campaign, size: str, image_size: int, form: str, batch: int, compiled: bool):
        self.campaign, self.device = campaign, campaign.device
        self.batch, self.compiled = batch, compiled
        self.key = key(size, image_size, form, campaign)
        self.name = f"{size} {image_size} {form}, batch {batch}"
        there = stacks_of(campaign.device, form, batch)
        self.made = steps_of(size, image_size, form, batch, campaign.device, stacks=there, bf16=not campaign.miniature)
        self.resident = 16 * num_parameters(network(size, image_size, form))
        self.rounds = {"rounds": 2, "warmup": 1} if campaign.miniature else {"rounds": 7, "warmup": 1}
        self.calls: dict[str, Callable[[], Any]] = {}
        self.figures: dict[str, dict[str, Any]] = {}
        self.alone: dict[str, rows.Timing] = {}  # timings of stacks that are not timed in turn yet

    def measure(self, names: Sequence[str]) -> list[str]:
        """Measure stacks; if the batch is too large for one, return it and the remaining ones."""
        left: list[str] = []
        for i, name in enumerate(names):
            if left or not self.begins(name):
                continue
            with self.campaign.attempt("step", name, **self.key):
                if not self.add(name):
                    self.campaign.store("too large", {**self.key, "batch": self.batch}, name, {})
                    self.campaign.say(f"  {self.name} is too large for {name}")
                    self.campaign.recover(f"too little memory for {name}")  # which can have interrupted a capture
                    left = [*names[i:], *names[:i]]
                elif self.compiled:  # before the next one, which takes minutes and can run out of time
                    self.compare()
        self.compare()
        for name, timing in self.alone.items():
            if "launches" in self.figures[name]:
                self.store(name, timing, [])
        return left

    def begins(self, name: str) -> bool:
        """Return whether to measure a stack now; print the reason if not."""
        campaign = self.campaign
        if any(row["variant"] == name for row in campaign.failed_now("step", **self.key)):
            return False
        if name not in self.made.makers:
            reason = f"a batch of {self.batch} is not made of groups of {GROUP}"
            campaign.store("absent", {"bench_of": "step", **self.key}, name, {"reason": reason})
            return False
        needed = ready_after(campaign, name, self.key["preset"]) + _TIMING
        if not campaign.miniature and campaign.left() < needed:
            campaign.say(f"  {self.name}: {name} takes some {needed:.0f} s, {campaign.left():.0f} s are left")
            return False
        return True

    def add(self, name: str) -> bool:
        """Measure a stack alone, and drop the others if memory is short; return whether it fits."""
        step, began = None, time.monotonic()
        while True:
            try:
                before = held(self.device) if self.device.type == "cuda" else 0
                step = step or self.made.makers[name]()
                self.time_alone(name, step, before, began)
            except torch.OutOfMemoryError:
                if not self.calls:
                    return False
            else:
                self.calls[name] = step
                return True
            # Outside the handler, since the error keeps the memory alive. Compiled code is kept, except a graph whose
            # capture can have been interrupted.
            self.calls.clear()
            step = None if name == "ours graphs" else step
            self.campaign.recover(f"too little memory for {name} beside others")

    def time_alone(self, name: str, step: Callable[[], Any], before: int, began: float) -> None:
        """Time a stack and store its row, then count its launches for the next row.

        Args:
            name: name of the stack.
            step: its step, which compiles at the first call and captures graphs at the second.
            before: bytes held before it was built.
            began: start time.
        """
        on_gpu = self.device.type == "cuda"
        step()
        if on_gpu:
            torch.cuda.synchronize(self.device)
        figures = self.figures[name] = {"ready_s": round(time.monotonic() - began, 2), "optimizer": True}
        step()
        if on_gpu:
            resident = self.resident if name != "products" else 0
            graphs = name == "ours graphs"
            peak = held(self.device) - before if graphs else taken_by(step, self.device) + resident
            figures |= {"step_gb": round((peak - resident) / 1e9, 3), "peak_gb": round(peak / 1e9, 3)}
        self.alone[name] = rows.measure({name: step}, self.device, **self.rounds)[name]
        self.store(name, self.alone[name], [])
        if on_gpu:
            figures["launches"] = launches(step)

    def compare(self) -> None:
        """Time the stacks in memory in turn, and store their rows again."""
        if len(self.calls) < 2 or not self.alone.keys() & self.calls.keys():
            return
        with self.campaign.attempt("step", "in turn", **self.key):
            timings = rows.measure(self.calls, self.device, **self.rounds)
            for name, timing in timings.items():
                self.store(name, timing, [other for other in timings if other != name])
                self.alone.pop(name, None)

    def store(self, name: str, timing: rows.Timing, others: list[str]) -> None:
        """Store the row of a stack, with the stacks that it was timed in turn with."""
        per_second = self.batch / timing.median_ms * 1e3
        figures = {
            **timing._asdict(),
            "images_per_s": round(per_second, 3),
            "forward_gmac": round(self.made.forward_gmac, 3),
            **self.figures[name],
            "in_turn_with": others,
        }
        peak = None if self.campaign.miniature else peak_tflops(self.campaign.machine["device"])
        if peak:
            figures |= {"mfu": round(mfu(self.made.forward_gmac, per_second, peak), 4), "peak_tflops_bf16": peak}
        self.campaign.store("step", self.made.case, name, figures)
        how = f"in turn with {', '.join(others)}" if others else f"alone, ready after {figures['ready_s']:.0f} s"
        self.campaign.say(f"  {self.name}: {name} {per_second:.1f} images/s, {how}")


def mfu(forward_gmac: float, images_per_s: float, peak_tflops: float) -> float:
    """Return the MFU: two operations per MAC, and three times the forward pass per step."""
    return 6 * forward_gmac * 1e9 * images_per_s / (peak_tflops * 1e12)


def taken_by(step: Callable[[], Any], device: torch.device) -> int:
    """Return the peak bytes that a step allocates; the replay of a graph uses only its pool."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def held(device: torch.device) -> int:
    """Return the bytes that the allocator cannot release, including the pools of graphs."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


def launches(step: Callable[[], Any]) -> int | None:
    """Return the number of kernels that a step launches; None if the profiler sees none."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    return count_kernels(seen.events())


def count_kernels(events: Any) -> int | None:
    """Return the number of GPU kernels in a profile, without copies, fills and annotated spans."""
    on_gpu = [event for event in events if event.device_type == DeviceType.CUDA]
    spans = [event for event in on_gpu if getattr(event, "is_user_annotation", False)]
    others = [event for event in on_gpu if event.name.startswith(("Memcpy", "Memset"))]
    return len(on_gpu) - len(spans) - len(others) or None
