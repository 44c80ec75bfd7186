"""volumes.jsonl: one row for every input, what became of it; dataset.lock: the proof that two folders are the same."""

from __future__ import annotations

import hmac
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from photon_data.errors import UsageError
from photon_data.files import Location, digest_of, from_jsonl, jsonl_bytes
from photon_data.private import read_names, save_names
from photon_data.recipe import ALGORITHM, Recipe

VOLUMES, DATASET, LOCK = "volumes.jsonl", "dataset.json", "dataset.lock"
# Every input ends in exactly one of these.
PREPARED, UNCHANGED, REFUSED, FAILED = "prepared", "unchanged", "refused", "failed"
STATES = (PREPARED, UNCHANGED, REFUSED, FAILED)
# The code of a refusal by a person: prune took the volume away, and prepare leaves it out.
PRUNED = "pruned"
# An inspection writes nothing: what would be prepared is "ready".
READY = "ready"
# Of a row of volumes.jsonl, and of dataset.json: the `digest_of` what else it says. Earlier versions did not write it.
ROW_DIGEST, DATASET_DIGEST = "row_sha256", "sha256"


@dataclass(frozen=True)
class VolumeRecord:
    """What became of one input; `record.row()` is its row.

    `facts` are what was measured on the way, as stored in the store too:
    format, dtype, slope, intercept, rescale ("header" | "stored" | "table" | "metadata")
    policy                {"nifti_affine": ...}: the choices of the policy that mattered; no such key where none did
    geometry, grid        Geometry.to_json() of the native grid and of the target grid
    cut_mm, pad_mm        {"x": [low, high], "y": ..., "z": ...} mm of the scan outside of the grid, and the other way
                          round, at the low and the high end of each world axis (L, P, S grow)
    full_grid             Geometry.to_json() of the whole field; only with --grids full
    padding_voxels        how many voxels were padding, declared or far below air, and became air
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
    store: str | None = None
    store_bytes: int | None = None
    store_sha256: str | None = None  # of the store's root metadata, which record every other file of it
    arrays_sha256: str | None = None  # of those records alone: it does not depend on the id
    facts: dict[str, Any] | None = None
    seconds: float | None = None  # wall time of the work; None where it was done by an earlier run
    root: str | None = None  # the source folder; None in rows of versions that did not record it
    patient: str | None = None  # a keyed hash of the patient's ID, of DICOM
    hidden: bool = False  # source and root may be a patient's name: they are in the private file, not in the row

    @property
    def is_there(self) -> bool:
        """Whether the volume's store exists: it was prepared, now or earlier."""
        return self.state in (PREPARED, UNCHANGED)

    @property
    def name(self) -> str:
        """What people may be shown: the source's path, or the id where that is hidden."""
        return self.id if self.hidden else self.source

    def row(self) -> dict[str, Any]:
        """Return the row of volumes.jsonl, without what is hidden."""
        return vars(self) | ({"source": "", "root": None} if self.hidden else {})

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
        records = [VolumeRecord.from_json(row) for row in from_jsonl((out.read(VOLUMES) or b"").decode())]
    except (ValueError, TypeError) as error:
        remedy = "bring it back from a copy, or prepare into another folder"
        raise UsageError(f"{out.at(VOLUMES)} is damaged: {error}; {remedy}") from None
    if not any(record.hidden for record in records):
        return records
    names = read_names(out)
    return [_named(record, *names[record.id]) if record.id in names else record for record in records]


def records_of(out: Location) -> list[VolumeRecord]:
    """Return the rows of volumes.jsonl; UsageError where there is none."""
    if not out.exists(VOLUMES):
        raise UsageError(f"expected the output of photon-data prepare, but {out.url} has no {VOLUMES}")
    return read_records(out)


def _named(record: VolumeRecord, root: str, source: str) -> VolumeRecord:
    return replace(record, root=root, source=source) if record.hidden else record


def write_records(out: Location, records: Iterable[VolumeRecord]) -> None:
    """Write volumes.jsonl, whole, and what it hides to the private file."""
    records = list(records)
    if hidden := [record for record in records if record.hidden]:
        known = read_names(out)
        names = {record.id: (record.root, record.source) if record.root else known.get(record.id) for record in hidden}
        save_names(out, ((id, *place) for id, place in names.items() if place))
    rows = (record.row() for record in records)
    out.write(VOLUMES, jsonl_bytes({**row, ROW_DIGEST: digest_of(row, ROW_DIGEST)} for row in rows))


