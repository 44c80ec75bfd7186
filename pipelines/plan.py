"""What `photon-data prepare` is requested to do -> jobs, and which of them are to be done. Nothing is written here."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from photon_data.datasets.base import DataSet
from photon_data.datasets.combine import Collection, combine, read_dataset
from photon_data.datasets.declare import DataManifest, read_data_manifest
from photon_data.errors import UsageError
from photon_data.files import Location
from photon_data.hounsfield import Rescale
from photon_data.prepare_file import Job, already_there, recipe_digest
from photon_data.questions.manifest import Manifests, Unmatched, by_name
from photon_data.questions.question import PROMPTS, Question, with_prompt_style
from photon_data.questions.question_table import read_questions
from photon_data.questions.splits import FRACTIONS, Count, assign_splits, leaks, refuse_leaks
from photon_data.questions.table import read_table
from photon_data.readers.find import find_scans, left_alone
from photon_data.recipe import Policy, Recipe, named_recipe
from photon_data.records import STATES, UNCHANGED, VolumeRecord, read_records
from photon_data.scan import Source
from photon_data.store import is_whole, read_metadata, store_name

HEADER, STORED = "header", "stored"  # values of --hu-source that are no table
# A scan that the table of --hu-source does not name is refused on its own: these are no slope and no intercept.
NOT_IN_TABLE = Rescale(math.nan, math.nan, "table")


@dataclass(frozen=True)
class Request:
    """A request about a folder of scans with tables about it, or about the data sets of a data_manifest.yaml.

    Every data set has its own recipe name, policy, questions and splits; the fields from `hu_source` are a folder's.
    """

    source: Path  # a folder of scans, one scan, or the data_manifest.yaml
    out: Location
    recipe: Recipe
    policy: Policy = field(default_factory=Policy)  # for data sets, only its max_voxels counts
    datasets: tuple[DataSet, ...] = ()  # none for a folder of scans
    prompt: str | None = None  # style of the questions; None for the manifest's own, or for questions as they are
    seed: int = 0
    allow_leaks: bool = False
    limit: int | None = None  # only so many scans
    overwrite: bool = False
    pictures: int = 48  # volumes shown as pictures in the report

    hu_source: str = HEADER  # "header", "stored", or the path of a table: see `rescaling`
    questions: Path | None = None  # a table of questions; None for one row per volume
    columns: Mapping[str, str] = field(default_factory=dict)  # {our name: name in the tables}
    # Share of each split, where the table of questions has no splits.
    fractions: Mapping[str, float] = field(default_factory=lambda: FRACTIONS)
    id_from: str = "path"  # what volume ids are made from: "path", "name" or "hash"
    include: Sequence[str] = ()  # globs of what is looked at, and of what is not; see `find_scans`
    exclude: Sequence[str] = ()
    follow_links: bool = True


class Callback:
    """What a run calls as it proceeds; a subclass overrides what it shows.

    on_archive  the name of an archive that is unpacked, and the bytes of all archives, done and in all
    on_file     how many files were seen while looking for scans
    on_note     a sentence for the person who reads along
    on_plan     what will be done, and the number of files that are no scans, by suffix
    on_record   a scan that was prepared, refused, or failed
    """

    def on_archive(self, name: str, done_bytes: int, total_bytes: int) -> None: ...  # noqa: D102 - see above
    def on_file(self, count: int) -> None: ...  # noqa: D102
    def on_note(self, note: str) -> None: ...  # noqa: D102
    def on_plan(self, todo: Plan, ignored: Mapping[str, int]) -> None: ...  # noqa: D102
    def on_record(self, record: VolumeRecord) -> None: ...  # noqa: D102


class Gathered(NamedTuple):
    """What is to be prepared and asked."""

    jobs: list[Job]
    questions: list[Question] | None  # with splits; None for one row per volume
    unmatched: Sequence[Unmatched] = ()  # questions whose volume is known not to exist
    ignored: Mapping[str, int] = {}  # {suffix: number} of files that are no scans
    notes: Sequence[str] = ()  # sentences for the person who reads along


class Plan(NamedTuple):
    """What a run will do."""

    jobs: list[Job]  # to execute
    done: list[VolumeRecord]  # of inputs whose stores exist already
    kept: list[VolumeRecord]  # of volumes of earlier runs that are no input of this one
    before: list[VolumeRecord]  # what earlier runs left of the jobs' sources: it stands until the job is done


class Result(NamedTuple):
    """What a run left."""

    records: list[VolumeRecord]  # of its inputs
    kept: list[VolumeRecord]  # as in the plan
    manifests: Manifests  # no rows where splits leak
    counts: list[Count]  # what the questions are, by data set, task and split
    leak: str | None  # what several splits have in common; None where they are apart, or where leaks are allowed
    damaged: Sequence[str]  # the archives that could not be unpacked as a whole, and why

    @property
    def states(self) -> dict[str, int]:
        """How many inputs ended in each state; they add up to all inputs."""
        return count_states(self.records)

    @property
    def complete(self) -> bool:
        """Whether every input has its store and every question its row."""
        has_stores = all(record.is_there for record in self.records)
        return has_stores and not self.manifests.unmatched and self.leak is None and not self.damaged


def count_states(records: Sequence[VolumeRecord]) -> dict[str, int]:
    """Return {state: number of records} with every state."""
    found = Counter(record.state for record in records)
    return {state: found[state] for state in STATES}


def request_of_manifest(path: Path, only: Sequence[str], out: str | None, **options: Any) -> Request:
    """Return the request for the data sets of a data_manifest.yaml, or for those named in `only`.

    `options` are further fields of the request; the seed is the manifest's, if none is given.
    """
    manifest = read_data_manifest(path)
    datasets = manifest.only(only)
    options = {"seed": manifest.seed, **options}
    return Request(path, out_of(manifest, out), one_recipe(datasets), datasets=datasets, **options)


def out_of(manifest: DataManifest, out: str | None) -> Location:
    """Return where to write: what the command says, else what the manifest says; UsageError where neither does."""
    where = out or manifest.out
    if where is None:
        expected = f"an output folder as `out:` in {manifest.path.name} or after --manifest"
        raise UsageError(f"expected {expected}, found neither")
    return Location(where)


def one_recipe(datasets: Sequence[DataSet]) -> Recipe:
    """Return the one recipe of the data sets; UsageError where there are several, since a folder holds one."""
    recipes = {entry.name: recipe_of(entry)[0] for entry in datasets}
    if len({recipe.digest for recipe in recipes.values()}) > 1:
        found = ", ".join(f"{name} {recipe.name} ({recipe.digest})" for name, recipe in recipes.items())
        remedy = "prepare them one by one, with --only NAME OUT"
        raise UsageError(f"expected one recipe per output folder, found {found}; {remedy}")
    return next(iter(recipes.values()))


def recipe_of(entry: DataSet) -> tuple[Recipe, Policy]:
    """Return the recipe that an entry names, and its policy; UsageError with its place for one that is not known."""
    try:
        return named_recipe(entry.recipe.name, entry.recipe.settings)
    except UsageError as error:
        raise entry.error(str(error)) from None


def gather(request: Request, callback: Callback | None = None) -> Gathered:
    """Return the jobs and questions that a request is about; UsageError for what cannot be followed.

    Leaks that the questions themselves show are refused here, before hours of work; `prepare` finds those of content.
    """
    callback = callback or Callback()
    for root in [root for entry in request.datasets for root in entry.roots] or [request.source]:
        if request.out.is_local and root.resolve() == request.out.path.resolve():
            raise UsageError(f"expected an output folder of its own, found the source {root} itself")
    if request.prompt is not None and request.prompt not in PROMPTS:
        raise UsageError(f"--prompt-style: expected one of {', '.join(PROMPTS)}, found {request.prompt!r}")
    gathered = (_gather_datasets if request.datasets else _gather_folder)(request, callback)
    if gathered.questions and not request.allow_leaks:
        refuse_leaks(leaks(map(as_row, gathered.questions)))
    return gathered


def as_row(question: Question) -> dict[str, object]:
    """Return what the leak check looks at."""
    return {
        "volume_id": question.volume,
        "patient": question.patient,
        "split": question.split,
        "extra": {"source_id": question.extra.get("source_id")},
    }


def _gather_folder(request: Request, callback: Callback) -> Gathered:
    """Return the scans of a folder, and the questions of a table with its own splits or drawn ones."""
    questions = None
    if request.questions is not None:
        columns = {name: column for name, column in request.columns.items() if name not in ("slope", "intercept")}
        questions = read_questions(request.questions, columns)
        questions = with_prompt_style(questions, request.prompt, "shown") if request.prompt else questions
    sources, ignored = find_scans(
        request.source,
        id_from=request.id_from,
        on_file=callback.on_file,
        include=request.include,
        exclude=request.exclude,
        follow_links=request.follow_links,
    )
    if not sources:
        found = f"{left_alone(ignored)} in {request.source}"
        raise UsageError(f"expected scans (NIfTI, NRRD, MetaImage, DICOM), found {found}; is this the right folder?")
    rescale, out = rescaling(request.hu_source, sources, request.columns), request.out.at("")
    jobs = [
        Job(source, out, request.recipe, request.policy, rescale(source), overwrite=request.overwrite)
        for source in sources[: request.limit]
    ]
    if questions is not None:
        find = by_name((source.id, source.path) for source in sources)
        # Ids in place of names of scans: two names of one scan must not be two patients.
        questions = [replace(question, volume=find(question.volume).id or question.volume) for question in questions]
        questions = assign_splits(questions, fractions=request.fractions, seed=request.seed)
    return Gathered(jobs, questions, ignored=ignored)


def rescaling(
    hu_source: str, sources: Sequence[Source], columns: Mapping[str, str]
) -> Callable[[Source], Rescale | None]:
    """Return the function that gives each source its slope and intercept: None for the header's.

    `hu_source` is "header", "stored" (slope 1, intercept 0), or the path of a csv, tsv or jsonl with columns volume,
    slope, intercept; `columns` maps these names to the table's. UsageError where the table names a volume twice.
    """
    if hu_source == HEADER:
        return lambda source: None
    if hu_source == STORED:
        return lambda source: Rescale(1.0, 0.0, "stored")
    path = Path(hu_source)
    if not path.is_file():
        raise UsageError(f"--hu-source: expected header, stored or a table, found {hu_source!r}, which is no file")
    find = by_name((source.id, source.path) for source in sources)
    volume, slope, intercept = (columns.get(name, name) for name in ("volume", "slope", "intercept"))
    by_id: dict[str, Rescale] = {}
    for line, values in read_table(path).rows:
        try:
            numbers = float(values[slope]), float(values[intercept])
            match = find(str(values[volume]))
        except (KeyError, TypeError, ValueError):
            expected = f"{volume} (text), {slope}, {intercept} (numbers)"
            raise UsageError(f"{path.name}, {line}: expected {expected}, found {values}") from None
        if match.is_ambiguous:
            found = f"{values[volume]!r}, {match.reason}"
            raise UsageError(f"{path.name}, {line}: expected the name of one scan, found {found}")
        if match.id in by_id:
            raise UsageError(f"{path.name}, {line}: expected one row per volume, found a second one for {match.id}")
        if match.id:
            by_id[match.id] = Rescale(*numbers, "table")
    return lambda source: by_id.get(source.id, NOT_IN_TABLE)


def _gather_datasets(request: Request, callback: Callback) -> Gathered:
    """Return the volumes that the questions of declared data sets need, and those questions."""
    parts = [
        read_dataset(entry, instruction=recipe_of(entry)[0].instruction, seed=request.seed, on_file=callback.on_file)
        for entry in request.datasets
    ]
    combined = combine(parts, request.seed, request.prompt)
    jobs = jobs_of(request, combined)
    if not jobs:
        raise UsageError(f"{request.source}: expected volumes with questions, found none")
    return Gathered(jobs, combined.questions, combined.unmatched, notes=combined.notes)


def jobs_of(request: Request, combined: Collection) -> list[Job]:
    """Return a job for every volume of combined data sets."""
    jobs, recipes = [], {entry.name: recipe_of(entry) for entry in request.datasets}
    out, largest = request.out.at(""), request.policy.max_voxels
    for volume in combined.volumes[: request.limit]:
        recipe, policy = recipes[volume.dataset.name]
        policy = replace(policy, max_voxels=largest)
        jobs.append(Job(volume.source, out, recipe, policy, volume.rescale, volume.table_grid, request.overwrite))
    return jobs


def plan(jobs: Sequence[Job], out: Location, recipe: Recipe) -> Plan:
    """Return which of the jobs have to be done; UsageError if the result would mix recipes."""
    before = {record.id: record for record in read_records(out)}
    ids = {job.source.id for job in jobs}
    others = [replace(old, state=UNCHANGED) for old in before.values() if old.is_there and old.id not in ids]
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(lambda job: _unchanged(job, before.get(job.source.id)), jobs))
        digests = list(threads.map(lambda record: _digest_of_store(out, record), others))
    kept = [(record, digest) for record, digest in zip(others, digests, strict=True) if digest]
    foreign = [record.id for record, digest in kept if digest != recipe.digest]
    if foreign:
        raise UsageError(
            f"expected one recipe per folder, found {len(foreign)} volumes of another recipe in {out.url} that are not "
            f"among these inputs, {foreign[0]} first; use another folder, or prepare all of them again"
        )
    todo = [job for job, done in zip(jobs, found, strict=True) if done is None]
    left = [before[job.source.id] for job in todo if job.source.id in before]
    return Plan(todo, [done for done in found if done], [record for record, _ in kept], left)


def _unchanged(job: Job, before: VolumeRecord | None) -> VolumeRecord | None:
    """Return the record of a finished store whose source still has the size and time that volumes.jsonl recorded."""
    if before is None or before.fingerprint is None:
        return None
    is_same = (before.bytes_in, before.mtime_ns) == (job.source.bytes, job.source.mtime_ns)
    return already_there(job, before.fingerprint) if is_same else None


def _digest_of_store(out: Location, record: VolumeRecord) -> str | None:
    """Return the digest of the recipe that a record's store was made by; None where the store is gone."""
    name = store_name(record.id)
    metadata = read_metadata(out, name)
    if metadata is None or metadata["sha256"] != record.store_sha256 or not is_whole(out, name, metadata):
        return None
    return recipe_digest(metadata)
