"""What `photon-data prepare` is requested to do -> jobs, and which of them are to be done. No store is written here."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

from photon_data.datasets.base import ID_FROM, DataSet
from photon_data.datasets.combine import Collection, combine, read_dataset
from photon_data.errors import UsageError, first_few, nearest_name
from photon_data.files import Location
from photon_data.hounsfield import HEADER
from photon_data.override import read_overrides, rescaling
from photon_data.prepare_file import Job, already_there, recipe_digest
from photon_data.private import HEADERS, hide_names, private_folder
from photon_data.questions.manifest import Unmatched, refuse_unsound
from photon_data.questions.question import PROMPTS, UNKNOWN, Question, by_name, read_questions, with_prompt_style
from photon_data.questions.splits import assign_splits, leaks_of, refuse_leaks
from photon_data.readers.find import check_id_prefix, find_scans, left_alone
from photon_data.readers.mask_pattern import MASKS, scans_alone
from photon_data.records import (
    FAILED,
    INSPECTED,
    PRUNED,
    REFUSED,
    UNCHANGED,
    Rows,
    VolumeRecord,
    read_again,
    read_records,
    store_names,
)
from photon_data.scan import Source, is_url, place_name
from photon_data.store import is_whole, read_metadata
from photon_pipelines.collection import (
    deep_ids,
    ids_of_earlier_runs,
    notes_of_old_ids,
    refuse_lost_names,
    refuse_namesakes,
    without_withdrawn,
)
from photon_pipelines.request import Request, grids_of, paths_of, recipe_of

# What DICOM archives hold: names of their files and folders may be a patient's.
HIDDEN = ("dicom", "folder")


class Callback:
    """What a run calls as it proceeds; a subclass overrides what it shows.

    on_archive  the name of an archive that is unpacked, and the bytes of all archives, done and in all
    on_file     how many files were seen while looking for scans
    on_note     a sentence for the person who reads along
    on_plan     what will be done, and the number of files that are no scans, by suffix
    on_record   a scan that was prepared, refused, or failed
    on_masks    what became of the masks of a volume, and of how many in all
    """

    def on_archive(self, name: str, done_bytes: int, total_bytes: int) -> None: ...  # noqa: D102 - see above
    def on_file(self, count: int) -> None: ...  # noqa: D102
    def on_note(self, note: str) -> None: ...  # noqa: D102
    def on_plan(self, todo: Plan, ignored: Mapping[str, int]) -> None: ...  # noqa: D102
    def on_record(self, record: VolumeRecord) -> None: ...  # noqa: D102
    def on_masks(self, row: VolumeRecord, total: int) -> None: ...  # noqa: D102


class Gathered(NamedTuple):
    """What is to be prepared and asked."""

    jobs: list[Job]
    questions: dict[str, list[Question]]  # by data set, with splits; empty for one row per volume
    unmatched: Sequence[Unmatched] = ()  # questions whose volume is known not to exist
    ignored: Mapping[str, int] = {}  # {suffix: number} of files that are no scans
    notes: Sequence[str] = ()  # sentences for the person who reads along
    key: str | None = None  # that ids and patients were made with
    rows: Rows | None = None  # of OUT, when it was looked at


class Plan(NamedTuple):
    """What a run will do."""

    jobs: list[Job]  # to execute
    done: list[VolumeRecord]  # of inputs whose stores exist already, or that were refused before for the same reasons
    kept: list[VolumeRecord]  # of earlier runs, no input of this one: volumes, and refused scans of other sources
    before: list[VolumeRecord]  # earlier records of the jobs' sources; volumes.jsonl has them until the job is done


def gather(request: Request, callback: Callback | None = None, *, keeps_headers: bool = True) -> Gathered:
    """Return the jobs and questions that a request is about; UsageError for what cannot be followed.

    Leaks that the questions themselves show are refused here, before hours of work; `prepare` finds those of content.
    With `keeps_headers`, the headers of DICOM files are kept in the private folder: they take long to read.
    """
    callback = callback or Callback()
    for root in [root for entry in request.datasets for root in entry.roots] or [request.source]:
        out = request.out
        if root.resolve() == out.path.resolve() if out.is_local else place_name(root) == out.url.rstrip("/"):
            raise UsageError(f"expected an output folder of its own, found the source {place_name(root)} itself")
    if request.masks and is_url(place_name(request.source)):
        found = f"{place_name(request.source)}: masks are not read from an object store"
        raise UsageError(f"--masks: expected a local folder as SOURCE, found {found}; mount it, or copy it to a disk")
    if request.check not in ("time", "content"):
        raise UsageError(f"--check: expected time or content, found {request.check!r}")
    paths_of(request)  # a misuse is told before the search
    grids = grids_of(request)
    check_id_prefix(request.id_prefix)
    if request.prompt is not None and request.prompt not in PROMPTS:
        raise UsageError(f"--prompt-style: expected one of {', '.join(PROMPTS)}, found {request.prompt!r}")
    headers = keeps_headers and request.id_from in ("auto", "key") and request.out.is_shared  # names are hidden
    gathered = _gather_datasets(request, callback) if request.datasets else _gather_folder(request, callback, headers)
    sources = [job.source for job in gathered.jobs]
    overrides = read_overrides(request.overrides, sources) if request.overrides else {}
    jobs = gathered.jobs[: request.limit]
    if overrides or request.accept:
        jobs = [job.adjusted(overrides.get(job.source.id), request.accept) for job in jobs]
    gathered = gathered._replace(jobs=[job if job.grids == grids else replace(job, grids=grids) for job in jobs])
    for name, asked in gathered.questions.items():
        refuse_unsound(name, asked)
    if not request.allow_leaks:
        refuse_leaks(leaks_of(question for part in gathered.questions.values() for question in part))
    return gathered


def _gather_folder(request: Request, callback: Callback, keeps_headers: bool) -> Gathered:
    """Return the scans of a folder, and the questions of a table with its own splits or drawn ones."""
    asked: list[Question] = []
    if request.questions is not None:  # first: a table that cannot be read is told before the search
        columns = {name: column for name, column in request.columns.items() if name not in ("slope", "intercept")}
        asked = read_questions(request.questions, columns)
        asked = with_prompt_style(asked, request.prompt, "shown") if request.prompt else asked
    rows = read_again(request.out)
    sources, ignored, key = _find_in_folder(request, callback, keeps_headers, rows)
    notes = notes_of_old_ids(sources) if key else []
    out, by_table = request.out.at(""), request.hu_source != HEADER
    rescale = rescaling(request.hu_source, sources, request.columns) if by_table else None
    jobs = [
        Job(source, out, request.recipe, request.policy, rescale and rescale(source), overwrite=request.overwrite)
        for source in sources
    ]
    if request.questions is None:
        return Gathered(jobs, {}, ignored=ignored, notes=notes, key=key, rows=rows)
    name = request.id_prefix + request.questions.stem.lstrip(".")
    made, unmatched = _joined(asked, sources, name)
    notes += _notes_of_unmatched(asked, unmatched, sources)
    if unknown := sum(not (question.split or question.patient) for question in made):
        notes.append(f"{unknown} of {len(asked)} questions have no patient: their splits are drawn by volume")
    questions = {name: assign_splits(made, fractions=request.fractions, seed=request.seed)}
    return Gathered(jobs, questions, unmatched, ignored, notes, key, rows)


def _find_in_folder(
    request: Request, callback: Callback, keeps_headers: bool, rows: Rows
) -> tuple[Sequence[Source], Mapping[str, int], str | None]:
    """Return the scans of a folder, what was left alone, and the key that ids were made with, if any were."""
    known_ids = ids_of_earlier_runs(request.source, request.out, request.id_prefix, rows.records)
    sources, ignored = find_scans(
        request.source,
        id_from="path" if request.id_from in ("auto", "key") else request.id_from,
        id_prefix=request.id_prefix,
        known_ids=known_ids,
        on_file=callback.on_file,
        include=request.include,
        exclude=request.exclude,
        follow_links=request.follow_links,
        headers=str(private_folder(request.out) / HEADERS) if keeps_headers else "",
    )
    if request.masks:
        sources, masks = scans_alone(sources, request.masks)
        ignored = ignored | ({MASKS: masks} if masks else {})
    if not sources:
        found = f"{left_alone(ignored)} in {place_name(request.source)}"
        raise UsageError(f"expected scans (NIfTI, NRRD, MetaImage, DICOM), found {found}; is this the right folder?")
    formats = {source.format for source in sources}
    hidden = formats if request.id_from == "key" else HIDDEN if request.id_from == "auto" and "dicom" in formats else ()
    if hidden:
        sources, key = hide_names(sources, hidden, request.out, request.id_prefix, known_ids)
        return sources, ignored, key
    return [replace(source, patient="") if source.patient else source for source in sources], ignored, None


def _joined(
    asked: Sequence[Question], sources: Sequence[Source], dataset: str
) -> tuple[list[Question], list[Unmatched]]:
    """Return the questions with ids of scans in place of names, and those that name no scan or several.

    Two names of one scan must not be two patients, and a scan of another source never answers to a name.
    """
    by_id = {source.id: source for source in sources}
    is_hidden = any(source.hidden for source in sources)
    find, made, unmatched = by_name((source.id, source.path) for source in sources), [], []
    for question in asked:
        match = find(question.volume)
        if match.id is None:
            shown, reason = question.volume, match.reason
            if is_hidden:
                shown, reason = "(name)", reason.partition(" (")[0]
            unmatched.append(Unmatched(question.id, shown, reason))
            made.append(replace(question, volume=f"{UNKNOWN}{shown}", dataset=dataset))
        else:
            patient = question.patient or by_id[match.id].patient or None
            made.append(replace(question, volume=match.id, dataset=dataset, patient=patient))
    return made, unmatched


def _notes_of_unmatched(
    questions: Sequence[Question], unmatched: Sequence[Unmatched], sources: Sequence[Source]
) -> list[str]:
    """Return a sentence about the questions that name no scan or several, before hours of work."""
    reasons = {one.volume: one.reason for one in unmatched}
    if not reasons:
        return []
    paths = [source.id if source.hidden else source.path for source in sources]
    near = {name: nearest_name(name, paths) or paths[0] for name in list(reasons)[:4]}
    told = [f"{name!r}: {reasons[name]} (a name that there is: {path!r})" for name, path in near.items()]
    found = f"{len(unmatched)} of {len(questions)} questions do not name one scan of this source"
    return [f"{found}: {first_few(told)}"]


def _gather_datasets(request: Request, callback: Callback) -> Gathered:
    """Return the volumes that the questions of declared data sets need, and those questions."""
    rows, key = read_again(request.out), None
    refuse_lost_names(request.out, rows.records)
    ids = {(record.root, record.source): record.id for record in rows.records}

    def hide(entry: DataSet, sources: Sequence[Source]) -> Sequence[Source]:
        nonlocal key
        if ID_FROM in entry.options or not any(source.format == "dicom" for source in sources):
            return sources
        known = {s.path: ids[s.root, s.path] for s in sources if (s.root, s.path) in ids}
        hidden, key = hide_names(sources, HIDDEN, request.out, entry.options.get("id_prefix", ""), known, key)
        return hidden

    parts = []
    for entry in request.datasets:
        how: dict[str, Any] = {
            "instruction": recipe_of(entry)[0].instruction,
            "seed": request.seed,
            "on_file": callback.on_file,
        }
        parts.append(read_dataset(entry, **how, hide=hide))
    combined = combine(parts, request.seed, request.prompt)
    jobs = jobs_of(request, combined)
    if not jobs:
        raise UsageError(f"{request.source}: expected volumes with questions, found none")
    questions = {entry.name: [q for q in combined.questions if q.dataset == entry.name] for entry in request.datasets}
    notes = [*combined.notes, *notes_of_old_ids([job.source for job in jobs])]
    return Gathered(jobs, questions, combined.unmatched, notes=notes, key=key, rows=rows)


def jobs_of(request: Request, combined: Collection) -> list[Job]:
    """Return a job for every volume of combined data sets."""
    jobs, how, out = [], {}, request.out.at("")
    for entry in request.datasets:
        recipe, policy = recipe_of(entry)
        how[entry.name] = recipe, replace(policy, max_voxels=request.policy.max_voxels)
    for volume in combined.volumes:
        source = volume.source if volume.source.hidden else replace(volume.source, patient="")
        jobs.append(Job(source, out, *how[volume.dataset.name], volume.rescale, volume.table_grid, request.overwrite))
    return jobs


def plan(jobs: Sequence[Job], request: Request, rows: Rows | None = None) -> Plan:
    """Return which of the jobs have to be done; UsageError if the result would mix recipes, or scans of one id.

    `rows` are those that were read before; if another run wrote since, they are read again.
    """
    out, recipe, records = request.out, request.recipe, read_again(request.out, rows).records
    jobs, left_out = without_withdrawn(jobs, records)
    together = {str(folder) for entry in request.datasets for folder in entry.folders}
    known = {record.store for record in records}
    strays = {place for place in store_names(out) if place not in known}
    del known
    refuse_namesakes([job.source for job in jobs], records, out, strays, together, overwrite=request.overwrite)
    before, ids = {record.id: record for record in records}, {job.source.id for job in jobs}
    deep = deep_ids([job.source.id for job in jobs], before, strays)
    jobs = [replace(job, deep=True) if job.source.id in deep else job for job in jobs]
    others = [old for old in records if old.id not in ids]
    # Of this source, what is not there any more goes, if all of it was looked at. Withdrawn volumes stay known.
    is_partial = request.limit is not None or request.include or request.exclude or request.datasets
    roots = set() if is_partial else {job.source.root for job in jobs}
    refused = [
        old for old in others if not old.is_there and (old.code == PRUNED or (old.root and old.root not in roots))
    ]
    there = [replace(old, state=UNCHANGED) for old in others if old.is_there]
    # Where content counts, the worker hashes, and makes no store that is there.
    earlier = [] if request.check == "content" else [before, {r.id: r for r in read_records(out, INSPECTED)}]

    def done(job: Job) -> VolumeRecord | None:
        rows = (part.get(job.source.id) for part in earlier)
        return next(filter(None, (_unchanged(job, row, request.retry_failed) for row in rows)), None)

    found = _mapped(done, jobs)
    digests = _mapped(lambda record: _digest_of_store(out, record), there)
    kept = [(record, digest) for record, digest in zip(there, digests, strict=True) if digest]
    foreign = [record.id for record, digest in kept if digest != recipe.digest]
    if foreign:
        found_there = f"{len(foreign)} volumes of another recipe in {out.url} that are not among these inputs"
        remedy = f"{foreign[0]} first; use another folder, or prepare all of them again"
        raise UsageError(f"expected one recipe per folder, found {found_there}, {remedy}")
    todo = [job for job, record in zip(jobs, found, strict=True) if record is None]
    left = [before[job.source.id] for job in todo if job.source.id in before]
    finished = [*left_out, *(record for record in found if record)]
    done_ids = {record.id for record in finished}
    return Plan(todo, finished, [*(r for r, _ in kept), *(r for r in refused if r.id not in done_ids)], left)


def _mapped(do: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """Return what `do` makes of each item. From where it waits for files, threads do it: elsewhere they cost a fifth.

    Many items are a task: one takes more memory, and time, than a scan's record.
    """
    found, parts = list[Any](), iter([items[start : start + 64] for start in range(0, len(items), 64)])
    for part in parts:
        start_s, start_busy_s = time.perf_counter(), time.thread_time()
        found += map(do, part)
        if time.perf_counter() - start_s > 4 * (time.thread_time() - start_busy_s):
            break
    with ThreadPoolExecutor(16) as threads:
        return found + list(chain.from_iterable(threads.map(lambda part: [do(item) for item in part], parts)))


def _unchanged(job: Job, before: VolumeRecord | None, retry_failed: bool) -> VolumeRecord | None:
    """Return the record of a source that is as volumes.jsonl recorded it, by size and time.

    It has a finished store, or was refused under the same recipe and policy by the same version.
    """
    source = job.source
    if before is None or source.problem or (before.bytes_in, before.mtime_ns) != (source.bytes, source.mtime_ns):
        return None
    if before.state in (REFUSED, FAILED):
        reasons = {one.refusal_key() for one in (job, replace(job, grids="volume"))}  # more grids have more of them
        is_known = before.key in reasons and not (retry_failed or job.overwrite)
        now = replace(before, root=source.root, source=source.path, hidden=source.hidden, seconds=None)
        return now if is_known else None
    there = before.fingerprint and already_there(job, before.fingerprint, before)
    if not there:
        return None
    is_done = (before.state, before.seconds) == (UNCHANGED, None)
    same = before if is_done else replace(before, state=UNCHANGED, seconds=None)
    return same if same == there else there  # what is as before takes no memory of its own


def _digest_of_store(out: Location, record: VolumeRecord) -> str | None:
    """Return the digest of the recipe that a record's store was made by; None where the store is gone."""
    metadata = read_metadata(out, record.place)
    if metadata is None or metadata["sha256"] != record.store_sha256 or not is_whole(out, record.place, metadata):
        return None
    return recipe_digest(metadata)
