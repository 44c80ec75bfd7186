"""What `photon-data prepare` is to work on: a folder with a table of questions, or the data sets of a data_manifest.yaml."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from photon_data.collect import Combined, collect, combine
from photon_data.collector import paused
from photon_data.declared import DataManifest, DataSet
from photon_data.errors import UsageError
from photon_data.job import Job
from photon_data.join import by_source
from photon_data.location import Location
from photon_data.manifest import Unmatched
from photon_data.prepare import Rescale
from photon_data.prompts import PROMPTS, put
from photon_data.questions import Question, read_questions
from photon_data.readers import find_scans, left_alone
from photon_data.recipe import Recipe
from photon_data.scan import MAX_VOXELS, Source
from photon_data.splits import FRACTIONS, assign_splits, leaks, refuse_leaks
from photon_data.stated import Stated
from photon_pipelines.recipes import named_recipe
from photon_pipelines.rescaling import HEADER, rescaling


class Data(NamedTuple):
    """What is to be prepared and asked.

    questions  with splits; None for one row per volume
    unmatched  questions whose volume is known not to be there
    ignored    {suffix: number} of files that are no scans
    notes      sentences for the person who reads along
    """

    jobs: list[Job]
    questions: list[Question] | None
    unmatched: Sequence[Unmatched] = ()
    ignored: Mapping[str, int] = {}
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Order:
    """What somebody asked `photon-data prepare` for; the CLI's options, one to one.

    source   a folder of scans, or, if `datasets` are given, the data_manifest.yaml that declares them
    prompt   the style that questions are put in; None for the manifest's own, or as they are
    """

    source: Path
    out: Location
    recipe: Recipe
    datasets: tuple[DataSet, ...] = ()
    hu_source: str = HEADER
    questions: Path | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    prompt: str | None = None
    fractions: Mapping[str, float] = field(default_factory=lambda: dict(FRACTIONS))
    seed: int = 0
    allow_leaks: bool = False
    id_from: str = "path"
    limit: int | None = None
    overwrite: bool = False
    max_voxels: int = MAX_VOXELS
    pictures: int = 48


@paused()
def gather(order: Order, on_file: Callable[[int], None] = lambda count: None) -> Data:
    """Return all that an order is about; nothing is written. UsageError for what cannot be followed.

    Leaks that the questions themselves show are refused here, before hours of work; those that only content shows, later.
    """
    roots = [root for entry in order.datasets for root in entry.roots] or [order.source]
    for root in roots:
        if order.out.is_local and root.resolve() == order.out.path.resolve():
            raise UsageError(f"an output folder of its own wanted, got the source {root} itself")
    if order.prompt is not None and order.prompt not in PROMPTS:
        raise UsageError(f"--prompt-style: one of {', '.join(PROMPTS)} wanted, got {order.prompt!r}")
    data = _declared(order, on_file) if order.datasets else _folder(order, on_file)
    if not order.allow_leaks:
        refuse_leaks(leaks(map(as_row, data.questions or ()), []))
    return data


def out_of(manifest: DataManifest, out: str | None) -> Location:
    """Return where to write: what the command says, else what the manifest says; UsageError where neither does."""
    where = out or manifest.out
    if where is None:
        raise UsageError(f"an output folder wanted, as `out:` in {manifest.path.name} or after --manifest")
    return Location(where)


def one_recipe(datasets: Sequence[DataSet]) -> Recipe:
    """Return the recipe of the first data set; UsageError if another one's gives other bytes, since a folder holds one."""
    recipes = {entry.name: recipe_of(entry) for entry in datasets}
    digests = Counter(recipe.digest for recipe in recipes.values())
    if len(digests) > 1:
        said = ", ".join(f"{name} {recipe.name} ({recipe.digest})" for name, recipe in recipes.items())
        raise UsageError(f"one recipe per output folder wanted, got {said}; prepare them one by one, with --only NAME OUT")
    return next(iter(recipes.values()))


def recipe_of(entry: DataSet) -> Recipe:
    """Return the recipe that an entry names; UsageError with its place for one that is not known."""
    try:
        return named_recipe(entry.recipe.name, entry.recipe.settings)
    except UsageError as error:
        raise entry.wrong(str(error)) from None


def _folder(order: Order, on_file: Callable[[int], None]) -> Data:
    """Return the scans of a folder and the questions of a table, its own splits or drawn ones."""
    questions = None
    if order.questions is not None:
        columns = {name: column for name, column in order.columns.items() if name not in ("slope", "intercept")}
        questions = read_questions(order.questions, columns)
        questions = put(questions, order.prompt, "shown") if order.prompt else questions
    found = find_scans(order.source, id_from=order.id_from, on_file=on_file)
    if not found.sources:
        raise UsageError(
            f"scans wanted (NIfTI, NRRD, MetaImage, DICOM), found {left_alone(found.ignored)} in {order.source}; "
            "is this the right folder?"
        )
    rescale = rescaling(order.hu_source, found.sources, order.columns)
    jobs = [_job(order, source, order.recipe, rescale(source)) for source in found.sources[: order.limit]]
    if questions is not None:
        questions = assign_splits(_by_id(questions, found.sources), fractions=order.fractions, seed=order.seed)
    return Data(jobs, questions, ignored=found.ignored)


def _by_id(questions: Sequence[Question], sources: Sequence[Source]) -> list[Question]:
    """Return the questions with ids for the volumes' names where those name one scan: two names must not be two patients."""
    find, ids = by_source(sources), {source.id for source in sources}
    named = {name: found for name in {q.volume for q in questions} if (found := find(name)) in ids}
    return [replace(question, volume=named.get(question.volume, question.volume)) for question in questions]


def _declared(order: Order, on_file: Callable[[int], None]) -> Data:
    """Return the volumes that the questions of declared data sets need, and those questions."""
    parts = [
        collect(entry, instruction=recipe_of(entry).instruction, seed=order.seed, on_file=on_file) for entry in order.datasets
    ]
    both = combine(parts, order.seed, order.prompt)
    jobs = jobs_of(order, both)
    if not jobs:
        raise UsageError(f"{order.source}: volumes with questions wanted, found none")
    return Data(jobs, both.questions, both.unmatched, notes=both.notes)


def jobs_of(order: Order, both: Combined) -> list[Job]:
    """Return a job for every volume of combined data sets."""
    recipes = {entry.name: recipe_of(entry) for entry in order.datasets}
    return [
        _job(order, source, recipes[entry.name], both.rescale.get(source.id), both.stated.get(source.id))
        for source, entry in both.sources[: order.limit]
    ]


def _job(order: Order, source: Source, recipe: Recipe, rescale: Rescale | None, stated: Stated | None = None) -> Job:
    return Job(source, order.out.at(""), recipe, rescale, stated, max_voxels=order.max_voxels, overwrite=order.overwrite)


def as_row(question: Question) -> dict[str, object]:
    """Return what the leak check looks at."""
    return {
        "volume_id": question.volume,
        "patient": question.patient,
        "split": question.split,
        "extra": {"source_id": question.extra.get("source_id")},
    }
