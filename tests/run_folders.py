"""Run folders as fastmask.train leaves them, without training, and the parsed page of a report."""

import base64
import json
from html.parser import HTMLParser

# fmt: off
CONFIG = {
    "preset": "digits", "run_dir": "runs/a", "max_steps": 100, "batch_size": 64, "device": "cpu", "precision": "fp32",
    "data": "digits", "width": 96, "depth": 4, "decoder_width": 64, "decoder_depth": 2, "patch_size": 2, "lr": 0.003,
    "process": "edm", "network": "maskdit",
}
# fmt: on
VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "numpy": "2.4.6", "commit": "0123456789abcdef"}
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
)
VOID = {"meta", "link", "input", "img", "br", "path"}  # path: closed by itself


def report(step, **others):
    """Return a line of stats.jsonl."""
    # fmt: off
    return {
        "step": step, "loss": 2.0 / step, "denoising": 1.5 / step, "reconstruction": 0.5,
        "loss_at_log_snr/-inf..-2.0": 0.9, "loss_at_log_snr/-2.0..0.0": 0.7, "loss_at_log_snr/6.0..inf": 0.4,
        "grad_norm": 1.0, "update_ratio": 0.01, "lr": 0.003, "mask_ratio": 0.5, "memory_gb": 0.5, "data_wait": 0.02,
        "images_per_s": 640.0, "train_s": step * 0.1, **others,
    }
    # fmt: on


def write_run(folder, lines=None, *, said=None, config=None, pictures=(), evaluation=None):
    """Write a run folder and return it; ``said`` is added to `run.json`, which is missing for False."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [report(step) for step in range(10, 101, 10)] if lines is None else lines
    (folder / "stats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if said is not False:
        whole = {"config": {**CONFIG, **(config or {})}, "changes": [], "world_size": 1, "versions": VERSIONS}
        whole |= {"command": ["fastmask/train.py", "--preset", "digits"], **(said or {})}
        (folder / "run.json").write_text(json.dumps(whole))
    for step in pictures:
        (folder / "samples").mkdir(exist_ok=True)
        (folder / "samples" / f"step-{step:08d}.png").write_bytes(PNG)
    if evaluation is not None:
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


class Page(HTMLParser):
    """A parsed page; fails where a tag is not closed in its order.

    Attributes:
        text: the text outside of styles and scripts.
        tags: the name and attributes of every tag.
        tables: the cells of every table by row.
    """

    def __init__(self, page):
        super().__init__()
        self.text, self.tags, self.tables, self._open = "", [], [], []
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self._open):
            self.text += data
        if {"td", "th"} & set(self._open):
            self.tables[-1][-1][-1] += data

    def all(self, tag, kind):
        """Return the attributes of the tags of a name and a class."""
        return [own for name, own in self.tags if name == tag and kind in (own.get("class") or "").split()]

    def row(self, name):
        """Return the cells beside the first heading of this text in any table."""
        return next(row[1:] for table in self.tables for row in table if row[:1] == [name])
