"""The kernel benchmarks of `bench.ops` at the presets' shapes: quick variants first, then the compiled reference.

Compiling and tuning the reference takes by far the longest, so it comes last if time is short.
"""

from collections.abc import Iterator
from typing import Any

import torch

from bench import rows
from bench.campaign.state import Campaign, DeviceLostError, release
from bench.instruments.cases import Case, figures, forms
from bench.instruments.cases import make as make_case
from bench.instruments.graph import CaptureFailedError
from bench.ops import OPS

# preset, and whether to include the compiled reference
_PASSES = (("xl2-in256", False), ("xl2-in256", True), ("b2-in256", False), ("s2-in256", False), ("xl2-in512", False))
_SECONDS = {False: 3, True: 25}  # minimum remaining time to start a case


def wanted(campaign: Campaign) -> Iterator[dict[str, Any]]:
    """Yield the outstanding cases: preset, file of the op, form, direction, compiled."""
    for preset, compiled in (("digits", False),) if campaign.miniature else _PASSES:
        for op in OPS:
            for form, direction in forms(op):
                if campaign.miniature and (form, direction) != forms(op)[-1]:
                    continue  # one of each op
                case = {"preset": preset, "file": op, "form": form, "direction": direction}
                if not campaign.is_done("kernel", "compiled" if compiled else "ours", **case):
                    yield {**case, "compiled": compiled}


def todo(campaign: Campaign) -> list[str]:
    """Return the outstanding cases."""
    return [
        f"{c['file']} {c['form']} {c['direction']} {c['preset']}{' compiled' if c['compiled'] else ''}"
        for c in wanted(campaign)
    ]


def run(campaign: Campaign) -> None:
    """Measure the outstanding cases."""
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
    """Check a case, time the variants that pass in turn, and store a row for each."""
    torch.set_float32_matmul_precision("highest")
    refused = {row["variant"]: row["reason"] for row in campaign.find("uncaptured", torch=torch.__version__, **key)}
    where = key["file"], key["form"], key["direction"], key["preset"], campaign.device
    case = make_case(*where, compiler=compiled, refused=refused)
    times = {"rounds": 2, "warmup": 1} if campaign.miniature else {"rounds": 30, "warmup": 3}
    try:
        keep_right(campaign, case, key)
        timings = rows.measure(case.variants, campaign.device, **times)
    except CaptureFailedError as error:
        for name, call in case.variants.items():
            if name not in refused and getattr(call, "refused", ""):
                campaign.store("uncaptured", {"bench_of": "kernel", **key}, name, {"reason": call.refused})
        raise DeviceLostError(f"{case.op}: {error}") from error
    said = {name: getattr(case, name) for name in ("op", "direction", "shape", "dtype", "preset")}
    for name, found in figures(case, timings, bandwidth).items():
        campaign.store("kernel", said, name, {**found, "file": key["file"], "form": key["form"]})
    for name, reason in case.missing.items():
        if not campaign.is_done("kernel", name, **key):
            campaign.store("absent", {"bench_of": "kernel", **key}, name, {"reason": reason})
    times_said = ", ".join(f"{name} {timing.median_ms:.3f}" for name, timing in timings.items())
    campaign.say(f"  {case.op} {key['form']} {case.direction} {case.shape}: {times_said} ms")


def keep_right(campaign: Campaign, case: Case, key: dict[str, Any]) -> None:
    """Remove variants that fail or are inaccurate from a case; each is a failure, and the others are timed.

    A variant that failed earlier in this call is not retried: it can have crashed the previous process.
    """
    right = set()
    failed = {row["variant"] for row in campaign.failed_now("kernel", **key)}
    for name in [name for name in case.variants if name not in failed]:
        with campaign.attempt("kernel", name, **key):
            case.check(name)
            right.add(name)
    for name in case.variants.keys() - right:
        del case.variants[name]
