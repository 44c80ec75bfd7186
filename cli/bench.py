"""The body of `photon bench`: progress, a table for each thing that is measured, bench.json and a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers

from photon_cli.terminal import ProgressBar, console, print_table
from photon_data.errors import UsageError
from photon_data.files import write_whole
from photon_train.bench import BASELINE, WAYS, WHAT, BenchSettings, Cell, bench
from photon_train.measuring import device

JSON, PICTURE = "bench.json", "bench.png"
DEFAULTS: dict[str, dict[str, Any]] = {
    "3b": {"questions": (1, 8, 40)},
    "tiny": {"questions": (1, 4), "repeats": 1, "new_tokens": 8},
}
HEADINGS = ("", "K", "kept", "s", "questions/s", "tokens/s", "GiB", "MFU", f"x {BASELINE}", "published (ours / it)")
UNITS = {"iterations_per_second": "it/s", "tokens_per_second": "token/s", "peak_memory_gib": "GiB"}


def settings_of(size: str | None, what: str, questions: str) -> BenchSettings:
    """Return what the options say; without a size, the published shapes where there is a GPU. UsageError otherwise."""
    size = size or ("3b" if device().type == "cuda" else "tiny")
    given: dict[str, Any] = {"what": tuple(_parts(what)) if what else tuple(WHAT)}
    if questions:
        try:
            given["questions"] = tuple(sorted({int(number) for number in _parts(questions)}))
        except ValueError:
            raise UsageError(f"--questions: expected numbers such as 1,8,40, found {questions!r}") from None
    return BenchSettings(size=size, **{**DEFAULTS.get(size, {}), **given})


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def run(settings: BenchSettings, output: Path) -> bool:
    """Measure, write and print all of it; return whether every cell was measured."""
    transformers.logging.set_verbosity_error()
    with ProgressBar("measuring") as bar:

        def on_cell(done: int, total: int, cell: Cell) -> None:
            bar.count(done, total)
            bar.update(detail=f"{WHAT[cell.what]}, {WAYS[cell.way].title}, K = {cell.questions}")

        report = bench(settings, on_cell)
    with write_whole(output / JSON) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n")
    with write_whole(output / PICTURE, output / f".{PICTURE}.partial.png") as temporary:
        draw(report, temporary)
    show(report)
    console.print(f"{output}: {JSON}, {PICTURE}", soft_wrap=True)
    return not any(cell["error"] for cell in report["cells"])


def show(report: Mapping[str, Any]) -> None:
    """Print what was measured with, a table for each thing that was measured, and the notes."""
    size = report["settings"]["size"]
    console.print(f"{described(size)}: {report['weights']:,} random weights, {report['device']}, {report['dtype']}")
    versions = f"torch {report['torch']}, transformers {report['transformers']}"
    console.print(f"attention: {report['attention']}; {versions}; median of {report['settings']['repeats']}")
    for what in report["settings"]["what"]:
        rows = [cells_of_row(cell, report["ways"]) for cell in report["cells"] if cell["what"] == what]
        print_table(WHAT[what], HEADINGS, rows, texts=1)
    for note in (
        f"K: questions on a volume. x {BASELINE}: questions/s as a multiple of the first row's.",
        *report["notes"],
    ):
        console.print(f"- {note}")


def described(size: str) -> str:
    """Return what a model of this size is for."""
    published = "the published shapes (3B)"
    return published if size == "3b" else "a tiny model, which shows that measuring works; its times say nothing of 3B"


def cells_of_row(cell: Mapping[str, Any], titles: Mapping[str, str]) -> list[str]:
    """Return the texts of a row of the table, from a cell of bench.json."""
    first = [titles[cell["way"]], str(cell["questions"])]
    if cell["error"]:
        return [*first, *[""] * (len(HEADINGS) - 3), cell["error"]]
    names = ("kept_tokens", "seconds", "questions_per_second", "tokens_per_second", "peak_memory_gib")
    multiple, theirs = (cell[name] for name in ("speedup", "published_speedup"))
    compared = f"{multiple:.2f}" if multiple else "-"
    return [
        *first,
        *("-" if cell[name] is None else number(cell[name]) for name in names),
        "-" if cell["mfu"] is None else f"{cell['mfu']:.1%}",
        compared + (f" (published {theirs:.2f})" if theirs else ""),
        "; ".join(_against(name, value, cell["of_published"].get(name)) for name, value in cell["published"].items()),
    ]


def number(value: float) -> str:
    """Return a number as the tables have it: three digits, or the whole of it."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _against(name: str, value: float, ratio: float | None) -> str:
    return f"{value:g} {UNITS[name]}" + (f" ({ratio:.2f})" if ratio is not None else "")


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draw questions per second of every cell, a panel for each thing that was measured; diamonds are published."""
    import matplotlib  # late: half a second

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown: Sequence[str] = report["settings"]["what"]
    figure, axes = pyplot.subplots(1, len(shown), figsize=(3 + 3 * len(shown), 4.2), squeeze=False, sharey=True)
    for axis, what in zip(axes.flat, shown, strict=True):
        for place, cell in enumerate(own := [cell for cell in report["cells"] if cell["what"] == what]):
            axis.barh(place, cell["questions_per_second"] or 0, color="#4c78a8")
            axis.text(0, place, cell["error"].partition(":")[0], fontsize=7, va="center")
            if "iterations_per_second" in cell["of_published"]:
                axis.plot(cell["published"]["iterations_per_second"], place, "D", color="#e45756")
        names = [f"{report['ways'][cell['way']]}, K = {cell['questions']}" for cell in own]
        axis.set_yticks(range(len(names)), names, fontsize=7)
        axis.tick_params(axis="x", labelsize=7)
        axis.set_xlabel("questions per second", fontsize=8)
        axis.set_title(WHAT[what], fontsize=9)
        axis.grid(alpha=0.3, axis="x")
    axes[0, 0].invert_yaxis()
    size = report["settings"]["size"]
    diamonds = "; diamonds: published" if size == "3b" else ""
    figure.suptitle(f"{size}, random weights, {report['device']}, {report['dtype']}{diamonds}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
