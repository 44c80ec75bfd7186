"""A prepared folder -> the same volumes in another format, with manifests that name those files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from photon_data.errors import UsageError
from photon_data.export import FORMATS
from photon_data.files import Location, from_jsonl, jsonl_bytes
from photon_data.json_text import from_json
from photon_data.questions.manifest import manifest_names
from photon_data.records import read_records
from photon_data.store import open_volume, store_name

# Records which store each exported file was made from.
INDEX = "export.json"


def export_all(
    out: Location,
    format_: str,
    folder: Path,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> str:
    """Write every volume of `out` into `folder`/volumes, and its manifests with those paths; what is up to date stays.

    Returns a sentence with the counts. UsageError for an unknown format and where nothing was prepared.
    """
    if format_ not in FORMATS:
        raise UsageError(f"--format: expected one of {', '.join(FORMATS)}, found {format_!r}")
    records = [record for record in read_records(out) if record.is_there]
    if not records:
        raise UsageError(f"expected prepared volumes in {out.url}, found none; run photon-data prepare first")
    target, (suffix, write) = Location(str(folder)), FORMATS[format_]
    made_from, kept = _made_from(target), 0
    (folder / "volumes").mkdir(parents=True, exist_ok=True)
    for number, record in enumerate(records, 1):
        path = target.place(f"volumes/{record.id}{suffix}")
        if not overwrite and path.exists() and made_from.get(record.id) == record.store_sha256:
            kept += 1
        else:
            write(open_volume(out.at(store_name(record.id))), path)
            made_from[record.id] = record.store_sha256
            target.write(INDEX, json.dumps(made_from, sort_keys=True).encode())
        progress(number, len(records))
    names = manifest_names(out)
    for name in names:
        target.write(name, jsonl_bytes(_moved(out, name, target, suffix)))
    return f"{len(records)} volumes, {kept} of them there before; {len(names)} manifests in {folder}"


def _made_from(target: Location) -> dict[str, str | None]:
    """Return {id: hash of the store} of what an earlier export wrote; {} where that cannot be read."""
    try:
        return dict(from_json(target.read(INDEX) or b"{}"))
    except (ValueError, TypeError):
        return {}


def _moved(out: Location, name: str, target: Location, suffix: str) -> list[dict[str, Any]]:
    """Return the rows of a manifest with the paths of the exported files; UsageError for rows that name no volume."""
    try:
        rows = from_jsonl((out.read(name) or b"").decode())
        return [{**row, "videos": [target.at(f"volumes/{row['volume_id']}{suffix}")]} for row in rows]
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{out.at(name)} is damaged: {error}; run photon-data prepare again") from None
