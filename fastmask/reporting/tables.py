"""The tables of a page: summary, configuration and its differences, evaluation."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fastmask.reporting.chart import style_of
from fastmask.reporting.figures import metric_name
from fastmask.reporting.load import RunRecord
from fastmask.reporting.scale import duration, short
from fastmask.reporting.text import flag, safe, shown, table

_LOWER = {"frechet", "fid", "sfid", "kid", "fd_dinov2", "kd_dinov2"}
_HIGHER = {"agreement", "is", "precision", "recall", "density", "coverage"}
_SHOWN_ABOVE = ("step", "images_per_s", "train_s")  # of an evaluation: the step heads it, the others are in the summary
_NOT_SHOWN = ("run_dir",)  # always differs, and heads every table
_KINDS = ("process", "network")  # recorded beside the flags, but chosen by the preset


def summary(runs: Sequence[RunRecord], price_per_hour: float) -> str:
    """Return the table of what each run is, did and cost.

    Args:
        runs: the runs.
        price_per_hour: price of an hour of one device, in any currency; 0 leaves the cost out.
    """
    facts: dict[str, Callable[[RunRecord], str]] = {
        "Preset": lambda run: shown(run.config.get("preset")),
        "Network": _network,
        "Parameters": lambda run: _or_unknown(run.parameters, short),
        "Process": lambda run: shown(run.config.get("process")),
        "Data": lambda run: shown(run.config.get("data")),
        "Device": _device,
        "Precision": lambda run: shown(run.config.get("precision")),
        "Steps": _steps,
        "Images seen": lambda run: _or_unknown(run.images(run.step), lambda count: f"{count:,}"),
        "Last loss": lambda run: _or_unknown(_last(run, "loss"), lambda loss: f"{loss:.4f}"),
        "Throughput, median": lambda run: _or_unknown(
            _median(run, "images_per_s"), lambda rate: f"{rate:,.0f} images/s"
        ),
        "Training time": lambda run: _or_unknown(run.train_s, duration),
        "Device time": _device_time,
    }
    if price_per_hour:
        facts[f"Cost at {price_per_hour:g} per hour and device"] = lambda run: _or_unknown(
            run.device_hours, lambda hours: _price(hours * price_per_hour)
        )
    facts |= {
        "Versions": _versions,
        "Commit": lambda run: shown(run.versions.get("commit", "")[:10] if "commit" in run.versions else None),
        "Last report": lambda run: time.strftime("%Y-%m-%d %H:%M", time.localtime(run.reported)),
    }
    rows = ([name, *(fact(run) for run in runs)] for name, fact in facts.items())
    return table(_head(runs), rows, "Summary of the runs")


def differences(runs: Sequence[RunRecord]) -> str:
    """Return the table of the flags in which the runs differ."""
    rows = [
        [_name_of(name), *(_setting(run, name) for run in runs)]
        for name in _names(runs)
        if any(run.config.get(name) != runs[0].config.get(name) or name not in run.config for run in runs)
    ]
    if not rows:
        return "<p>The configurations are the same.</p>"
    return table(_head(runs), rows, "Differences between the configurations")


def changes(runs: Sequence[RunRecord]) -> str:
    """Return the table of what was changed when a run was resumed; empty if nothing was."""
    rows = [
        [
            _run_name(i, run.label),
            f"{each['step'] + 1:,}",
            _name_of(str(each.get("field"))),
            shown(each.get("from")),
            shown(each.get("to")),
        ]
        for i, run in enumerate(runs)
        for each in run.changes
    ]
    if not rows:
        return ""
    head = ("Run", "From step", "Flag", "Before", "After")
    return table(head, rows, "Changes on resume")


def configuration(runs: Sequence[RunRecord]) -> str:
    """Return the whole configuration and the commands of the runs, folded away."""
    rows = ([_name_of(name), *(_setting(run, name) for run in runs)] for name in _names(runs))
    found = f"<details><summary>All flags</summary>{table(_head(runs), rows, 'All flags')}</details>"
    commands = ""
    for run in runs:
        words = run.said.get("command")
        if isinstance(words, list):
            title = f"<h4>{safe(run.label)}</h4>" if len(runs) > 1 else ""
            commands += f"{title}<pre>{safe(' '.join(map(str, words)))}</pre>"
    return found + (f"<details><summary>Command</summary>{commands}</details>" if commands else "")


def evaluation(runs: Sequence[RunRecord]) -> str:
    """Return the tables of the metrics and of the protocol that they were measured by; empty without any."""
    judged = [(i, run) for i, run in enumerate(runs) if run.evaluation]
    if not judged:
        return ""
    heads = ["", *(_run_name(i, run.label) for i, run in judged)]
    metrics = _keys(run.evaluation for _, run in judged)
    rows = [
        [_metric(name), *(_metric_value(run.evaluation.get(name)) for _, run in judged)]
        for name in ("step", *metrics)
        if any(type(run.evaluation.get(name)) in (int, float) for _, run in judged)
    ]
    protocols = [flattened(run.evaluation.get("protocol")) for _, run in judged]
    found = table(heads, rows, "Metrics")
    if any(protocols):
        names = _keys(protocols)
        differing = [
            name for name in names if len({str(each.get(name)) for each in protocols}) > 1 and name != "source"
        ]
        if differing:
            found += (
                f'<p class="warn">The protocols differ in {safe(", ".join(differing))}: compare the metrics with care.'
                f"</p>"
            )
        rows = [[safe(name), *(shown(each.get(name)) for each in protocols)] for name in names]
        found += f"<details><summary>Protocol</summary>{table(heads, rows, 'Protocol of the evaluation')}</details>"
    return found


def flattened(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return the values of nested mappings, by their names joined with dots; empty for another value."""
    found: dict[str, Any] = {}
    for name, each in value.items() if isinstance(value, dict) else ():
        found |= flattened(each, f"{prefix}{name}.") if isinstance(each, dict) else {f"{prefix}{name}": each}
    return found


