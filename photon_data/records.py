"""volumes.jsonl: one row for every input, what became of it; where its store lies."""

from __future__ import annotations

import hashlib
import json
import re
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from sys import intern
from typing import Any, NamedTuple, Protocol, TypeVar

from photon_data.errors import Refused, UsageError, is_out_of_memory, unforeseen
from photon_data.files import NO_SPACE, Location, append_row, digest_of, refuse_unsafe
from photon_data.json_text import fields_of, from_json
from photon_data.private import append_name, read_names, save_names, without_names
from photon_data.scan import Source

VOLUMES, DATASET, LOCK = "volumes.jsonl", "dataset.json", "dataset.lock"
INSPECTED = "inspected.jsonl"  # what `inspect` found of scans; `prepare` does not read again what it would refuse
SUFFIX = ".ome.zarr"  # of stores
STORES, MASKS = "volumes", "masks"  # their folders
# From so many volumes on, new stores are laid into 256 folders: file systems slow down with the names in one.
MANY, SHELF = 100_000, re.compile("[0-9a-f]{2}")
# Every input ends in exactly one of these.
PREPARED, UNCHANGED, REFUSED, FAILED = "prepared", "unchanged", "refused", "failed"
STATES = (PREPARED, UNCHANGED, REFUSED, FAILED)
# The code of a refusal by a person: prune took the volume away, and prepare leaves it out.
PRUNED = "pruned"
# An inspection writes nothing: what would be prepared is "ready".
READY = "ready"
# Keys of replies that are no record: of a child that found the output full, of one that died over its job, and of a
# machine that can run no child. An exception instead would put the job, and names in it, into the log of a Dask worker.
OUT_FULL, DIED, UNABLE = "no space", "died", "unable"
# Refusals that the next run may not meet again, and failures that it will.
PASSING, LASTING = ("unreadable", "dicom-extra-missing"), ("timeout", "crashed")
# Of a row of volumes.jsonl, and of dataset.json: the `digest_of` what else it says. Earlier versions did not write it.
ROW_DIGEST, DATASET_DIGEST = "row_sha256", "sha256"


def store_name(volume_id: str, deep: bool = False, folder: str = STORES) -> str:
    """Return where the store of a volume lies below the output folder; UsageError for an id that cannot name a file.

    volumes/ID.ome.zarr, or deep: volumes/ab/ID.ome.zarr, where ab are the first digits of the SHA-256 of the id. Where
    a volume lies that is there, its row says: see `VolumeRecord.place`.
    """
    if not volume_id or volume_id.startswith("."):
        raise UsageError(f"expected an id that begins with a letter or a digit, found {volume_id[:80]!r}; rename it")
    name = refuse_unsafe(volume_id + SUFFIX, "an id")
    return f"{folder}/{hashlib.sha256(volume_id.encode()).hexdigest()[:2]}/{name}" if deep else f"{folder}/{name}"


def places_of(volume_id: str, folder: str = STORES) -> list[str]:
    """Return the two places where a store of that id can lie."""
    return [store_name(volume_id, deep, folder) for deep in (False, True)]


def store_names(out: Location, folder: str = STORES) -> list[str]:
    """Return the places of all that lies in a folder of stores, flat or deep, whatever it is."""
    found = list[str]()
    for name in out.names(folder):
        place = f"{folder}/{name}"
        found += [f"{place}/{one}" for one in out.names(place)] if SHELF.fullmatch(name) else [place]
    return found


# What the facts of most scans have in common, as JSON: what is packed refers to it. It is nowhere on a disk.
_FACTS = (
    b'{"format": "dicom", "format": "nifti", "dtype": "int16", "slope": 1.0, "intercept": -1024.0, "intercept": 0.0, '
    b'"rescale": "header", "geometry": {"shape_zyx": [512, 512], "origin_lps": [-, "steps_lps": [[0.0, 0.0, 1.0], '
    b'[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]], "spacing_zyx_mm": [1.0, 1.0, 1.0], "orientation_zyx": "SPL"}, "grid": {'
    b'"shape_zyx": [, "grid_to_native_zyx": [[, 0.0, 0.0, [0.0, [0.0, 0.0, 0.0, 1.0]], "native_to_grid_zyx": [[, '
    b'[0.0, 0.0, 0.0, 1.0]], "cut_mm": {"x": [0.0, 0.0], "y": [0.0, 0.0], "z": [0.0, 0.0]}, "pad_mm": {"x": [0.0, '
    b'0.0], "y": [0.0, 0.0], "z": [0.0, 0.0]}, "padding_voxels": 0, "hu_before": {"min": -1024.0, "max": 3071.0, '
    b'"mean": -, "p01": -1024.0, "p50": -, "p99": 1000.0, "non_finite": 0, "histogram": [0, 0, 0, 0, ]}, "hu_after": '
    b'{"min": -1000.0, "max": 1000.0, "mean": -, "p01": -1000.0, "p50": -1000.0, "p99": , "non_finite": 0}}'
)


