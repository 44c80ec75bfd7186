"""What a run leaves for people: log.jsonl (a line a step), curves.png, summary.json."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from photon_data.location import Location

LOG = "log.jsonl"
CURVES = "curves.png"
SUMMARY = "summary.json"

# Title of a panel -> the logged values in it.
PANELS = {
    "loss (per step)": ("loss", "ce"),
    "parts of the loss": ("band", "robustness", "flip", "grounding"),
    "kept share of visual tokens": ("keep_ratio", "eval_keep_ratio"),
    "threshold": ("threshold",),
    "evaluation": ("eval_loss", "eval_exact"),
    "gradient norms": ("grad_norm/patch_embedding", "grad_norm/vision", "grad_norm/language_model", "grad_norm/threshold"),
    "questions per second": ("questions_per_second",),
    "share of time waiting for data": ("data_wait_share",),
}


class Log:
    """log.jsonl of a run. Lines of steps after `from_step`, left by a run that was killed, are dropped."""

    def __init__(self, run: Path, from_step: int) -> None:
        self.path = run / LOG
        kept = [row for row in read_log(run) if row["step"] <= from_step]
        Location(str(run)).write(LOG, "".join(json.dumps(row) + "\n" for row in kept).encode())

    def write(self, row: dict[str, Any]) -> None:
        """Append one line."""
        with self.path.open("a") as file:
            file.write(json.dumps({k: _plain(v) for k, v in row.items()}) + "\n")


def read_log(run: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's log; a last line that was cut off is left out."""
    path = run / LOG
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def write_summary(run: Path, summary: dict[str, Any]) -> None:
    """Write summary.json and curves.png."""
    Location(str(run)).write(SUMMARY, json.dumps({k: _plain(v) for k, v in summary.items()}, indent=1).encode())
    draw_curves(read_log(run), run / CURVES)


def draw_curves(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the logged values over the steps, a panel for each kind that was logged."""
    import matplotlib  # late: half a second

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {title: found for title, names in PANELS.items() if (found := [n for n in names if any(n in row for row in rows)])}
    columns = 2
    figure, axes = pyplot.subplots(
        math.ceil(len(panels) / columns), columns, figsize=(11, 2.6 * len(panels) / columns + 1), squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, names) in zip(axes.flat, panels.items(), strict=False):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            axis.plot(*zip(*points, strict=True), label=name, linewidth=1, marker="." if len(points) < 50 else None)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("optimizer step", fontsize=8)
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
