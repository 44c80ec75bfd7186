"""The content of a scan's files as one short text: same bytes, same fingerprint, wherever they lie.

One file, start to end: source -> record. A plain function that gives the same bytes whatever runs it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from photon_data.errors import Refused, unforeseen
from photon_data.files import Location
from photon_data.prepare import Rescale, prepare_volume
from photon_data.readers import open_scan
from photon_data.readers.nifti import BLANK
from photon_data.recipe import ALGORITHM, Recipe
from photon_data.records import FAILED, PREPARED, READY, REFUSED, UNCHANGED, VolumeRecord
from photon_data.scan import MAX_VOXELS, Scan, Source, TableGrid
from photon_data.store import is_whole, read_metadata, store_name, write_store


def fingerprint(files: Sequence[Path]) -> str:
    """Return "sha256:<64 hex>" of the content of the files, in their order; names and dates do not count.

    One file gives the hash that `sha256sum` prints. Several give the hash of their (size, sha256) pairs, so that bytes moved
    from the end of one file to the start of the next show. OSError for a file that cannot be read.
    """
    digests = [_digest(file) for file in files]
    if len(digests) == 1:
        return f"sha256:{digests[0][1]}"
    listing = "".join(f"{size} {digest}\n" for size, digest in digests)
    return f"sha256:{hashlib.sha256(listing.encode()).hexdigest()}"


def _digest(path: Path) -> tuple[int, str]:
    with path.open("rb", buffering=0) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest


NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class NoSpace(OSError):
    """The output is full: nothing more can be prepared, and this says so to the whole run."""


@dataclass(frozen=True)
class Job:
    """All that decides what becomes of one source.

    `rescale` and `stated` are what somebody other than the header says of its values and of its grid.
    `overwrite` prepares it even if its store is there; without `write` everything is done but the writing ("ready").
    """

    source: Source
    out: str
    recipe: Recipe
    rescale: Rescale | None = None
    stated: TableGrid | None = None
    max_voxels: int = MAX_VOXELS
    overwrite: bool = False
    write: bool = True

    def to_json(self) -> dict[str, Any]:
        """Return the plain dict that `from_json` reads back."""
        data = asdict(self)
        data["source"]["files"] = [str(file) for file in self.source.files]
        data["stated"] = self.stated and self.stated.to_json()
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Job:
        """Return the Job that `to_json` wrote."""
        source = Source(**{**data["source"], "files": tuple(Path(f) for f in data["source"]["files"])})
        rescale = Rescale(*data["rescale"]) if data["rescale"] else None
        stated = TableGrid.from_json(data["stated"]) if data["stated"] else None
        recipe = Recipe.from_json(data["recipe"])
        return cls(**{**data, "source": source, "recipe": recipe, "rescale": rescale, "stated": stated})

    def key(self, content: str) -> str:
        """Return the hash of all that decides the store's bytes: the source's fingerprint, recipe, what others say, algorithm."""
        parts = [content, self.recipe.digest, self.rescale, ALGORITHM, *([self.stated.to_json()] if self.stated else [])]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def record(self, state: str, **more: Any) -> VolumeRecord:
        """Return a record of this job's source in the given state."""
        source = self.source
        return VolumeRecord(source.id, source.path, state, source.bytes, source.mtime_ns, **more)


def run(job: Job) -> VolumeRecord:
    """Return the record of the source, whose store is then there unless it was refused or failed; NoSpace if the disk is full."""
    start = time.perf_counter()
    try:
        record = _prepare(job)
    except Refused as refusal:
        record = job.record(REFUSED, code=refusal.code, reason=_without_name(refusal.message, job.source))
    except OSError as error:
        if error.errno in NO_SPACE:
            raise NoSpace(error.errno, f"no space left for {job.out}; free some and run the same command again") from None
        record = job.record(FAILED, code=type(error).__name__, reason=f"{error.strerror or 'input/output error'}")
    except Exception as error:  # the edge of a work item: whatever it was costs this file only, and is recorded
        record = job.record(FAILED, code=type(error).__name__, reason=unforeseen(error))
    return replace(record, seconds=round(time.perf_counter() - start, 3))


def _without_name(message: str, source: Source) -> str:
    """Return a message without the file's name at its start: a record names its source already. A folder has no file."""
    return message.removeprefix(f"{source.files[0].name}: ") if source.files else message


def _prepare(job: Job) -> VolumeRecord:
    if job.source.problem:
        raise Refused(job.source.code, job.source.problem)
    content = fingerprint(job.source.files)
    done = already_there(job, content)
    if done:
        return done
    prepared = prepare_volume(opened(job), job.recipe, job.rescale)
    if not job.write:
        return job.record(READY, fingerprint=content, facts=prepared.facts)
    key, name = job.key(content), store_name(job.source.id)
    identity = {
        "id": job.source.id,
        "key": key,
        "fingerprint": content,
        "recipe": job.recipe.to_json(),
        "digest": job.recipe.digest,
    }
    written = write_store(prepared, Location(job.out), name, identity)
    return job.record(
        PREPARED,
        fingerprint=content,
        key=key,
        store=name,
        store_bytes=written["bytes"],
        store_sha256=written["sha256"],
        facts=prepared.facts,
    )


def opened(job: Job) -> Scan:
    """Return the job's scan, its header read and found sound, on the grid that is stated for it; Refused where it has none."""
    affine = BLANK if job.stated and job.stated.replaces_header else job.recipe.nifti_affine
    scan = open_scan(job.source, nifti_affine=affine, max_voxels=job.max_voxels)
    return replace(scan, geometry=job.stated.reconcile(scan.geometry)) if job.stated else scan


def already_there(job: Job, content: str) -> VolumeRecord | None:
    """Return the record of a store that was made from just this content and recipe, None if there is none."""
    if job.overwrite or not job.write:
        return None
    out, name = Location(job.out), store_name(job.source.id)
    metadata = read_metadata(out, name)
    if metadata is None or metadata.get("key") != job.key(content) or not is_whole(out, name, metadata):
        return None
    return job.record(
        UNCHANGED,
        fingerprint=content,
        key=metadata["key"],
        store=name,
        store_bytes=metadata["bytes"],
        store_sha256=metadata["sha256"],
        facts=metadata["facts"],
    )
