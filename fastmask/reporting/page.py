"""One self-contained HTML page about one or several runs."""

import time
from collections.abc import Sequence

from fastmask.reporting.figures import Figures
from fastmask.reporting.load import RunRecord
from fastmask.reporting.pictures import sample_grids
from fastmask.reporting.style import SCRIPT, STYLE
from fastmask.reporting.tables import changes, configuration, differences, evaluation, summary
from fastmask.reporting.text import safe

# Nothing outside the page is loaded, whatever a run's files hold.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_SWITCH = {"steps": "steps", "images": "images", "time": "time"}  # the x axes


def page_of(runs: Sequence[RunRecord], price_per_hour: float = 0.0) -> str:
    """Return the page.

    Args:
        runs: at least one run.
        price_per_hour: price of an hour of one device; 0 leaves the cost out.
    """
    figures, changed = Figures(runs), changes(runs)
    several = len(runs) > 1
    sections = {
        "Summary": summary(runs, price_per_hour) + _undone(runs),
        "Differences": differences(runs) + (changed and f"<h3>Changed on resume</h3>{changed}") if several else "",
        "Changed on resume": "" if several else changed,
        "Loss": _charts(figures.loss()),
        "Loss by noise level": _charts(figures.noise()),
        "Samples": sample_grids(runs),
        "Evaluation": evaluation(runs) + _charts(figures.evaluation()),
        "Schedule": _charts(figures.schedule()),
        "Speed": _charts(figures.speed()),
        "Configuration": configuration(runs),
    }
    sections = {name: content for name, content in sections.items() if content}
    labels = [run.label for run in runs]
    title = f"{len(runs)} runs" if several else labels[0]
    subtitle = ", ".join(labels) if several else "Report of a training run"
    links = "".join(f'<a href="#{_id(name)}">{name}</a>' for name in sections)
    switch = "".join(
        f'<label><input type="radio" name="x" id="x-{key}"{" checked" * (key == "steps")}>{name}</label>'
        for key, name in _SWITCH.items()
    )
    body = "".join(f'<section id="{_id(name)}"><h2>{name}</h2>\n{text}</section>\n' for name, text in sections.items())
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{safe(title)} - fastmask</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<header><h1>{safe(title)}</h1><p class="sub">{safe(subtitle)}</p></header>
<div class="bar"><form><nav aria-label="Sections">{links}</nav>
<fieldset><legend>x axis</legend>{switch}</fieldset></form></div>
<main>
{body}</main>
<footer>Written by fastmask.report on {time.strftime("%Y-%m-%d %H:%M")}. Training time leaves out checkpoints and
sampling; device time is training time by the number of processes of the last start.</footer>
<dialog aria-label="Sample grid"></dialog>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _charts(figures: str) -> str:
    return f'<div class="charts">{figures}</div>' if figures else ""


def _id(name: str) -> str:
    return name.lower().replace(" ", "-")


def _undone(runs: Sequence[RunRecord]) -> str:
    return "".join(
        f'<p class="note">{safe(run.label)}: {run.undone:,} reports of steps that a rollback undid are left out.</p>'
        for run in runs
        if run.undone
    )