def _run_name(index: int, label: str) -> str:
    return f'<i class="swatch {style_of(index)}"></i>{safe(label)}'


def _head(runs: Sequence[RunRecord]) -> list[str]:
    return ["", *(_run_name(i, run.label) if len(runs) > 1 else safe(run.label) for i, run in enumerate(runs))]


def _keys(mappings: Iterable[Any]) -> list[str]:
    return list(dict.fromkeys(key for each in mappings for key in each if key not in _SHOWN_ABOVE))


def _names(runs: Sequence[RunRecord]) -> list[str]:
    return [name for name in _keys(run.config for run in runs) if name not in _NOT_SHOWN]


def _name_of(name: str) -> str:
    return safe(name) if name in _KINDS else flag(name)


def _setting(run: RunRecord, name: str) -> str:
    return shown(run.config[name]) if name in run.config else '<span class="none">no such flag</span>'


def _or_unknown(value: Any, text: Callable[[Any], str]) -> str:
    return '<span class="none">unknown</span>' if value is None else safe(text(value))


def _network(run: RunRecord) -> str:
    config = run.config
    if not config:
        return _or_unknown(None, str)
    sizes = f"width {shown(config.get('width'))}, depth {shown(config.get('depth'))}"
    if config.get("decoder_depth"):
        sizes += f"; decoder {shown(config.get('decoder_width'))}, {shown(config.get('decoder_depth'))}"
    return f"{safe(config.get('network', 'maskdit'))}: {sizes}; patch {shown(config.get('patch_size'))}"


def _device(run: RunRecord) -> str:
    name = run.versions.get("gpu") or run.config.get("device")
    if name is None:
        return _or_unknown(None, str)
    name = "CPU" if name == "cpu" else name
    count = run.world_size
    return safe(f"{count} x {name}" if count else name) + ("" if count else " (number of processes not recorded)")


def _steps(run: RunRecord) -> str:
    total = run.config.get("max_steps")
    if type(total) is not int or total <= 0:
        return f"{run.step:,}"
    return (
        f'{run.step:,} of {total:,}<progress max="{total}" value="{run.step}" '
        f'aria-label="steps done">{run.step / total:.0%}</progress>'
    )


def _device_time(run: RunRecord) -> str:
    unit = "GPU-hours" if run.on_gpu else "hours (CPU)" if run.config.get("device") == "cpu" else "hours"
    return _or_unknown(run.device_hours, lambda hours: f"{hours:.3g} {unit}" if hours < 1e3 else f"{hours:,.0f} {unit}")


def _price(price: float) -> str:
    return f"{price:,.2f}" if price >= 0.1 else f"{price:.2g}"


def _versions(run: RunRecord) -> str:
    found = [f"{name} {run.versions[name]}" for name in ("torch", "python", "numpy") if name in run.versions]
    return _or_unknown(", ".join(found) or None, str)


def _last(run: RunRecord, key: str) -> float | None:
    return next((line[key] for line in reversed(run.lines) if key in line), None)


def _median(run: RunRecord, key: str) -> float | None:
    values = [line[key] for line in run.lines if key in line]
    return statistics.median(values) if values else None


def _metric(name: str) -> str:
    better = "lower is better" if name in _LOWER else "higher is better" if name in _HIGHER else ""
    return safe(metric_name(name)) + (f' <span class="note">{better}</span>' if better else "")


def _metric_value(value: Any) -> str:
    if type(value) is int:
        return f"{value:,}"
    return f"{value:.4g}" if type(value) is float else '<span class="none">not measured</span>'
