"""volumes.jsonl: one row for every input, what became of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from photon_data.errors import UsageError
from photon_data.files import Location, from_jsonl, jsonl_bytes

VOLUMES, DATASET = "volumes.jsonl", "dataset.json"
# Every input ends in exactly one of these.
PREPARED, UNCHANGED, REFUSED, FAILED = "prepared", "unchanged", "refused", "failed"
STATES = (PREPARED, UNCHANGED, REFUSED, FAILED)
# An inspection writes nothing: what would be prepared is "ready".
READY = "ready"


@dataclass(frozen=True)
class VolumeRecord:
    """What became of one input; `vars(record)` is its row.

    `facts` are what was measured on the way, as stored in the store too:
    format, dtype, slope, intercept, rescale ("header" | "stored" | "table" | "metadata")
    policy                {"nifti_affine": ...}: the choices of the policy that mattered; no such key where none did
    geometry, grid        Geometry.to_json() of the native grid and of the target grid
    cut_mm, pad_mm        {"x": [low, high], "y": ..., "z": ...} mm of the scan outside of the grid, and the other way
                          round, at the low and the high end of each world axis (L, P, S grow)
    hu_before, hu_after   {"min", "max", "mean", "p01", "p50", "p99", "non_finite"}; hu_before also "histogram": counts
                          in 64 equal bins over [-1100, 1100]
    """

    id: str
    source: str  # path relative to the source folder
    state: str
    bytes_in: int  # of the source's files together
    mtime_ns: int  # of its file; of several, a number that changes with the name, size or time of any
    fingerprint: str | None = None  # "sha256:..." of the content of its files
    key: str | None = None  # the resume key: a hash of what the store was made from
    code: str | None = None  # why it was refused or failed: a slug to group by, and a sentence
    reason: str | None = None
    store: str | None = None
    store_bytes: int | None = None
    store_sha256: str | None = None  # of the store's root metadata, which record every other file of it
    facts: dict[str, Any] | None = None
    seconds: float | None = None  # wall time of the work; None where it was done by an earlier run

    @property
    def is_there(self) -> bool:
        """Whether the volume's store exists: it was prepared, now or earlier."""
        return self.state in (PREPARED, UNCHANGED)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> VolumeRecord:
        """Return the record of a row; keys of newer versions are ignored."""
        if not isinstance(row, dict):
            raise ValueError(f"expected a row, found {row!r:.80}")
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in row.items() if key in known})


def read_records(out: Location) -> list[VolumeRecord]:
    """Return the rows of volumes.jsonl, none if there is no such file; UsageError if it cannot be read."""
    try:
        return [VolumeRecord.from_json(row) for row in from_jsonl((out.read(VOLUMES) or b"").decode())]
    except (ValueError, TypeError) as error:
        remedy = "remove it, stores are recognised without it"
        raise UsageError(f"{out.at(VOLUMES)} is damaged: {error}; {remedy}") from None


def write_records(out: Location, records: Iterable[VolumeRecord]) -> None:
    """Write volumes.jsonl, whole."""
    out.write(VOLUMES, jsonl_bytes(map(vars, records)))
