"""The whole of `photon-data prepare`: find, prepare, write manifests, report."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from photon_data.counts import Count, count
from photon_data.errors import UsageError
from photon_data.manifest import Manifests, build, write
from photon_data.records import VolumeRecord
from photon_data.report import render_report
from photon_data.splits import leaks, refuse_leaks
from photon_data.store import open_volume
from photon_pipelines.execute import Workers
from photon_pipelines.gather import Data, Order, gather
from photon_pipelines.lock import exclusive
from photon_pipelines.prepare import Outcome, Plan, plan, run_plan, write_dataset
from photon_pipelines.unpacking import pending, unpack_all
from photon_pipelines.verify import digests

REPORT, COUNTS = "report.html", "questions.json"


class Result(NamedTuple):
    """What a run left: the outcome per file, the manifests, what is in them, and why there are none if splits leak.

    `damaged` says which archives could not be unpacked as a whole, and why.
    """

    outcome: Outcome
    manifests: Manifests
    counts: list[Count]
    leak: str | None = None
    damaged: Sequence[str] = ()

    @property
    def complete(self) -> bool:
        """Whether every input has its store and every question its row."""
        return self.outcome.complete and not self.manifests.unmatched and self.leak is None and not self.damaged


class Watcher(NamedTuple):
    """Told of progress: files seen while searching, notes on them, the plan before work starts, each record as it ends.

    Before that, of archives that are unpacked: the name, and of all archives the bytes that are read and that there are.
    """

    on_file: Callable[[int], None] = lambda count: None
    on_note: Callable[[str], None] = lambda note: None
    on_plan: Callable[[Plan, Mapping[str, int]], None] = lambda todo, ignored: None
    on_record: Callable[[VolumeRecord], None] = lambda record: None
    on_archive: Callable[[str, int, int], None] = lambda name, done, total: None


def prepare(order: Order, workers: Workers, watch: Watcher) -> Result:
    """Do what was ordered and return it. UsageError before any store is written; NoSpace and Stopped leave what is done.

    What can be wrong with tables is found before the first scan is read, and only one run at a time may write into a folder.
    """
    damaged = unpack_all(pending(order.datasets, order.limit), order.out, watch.on_archive, watch.on_note)
    data = gather(order, watch.on_file)
    for note in data.notes:
        watch.on_note(note)
    with exclusive(order.out):
        todo = plan(data.jobs, order.out, order.recipe)
        watch.on_plan(todo, data.ignored)
        write_dataset(order.out, order.recipe, Outcome(todo.done, todo.kept), str(order.source))
        outcome = run_plan(todo, order.out, workers, watch.on_record)
        return finish(order, outcome, data)._replace(damaged=damaged)


def finish(order: Order, outcome: Outcome, data: Data) -> Result:
    """Write manifests, counts, dataset.json and the report of a finished run.

    Splits that leak in a way that only content shows get no manifests, and old ones go: nobody trains on them by mistake.
    """
    out, rows = order.out, outcome.rows
    name = order.questions.stem if order.questions else None
    manifests = build(data.questions, rows, out=out.at(""), instruction=order.recipe.instruction, dataset=name)
    manifests = manifests._replace(unmatched=sorted([*manifests.unmatched, *data.unmatched]))
    leak = None if order.allow_leaks else _leak(manifests, rows)
    if leak is not None:
        manifests = manifests._replace(rows={})
    write(manifests, out.at(""))
    dataset = write_dataset(out, order.recipe, outcome, str(order.source), digests(out))
    _report(order, rows, dataset)
    counts = count(row for split in manifests.rows.values() for row in split)
    out.write(COUNTS, (json.dumps([found.to_json() for found in counts], indent=1, ensure_ascii=False) + "\n").encode())
    return Result(outcome, manifests, counts, leak)


def _leak(manifests: Manifests, rows: list[VolumeRecord]) -> str | None:
    """Return what several splits have in common, as a text; None where they are apart."""
    try:
        refuse_leaks(leaks((row for split in manifests.rows.values() for row in split), rows))
    except UsageError as error:
        return str(error)
    return None


def _report(order: Order, rows: list[VolumeRecord], dataset: dict[str, Any]) -> None:
    page = render_report(
        rows,
        recipe=order.recipe,
        open_volume=lambda record: open_volume(order.out.at(record.store or ""), "model"),
        pictures=order.pictures,
        title=order.out.at("").rstrip("/").rpartition("/")[2],
        source=order.source.name,
        tools=dataset["versions"],
    )
    order.out.write(REPORT, page)