_encode = json.JSONEncoder(check_circular=False).encode  # facts hold no circles; looking for them takes time


class Facts(Mapping[str, Any]):
    """What was measured of one scan, read only: 0.7 kB, where the dicts of 50,000 scans would take half a gigabyte."""

    __slots__ = ("_packed",)

    def __init__(self, facts: Mapping[str, Any]) -> None:
        pack = zlib.compressobj(1, zdict=_FACTS)
        self._packed = pack.compress(_encode(dict(facts)).encode()) + pack.flush()

    @property
    def packed(self) -> bytes:
        """All of it, compressed."""
        return self._packed

    def __getitem__(self, key: str) -> Any:
        return _unpacked(self._packed)[key]

    def __iter__(self) -> Iterator[str]:
        return iter(_unpacked(self._packed))

    def __len__(self) -> int:
        return len(_unpacked(self._packed))

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value, or another where there is none: unpacked once, where Mapping's own way asks and catches."""
        return _unpacked(self._packed).get(key, default)

    def __eq__(self, other: object) -> bool:
        """Tell whether two say the same; Mapping's own way looks up every key of both."""
        if isinstance(other, Facts):
            return self._packed == other._packed or _unpacked(self._packed) == _unpacked(other._packed)
        return _unpacked(self._packed) == other

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return Facts, (dict(self),)


@lru_cache(8)  # one scan's facts are looked at together
def _unpacked(packed: bytes) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(zlib.decompressobj(zdict=_FACTS).decompress(packed))
    return facts


@dataclass(frozen=True, slots=True)
class VolumeRecord:
    """What became of one input; `record.row()` is its row. A run holds one for every scan: see benchmarks/scale.py.

    `facts` are what was measured on the way, as stored in the store too:
    format, dtype, slope, intercept, rescale ("header" | "stored" | "table" | "metadata")
    policy                {"nifti_affine": ...}: the choices of the policy that mattered; no such key where none did
    changes               [{"code", "before", "after"}]: what was repaired, accepted or overridden; no key where nothing
    override              the row of the table of overrides, {column: cell}; no such key without one
    slices                of a repaired series: their positions along the normal and the usual distance in mm, gaps
                          [from, to, slices missing], step of the grid, voxels of the target grid in gaps
    geometry, grid        Geometry.to_json() of the native grid and of the target grid
    uncropped             Geometry.to_json() of the whole file, where an override cropped it
    cut_mm, pad_mm        {"x": [low, high], "y": ..., "z": ...} mm of the scan outside of the grid, and the other way
                          round, at the low and the high end of each world axis (L, P, S grow)
    full_grid             Geometry.to_json() of the whole field; only with --grids full
    padding_voxels        how many voxels were padding, declared or below air, and became air
    undeclared_padding_hu the value of padding below air that no header declares; no such key without
    body_mm               {"x": [low, high], ...} around the body, LPS; only with the recipe's centre=body
    hu_before, hu_after   {"min", "max", "mean", "p01", "p50", "p99", "non_finite"}; hu_before also "histogram": counts
                          in 64 equal bins over [-1100, 1100]
    """

    id: str
    source: str  # path relative to the source folder
    state: str
    bytes_in: int  # of the source's files together
    mtime_ns: int  # of its file; of several, a number that changes with the name, size or time of any
    fingerprint: str | None = None  # "sha256:..." of the content of its files
    key: str | None = None  # the resume key: a hash of what the store was made from, or of what was refused
    code: str | None = None  # why it was refused or failed: a slug to group by, and a sentence
    reason: str | None = None
    accept: str | None = None  # what --accept takes to let it pass; "CODE=?" where a person has to choose
    store: str | None = None
    store_bytes: int | None = None
    store_sha256: str | None = None  # of the store's root metadata, which record every other file of it
    arrays_sha256: str | None = None  # of those records alone: it does not depend on the id
    model_sha256: str | None = None  # of the model grid alone: it does not depend on --grids
    facts: Mapping[str, Any] | None = None
    seconds: float | None = None  # wall time of the work; None where it was done by an earlier run
    root: str | None = None  # the source folder; None in rows of versions that did not record it
    patient: str | None = None  # a keyed hash of the patient's ID, of DICOM
    hidden: bool = False  # source and root may be a patient's name: they are in the private file, not in the row

    def __post_init__(self) -> None:
        """Pack what was measured; what many records have in common is held once."""
        if self.facts is not None and not isinstance(self.facts, Facts):
            object.__setattr__(self, "facts", Facts(self.facts))
        for name in ("state", "code", "root"):
            if type(value := getattr(self, name)) is str:
                object.__setattr__(self, name, intern(value))

    @property
    def is_there(self) -> bool:
        """Whether the volume's store exists: it was prepared, now or earlier."""
        return self.state in (PREPARED, UNCHANGED)

    def mark(self) -> bytes:
        """Return what changes when anything that the record says does."""
        said = [getattr(self, name) for name in FIELDS if name != "facts"]
        return repr(said).encode("utf-8", "backslashreplace") + (self.facts.packed if self.facts else b"")  # type: ignore[attr-defined]

    @property
    def place(self) -> str:
        """Where its store lies below the output folder, or would."""
        return self.store or store_name(self.id)

    @property
    def is_deep(self) -> bool:
        """Whether its store lies in one of 256 folders."""
        return self.place.count("/") > 1

    @property
    def name(self) -> str:
        """What people may be shown: the source's path, or the id where that is hidden."""
        return self.id if self.hidden else self.source

    def row(self) -> dict[str, Any]:
        """Return the row of volumes.jsonl, without what is hidden, with its own digest."""
        row = self.to_json() | ({"source": "", "root": None} if self.hidden else {})
        row[ROW_DIGEST] = digest_of(row, ROW_DIGEST)
        return row

    def to_json(self) -> dict[str, Any]:
        """Return the plain dict that `from_json` reads back, with what is hidden."""
        data = {name: getattr(self, name) for name in FIELDS}
        data["facts"] = None if self.facts is None else {**_unpacked(self.facts.packed)}  # type: ignore[attr-defined]
        return data

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> VolumeRecord:
        """Return the record of a row; keys of newer versions are ignored. ValueError for what no row of ours holds.

        Rows come from elsewhere too, and files are named after them: an id can name one, and a store has that name.
        """
        record = cls(**fields_of(cls, row))
        if record.state not in (*STATES, READY):
            raise ValueError(f"expected a state of {', '.join(STATES)}, found {record.state!r:.80}")
        own = store_name(record.id)  # an id that can name no file is an error
        if record.store in (None, own):
            return record
        if record.store not in (store_name(record.id, True), *places_of(record.id, MASKS)):
            raise ValueError(f"expected {own} as the store of {record.id}, found {record.store!r:.80}")
        return record


