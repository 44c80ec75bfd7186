"""The body of `photon-data prepare`: do it or estimate it, and say what came of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from rich.table import Table

from photon_cli.exits import STOPPED
from photon_cli.options import console, fail
from photon_cli.progress import Show
from photon_data.questions.counts import Count
from photon_data.readers import left_alone
from photon_data.recipe import Recipe
from photon_pipelines.cluster import Stopped, Workers
from photon_pipelines.plan import Order, gather
from photon_pipelines.prepare import Plan, Result, plan
from photon_pipelines.prepare import prepare as run_order
from photon_pipelines.unpack import pending

# Measured by benchmarks/prepare_peers.py and prepare_scaling.py; good for an order of magnitude.
SECONDS_PER_VOLUME, SECONDS_PER_MB = 0.5, 0.006
COMPRESSED = 0.45
FILES_PER_STORE = 6
WORKER_GB = 0.4
SHOWN = 10
SHORT = 40


def prepare(order: Order, workers: Workers) -> bool:
    """Prepare what was ordered, with progress; return whether every input has its store and every question its row."""
    try:
        with Show() as show:
            result = run_order(order, workers, show.watcher)
    except Stopped as stop:
        fail(f"Stopped: {stop}. What is done is kept.", STOPPED)
    _say(order, result)
    return result.complete


def estimate(order: Order, workers: Workers) -> None:
    """Print what `prepare` would do and about what it needs; nothing is written."""
    for archives in pending(order.datasets, order.limit):
        console.print(str(archives), soft_wrap=True)
    there = tuple(entry for entry in order.datasets if not any(archives.is_all for archives in pending([entry])))
    if order.datasets and not there:
        return
    data = gather(replace(order, datasets=there))
    for note in data.notes:
        console.print(note, soft_wrap=True)
    lines = cost(order.recipe, plan(data.jobs, order.out, order.recipe), workers)
    title = f"photon-data prepare {order.source} {order.out.url} (dry run)"
    say_lines(title, {**lines, "files left alone": left_alone(data.ignored)})


def say_lines(title: str, lines: Mapping[str, str]) -> None:
    """Print what has a name each as a table."""
    table = Table(title=title, show_header=False)
    for name, text in lines.items():
        table.add_row(name, text)
    console.print(table)


def cost(recipe: Recipe, todo: Plan, workers: Workers) -> dict[str, str]:
    """Return what is to do and about what it needs, as {name: text}."""
    megabytes = sum(job.source.bytes for job in todo.jobs) / 1e6
    crew = workers.local_count()
    seconds = (SECONDS_PER_VOLUME * len(todo.jobs) + SECONDS_PER_MB * megabytes) / crew
    return {
        "to prepare": f"{len(todo.jobs)} scans, {megabytes:,.0f} MB",
        "done before": f"{len(todo.done)} scans",
        "known to be refused": f"{sum(job.source.problem is not None for job in todo.jobs)} scans",
        "time": f"about {_duration(seconds)} with {crew} local workers" if not workers.scheduler else "depends on the cluster",
        "memory": f"about {WORKER_GB * crew:.1f} GB for axis-aligned scans, up to {1.5 * crew:.1f} GB for oblique ones",
        "disk": f"about {_store_mb(recipe) * len(todo.jobs) / 1e3:,.1f} GB in {FILES_PER_STORE * len(todo.jobs)} files",
    }


def _store_mb(recipe: Recipe) -> float:
    voxels = math.prod(recipe.shape_zyx) + math.prod(recipe.model_shape_zyx)
    return 2 * voxels * COMPRESSED / 1e6


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _say(order: Order, result: Result) -> None:
    """Print counts, the manifests, and where to look."""
    outcome, manifests, counts, leak, damaged = result
    table = Table(title=f"{sum(outcome.counts.values())} scans")
    for state in outcome.counts:
        table.add_column(state, justify="right")
    table.add_row(*(str(n) for n in outcome.counts.values()))
    console.print(table)
    codes = Counter(record.code for record in outcome.records if not record.is_there)
    for code, count in codes.most_common():
        console.print(f"  {count} x {code}")
    if outcome.kept:
        console.print(f"{len(outcome.kept)} volumes of earlier runs were kept, {outcome.kept[0].id} first")
    for split, rows in manifests.rows.items():
        console.print(f"manifests/{split}.jsonl: {len(rows)} rows on {len({row['volume_id'] for row in rows})} volumes")
    if leak is not None:
        console.print(f"No manifests were written: {leak}", style="red", soft_wrap=True)
    if damaged:
        console.print(f"{len(damaged)} x archives that could not be read as a whole; see above", style="red")
    say_counts(counts)
    _say_unmatched(result)
    console.print(f"{order.out.url}: see report.html, volumes.jsonl", soft_wrap=True)


def say_counts(counts: Sequence[Count]) -> None:
    """Print what is asked of what, and how far a constant answer gets."""
    if not any(found.constant_answer for found in counts):
        return
    table = Table(title="questions (all of it in questions.json)")
    for name in ("data set", "task", "split", "questions", "volumes", "per volume", "best constant answer", "right", "macro"):
        table.add_column(name, overflow="fold")
    for found in counts:
        low, middle, high = found.per_volume
        numbers = [f"{found.questions:,}", f"{found.volumes:,}", f"{low} to {high}, median {middle:g}"]
        answer = [_short(found.constant_answer or ""), _percent(found.constant_accuracy), _percent(found.constant_macro)]
        table.add_row(found.dataset, found.task, found.split, *numbers, *answer)
    console.print(table)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHORT else line[:SHORT] + "..."


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _say_unmatched(result: Result) -> None:
    unmatched = result.manifests.unmatched
    if unmatched:
        console.print(f"{len(unmatched)} questions have no row:", style="red")
    for missing in unmatched[:SHOWN]:
        console.print(f"  {missing.id} (volume {missing.volume}): {missing.reason}", soft_wrap=True)
    if len(unmatched) > SHOWN:
        console.print(f"  and {len(unmatched) - SHOWN} more")
