"""The whole of `photon-data inspect`: find scans -> read them -> what is wrong with each. No store is written."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import replace

from photon_data.files import append_row
from photon_data.lock import Hold, exclusive
from photon_data.prepare_file import Job
from photon_data.private import keep_key
from photon_data.readers.find import LABEL_MAP
from photon_data.readers.mask_pattern import usual_pattern
from photon_data.records import INSPECTED, READY, VolumeRecord, by_id, read_again, read_records
from photon_pipelines.cluster import Workers, prepared
from photon_pipelines.collection import without_withdrawn
from photon_pipelines.plan import Callback, Plan, gather
from photon_pipelines.request import Request


def inspect(
    request: Request, workers: Workers, callback: Callback | None = None
) -> tuple[list[VolumeRecord], Mapping[str, int], list[str]]:
    """Return the record of every scan, by id, the number of other files by suffix, and notes. No store is written.

    The state of a scan that would be prepared is "ready", of others "refused" or "failed". A folder OUT keeps what was
    found: what did not change since is not read again, and `prepare` knows what it would refuse. A scan that `prune`
    took away for good is not read.
    """
    callback = callback or Callback()
    gathered = gather(request, callback)
    jobs = [replace(job, write=False) for job in gathered.jobs]
    notes = []
    if LABEL_MAP in gathered.ignored and (found := usual_pattern([job.source for job in jobs])):
        notes.append(f"--masks '{found[0]}' would find the masks of {found[1]} of {len(jobs)} scans")
    if not request.out.is_local:
        callback.on_plan(Plan([*jobs], [], [], []), gathered.ignored)
        return by_id(_inspected(jobs, workers, None, callback)), gathered.ignored, notes
    with exclusive(request.out) as hold:
        if gathered.key and (note := keep_key(request.out, gathered.key)):
            callback.on_note(note)
        before = {row.id: row for row in read_records(request.out, INSPECTED)}
        jobs, left_out = without_withdrawn(jobs, read_again(request.out, gathered.rows).records)
        done = [row for job in jobs if (row := _inspected_before(job, before.get(job.source.id), request))]
        ids = {row.id for row in done}
        jobs = [job for job in jobs if job.source.id not in ids]
        callback.on_plan(Plan([*jobs], [*left_out, *done], [], []), gathered.ignored)
        try:
            done += _inspected(jobs, workers, hold, callback)
        finally:
            rows = before | {row.id: row for row in (*read_records(request.out, INSPECTED), *done)}
            request.out.write_rows(INSPECTED, (row.row() for row in by_id(rows.values())))
    return by_id([*left_out, *done]), gathered.ignored, notes


def _inspected(
    jobs: list[Job], workers: Workers, hold: Hold | None, callback: Callback
) -> Generator[VolumeRecord, None, None]:
    """Yield what is found of each scan, and add it to the journal of OUT."""
    keys = {job.source.id: job.refusal_key() for job in jobs}
    with closing(prepared(jobs, workers, hold)) as finished:
        for record in finished:
            record = replace(record, key=keys[record.id]) if record.state == READY else record
            if hold is not None:
                append_row(hold.out.place(INSPECTED), record.row())
            callback.on_record(record)
            yield record


def _inspected_before(job: Job, row: VolumeRecord | None, request: Request) -> VolumeRecord | None:
    """Return what an earlier inspection found, if the scan and all that decides about it are the same since."""
    source = job.source
    if row is None or (row.bytes_in, row.mtime_ns) != (source.bytes, source.mtime_ns) or source.problem:
        return None
    if row.key != job.refusal_key() or (row.state != READY and request.retry_failed):
        return None
    return replace(row, root=source.root, source=source.path, hidden=source.hidden)
