"""The whole of `photon-data prepare`: find scans -> plan -> run the jobs -> write rows -> report. And of `prune`.

Whatever it leaves is complete; run it again and it goes on.
"""

from __future__ import annotations

import hashlib
import json
import platform
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

from photon_data.dataset_lock import differences, lock_lines, lock_of, salt_of
from photon_data.errors import UsageError
from photon_data.files import Location, digest_of
from photon_data.json_text import from_json
from photon_data.lock import Hold, exclusive
from photon_data.mask_store import FOLDER as MASK_STORES
from photon_data.mask_store import ROWS as MASK_ROWS
from photon_data.mask_store import forget, id_at, read_rows, write_rows
from photon_data.private import keep_key, save_names
from photon_data.questions.kept import (
    collect,
    content_digests,
    digests_of_all,
    keep_questions,
    kept_questions,
    question_digests,
    row_ids,
)
from photon_data.questions.manifest import Manifests, Unmatched, build, write
from photon_data.questions.question import UNKNOWN, Question
from photon_data.questions.splits import count, leaks, refuse_leaks
from photon_data.readers.object_path import source_path
from photon_data.recipe import Recipe
from photon_data.records import (
    DATASET,
    DATASET_DIGEST,
    INSPECTED,
    LOCK,
    PRUNED,
    REFUSED,
    VOLUMES,
    VolumeRecord,
    append_record,
    by_id,
    read_records,
    store_names,
    write_records,
)
from photon_data.report import NO_PICTURE, render_report
from photon_data.scan import place_name
from photon_data.store import open_volume
from photon_pipelines.cluster import Workers, prepared
from photon_pipelines.collection import Result, count_states
from photon_pipelines.mask_plan import MaskPlan, find_masks, plan_masks
from photon_pipelines.plan import Callback, Plan, gather, plan
from photon_pipelines.request import Request, grids_of, notes_of_grids, paths_of
from photon_pipelines.unpack import pending, unpack_all

REPORT, COUNTS = "report.html", "questions.json"
# Rows are appended to volumes.jsonl as scans end. In an object store it is written anew about this often instead: a run
# that is killed there has to read refused files of this span again.
SNAPSHOT_S = 30
LIBRARIES = ("photon-ct", "numpy", "SimpleITK", "nibabel", "zarr", "numcodecs", "isal", "dask")


def prepare(request: Request, workers: Workers, callback: Callback | None = None) -> Result:
    """Do what is requested and return what came of it. NoSpace, Stopped and KeyboardInterrupt leave what is done.

    UsageError before any store is written: tables are checked before the first scan is read, and only one run at a time
    may write into a folder.
    """
    callback, out = callback or Callback(), request.out
    damaged: Sequence[str] = []
    if request.datasets:
        damaged = unpack_all(pending(request.datasets, request.limit), out, callback.on_archive, callback.on_note)
    gathered = gather(request, callback)
    hidden = any(job.source.hidden for job in gathered.jobs)
    found = find_masks(request, gathered.jobs) if request.with_masks else {}
    for note in gathered.notes:
        callback.on_note(note)
    with exclusive(out) as hold:
        todo = plan(gathered.jobs, request, gathered.rows)
        questions = collect(gathered.questions, gathered.jobs, out, gathered.rows, allow_leaks=request.allow_leaks)
        gathered = gathered._replace(rows=None)
        gathered.jobs.clear()  # those to do are in the plan, until they are done
        if gathered.key and (note := keep_key(out, gathered.key)):
            callback.on_note(note)
        callback.on_plan(todo, gathered.ignored)
        for note in notes_of_grids(todo.before, todo.done, request):
            callback.on_note(note)
        _write_dataset(request, todo.done, todo.kept, manifests=None, hidden=hidden)
        there = question_digests(out)
        for name, asked in questions.items():
            if name in gathered.questions or name not in there:
                keep_questions(out, name, asked)
        records = _run(todo, hold, workers, callback)
        masks = _run_masks(plan_masks(found, request, records), hold, workers, callback) if found else []
        result = finish(request, records, todo.kept, questions, gathered.unmatched)
        return result._replace(damaged=damaged, masks=masks)


