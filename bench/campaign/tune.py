"""Tuning of the launch settings of row kernels, compared with the table in `_triton/_common.row_settings`.

For each width of the presets: warps per program, and rows per program forward and backward, for `modulate_norm` and
`add_gated_norm` together, since they share a setting. The table is not edited; the winner is printed and stored.
"""

import contextlib
import importlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench import rows
from bench.campaign.state import Campaign, release
from bench.instruments.calls import calls_of
from bench.instruments.graph import CaptureFailedError, Graphed
from bench.ops import describe, shapes_of
from fastmask.presets import PRESETS

OPS = ("modulate_norm", "add_gated_norm")
DIRECTIONS = ("forward", "backward")
_ROWS = (8, 16, 32, 64)
_MARGIN = 0.97  # the winner must take less than this fraction of the table's time
_SAMPLES, _TOKENS = 128, 128

Settings = Any  # _triton._common.RowSettings; its module needs triton


def widths(campaign: Campaign) -> list[int]:
    """Return the encoder and decoder widths of the presets, XL/2's first."""
    if campaign.miniature:
        return [16]
    found = dict.fromkeys((1152, 512))
    for preset in PRESETS.values():
        found |= dict.fromkeys(w for w in (preset.get("width"), preset.get("decoder_width")) if w)
    return list(found)


def todo(campaign: Campaign) -> list[str]:
    """Return the widths that are not tuned yet."""
    if not triton_runs(campaign.device):
        return []
    return [f"D={width}" for width in widths(campaign) if not campaign.is_done("tune", width=width)]


def run(campaign: Campaign) -> None:
    """Tune the outstanding widths."""
    if not triton_runs(campaign.device):
        campaign.say("  nothing to tune: no Triton kernel runs here (on a CPU set TRITON_INTERPRET=1)")
        return
    wrong = [op for op in OPS if campaign.failed_now("check", op=op)]
    if wrong:
        campaign.say(f"  not tuned, as {' and '.join(wrong)} failed the check")
        return
    for width in widths(campaign):
        if not campaign.is_done("tune", width=width):
            with campaign.attempt("tune", width=width):
                release()
                tune(campaign, width)


def triton_runs(device: torch.device) -> bool:
    """Return whether the Triton kernels of these ops run on a device: on a GPU, or in the interpreter."""
    rows = importlib.import_module("fastmask.kernels").backends()
    found = {row.op.removesuffix("_fwd") for row in rows if (row.device, row.kernel) == (device.type, "triton")}
    return found.issuperset(OPS)


def tune(campaign: Campaign, width: int) -> None:
    """Time the candidates of a width, then the best and the table's in turn, and store both."""
    present = row_settings(width)
    sizes = (2, 4) if campaign.miniature else (_SAMPLES, _TOKENS)
    calls = launches(width, *sizes, campaign.device)
    quick = {"rounds": 1, "warmup": 1} if campaign.miniature else {"rounds": 7, "warmup": 2}
    # Quick timing of all candidates.
    times: dict[tuple[int, int], dict[tuple[str, str], float]] = {}
    for warps, count in candidates(present, _ROWS[:2] if campaign.miniature else _ROWS):
        chosen = present._replace(num_warps=warps, rows_forward=count, rows_backward=count)
        variants = {key: under(chosen, call, campaign.device) for key, call in calls.items()}
        timed = rows.measure(variants, campaign.device, **quick)
        times[warps, count] = {key: timing.median_ms for key, timing in timed.items()}
    best = winner(present, times)
    # The best one against the table's, in turn.
    compared: dict[tuple[str, str, str], Callable[[], Any]] = {}
    for name, settings in (("present", present), ("winner", best)):
        compared |= {(name, *key): under(settings, call, campaign.device) for key, call in calls.items()}
    final = rows.measure(compared, campaign.device, **(quick if campaign.miniature else {"rounds": 30}))
    total = {name: sum(t.median_ms for key, t in final.items() if key[0] == name) for name in ("present", "winner")}
    if total["winner"] > _MARGIN * total["present"]:
        best = present
    for (name, op, direction), timing in final.items():
        settings = present if name == "present" or best == present else best
        if name == "winner" and best == present:
            timing = final["present", op, direction]
        case = {"width": width, "rows": sizes[0] * sizes[1], "op": op, "direction": direction}
        campaign.store("tune", case, name, {**timing._asdict(), "settings": settings._asdict()})
    gain = "stays" if best == present else f"-> {short(best)}: {total['winner'] / total['present']:.2f} of its time"
    campaign.say(f"  D={width}: {short(present)} {gain}")


def row_settings(width: int) -> Settings:
    """Return the table's settings."""
    return importlib.import_module("fastmask.kernels._triton._common").row_settings(width)


def candidates(present: Settings, counts: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield warps and rows to try: half, the same and twice the table's warps, and these counts of rows."""
    warps = sorted({min(16, max(1, w)) for w in (present.num_warps // 2, present.num_warps, 2 * present.num_warps)})
    yield from itertools.product(warps, counts)


def winner(present: Settings, times: dict[tuple[int, int], dict[tuple[str, str], float]]) -> Settings:
    """Return the fastest settings: both directions share the warps, but not the rows.

    Args:
        present: the table's settings.
        times: milliseconds per op and direction, by warps and rows.
    """
    found = []
    for warps in sorted({warps for warps, _ in times}):
        total, chosen = 0.0, []
        for direction in DIRECTIONS:
            by_rows = {
                count: sum(ms for (_, towards), ms in each.items() if towards == direction)
                for (w, count), each in times.items()
                if w == warps
            }
            chosen.append(min(by_rows, key=by_rows.__getitem__))
            total += by_rows[chosen[-1]]
        found.append((total, warps, *chosen))
    _, warps, forward, backward = min(found)
    return present._replace(num_warps=warps, rows_forward=forward, rows_backward=backward)


def launches(width: int, samples: int, tokens: int, device: torch.device) -> dict[tuple[str, str], Callable[[], Any]]:
    """Return the launches of both ops in both directions, as in a block: with a Linear, whose input they recompute."""
    shapes = shapes_of("xl2-in256", device)._replace(width=width, batch=samples, keep=tokens)
    found: dict[tuple[str, str], Callable[[], Any]] = {}
    for make in describe("norm_linear").forms.values():
        op = make(shapes)
        for direction, (call,) in zip(DIRECTIONS, calls_of(op), strict=True):
            found[op.kernel, direction] = call.launch
    return found


@contextlib.contextmanager
def settings_for_all(settings: Settings) -> Iterator[None]:
    """Make the launchers of both ops use these settings for every width."""
    modules = [importlib.import_module(f"fastmask.kernels._triton.{op}") for op in OPS]
    before = [module.row_settings for module in modules]
    try:
        for module in modules:
            module.row_settings = lambda width: settings
        yield
    finally:
        for module, function in zip(modules, before, strict=True):
            module.row_settings = function


def under(settings: Settings, call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """Return a call under these settings: on a GPU the replay of its graph, which was captured under them."""

    def call_under() -> Any:
        with settings_for_all(settings):
            return call()

    if device.type != "cuda":
        return call_under
    graphed = Graphed(call_under)
    try:
        graphed()
    except CaptureFailedError as error:
        raise RuntimeError(str(error)) from error  # a failure of this width, which the next process does not try again
    return graphed


def short(settings: Settings) -> str:
    """Format settings for a message."""
    return f"{settings.num_warps} warps, {settings.rows_forward}/{settings.rows_backward} rows"
