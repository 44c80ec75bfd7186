"""The whole of `photon-data prepare`: find, prepare, write manifests, report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from photon_data.errors import UsageError
from photon_data.job import Job
from photon_data.location import Location
from photon_data.manifest import Manifests, build, write
from photon_data.questions import Question, read_questions
from photon_data.readers import find_scans
from photon_data.recipe import Recipe
from photon_data.records import VolumeRecord
from photon_data.report import render_report
from photon_data.scan import MAX_VOXELS
from photon_data.splits import FRACTIONS, assign_splits, leaks, refuse_leaks
from photon_data.store import open_volume
from photon_pipelines.execute import Workers
from photon_pipelines.lock import exclusive
from photon_pipelines.prepare import Outcome, Plan, plan, run_plan, write_dataset
from photon_pipelines.rescaling import HEADER, rescaling

REPORT = "report.html"


@dataclass(frozen=True)
class Order:
    """What somebody asked `photon-data prepare` for; the CLI's options, one to one."""

    source: Path
    out: Location
    recipe: Recipe
    hu_source: str = HEADER
    questions: Path | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    fractions: Mapping[str, float] = field(default_factory=lambda: dict(FRACTIONS))
    seed: int = 0
    allow_leaks: bool = False
    id_from: str = "path"
    limit: int | None = None
    overwrite: bool = False
    max_voxels: int = MAX_VOXELS
    pictures: int = 48


class Result(NamedTuple):
    """What a run left: the outcome per file, and the manifests."""

    outcome: Outcome
    manifests: Manifests


class Watcher(NamedTuple):
    """Told of progress: files seen while searching, the plan before work starts, and each record as it ends."""

    on_file: Callable[[int], None] = lambda count: None
    on_plan: Callable[[Plan, Mapping[str, int]], None] = lambda todo, ignored: None
    on_record: Callable[[VolumeRecord], None] = lambda record: None


def prepare(order: Order, workers: Workers, watch: Watcher) -> Result:
    """Do what was ordered and return it. UsageError before anything is written; NoSpace and Stopped leave what is done.

    What can be wrong with tables is found before the first scan is read, and only one run at a time may write into a folder.
    """
    if order.out.is_local and order.source.resolve() == order.out.path.resolve():
        raise UsageError(f"an output folder of its own wanted, got the source {order.source} itself")
    questions = ask(order)
    with exclusive(order.out):
        todo, ignored = make_plan(order, watch)
        watch.on_plan(todo, ignored)
        write_dataset(order.out, order.recipe, Outcome(todo.done, todo.kept), str(order.source))
        outcome = run_plan(todo, order.out, workers, watch.on_record)
        return Result(outcome, finish(order, outcome, questions))


def make_plan(order: Order, watch: Watcher) -> tuple[Plan, Mapping[str, int]]:
    """Return what is to be done, and how many files of which suffix are no scans; nothing is written."""
    jobs, ignored = find_jobs(order, watch)
    return plan(jobs, order.out, order.recipe), ignored


def find_jobs(order: Order, watch: Watcher) -> tuple[list[Job], Mapping[str, int]]:
    """Return a job for every scan of the source, and how many files of which suffix are no scans; UsageError for no scan."""
    found = find_scans(order.source, id_from=order.id_from, on_file=watch.on_file)
    if not found.sources:
        raise UsageError(f"scans wanted in {order.source}, found none; NIfTI, NRRD, MetaImage and DICOM are read")
    rescale = rescaling(order.hu_source, found.sources, order.columns)
    out = order.out.at("")
    jobs = [
        Job(source, out, order.recipe, rescale(source), order.max_voxels, order.overwrite)
        for source in found.sources[: order.limit]
    ]
    return jobs, found.ignored


def ask(order: Order) -> list[Question] | None:
    """Return the questions of the order's table with their splits, None without a table.

    Leaks that the table itself shows are refused here, before hours of work; those that only content shows, in `finish`.
    """
    if order.questions is None:
        return None
    questions = read_questions(order.questions, {k: v for k, v in order.columns.items() if k not in ("slope", "intercept")})
    questions = assign_splits(questions, fractions=order.fractions, seed=order.seed)
    if not order.allow_leaks:
        refuse_leaks(leaks(({"volume_id": q.volume, "patient": q.patient, "split": q.split} for q in questions), []))
    return questions


def finish(order: Order, outcome: Outcome, questions: Sequence[Question] | None) -> Manifests:
    """Write manifests, dataset.json and the report of a finished run; UsageError for splits that leak into one another."""
    out, rows = order.out, outcome.rows
    name = order.questions.stem if order.questions else None
    manifests = build(questions, rows, out=out.at(""), instruction=order.recipe.instruction, dataset=name)
    dataset = write_dataset(out, order.recipe, outcome, str(order.source))
    _report(order, rows, dataset)
    if not order.allow_leaks:
        refuse_leaks(leaks((row for split in manifests.rows.values() for row in split), rows))
    write(manifests, out.at(""))
    return manifests


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