def lock_of(
    records: Iterable[VolumeRecord],
    questions: Mapping[str, str],
    recipe: Recipe,
    versions: Mapping[str, str],
    salt: str,
) -> dict[str, Any]:
    """Return what dataset.lock holds: all that tells whether another folder has the same bytes, without a name.

    Ids, contents, settings and data sets are hashed with the salt. `questions` are {name: SHA-256 of its questions}.
    """
    volumes = [
        {
            "id": _keyed(salt, record.id),
            "content": _keyed(salt, str(record.fingerprint)),
            "settings": _keyed(salt, str(record.key)),
            "arrays": record.arrays_sha256 or record.store_sha256,
        }
        for record in records
        if record.is_there
    ]
    return {
        "format": 1,
        "salt": salt,
        "algorithm": ALGORITHM,
        "recipe": recipe.to_json(),
        "versions": dict(versions),
        "volumes": sorted(volumes, key=lambda volume: str(volume["id"])),
        "questions": {_keyed(salt, name): _keyed(salt, digest) for name, digest in sorted(questions.items())},
    }


def _keyed(salt: str, text: str) -> str:
    return hmac.new(salt.encode(), text.encode(), "sha256").hexdigest()[:32]


def read_lock(path: Path) -> dict[str, Any]:
    """Return a dataset.lock that this version can follow; UsageError for another file or another algorithm."""
    expected = UsageError(f"--lock: expected a dataset.lock, found something else in {path}")
    try:
        lock = json.loads(path.read_bytes())
        algorithm, versions = lock["algorithm"], dict(lock["versions"])
    except OSError as error:
        raise UsageError(f"--lock: expected a readable file, found {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise expected from None
    if algorithm != ALGORITHM:
        remedy = f"install photon-ct {versions.get('photon-ct')}"
        raise UsageError(f"--lock: expected algorithm {ALGORITHM}, found {algorithm} in {path}; {remedy}")
    try:
        _ = lock["salt"], lock["questions"], Recipe.from_json(lock["recipe"])
        _ = [[volume[name] for name in ("id", "content", "settings", "arrays")] for volume in lock["volumes"]]
    except (KeyError, TypeError, AttributeError, UsageError):
        raise expected from None
    return lock


def differences(lock: Mapping[str, Any], own: Mapping[str, Any], records: Iterable[VolumeRecord]) -> Iterator[str]:
    """Yield how a folder differs from a lock, a sentence each. `own` is the folder's lock with the same salt.

    A volume is known by its id, or else by its content: ids of DICOM depend on a key of their folder.
    """
    left = {volume["id"]: volume for volume in lock["volumes"]}
    names = {_keyed(own["salt"], record.id): record.id for record in records}
    strangers = []
    for volume in sorted(own["volumes"], key=lambda volume: names[volume["id"]]):
        if other := left.pop(volume["id"], None):
            yield from _difference(names[volume["id"]], volume, other, lock, own)
        else:
            strangers.append(volume)
    by_content = {volume["content"]: volume["id"] for volume in left.values()}
    for volume in strangers:
        if other := left.pop(by_content.get(volume["content"], ""), None):
            yield from _difference(names[volume["id"]], volume, other, lock, own)
        else:
            yield f"{names[volume['id']]}: not in the lock"
    if left:
        yield f"{len(left)} volumes of the lock are not here: their scans are missing or refused"
    if lock["questions"] != own["questions"]:
        yield "the questions are not those of the lock"


def _difference(
    name: str, volume: Mapping[str, str], other: Mapping[str, str], lock: Mapping[str, Any], own: Mapping[str, Any]
) -> Iterator[str]:
    if other["content"] != volume["content"]:
        yield f"{name}: its source has another content than the lock's"
    elif other["settings"] != volume["settings"]:
        yield f"{name}: made with other settings (recipe, rescaling, policy, grids) from the same content"
    elif other["arrays"] != volume["arrays"]:
        versions = {key: (lock["versions"].get(key), value) for key, value in own["versions"].items()}
        changed = ", ".join(f"{key} {a} there, {b} here" for key, (a, b) in versions.items() if a != b)
        yield f"{name}: other bytes from the same content and settings ({changed or 'the same versions'})"
