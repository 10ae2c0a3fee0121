"""The tables of the report, from rows.

All measured figures go through `Rows` and `cell`, which return "not measured" without a row. Two times are compared
only if they are from one run, or else from the same code on the same machine. A loader and a training step only have to
share the machine.
"""

from collections.abc import Callable, Iterator
from typing import Any

from bench.report.compare import machine_of, time_of
from bench.report.derived import (
    FORMS,
    MORE_STACKS,
    PLAIN,
    RECIPES,
    SIZES,
    STACKS,
    Rows,
    against,
    bound,
    dense_of,
    faster,
    is_beside_packed_alone,
    mfu,
    moved,
    of_copy,
    rate,
    size_of,
)
from bench.report.tables import header, line
from bench.rows import Row
from fastmask.gpus import GPUS, gpu_named

NOT_MEASURED = "not measured"


# Published figures, for context; never in a table with measured ones.
PUBLISHED = [
    ("MaskDiT-XL/2, 256x256, masked 0.5", "8 A100, batch 1024", "2.16 it/s", "bars of MaskDiT's figure, read off"),
    ("DiT-XL/2, 256x256", "8 A100, batch 1024", "0.62 it/s", "bars of MaskDiT's figure, read off"),
    ("MaskDiT-XL/2, 256x256, masked 0.5", "per A100", "276 images/s, 35 % MFU", "2.16 x 1024 / 8; 6 x MAC x images/s"),
]


# Performance goals: form, side, images/s on one H100 in bf16, and GMAC per image and forward pass.
GOALS = [
    ("masked-0.5", 256, 1219, 65.45),
    ("dense", 256, 673, 118.62),
    ("masked-0.5", 512, 285, 280.15),
    ("dense", 512, 152, 524.52),
]


def cell(form: str, value: Callable[..., float], *rows: Row | None) -> str:
    """Format a figure computed from rows, or "not measured" if a row is missing."""
    return NOT_MEASURED if any(row is None for row in rows) else form.format(value(*rows))


