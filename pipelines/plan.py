"""`--hu-source`: who says what slope and intercept turn stored values into Hounsfield units.

What `photon-data prepare` is to work on: a folder with a table of questions, or the data sets of a data_manifest.yaml.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from photon_data.datasets.base import DataSet
from photon_data.datasets.combine import Collection, combine, read_dataset
from photon_data.datasets.declare import DataManifest
from photon_data.errors import UsageError
from photon_data.files import Location
from photon_data.hounsfield import Rescale
from photon_data.prepare_file import Job
from photon_data.questions.join import by_name
from photon_data.questions.question import PROMPTS, Question, with_prompt_style
from photon_data.questions.question_table import read_questions
from photon_data.questions.rows import Unmatched
from photon_data.questions.splits import FRACTIONS, assign_splits, leaks, refuse_leaks
from photon_data.questions.table import read_table
from photon_data.readers import find_scans, left_alone
from photon_data.recipe import Policy, Recipe, named_recipe
from photon_data.scan import Source, Stated

HEADER, STORED = "header", "stored"
COLUMNS = ("volume", "slope", "intercept")
# A scan that the table does not name is refused on its own: these are no slope and no intercept.
NOT_IN_TABLE = Rescale(math.nan, math.nan, "table")


def rescaling(said: str, sources: Iterable[Source], columns: Mapping[str, str]) -> Callable[[Source], Rescale | None]:
    """Return what gives each source its rescaling: None for the header's, (1, 0) for `stored`, or the rows of a table.

    `said` is "header", "stored" or the path of a csv, tsv or jsonl with columns volume, slope, intercept (`columns` maps
    these names to the table's). UsageError for a table that cannot be read or names a volume twice.
    """
    if said == HEADER:
        return lambda source: None
    if said == STORED:
        return lambda source: Rescale(1.0, 0.0, "stored")
    if not Path(said).is_file():
        raise UsageError(f"--hu-source: header, stored or a table wanted, got {said!r}, which is no file")
    named = _read(Path(said), sources, columns)
    return lambda source: named.get(source.id, NOT_IN_TABLE)


def _read(path: Path, sources: Iterable[Source], columns: Mapping[str, str]) -> dict[str, Rescale]:
    find = by_name((source.id, source.path) for source in sources)
    volume, slope, intercept = (columns.get(name, name) for name in COLUMNS)
    named: dict[str, Rescale] = {}
    for place, values in read_table(path).rows:
        try:
            numbers = float(values[slope]), float(values[intercept])
            match = find(str(values[volume]))
        except (KeyError, TypeError, ValueError):
            raise UsageError(
                f"{path.name}, {place}: {volume} (text), {slope}, {intercept} (numbers) wanted, got {values}"
            ) from None
        if match.id:
            if match.id in named:
                raise UsageError(f"{path.name}, {place}: one row per volume wanted, got a second one for {match.id}")
            named[match.id] = Rescale(*numbers, "table")
        elif match.is_ambiguous:
            raise UsageError(f"{path.name}, {place}: the name of one scan wanted, got {values[volume]!r}, {match.reason}")
    return named


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
    policy   of a folder; data sets have their own, of which only max_voxels is this one's
    prompt   the style that questions are put in; None for the manifest's own, or as they are
    """

    source: Path
    out: Location
    recipe: Recipe
    policy: Policy = field(default_factory=Policy)
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
    pictures: int = 48


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
        refuse_leaks(leaks(map(as_row, data.questions or ())))
    return data


def out_of(manifest: DataManifest, out: str | None) -> Location:
    """Return where to write: what the command says, else what the manifest says; UsageError where neither does."""
    where = out or manifest.out
    if where is None:
        raise UsageError(f"an output folder wanted, as `out:` in {manifest.path.name} or after --manifest")
    return Location(where)


def one_recipe(datasets: Sequence[DataSet]) -> Recipe:
    """Return the recipe of the first data set; UsageError if another one's gives other bytes, since a folder holds one."""
    recipes = {entry.name: recipe_of(entry)[0] for entry in datasets}
    digests = Counter(recipe.digest for recipe in recipes.values())
    if len(digests) > 1:
        said = ", ".join(f"{name} {recipe.name} ({recipe.digest})" for name, recipe in recipes.items())
        raise UsageError(f"one recipe per output folder wanted, got {said}; prepare them one by one, with --only NAME OUT")
    return next(iter(recipes.values()))


def recipe_of(entry: DataSet) -> tuple[Recipe, Policy]:
    """Return the recipe that an entry names, and its policy; UsageError with its place for one that is not known."""
    try:
        return named_recipe(entry.recipe.name, entry.recipe.settings)
    except UsageError as error:
        raise entry.error(str(error)) from None


def _folder(order: Order, on_file: Callable[[int], None]) -> Data:
    """Return the scans of a folder and the questions of a table, its own splits or drawn ones."""
    questions = None
    if order.questions is not None:
        columns = {name: column for name, column in order.columns.items() if name not in ("slope", "intercept")}
        questions = read_questions(order.questions, columns)
        questions = with_prompt_style(questions, order.prompt, "shown") if order.prompt else questions
    found = find_scans(order.source, id_from=order.id_from, on_file=on_file)
    if not found.sources:
        raise UsageError(
            f"scans wanted (NIfTI, NRRD, MetaImage, DICOM), found {left_alone(found.ignored)} in {order.source}; "
            "is this the right folder?"
        )
    rescale = rescaling(order.hu_source, found.sources, order.columns)
    jobs = [_job(order, source, (order.recipe, order.policy), rescale(source)) for source in found.sources[: order.limit]]
    if questions is not None:
        questions = assign_splits(_by_id(questions, found.sources), fractions=order.fractions, seed=order.seed)
    return Data(jobs, questions, ignored=found.ignored)


def _by_id(questions: Sequence[Question], sources: Sequence[Source]) -> list[Question]:
    """Return the questions with ids for the volumes' names where those name one scan: two names must not be two patients."""
    find = by_name((source.id, source.path) for source in sources)
    return [replace(question, volume=find(question.volume).id or question.volume) for question in questions]


def _declared(order: Order, on_file: Callable[[int], None]) -> Data:
    """Return the volumes that the questions of declared data sets need, and those questions."""
    parts = [
        read_dataset(entry, instruction=recipe_of(entry)[0].instruction, seed=order.seed, on_file=on_file) for entry in order.datasets
    ]
    both = combine(parts, order.seed, order.prompt)
    jobs = jobs_of(order, both)
    if not jobs:
        raise UsageError(f"{order.source}: volumes with questions wanted, found none")
    return Data(jobs, both.questions, both.unmatched, notes=both.notes)


def jobs_of(order: Order, both: Collection) -> list[Job]:
    """Return a job for every volume of combined data sets."""
    recipes = {entry.name: recipe_of(entry) for entry in order.datasets}
    return [
        _job(order, volume.source, recipes[volume.dataset.name], volume.rescale, volume.stated)
        for volume in both.volumes[: order.limit]
    ]


def _job(
    order: Order, source: Source, made_by: tuple[Recipe, Policy], rescale: Rescale | None, stated: Stated | None = None
) -> Job:
    recipe, policy = made_by
    policy = replace(policy, max_voxels=order.policy.max_voxels)
    return Job(source, order.out.at(""), recipe, policy, rescale, stated, overwrite=order.overwrite)


def as_row(question: Question) -> dict[str, object]:
    """Return what the leak check looks at."""
    return {
        "volume_id": question.volume,
        "patient": question.patient,
        "split": question.split,
        "extra": {"source_id": question.extra.get("source_id")},
    }
