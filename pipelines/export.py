"""A prepared folder -> the same volumes in another format, with manifests that name those files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from photon_data.errors import UsageError
from photon_data.export import FORMATS
from photon_data.files import Location, from_jsonl, jsonl_bytes
from photon_data.questions.manifest import manifest_names
from photon_data.records import VolumeRecord, read_records
from photon_data.store import open_volume

# Says which store each exported file was made from.
INDEX = "export.json"


class Exported(NamedTuple):
    """How many volumes are there, how many were there before, and how many manifests were written."""

    volumes: int
    kept: int
    manifests: int


def export_all(
    out: Location,
    format_: str,
    folder: Path,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], object] = lambda n, of: None,
) -> Exported:
    """Write every volume of `out` into `folder`/volumes, and its manifests with those paths; what is up to date stays.

    UsageError where nothing was prepared.
    """
    records = [record for record in read_records(out) if record.is_there]
    if not records:
        raise UsageError(f"prepared volumes wanted in {out.url}, found none; run photon-data prepare first")
    where, suffix = Location(str(folder)), FORMATS[format_].suffix
    made_from = json.loads(where.read(INDEX) or b"{}")
    kept = 0
    (folder / "volumes").mkdir(parents=True, exist_ok=True)
    for number, record in enumerate(records, 1):
        path = folder / "volumes" / f"{record.id}{suffix}"
        if not overwrite and path.exists() and made_from.get(record.id) == record.store_sha256:
            kept += 1
        else:
            _export(out, record, format_, path)
            made_from[record.id] = record.store_sha256
            where.write(INDEX, json.dumps(made_from, sort_keys=True).encode())
        progress(number, len(records))
    return Exported(len(records), kept, _write_manifests(out, where, suffix))


def _export(out: Location, record: VolumeRecord, format_: str, path: Path) -> None:
    assert record.store is not None
    FORMATS[format_].write(open_volume(out.at(record.store)), path)


def _write_manifests(out: Location, where: Location, suffix: str) -> int:
    """Copy every manifest, the exported file in place of each store."""
    names = manifest_names(out)
    for name in names:
        rows = from_jsonl((out.read(name) or b"").decode())
        moved = [{**row, "videos": [where.at(f"volumes/{row['volume_id']}{suffix}")]} for row in rows]
        where.write(name, jsonl_bytes(moved))
    return len(names)
