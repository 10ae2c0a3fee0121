"""The Markdown tables of a device's rows."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.campaign.state import latest
from bench.report.tables import header, line
from bench.rows import Row
from fastmask.files import atomic_write


def render(all_rows: list[Row]) -> str:
    """Return the tables of a device's rows; the last row of each case and variant counts."""
    by_bench: dict[str, list[Row]] = {}
    for row in latest(all_rows):
        by_bench.setdefault(row["bench"], []).append(row)
    if not by_bench:
        return "no rows yet\n"
    newest = max(all_rows, key=lambda row: row["date"])
    machine = ", ".join(f"{name} {newest[name]}" for name in ("torch", "triton", "driver_version") if newest.get(name))
    lines = [f"# {newest['device']}", "", f"{machine}; commit {newest['commit']}, code {newest.get('code', 'unknown')}"]
    if newest.get("miniature"):
        lines += ["", "A miniature on a CPU: the shapes and the times mean nothing, they test the code."]
    for bench, section in SECTIONS.items():
        if bench in by_bench:
            lines += ["", *section(by_bench[bench])]
    return "\n".join(lines) + "\n"


def write(all_rows: list[Row], path: Path) -> str:
    """Write the tables to a file atomically, and return them."""
    text = render(all_rows)
    with atomic_write(path) as partial:
        partial.write_text(text)
    return text


def _markdown(title: str, columns: list[str], body: list[list[Any]]) -> Iterator[str]:
    yield from (f"## {title}", "", *header(columns))
    for cells in body:
        yield line("" if cell is None else str(cell).replace("|", "/") for cell in cells)


def _device(rows: list[Row]) -> Iterator[str]:
    skipped = ("bench", "case", "variant", "device", "date", "commit", "run", "code", "miniature")
    yield from _markdown("Device", ["what", "value"], [[k, v] for k, v in rows[-1].items() if k not in skipped])


def _checks(rows: list[Row]) -> Iterator[str]:
    body = []
    for row in rows:
        errors = row.get("errors_over_allowed", {})
        if errors:
            worst = max(errors, key=errors.__getitem__)
            body.append([_said(row["case"]), len(errors), f"{errors[worst]:.2f}, {worst}"])
    yield from _markdown("Checks that were passed", ["what", "checks", "largest error / allowed"], body)
    for row in rows:
        if "passed" in row:
            yield from ("", f"pytest -m gpu: {row['passed']} passed, {row.get('failed', 0)} failed")


def _tune(rows: list[Row]) -> Iterator[str]:
    body = []
    for row in rows:
        settings = "{num_warps} warps, {rows_forward}/{rows_backward} rows".format(**row["settings"])
        case = row["case"]
        body.append([case["width"], case["op"], case["direction"], row["variant"], settings, _ms(row)])
    yield from _markdown("Launch settings", ["D", "op", "direction", "setting", "is", "ms [p20, p80]"], body)


def _kernels(rows: list[Row]) -> Iterator[str]:
    columns = ["op", "direction", "shape", "dtype", "variant", "ms [p20, p80]", "GB/s", "% of a copy", "TFLOP/s"]
    body = []
    for row in rows:
        case = [row["case"].get(name) for name in ("op", "direction", "shape", "dtype")]
        rates = [row.get(name) for name in ("gb_per_s", "copy_percent", "tflop_per_s")]
        launched = ", launched" if row.get("timed", "").startswith("launches") else ""
        body.append([*case, row["variant"] + launched, _ms(row), *rates])
    yield from _markdown("Kernels", columns, body)
    if any("launched" in cells[4] for cells in body):
        yield from ("", "Launched: no graph could be captured, and the time is also that of launches from Python.")