def per_machine(rows: list[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Yield each machine with its rows."""
    for machine in dict.fromkeys(map(machine_of, rows)):
        yield machine, [row for row in rows if machine_of(row) == machine]


def heading(title: str, machine: str, rows: list[Row]) -> tuple[str, ...]:
    """Return the heading of a machine's table."""
    return ("", f"### {title}: {machine}", "", _sources(rows), "")


def three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def against_dense(rows: Rows, row: Row) -> list[str]:
    """Return the cells of a masked step's speed-up over dense, its FLOP bound, and the fraction reached."""
    if row["case"]["form"] == "dense":
        return ["", "", ""]
    dense = dense_of(rows, row)
    share = cell("{:.0%}", lambda a, b: faster(a, b) / bound(a, b), row, dense)
    return [cell("{:.2f}x", faster, row, dense), cell("{:.2f}x", bound, row, dense), share]


def products_alone(rows: Rows, row: Row, form: str) -> str:
    """Return the cell of the GEMM-bound share: time of a step's matmuls and attention alone over its own."""
    return cell(form, against, row, rows.beside(row, "products"))


def steps(rows: Rows, bench: str = "step", title: str = "Training steps") -> Iterator[str]:
    """Yield the tables of training steps, one per machine; those of ``recipe_step`` have no plain baseline."""
    found = [row for row in rows.of(bench) if row["variant"] in (*STACKS, *MORE_STACKS)]
    found.sort(key=_order)
    for machine, mine in per_machine(found):
        yield from heading(title, machine, mine)
        columns = ["network", "side", "batch", "precision", "form", "stack", "ms (p20 to p80)", "images/s"]
        columns += [f"against {plain}" for plain in PLAIN]
        columns += ["against dense, same stack", "FLOP bound", "share of it", "products alone"]
        yield from header([*columns, "MFU"] if gpu_named(machine) else columns)
        for row in mine:
            case, stack = row["case"], row["variant"]
            name = size_of(row) + ("" if row.get("optimizer", True) else ", no optimizer")
            cells = [name, f"{case['image_size']}", f"{case['batch']}", case["precision"], case["form"], stack]
            cells += [cell("{}", time_of, row), cell("{:.4g}", rate, row)]
            for plain in PLAIN:
                alone = stack in PLAIN or case["form"] in RECIPES or bench != "step"
                cells.append("" if alone else cell("{:.2f}x", faster, row, rows.beside(row, plain)))
            cells += against_dense(rows, row)
            cells.append("" if stack in PLAIN else products_alone(rows, row, "{:.0%} of the time"))
            if gpu_named(machine):
                cells.append(cell("{:.1%}", mfu, row))
            yield line(cells)


def summary(rows: Rows) -> Iterator[str]:
    """Yield the README's tables: images/s of whole steps, one table per machine, one line per network and form."""
    found = [row for row in rows.of("step") if row["variant"] == "ours" and row.get("optimizer", True)]
    found.sort(key=_order)
    for machine, taken in per_machine(found):
        mine = [row for row in taken if not is_beside_packed_alone(rows, row)]
        batches = ", ".join(sorted({f"batch {row['case']['batch']}, {row['case']['precision']}" for row in mine}))
        yield from ("", f"Images/s of whole training steps on {machine} ({batches}; {_sources(mine)}):", "")
        shown = [*STACKS, *(s for s in MORE_STACKS if any(rows.beside(row, s) for row in mine))]
        columns = ["network", "form", *shown, "ours / plain eager", "ours / plain compiled"]
        yield from header([*columns, "ours masked / dense", "FLOP bound", "share of it", "products alone / ours"])
        for row in mine:
            stacks = {stack: rows.beside(row, stack) for stack in shown}
            best = max((r for s, r in stacks.items() if s not in PLAIN and r is not None), key=rate)
            cells = [f"{size_of(row)}, {row['case']['image_size']}", row["case"]["form"]]
            absent = {*STACKS} - {"ours"} if row["case"]["form"] in RECIPES else set()
            cells += [
                "" if stack in absent else cell("{}", lambda r: three_digits(rate(r)), stacks[stack]) for stack in shown
            ]
            cells += ["" if plain in absent else cell("{:.2f}x", faster, best, stacks[plain]) for plain in PLAIN]
            yield line([*cells, *against_dense(rows, row), products_alone(rows, row, "{:.0%}")])
    if not found:
        yield from ("", f"Training steps: {NOT_MEASURED}")


def kernels(rows: Rows) -> Iterator[str]:
    """Yield the tables of kernels, one per machine."""
    found = rows.of("kernel")
    for machine, mine in per_machine(found):
        yield from heading("Kernels", machine, mine)
        columns = ["op", "direction", "dtype", "shape", "variant", "ms (p20 to p80)", "GB/s of minimum traffic"]
        yield from header([*columns, "of copy bandwidth", "against reference"])
        for row in sorted(mine, key=lambda row: [str(row["case"][name]) for name in ("op", "shape", "direction")]):
            case = row["case"]
            cells = [str(case[name]) for name in ("op", "direction", "dtype", "shape")]
            cells += [row["variant"], cell("{}", time_of, row), cell("{:.4g}", moved, row)]
            cells.append(cell("{:.1%}", of_copy, row) if "copy_bandwidth" in row or "copy_percent" in row else "")
            reference = rows.beside(row, "reference")
            compared = cell("{:.2f}x", against, row, reference)
            yield line([*cells, "" if row["variant"] == "reference" else compared])


def loaders(rows: Rows) -> Iterator[str]:
    """Yield the tables of loaders, one per machine, compared with the fastest training step at the same image size."""
    found = rows.of("loader")
    training = [row for row in rows.of("step") if row["variant"] in STACKS and row.get("optimizer", True)]
    for machine, mine in per_machine(found):
        yield from heading("Loaders", machine, mine)
        columns = ["loader", "data", "shape", "batch", "workers", "ms of a batch", "images/s"]
        yield from header([*columns, "fastest step, images/s", "loader / fastest step", "fastest step"])
        steps_here = [row for row in training if machine_of(row) == machine]
        for row in mine:
            case = row["case"]
            step = max((s for s in steps_here if s["case"]["image_size"] == case["image_size"]), key=rate, default=None)
            cells = [row["variant"], *(f"{case[name]}" for name in ("data", "shape", "batch", "num_workers"))]
            cells += [cell("{:.4g}", lambda r: r["median_ms"] / r["case"]["batches"], row)]
            cells += [cell("{:,.1f}", loaded, row), cell("{:,.1f}", rate, step)]
            cells.append(cell("{:,.2f}x", lambda a, b: loaded(a) / rate(b), row, step))
            yield line([*cells, NOT_MEASURED if step is None else _step_named(step)])


def loaded(row: Row) -> float:
    """Return the images/s of a loader, whose times cover several batches."""
    return row["case"]["batches"] * rate(row)


def stores(rows: Rows) -> Iterator[str]:
    """Yield the tables of readers of stored moments, one per machine."""
    found = rows.of("store")
    for machine, mine in per_machine(found):
        yield from heading("Reading stored moments", machine, mine)
        columns = ["reader", "data", "batch", "workers", "images/s", "against files of .npy", "of a plain copy"]
        yield from header([*columns, "memory", "grown by"])
        for row in mine:
            case, name = row["case"], row["variant"]
            cells = [
                name,
                *(f"{case[field]}" for field in ("data", "batch", "num_workers")),
                cell("{:,.0f}", loaded, row),
            ]
            for other, form in (("DataLoader over .npy", "{:.2f}x"), ("copy", "{:.1%}")):
                is_alone = "own_mib" in row or name == other
                cells.append("" if is_alone else cell(form, against, row, rows.beside(row, other)))
            for field, form in (("own_mib", "{:,.0f} MiB"), ("grown_mib", "{:.1f} MiB")):
                cells.append(cell(form, lambda r, field=field: r[field], row) if field in row else "")
            yield line(cells)


def decoding(rows: Rows) -> Iterator[str]:
    """Yield the tables of decoders, alone and within `prepare`, one per machine."""
    found = [row for row in rows.of("decoding") if not row["variant"].startswith("prepare")]
    for machine, mine in per_machine(found):
        yield from heading("Decoding", machine, mine)
        columns = ["decoder", "data", "to", "workers", "images/s", "prepare, images/s", "prepare / decoder"]
        yield from header(columns)
        for row in mine:
            case, prepare = row["case"], rows.beside(row, f"prepare, {row['variant']}")
            cells = [row["variant"], *(f"{case[field]}" for field in ("data", "shape", "num_workers"))]
            cells += [cell("{:,.0f}", loaded, row), cell("{:,.0f}", loaded, prepare)]
            yield line([*cells, cell("{:.2f}x", lambda a, b: against(b, a), row, prepare)])


def sampling(rows: Rows) -> Iterator[str]:
    """Yield the tables of guided sampling, one per machine."""
    found = rows.of("sampling")
    for machine, mine in per_machine(found):
        yield from heading("Guided sampling", machine, mine)
        columns = ["network", "side", "batch", "precision", "steps", "sampler", "ms (p20 to p80)", "images/s"]
        yield from header([*columns, "against the plain loop"])
        for row in mine:
            case = row["case"]
            cells = [f"{case[field]}" for field in ("size", "image_size", "batch", "precision")]
            cells += [f"{case['sample_steps']} of {case['solver']}", row["variant"]]
            cells += [cell("{}", time_of, row), cell("{:.3g}", rate, row)]
            plain = rows.beside(row, "plain")
            yield line([*cells, "" if row["variant"] == "plain" else cell("{:.2f}x", against, row, plain)])


def goals(rows: Rows) -> Iterator[str]:
    """Yield the goals for one H100, with measured figures."""
    peak = GPUS["h100"].bf16
    yield from ("", f"### Goals: one H100, bf16, XL/2 (MFU of {peak / 1e12:g} TFLOP/s, dense)", "")
    yield from header(["form", "side", "goal, images/s", "goal, MFU", "measured, images/s", "of the goal", "row"])
    ours = [row for row in rows.of("step") if row["variant"].startswith("ours")]
    taken = [row for row in ours if gpu_named(machine_of(row)) == GPUS["h100"]]
    for form, side, goal, gmac in GOALS:
        wanted = {"form": form, "image_size": side, "precision": "bf16"}
        same = [r for r in taken if size_of(r) == "xl2" and wanted.items() <= r["case"].items() and r.get("optimizer")]
        best = max(same, key=rate, default=None)
        cells = [form, f"{side}", f"{goal:,}", f"{6e9 * gmac * goal / peak:.1%}", cell("{:,.0f}", rate, best)]
        cells += [cell("{:.0%}", lambda row, goal=goal: rate(row) / goal, best)]
        said = "" if best is None else f"{best['variant']}, batch {best['case']['batch']}, {best['commit']}"
        yield line([*cells, said])


def published() -> Iterator[str]:
    """Yield the table of published figures."""
    yield from ("", "### Published by others, not measured here", "")
    yield from header(["what", "where", "figure", "source"])
    yield from map(line, PUBLISHED)


def report(rows: Rows) -> list[str]:
    """Return the lines of the whole report."""
    lines = ["## Measured", "", "Times in ms: median (20th to 80th percentile). Made by `python -m bench.report`."]
    parts = {"Training steps": steps(rows)}
    if rows.of("recipe_step"):
        parts["Steps of recipes"] = steps(rows, "recipe_step", "Steps of recipes, ours alone")
    parts |= {"Kernels": kernels(rows), "Loaders": loaders(rows)}
    parts |= {"Guided sampling": sampling(rows)}
    parts |= {"Reading stored moments": stores(rows), "Decoding": decoding(rows)}
    for title, part in ((title, list(part)) for title, part in parts.items()):
        lines += part or ["", f"### {title}: {NOT_MEASURED}"]
    return [*lines, *goals(rows), *published()]


def _order(row: Row) -> tuple[Any, ...]:
    case = row["case"]
    form = FORMS.index(case["form"]) if case["form"] in FORMS else len(FORMS)
    place = SIZES.index(size_of(row)) if size_of(row) in SIZES else len(SIZES)
    optimizer = not row.get("optimizer", True)
    return (
        machine_of(row),
        place,
        case["image_size"],
        case["batch"],
        optimizer,
        form,
        (*STACKS, *MORE_STACKS).index(row["variant"]),
    )


def _step_named(row: Row) -> str:
    case = row["case"]
    name = f"{size_of(row)} {case['form']}, {row['variant']}"
    return f"{name}, batch {case['batch']}, {case['precision']}, {row['commit']}"


def _sources(rows: list[Row]) -> str:
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    dates = [row["date"][:10] for row in rows]
    return f"torch {', '.join(dict.fromkeys(row['torch'] for row in rows))}; {min(dates)} to {max(dates)}; at {commits}"