def finish(
    request: Request,
    records: list[VolumeRecord],
    kept: list[VolumeRecord],
    questions: Mapping[str, Sequence[Question]],
    unmatched: Sequence[Unmatched] = (),
) -> Result:
    """Write all that is made from records and questions: manifests, dataset.json, report, counts."""
    out, rows = request.out, by_id([*records, *kept])
    hidden = any(record.hidden for record in rows)
    versions = _versions()
    report = _write_report(request, rows, versions, hidden=hidden)
    manifests, left, leak = _write_manifests(request, questions, unmatched, rows)
    counts = count(row for split in manifests.rows.values() for row in split)
    _write_json(out, COUNTS, [asdict(found) for found in counts])
    salt = request.lock["salt"] if request.lock else salt_of(out) or secrets.token_hex(16)
    lock = lock_of(rows, content_digests(questions), request.recipe, grids_of(request), versions, salt)
    out.write(LOCK, lock_lines(lock))
    _write_dataset(request, records, kept, digests_of_all(out), hidden=hidden, report=report)
    found = list(differences(request.lock, lock, rows)) if request.lock else []
    return Result(records, kept, manifests, counts, found, left, leak, damaged=())


def _write_report(
    request: Request, rows: list[VolumeRecord], versions: Mapping[str, str], *, hidden: bool
) -> dict[str, str]:
    """Write the report, unless the one that is there was made from the same; return what dataset.json says of it.

    A page on which a picture is missing is always made again.
    """
    out, there = request.out, {record.id for record in rows if record.is_there}
    masks = [row for row in read_rows(out) if row.id in there] if out.exists(MASK_ROWS) else []
    title, source = out.at("").rstrip("/").rpartition("/")[2], "" if hidden else request.source.name
    made_from = hashlib.sha256(repr([request.recipe, request.pictures, title, source, versions]).encode())
    for row in (*rows, *masks):
        made_from.update(row.mark())
    known, page = _report_before(out), out.read(REPORT) or b""
    if known.get("made_from") == made_from.hexdigest() and known.get("sha256") == hashlib.sha256(page).hexdigest():
        return known
    page = render_report(
        rows,
        recipe=request.recipe,
        open_volume=lambda record: open_volume(out.at(record.place), "model", id=record.id),
        pictures=request.pictures,
        title=title,
        source=source,
        tools=versions,
        masks=masks,
    )
    out.write(REPORT, page)
    whole = NO_PICTURE.encode() not in page
    return {"made_from": made_from.hexdigest(), "sha256": hashlib.sha256(page).hexdigest()} if whole else {}


def _report_before(out: Location) -> dict[str, str]:
    """Return what dataset.json says of the report that was written last; {} where it says nothing."""
    try:
        return dict(from_json(out.read(DATASET) or b"")["report"])
    except (ValueError, KeyError, TypeError):
        return {}


def prune(out: Location, going: Iterable[str], *, for_good: bool) -> Result:
    """Take volumes away, with their rows and questions, and write manifests and report anew.

    With `for_good` their rows stay and say so: prepare leaves such scans out from then on, under any name.
    """
    with exclusive(out):
        ids, records, request = set(going), read_records(out), _request_of(out)
        questions = kept_questions(out)
        hidden = any(record.hidden for record in records)
        _write_dataset(request, [], records, manifests=None, hidden=hidden)  # what it records is about to change
        for name, own in questions.items():
            questions[name] = [question for question in own if question.volume not in ids]
            keep_questions(out, name, questions[name])
        rows = [_pruned(r) if r.id in ids else r for r in records if r.id not in ids or for_good]
        write_records(out, rows)
        if out.exists(INSPECTED):
            inspected = read_records(out, INSPECTED)
            out.write_rows(INSPECTED, (record.row() for record in inspected if record.id not in ids))
        if hidden and not any(record.hidden for record in rows):
            save_names(out, ())  # write_records has nobody to name
        forget(out, ids)
        for place in store_names(out):
            if id_at(place) in ids:
                out.remove(place)
        return finish(request, [], rows, questions)


def _request_of(out: Location) -> Request:
    """Return what is known of a prepared folder as a request; UsageError where dataset.json is gone or damaged."""
    try:
        dataset = from_json(out.read(DATASET) or b"")
        return Request(source_path(dataset["source"] or ""), out, Recipe.from_json(dataset["recipe"]), allow_leaks=True)
    except (ValueError, KeyError, TypeError, AttributeError):
        expected = f"a {DATASET} with the recipe of {out.url}"
        raise UsageError(f"expected {expected}, found none that can be read; run prepare again") from None


def _pruned(record: VolumeRecord) -> VolumeRecord:
    reason = f"taken away by prune; remove its line from {VOLUMES} to prepare it again"
    measured = ("key", "store", "store_bytes", "store_sha256", "facts", "seconds")
    nothing: dict[str, Any] = dict.fromkeys(measured)
    return replace(record, state=REFUSED, code=PRUNED, reason=reason, **nothing)


