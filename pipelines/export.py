"""A prepared folder -> the same volumes in another format, with manifests that name those files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from photon_data.errors import UsageError
from photon_data.export import FORMATS
from photon_data.files import Location, from_jsonl, jsonl_bytes
from photon_data.questions.manifest import manifest_names
from photon_data.records import read_records
from photon_data.store import open_volume, store_name

# Records which store each exported file was made from.
INDEX = "export.json"


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
    made_from = json.loads(target.read(INDEX) or b"{}")
    kept = 0
    (folder / "volumes").mkdir(parents=True, exist_ok=True)
    for number, record in enumerate(records, 1):
        path, source = folder / "volumes" / f"{record.id}{suffix}", record.store_sha256
        source = source if grid == "volume" else f"{source} {grid}"
        if not overwrite and path.exists() and made_from.get(record.id) == source:
            kept += 1
        else:
            store = out.at(store_name(record.id))
            write(open_volume(store, grid, id=record.id, verify="full"), path)  # type: ignore[arg-type]
            made_from[record.id] = source
            target.write(INDEX, json.dumps(made_from, sort_keys=True).encode())
        progress(number, len(records))
    names = manifest_names(out)
    for name in names:
        rows = from_jsonl((out.read(name) or b"").decode())
        moved = [{**row, "videos": [target.at(f"volumes/{row['volume_id']}{suffix}")]} for row in rows]
        target.write(name, jsonl_bytes(moved))
    return f"{len(records)} volumes, {kept} of them there before; {len(names)} manifests in {folder}"