FIELDS = tuple(field.name for field in fields(VolumeRecord))


class _Packed:
    """A field of VolumeRecord that takes and gives a SHA-256 as text, with "sha256:" or without, and holds its bytes.

    It stands before the member that `slots` made, which holds any other value as it is. A run holds five of these for
    every scan, and the text takes 48 bytes more.
    """

    TEXT = re.compile("(sha256:)?([0-9a-f]{64})")

    def __init__(self, held: Any) -> None:
        self.held = held

    def __get__(self, record: VolumeRecord | None, owner: type | None = None) -> Any:
        value = self.held.__get__(record, owner)
        if type(value) is not bytes:
            return value
        return ("sha256:" if value[:-32] else "") + value[-32:].hex()

    def __set__(self, record: VolumeRecord, value: Any) -> None:
        if type(value) is str and (match := self.TEXT.fullmatch(value)):
            value = (b":" if match[1] else b"") + bytes.fromhex(match[2])
        self.held.__set__(record, value)


for _name in ("fingerprint", "key", "store_sha256", "arrays_sha256", "model_sha256"):
    setattr(VolumeRecord, _name, _Packed(getattr(VolumeRecord, _name)))


class NoSpace(OSError):
    """The output is full: nothing more can be prepared, and this says so to the whole run."""


class Work(Protocol):
    """What a worker does with one source: a scan, or the masks of one."""

    @property
    def source(self) -> Source: ...  # noqa: D102
    @property
    def out(self) -> str: ...  # noqa: D102
    def refusal_key(self) -> str: ...  # noqa: D102
    def to_json(self) -> dict[str, Any]: ...  # noqa: D102


SomeWork = TypeVar("SomeWork", bound=Work)


def record_of(work: Work, state: str, **more: Any) -> VolumeRecord:
    """Return a record of the work's source in the given state, without hidden names."""
    source = work.source
    is_lasting = more["code"] not in PASSING if state == REFUSED else state == FAILED and more["code"] in LASTING
    if is_lasting and not source.problem:
        more["key"] = work.refusal_key()
    if source.hidden and more.get("reason"):
        more["reason"] = without_names(more["reason"], source.files)
    more |= {"root": source.root or None, "patient": source.patient or None, "hidden": source.hidden}
    return VolumeRecord(source.id, source.path, state, source.bytes, source.mtime_ns, **more)