def _steps(rows: list[Row]) -> Iterator[str]:
    columns = ["preset", "image", "form", "batch", "precision", "variant", "ms [p20, p80]", "images/s"]
    columns += ["x plain", "x dense", "MFU", "peak GB", "launches", "ready s"]
    body = []
    for row in rows:
        case = row["case"]
        plain = "plain compiled" if row["variant"].endswith(("compiled", "graphs")) else "plain eager"
        beside = [other for other in rows if other["run"] == row["run"] and other["case"] == case]
        dense = [other for other in rows if other["run"] == row["run"] and _is_dense_of(other["case"], case)]
        body.append(
            [
                *(case.get(name) for name in ("preset", "image_size", "form", "batch", "precision")),
                row["variant"],
                _ms(row),
                f"{row['images_per_s']:.1f}",
                _ratio(row, beside, plain) if row["variant"] != "products" else None,
                _ratio(row, dense, row["variant"]),
                f"{row['mfu']:.1%}" if row.get("mfu") and row["variant"] != "products" else None,
                row.get("peak_gb"),
                row.get("launches"),
                row.get("ready_s"),
            ]
        )
    yield from _markdown("Training steps", columns, body)
    peaks = sorted({row["peak_tflops_bf16"] for row in rows if "peak_tflops_bf16" in row})
    yield from ("", "`x plain` and `x dense` compare images/s of the same call; ~ marks plain steps that were timed")
    yield "before or after, and not in turn. Ours run under the trainer's numerics, which repeat bits, plain PyTorch"
    yield "under its own. `products` is the bound of `ours`: its matmuls and attention alone. Peak GB: what a"
    yield "step takes, measured, and 16 bytes per parameter; of graphs all that they hold. Ready: when the first step"
    yield "was done."
    if peaks:
        yield f"MFU: 6 operations per MAC of the forward pass, of {peaks[0]} TFLOP/s (dense bf16)."


def _digits(rows: list[Row]) -> Iterator[str]:
    row = rows[-1]
    title = f"Training on digits, {row['case']['steps']} steps, {row['case']['precision']}"
    pairs = zip(row["means"], row["expected"], strict=True)
    yield from _markdown(title, ["part", "loss", "CPU, fp32"], [[i + 1, a, b] for i, (a, b) in enumerate(pairs)])
    yield from ("", f"At most {row['deviation']:.2%} off, {row['band']:.0%} are allowed; {row['seconds']} s.")


def _absent(rows: list[Row]) -> Iterator[str]:
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        reasons.setdefault((row["variant"], row["reason"]), []).append(_said(row["case"]))
    yield from _markdown("Not there", ["variant", "why", "cases"], [[*key, len(said)] for key, said in reasons.items()])


def _failures(rows: list[Row]) -> Iterator[str]:
    body = [[_said(row["case"]), row["variant"], row["error"], row["date"]] for row in rows]
    yield from _markdown("Failures, some of them perhaps mended since", ["case", "variant", "error", "date"], body)


def _said(case: dict[str, Any]) -> str:
    return " ".join(str(value) for value in case.values())


def _ms(row: Row) -> str:
    return f"{row['median_ms']:.4g} [{row['p20_ms']:.4g}, {row['p80_ms']:.4g}]"


def _ratio(row: Row, others: list[Row], variant: str) -> str | None:
    other = next((other for other in others if other["variant"] == variant), None)
    if other is None:
        return None
    together = [row["variant"], *row.get("in_turn_with", [variant])]
    apart = other["case"] == row["case"] and variant not in together
    return f"{'~' if apart else ''}{row['images_per_s'] / other['images_per_s']:.2f}"


def _is_dense_of(other: dict[str, Any], case: dict[str, Any]) -> bool:
    same = all(other.get(name) == case.get(name) for name in ("image_size", "precision"))
    sizes = [one["preset"].removeprefix("dit-") for one in (other, case)]
    return same and other["form"] == "dense" and sizes[0] == sizes[1]


SECTIONS = {
    "device": _device,
    "failure": _failures,
    "check": _checks,
    "tune": _tune,
    "kernel": _kernels,
    "step": _steps,
    "digits": _digits,
    "absent": _absent,
}
