"""Sample grids of a page: a few PNG files of each run, embedded."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fastmask.console import say
from fastmask.files import read_regular
from fastmask.reporting.load import RunRecord
from fastmask.reporting.text import safe

MOST_PICTURES = 12  # of a run
MOST_BYTES = 4_000_000  # of all runs, before base64
_LARGEST = 32_000_000  # bytes of one file
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class _Picture(NamedTuple):
    step: int
    content: bytes


def sample_grids(runs: Sequence[RunRecord]) -> str:
    """Return the sample grids of the runs by step; empty if there are none."""
    drawn = [run for run in runs if run.pictures]
    found = ""
    for run in drawn:
        pictures = _chosen(run.pictures, MOST_BYTES // len(drawn))
        if not pictures:
            continue
        title = f"<h3>{safe(run.label)}</h3>" if len(runs) > 1 else ""
        left_out = len(run.pictures) - len(pictures)
        note = f'<p class="note">{len(pictures)} of {len(run.pictures)} sample grids are shown.</p>' if left_out else ""
        found += f'{title}<div class="pictures">{"".join(_figure(run, each) for each in pictures)}</div>{note}\n'
    return found


def spread(count: int, most: int) -> list[int]:
    """Return at most ``most`` of the indices below ``count``, evenly spaced, always with the last."""
    if count <= most:
        return list(range(count))
    if most == 1:
        return [count - 1]
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def _chosen(pictures: Sequence[tuple[int, Path]], most_bytes: int) -> list[_Picture]:
    """Return the evenly spaced pictures that fit, but always the last one; damaged files are skipped with a line."""
    sizes = [path.stat().st_size for _, path in pictures]
    most = MOST_PICTURES
    while most > 1 and sum(sizes[i] for i in spread(len(sizes), most)) > most_bytes:
        most -= 1
    read = []
    for i in spread(len(pictures), most):
        step, path = pictures[i]
        try:
            content = read_regular(path, _LARGEST)
        except (ValueError, OSError) as error:
            say(f"{error}: the picture is left out")
            continue
        if content.startswith(_SIGNATURE):
            read.append(_Picture(step, content))
        else:
            say(f"{path} is no PNG file: left out")
    return read


def _figure(run: RunRecord, picture: _Picture) -> str:
    text = f"Samples of {run.label} at step {picture.step:,}"
    source = f"data:image/png;base64,{base64.b64encode(picture.content).decode()}"
    return (
        f'<figure><button type="button" class="enlarge" title="Enlarge"><img alt="{safe(text)}" src="{source}">'
        f"</button><figcaption>step {picture.step:,}</figcaption></figure>"
    )