def recorded(work: SomeWork, do: Callable[[SomeWork], VolumeRecord]) -> VolumeRecord:
    """Return the record that `do` makes of the work, or that of its refusal or failure; NoSpace if the disk is full."""
    start_s = time.perf_counter()
    try:
        record = do(work)
    except Refused as refused:
        # The record has the file's name already. An unreadable folder has no files.
        name = f"{work.source.files[0].name}: " if work.source.names else ""
        reason = refused.message.removeprefix(name)
        record = record_of(work, REFUSED, code=refused.code, reason=reason, accept=refused.accept or None)
    except Exception as error:  # the edge of a work item: whatever it was costs this file only, and is recorded
        record = _failed(work, error)
    return replace(record, seconds=round(time.perf_counter() - start_s, 3))


def _failed(work: Work, error: Exception) -> VolumeRecord:
    """Return the record of work that ended with an error; NoSpace where the disk is full."""
    if is_out_of_memory(error):
        expected = "expected that a worker's memory suffices, found none left"
        return record_of(
            work, FAILED, code="memory", reason=f"{expected}; allow more with --memory, or fewer --workers"
        )
    if not isinstance(error, OSError):
        return record_of(work, FAILED, code=type(error).__name__, reason=unforeseen(error))
    if error.errno in NO_SPACE:
        message = f"no space left for {work.out}; free some and run the same command again"
        raise NoSpace(error.errno, message) from None
    return record_of(work, FAILED, code=type(error).__name__, reason=error.strerror or "input/output error")


def read_records(out: Location, file: str = VOLUMES) -> list[VolumeRecord]:
    """Return what volumes.jsonl, or inspected.jsonl, says, none if there is no such file; UsageError if it is damaged.

    While a run goes on, rows are appended: the last one of an id counts, and half a row at the end is none.
    """
    records: dict[str, VolumeRecord] = {}
    place = ""
    try:
        for number, row in enumerate(out.rows(file, may_be_cut=file == INSPECTED or is_unfinished(out)), 1):
            place = f"row {number}: "
            record = VolumeRecord.from_json(row)
            records[record.id], place = record, ""
    except (ValueError, TypeError) as error:
        remedy = "bring it back from a copy, or prepare into another folder" if file == VOLUMES else "remove it"
        raise UsageError(f"{out.at(file)} is damaged: {place}{error}; {remedy}") from None
    if not any(record.hidden for record in records.values()):
        return list(records.values())
    names = read_names(out)
    return [_named(record, *names[record.id]) if record.id in names else record for record in records.values()]


class Rows(NamedTuple):
    """The rows of a folder, and what its file was when they were read."""

    records: list[VolumeRecord]
    state: object


def read_again(out: Location, rows: Rows | None = None) -> Rows:
    """Return the rows of a folder: those given, if the file is the same; see `read_records`."""
    state = out.state(VOLUMES) if out.is_local else object()
    return rows if rows is not None and rows.state == state else Rows(read_records(out), state)


def is_unfinished(out: Location) -> bool:
    """Tell whether a run goes on in a folder, or was cut short: dataset.json says so until the end of a run."""
    try:
        return (content := out.read(DATASET)) is None or from_json(content)["manifests"] is None
    except (ValueError, KeyError, TypeError):
        return False


def records_of(out: Location) -> list[VolumeRecord]:
    """Return the rows of volumes.jsonl; UsageError where there is none."""
    if not out.exists(VOLUMES):
        raise UsageError(f"expected the output of photon-data prepare, but {out.url} has no {VOLUMES}")
    return read_records(out)


def by_id(records: Iterable[VolumeRecord]) -> list[VolumeRecord]:
    """Return records in the order of their ids."""
    return sorted(records, key=lambda record: record.id)


def _named(record: VolumeRecord, root: str, source: str) -> VolumeRecord:
    return replace(record, root=root, source=source) if record.hidden else record


def write_records(out: Location, records: Iterable[VolumeRecord]) -> None:
    """Write volumes.jsonl, whole, and what it hides to the private file."""
    records = list(records)
    if hidden := [record for record in records if record.hidden]:
        known = read_names(out)
        names = {record.id: (record.root, record.source) if record.root else known.get(record.id) for record in hidden}
        save_names(out, ((id, *place) for id, place in names.items() if place))
    out.write_rows(VOLUMES, (record.row() for record in records))


def append_record(out: Location, record: VolumeRecord) -> None:
    """Add a row to volumes.jsonl of a local folder, in the place of an earlier one of its id; see `read_records`."""
    if record.hidden and record.root:
        append_name(out, record.id, record.root, record.source)
    append_row(out.place(VOLUMES), record.row())
