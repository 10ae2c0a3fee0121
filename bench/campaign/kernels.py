"""The kernels of `bench.kernels` at the shapes of the presets: quick variants of all first, then with the compiler's.

Compiling and tuning the reference takes by far the longest, so a box that is too short loses that first.
"""

from collections.abc import Iterator
from typing import Any

import torch

from bench import rows
from bench.campaign.state import Campaign, release
from bench.kernels import OPS, figures, forms
from bench.kernels import make as make_case

# preset, and whether the compiled reference is among the variants
_PASSES = (("xl2-in256", False), ("xl2-in256", True), ("b2-in256", False), ("s2-in256", False), ("xl2-in512", False))
_SECONDS = {False: 3, True: 25}  # a case is not begun with less than this left


def wanted(campaign: Campaign) -> Iterator[dict[str, Any]]:
    """Yield what is not measured yet: preset, file of the op, form, direction, compiled."""
    for preset, compiled in (("digits", False),) if campaign.miniature else _PASSES:
        for op in OPS:
            for form, direction in forms(op):
                if campaign.miniature and (form, direction) != forms(op)[-1]:
                    continue  # one of each op
                case = {"preset": preset, "file": op, "form": form, "direction": direction}
                if not campaign.is_done("kernel", "compiled" if compiled else "reference", **case):
                    yield {**case, "compiled": compiled}


def todo(campaign: Campaign) -> list[str]:
    """Return what is not measured yet."""
    return [
        f"{c['file']} {c['form']} {c['direction']} {c['preset']}{' compiled' if c['compiled'] else ''}"
        for c in wanted(campaign)
    ]


def run(campaign: Campaign) -> None:
    """Measure what is not measured yet."""
    bandwidth = 0.0
    for case in list(wanted(campaign)):
        compiled = case.pop("compiled")
        if not campaign.miniature and campaign.left() < _SECONDS[compiled]:
            return
        bandwidth = bandwidth or rows.copy_bandwidth(campaign.device, 2**20 if campaign.miniature else 2**30)
        with campaign.attempt("kernel", "compiled" if compiled else "all", **case):
            release()
            measure(campaign, case, compiled, bandwidth)


def measure(campaign: Campaign, key: dict[str, Any], compiled: bool, bandwidth: float) -> None:
    """Check a case, time its variants in turn and store a row for each."""
    case = make_case(key["file"], key["form"], key["direction"], key["preset"], campaign.device, None)
    if not compiled:
        case.variants.pop("compiled", None)  # before the check, which would call it
    torch.set_float32_matmul_precision("highest")
    case.check()
    times = {"rounds": 2, "warmup": 1} if campaign.miniature else {"rounds": 30, "warmup": 3}
    timings = rows.measure(case.variants, campaign.device, **times)
    said = {name: getattr(case, name) for name in ("op", "direction", "shape", "dtype", "preset")}
    for name, found in figures(case, timings, bandwidth).items():
        campaign.store("kernel", said, name, {**found, "file": key["file"], "form": key["form"]})
    for name, reason in case.missing.items():
        if not campaign.is_done("kernel", name, **key):
            campaign.store("absent", {"bench_of": "kernel", **key}, name, {"reason": reason})
    times_said = ", ".join(f"{name} {timing.median_ms:.3f}" for name, timing in timings.items())
    campaign.say(f"  {case.op} {key['form']} {case.direction} {case.shape}: {times_said} ms")
