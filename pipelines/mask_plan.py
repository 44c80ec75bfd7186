"""`--masks PATTERN`: which mask files the scans of a run have, and which of them are to be read. Nothing is written."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from photon_data.errors import Refused, UsageError, unreadable
from photon_data.mask_store import FOLDER, read_rows
from photon_data.prepare_file import Job
from photon_data.prepare_masks import MaskJob, masks_there, prepare_masks
from photon_data.readers.mask_pattern import Folders, claimed_twice, common_words, masks_of, place_of
from photon_data.recipe import Policy
from photon_data.records import FAILED, REFUSED, VolumeRecord
from photon_data.scan import MaskFile, MaskPattern, Source, change_mark, names_below
from photon_pipelines.request import Request

NO_MASK = "no-mask"  # the code of a scan for which the pattern finds nothing


class FoundMasks(NamedTuple):
    """The mask files of one scan."""

    source: Source  # of them together, under the scan's id; `problem` says why there are none
    masks: tuple[MaskFile, ...]
    pattern: MaskPattern
    policy: Policy  # of the scan


def pattern_of(request: Request, source: Source) -> MaskPattern | None:
    """Return the pattern for a scan: that of the request, or of the first data set in whose folders it was found."""
    if not request.datasets:
        return request.masks
    of_root = (entry.masks for entry in request.datasets if Path(source.root) in entry.folders)
    return next((pattern for pattern in of_root if pattern), None)


def find_masks(request: Request, jobs: Iterable[Job]) -> dict[str, FoundMasks]:
    """Return {id: masks} of all scans that a pattern is for; UsageError for a pattern that finds nothing for any."""
    asked = [(job, pattern) for job in jobs if (pattern := pattern_of(request, job.source))]
    common = common_words(job.source for job, _ in asked if job.source.hidden)
    folders = Folders()
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(lambda pair: _found(pair[0], pair[1], common, folders), asked))
    fitting = {one.pattern.text for one in found if one.source.code != NO_MASK}
    for job, pattern in asked:
        if pattern.text not in fitting:
            where = f"; for {job.source.path} they would be {place_of(pattern, job.source)}" * (not job.source.hidden)
            raise UsageError(f"--masks {pattern.text}: expected masks of some scans, found none{where}")
    by_id = {one.source.id: one for one in found}
    places = {job.source.id: (place_of(pattern, job.source), by_id[job.source.id].masks) for job, pattern in asked}
    for id, file in claimed_twice(places):
        name = "one" if by_id[id].source.hidden else file.name
        problem = f"expected files of one scan, found {name}, which is of another one too; narrow --masks"
        refused = replace(by_id[id].source, problem=problem, code="mask-names")
        by_id[id] = by_id[id]._replace(source=refused)
    return by_id


def _found(job: Job, pattern: MaskPattern, common: set[str], folders: Folders) -> FoundMasks:
    source = job.source
    place, why, masks, facts = place_of(pattern, source), None, list[MaskFile](), []
    try:
        masks = masks_of(pattern, source, common, folders)
        for file in (file for mask in masks for file in mask.files):
            status = file.stat()
            facts.append((os.path.relpath(file, source.root), status.st_size, status.st_mtime_ns))
    except Refused as refused:
        why = refused
    except OSError as error:
        why = unreadable(Path(error.filename or place), error)
    if not masks and why is None:
        why = Refused(NO_MASK, f"expected masks by --masks {pattern.text}, found none; add them, or leave the scan out")
    names = names_below(source.root, (file for mask in masks for file in mask.files))
    size, mark, path = sum(size for _, size, _ in facts), change_mark(facts), os.path.relpath(place, source.root)
    made = Source(source.id, path, names, FOLDER, size, mark, root=source.root, hidden=source.hidden)
    made = replace(made, problem=why.message, code=why.code) if why else made
    return FoundMasks(made, tuple(masks), pattern, job.policy)


class MaskPlan(NamedTuple):
    """What a run will do about masks."""

    jobs: list[MaskJob]  # to execute
    done: list[VolumeRecord]  # of masks that are there already, or cannot be


def plan_masks(found: Mapping[str, FoundMasks], request: Request, volumes: Iterable[VolumeRecord]) -> MaskPlan:
    """Return which masks have to be made, of the volumes that are there."""
    before, jobs = {row.id: row for row in read_rows(request.out)}, []
    for volume in volumes:
        if volume.is_there and (one := found.get(volume.id)):
            files, how = (one.source, one.masks, one.pattern.labels), (request.recipe, one.policy)
            jobs.append(MaskJob(*files, volume, request.out.at(""), *how, request.overwrite))
    known = {} if request.check == "content" else before  # the worker hashes, and makes no masks that are there
    with ThreadPoolExecutor(16) as threads:
        rows = list(threads.map(lambda job: _done(job, known.get(job.source.id), request.retry_failed), jobs))
    todo = [job for job, row in zip(jobs, rows, strict=True) if row is None]
    return MaskPlan(todo, [row for row in rows if row])


def _done(job: MaskJob, before: VolumeRecord | None, retry_failed: bool) -> VolumeRecord | None:
    """Return the record of masks that need no reading: their files and their volume are as masks.jsonl has them."""
    if job.source.problem:
        return prepare_masks(job)
    if before is None or (before.bytes_in, before.mtime_ns) != (job.source.bytes, job.source.mtime_ns):
        return None
    if before.state in (REFUSED, FAILED):
        is_known = before.key == job.refusal_key() and not (retry_failed or job.overwrite)
        return replace(before, seconds=None) if is_known else None
    return masks_there(job, before.fingerprint) if before.fingerprint else None