def _write_dataset(
    request: Request,
    records: Sequence[VolumeRecord],
    kept: Sequence[VolumeRecord],
    manifests: dict[str, str] | None,
    *,
    hidden: bool,
    report: Mapping[str, str] | None = None,
) -> None:
    """Write dataset.json; `manifests` are {name: SHA-256}, None while the run is not finished.

    `report` says what the report was made from; None leaves what was there.
    """
    files = None
    if manifests is not None:  # else they are those of the run before
        files = {name: request.out.sha256(name) for name in (REPORT, COUNTS, LOCK)}
    dataset = {
        "format": 1,
        "source": None if hidden or not request.source.name else place_name(request.source),
        "recipe": request.recipe.to_json(),
        "digest": request.recipe.digest,
        "paths": paths_of(request),
        "grids": grids_of(request),
        "versions": _versions(),
        "counts": {**count_states(records), "kept": len(kept)},
        "manifests": manifests,
        "files": files,
        "report": dict(_report_before(request.out) if report is None else report),
    }
    _write_json(request.out, DATASET, {**dataset, DATASET_DIGEST: digest_of(dataset, DATASET_DIGEST)})


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}


def _write_json(out: Location, name: str, content: Any) -> None:
    out.write(name, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode(errors="backslashreplace"))


def _run(todo: Plan, hold: Hold, workers: Workers, callback: Callback) -> list[VolumeRecord]:
    """Run the jobs of a plan, which are used up, and return the records of all inputs, those done before first.

    volumes.jsonl is kept up to date, also when the run is stopped, interrupted or killed: it has the records of what is
    done, and of the rest what earlier runs left.
    """
    out = hold.out
    _remove_partial(out)
    records = list(todo.done)

    def write_snapshot() -> None:
        rows = {record.id: record for record in [*todo.before, *todo.kept, *records]}
        write_records(out, by_id(rows.values()))

    due_s = time.monotonic() + SNAPSHOT_S
    try:
        with closing(prepared(todo.jobs, workers, hold)) as finished:
            for record in finished:
                hold.check()
                records.append(record)
                if out.is_local:
                    append_record(out, record)
                elif (start_s := time.monotonic()) >= due_s:
                    write_snapshot()
                    end_s = time.monotonic()
                    due_s = end_s + max(SNAPSHOT_S, 20 * (end_s - start_s))  # more rarely where writing takes long
                callback.on_record(record)
    finally:
        if not hold.is_lost:
            write_snapshot()
    hold.check()
    _remove_partial(out)
    return records


def _remove_partial(out: Location) -> None:
    """Remove what killed runs, and workers that were lost, left half-written. Nobody is writing."""
    flat = [*(f"manifests/{name}" for name in out.names("manifests")), *out.names("")]
    for place in [*store_names(out), *store_names(out, MASK_STORES), *flat]:
        name = place.rpartition("/")[2]
        if name.startswith(".") and name.endswith(".partial"):
            out.remove(place)


def _run_masks(todo: MaskPlan, hold: Hold, workers: Workers, callback: Callback) -> list[VolumeRecord]:
    """Make the masks of a plan and return what became of all of them; masks.jsonl has them, also of a stopped run."""
    rows, jobs = list(todo.done), [*todo.jobs]
    total = len(jobs) + len(rows)
    for row in rows:
        callback.on_masks(row, total)
    try:
        with closing(prepared(jobs, workers, hold)) as finished:
            for row in finished:
                hold.check()
                rows.append(row)
                callback.on_masks(row, total)
    finally:
        if not hold.is_lost:
            write_rows(hold.out, [*read_rows(hold.out), *rows])
    return rows


def _write_manifests(
    request: Request,
    questions: Mapping[str, Sequence[Question]],
    unmatched: Sequence[Unmatched],
    rows: list[VolumeRecord],
) -> tuple[Manifests, list[str], str | None]:
    """Write the manifests; return them, ids of rows that are no more, and what leaks between splits, unless allowed.

    Splits that leak in their content get no manifests, and old ones go: nobody trains on them by mistake.
    """
    out, paths = request.out.at(""), paths_of(request)
    asked = [q for part in questions.values() for q in part if not q.volume.startswith(UNKNOWN)]
    everything = asked if questions else None  # without any, each volume has a row
    instruction = request.recipe.instruction
    manifests = build(everything, rows, out=out, instruction=instruction, paths=paths, by_id=True)
    manifests = manifests._replace(unmatched=sorted([*manifests.unmatched, *unmatched]))
    leak = None
    if not request.allow_leaks and len(manifests.rows) > 1:
        try:
            fingerprints = {record.id: record.fingerprint for record in rows}
            refuse_leaks(leaks((row for split in manifests.rows.values() for row in split), fingerprints))
        except UsageError as error:
            leak, manifests = str(error), manifests._replace(rows={})
    ids = {row["id"] for split in manifests.rows.values() for row in split}
    left = sorted({id_ for id_ in row_ids(request.out) if id_ not in ids})
    del ids
    write(manifests, out)
    return manifests, left, leak
