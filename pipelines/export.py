"""A prepared folder -> the same volumes in another format, with manifests that name those files."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from photon_data.errors import UsageError
from photon_data.export import FORMATS
from photon_data.files import Location
from photon_data.json_text import from_json
from photon_data.lock import exclusive
from photon_data.questions.manifest import manifest_names
from photon_data.records import read_records, store_name
from photon_data.store import open_volume

# Records which store each exported file was made from. It is written about this often, and when an export ends: after a
# kill, the volumes of this span are exported again.
INDEX, INDEX_S = "export.json", 30


def export_all(
    out: Location,
    format_: str,
    folder: Path,
    grid: str = "volume",
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> str:
    """Write every volume of `out` into `folder`/volumes, and its manifests with those paths; what is up to date stays.

    Returns a sentence with the counts. UsageError for an unknown format, where nothing was prepared, and for a store
    without that grid or that is not as it was written.
    """
    if format_ not in FORMATS:
        raise UsageError(f"--format: expected one of {', '.join(FORMATS)}, found {format_!r}")
    records = [record for record in read_records(out) if record.is_there]
    if not records:
        raise UsageError(f"expected prepared volumes in {out.url}, found none; run photon-data prepare first")
    target, (suffix, write) = Location(str(folder)), FORMATS[format_]
    paths = {record.id: target.place(f"volumes/{record.id}{suffix}") for record in records}
    with exclusive(target):
        (folder / "volumes").mkdir(parents=True, exist_ok=True)
        index, kept = {} if overwrite else _read_index(target), dict[str, str | None]()
        of_grid = "" if grid == "volume" else f" {grid}"
        wanted = {record.id: f"{record.store_sha256}{of_grid}" for record in records}
        for id, source in wanted.items():
            if index.get(id) == source and paths[id].exists():
                kept[id] = source
        made_from = dict(kept)
        _write_index(target, made_from)  # what is to be written anew is in it no more
        due_s = time.monotonic() + INDEX_S
        try:
            for number, record in enumerate(records, 1):
                if record.id not in kept:
                    store = out.at(store_name(record.id))
                    write(open_volume(store, grid, id=record.id, verify="full"), paths[record.id])  # type: ignore[arg-type]
                    made_from[record.id] = wanted[record.id]
                progress(number, len(records))
                if time.monotonic() >= due_s:
                    _write_index(target, made_from)
                    due_s = time.monotonic() + INDEX_S
        finally:
            _write_index(target, made_from)
        names = manifest_names(out)
        for name in names:
            target.write_rows(name, _moved(out, name, target, suffix))
    return f"{len(records)} volumes, {len(kept)} of them there before; {len(names)} manifests in {folder}"


def _read_index(target: Location) -> dict[str, str | None]:
    """Return {id: SHA-256 of the store that its file was made from}; {} where the index is gone or damaged."""
    try:
        return dict(from_json(target.read(INDEX) or b"{}"))
    except (ValueError, TypeError):
        return {}


def _moved(out: Location, name: str, target: Location, suffix: str) -> list[dict[str, Any]]:
    """Return the rows of a manifest with the paths of the exported files; UsageError for rows that name no volume."""
    try:
        return [{**row, "videos": [target.at(f"volumes/{row['volume_id']}{suffix}")]} for row in out.rows(name)]
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{out.at(name)} is damaged: {error}; run photon-data prepare again") from None


def _write_index(target: Location, made_from: Mapping[str, str | None]) -> None:
    target.write(INDEX, json.dumps(made_from, sort_keys=True).encode())
