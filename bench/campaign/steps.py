"""Whole training steps on random latents at the largest batch that fits, the most important first."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench import rows
from bench.campaign.gate import network_is_right
from bench.campaign.state import Campaign, peak_tflops, release
from bench.train.steps import Steps, config_of, stacks_of, steps
from fastmask.config import build_model
from fastmask.counts import trainable_parameters

_SIZES = (("xl2", 256), ("xl2", 512), ("b2", 256), ("l2", 256), ("s2", 256), ("b2", 512), ("l2", 512), ("s2", 512))
_FORMS = (("masked-0.5", False), ("dense", False), ("masked-0.5", True), ("dense", True))
_FORMS += (("masked-0.75", False), ("masked-0.75", True))
_START = {"s2": 1024, "b2": 512, "l2": 256, "xl2": 256}  # images at 256x256; a quarter at 512x512
_SECONDS = {False: 12, True: 45}  # a case is not begun with less than this left


def wanted(campaign: Campaign) -> Iterator[tuple[str, int, str, bool]]:
    """Yield what is not measured yet: size, image size, form, compiled."""
    sizes, forms = (_SIZES, _FORMS) if not campaign.miniature else ([("s2", 32)], [("masked-0.5", False)])
    for size, image_size in sizes:
        for form, compiled in forms:
            case = key(size, image_size, form, campaign)
            if not campaign.is_done("step", "ours compiled" if compiled else "ours", **case):
                yield size, image_size, form, compiled


def key(size: str, image_size: int, form: str, campaign: Campaign) -> dict[str, Any]:
    """Return what a row's case says, but for the batch."""
    precision = "fp32" if campaign.miniature else "bf16"
    preset = config_of(size, image_size, form).preset
    return {"preset": preset, "image_size": image_size, "form": form, "precision": precision}


def todo(campaign: Campaign) -> list[str]:
    """Return what is not measured yet."""
    return [f"{size} {side} {form}{' compiled' if compiled else ''}" for size, side, form, compiled in wanted(campaign)]


def run(campaign: Campaign) -> None:
    """Measure what is not measured yet, unless the network computes something else than it should."""
    if not network_is_right(campaign):
        campaign.say("  no step is timed: the network failed its check")
        return
    for size, image_size, form, compiled in list(wanted(campaign)):
        if not campaign.miniature and campaign.left() < _SECONDS[compiled]:
            return
        case = key(size, image_size, form, campaign)
        with campaign.attempt("step", "ours compiled" if compiled else "ours", **case):
            measure(campaign, size, image_size, form, compiled)


def measure(campaign: Campaign, size: str, image_size: int, form: str, compiled: bool) -> None:
    """Time the steps of a case at the largest batch that fits, and store a row for each variant."""
    release()
    earlier = campaign.find("step", "ours", **key(size, image_size, form, campaign))
    batch = 2 if campaign.miniature else _START[size] * 256**2 // image_size**2
    batch = earlier[-1]["case"]["batch"] if earlier else batch  # that of the eager steps, to compare with

    def at(batch: int) -> tuple[Steps, dict[str, dict[str, Any]]]:
        stacks = [s for s in stacks_of(campaign.device, form, batch) if s.endswith(("compiled", "graphs")) == compiled]
        case = steps(size, image_size, form, batch, campaign.device, stacks=stacks, bf16=not campaign.miniature)
        return case, timed(campaign, case, size, image_size, form, batch)

    case, found = largest_batch(at, batch)
    for name, figures in found.items():
        campaign.store("step", case.case, name, figures)
    said = ", ".join(f"{name} {figures['images_per_s']:.1f}" for name, figures in found.items())
    campaign.say(f"  {size} {image_size} {form}, batch {case.case['batch']}: {said} images/s")


def largest_batch(call: Callable[[int], Any], start: int) -> Any:
    """Return what a call gives at the largest of start, start / 2, ... 1 for which the memory is enough."""
    batch = start
    while batch:
        try:
            return call(batch)
        except torch.OutOfMemoryError:
            pass  # leave the handler first: the error holds what has filled the memory
        release()
        batch //= 2
    raise ValueError("too little memory for a batch of one image")


def timed(
    campaign: Campaign, case: Steps, size: str, image_size: int, form: str, batch: int
) -> dict[str, dict[str, Any]]:
    """Return the figures of each variant; times first, in turn, then memory and launches of one step each."""
    times = {"rounds": 2, "warmup": 1} if campaign.miniature else {"rounds": 7, "warmup": 2}
    timings = rows.measure(case.variants, campaign.device, **times)
    with torch.device("meta"):
        model = build_model(config_of(size, image_size, form), 4, image_size // 8)
    resident = 16 * trainable_parameters(model)
    peak = peak_tflops(campaign.machine["device"]) if not campaign.miniature else None
    found = {}
    for name, timing in timings.items():
        per_second = batch / timing.median_ms * 1e3
        figures: dict[str, Any] = {
            **timing._asdict(),
            "images_per_s": round(per_second, 3),
            "forward_gmac": round(case.forward_gmac, 3),
            "optimizer": True,
        }
        if peak:
            figures |= {"mfu": round(mfu(case.forward_gmac, per_second, peak), 4), "peak_tflops_bf16": peak}
        if campaign.device.type == "cuda":
            figures |= memory(case.variants[name], campaign.device, resident if name != "products" else 0)
            figures |= {"launches": launches(case.variants[name])}
        found[name] = figures
    return found


def mfu(forward_gmac: float, images_per_s: float, peak_tflops: float) -> float:
    """Return the share of the peak that the model's operations are: two per MAC, three forward passes per step."""
    return 6 * forward_gmac * 1e9 * images_per_s / (peak_tflops * 1e12)


def memory(step: Callable[[], Any], device: torch.device, resident: int) -> dict[str, float]:
    """Return the most memory that a step took beside what was there, and that with its own weights, moments and EMA.

    Programs share weights, moments and average, so what a step holds in between is counted and not measured, 16 bytes
    per parameter. Gradients are part of what the step takes.
    """
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    taken = torch.cuda.max_memory_allocated(device) - before
    return {"step_gb": round(taken / 1e9, 3), "peak_gb": round((taken + resident) / 1e9, 3)}


def launches(step: Callable[[], Any]) -> int | None:
    """Return how many kernels a step launches; None where the profiler sees none."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    return count_kernels(seen.events())


def count_kernels(events: Any) -> int | None:
    """Return how many of a profile's events are kernels on the GPU: copies, fills and marked spans are not."""
    on_gpu = [event for event in events if event.device_type == DeviceType.CUDA]
    spans = [event for event in on_gpu if getattr(event, "is_user_annotation", False)]
    others = [event for event in on_gpu if event.name.startswith(("Memcpy", "Memset"))]
    return len(on_gpu) - len(spans) - len(others) or None
