"""The body of `photon-data inspect --manifest`: per data set what is there, what is missing, and what the rest will cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from photon_cli.options import console
from photon_cli.prepare_command import cost, say_lines
from photon_data.datasets.base import DataSet
from photon_data.datasets.combine import Collection, combine, missing_paths, read_dataset
from photon_data.datasets.declare import read_data_manifest
from photon_data.errors import UsageError, first_few
from photon_data.questions.splits import leaks, refuse_leaks
from photon_pipelines.cluster import Workers
from photon_pipelines.plan import Order, as_row, jobs_of, one_recipe, out_of, recipe_of
from photon_pipelines.prepare import plan
from photon_pipelines.unpack import pending


def inspect_manifest(path: Path, only: Sequence[str], out: str | None, workers: Workers) -> bool:
    """Print what each data set of a manifest has and lacks, disk and time for the rest; return whether nothing is missing."""
    manifest = read_data_manifest(path)
    datasets, where = manifest.only(only), out_of(manifest, out)
    table = Table(title=f"data sets of {path}")
    for name in ("data set", "questions", "volumes needed", "there", "missing", "about it"):
        table.add_column(name, overflow="fold")
    parts = []
    for entry in datasets:
        part, cells = _look(entry, manifest.seed)
        parts += [part] if part else []
        table.add_row(*cells)
    console.print(table)
    if not parts:
        return False
    readable = tuple(entry for part in parts for entry in part.datasets)
    order = Order(path, where, one_recipe(readable), datasets=readable, seed=manifest.seed)
    both = combine(parts, manifest.seed)
    todo = plan(jobs_of(order, both), where, order.recipe)
    say_lines("for the volumes that are there", cost(order.recipe, todo, workers))
    refuse_leaks(leaks(map(as_row, both.questions)))
    return len(parts) == len(datasets) and not both.unmatched


def _look(entry: DataSet, seed: int) -> tuple[Collection | None, list[str]]:
    """Return a data set as far as it can be read, and its line of the table."""
    missing = missing_paths(entry)
    if missing:
        return None, [entry.name, "?", "?", "?", f"{len(missing)} files or folders", first_few(missing)]
    try:
        archives = pending([entry])
        for one in archives:
            if one.is_all:
                return None, [entry.name, "?", f"{len(one.requested):,}", "0", f"{len(one.missing):,}", str(one)]
        part = read_dataset(entry, instruction=recipe_of(entry)[0].instruction, seed=seed)
    except UsageError as error:
        return None, [entry.name, "?", "?", "?", "?", str(error)]
    there, gone = {q.volume for q in part.questions}, sorted({missing.volume for missing in part.unmatched})
    numbers = [len(part.questions) + len(part.unmatched), len(there) + len(gone), len(there), len(gone)]
    about = [*map(str, archives), *part.notes, *([f"missing: {first_few(gone)}"] if gone else [])]
    return part, [entry.name, *(f"{number:,}" for number in numbers), "; ".join(about)]
