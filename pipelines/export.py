"""A prepared folder -> the same volumes in another format, with manifests that name those files.

Where there are many volumes, processes of workers write them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numcodecs
import zarr

from photon_data.errors import UsageError
from photon_data.files import NO_SPACE, Location, write_whole
from photon_data.json_text import from_json
from photon_data.lock import exclusive
from photon_data.questions.manifest import manifest_names
from photon_data.readers.nifti import write_int16_nifti
from photon_data.records import DIED, SUFFIX, NoSpace, read_records
from photon_data.store import FILL_HU, ome_datasets, open_volume
from photon_data.volume import Volume
from photon_pipelines import child
from photon_pipelines.cluster import Needs, Workers, execute, pays

# Records which store each exported file was made from. It is written about this often, and when an export ends: after a
# kill, the volumes of this span are exported again.
INDEX, INDEX_S = "export.json", 30
# Fiji reads chunks of zarr v2 one by one; this many voxels are 2 MB.
CHUNK_ZYX = (64, 128, 128)


class Format(NamedTuple):
    """A format that others read."""

    suffix: str  # of the names of files
    write: Callable[[Volume, Path], None]  # whole or not at all


class ExportJob(NamedTuple):
    """A volume to export."""

    id: str
    store: str
    grid: str
    format: str
    path: str

    def to_json(self) -> dict[str, Any]:
        """Return what `export_one` takes."""
        return self._asdict()


def export_all(
    out: Location,
    format_: str,
    folder: Path,
    grid: str = "volume",
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], object] = lambda done, total: None,
    workers: Workers | None = None,
) -> str:
    """Write every volume of `out` into `folder`/volumes, and its manifests with those paths; what is up to date stays.

    Returns a sentence with the counts. UsageError for an unknown format, where nothing was prepared, and for a store
    without that grid or that is not as it was written. Volumes are written by `workers`, if given.
    """
    if format_ not in FORMATS:
        raise UsageError(f"--format: expected one of {', '.join(FORMATS)}, found {format_!r}")
    records = [record for record in read_records(out) if record.is_there]
    if not records:
        raise UsageError(f"expected prepared volumes in {out.url}, found none; run photon-data prepare first")
    target, suffix = Location(str(folder)), FORMATS[format_].suffix
    names = {record.id: record.place.removesuffix(SUFFIX) + suffix for record in records}
    paths = {id: target.place(name) for id, name in names.items()}
    with exclusive(target) as hold:
        for parent in {path.parent for path in paths.values()}:
            parent.mkdir(parents=True, exist_ok=True)
        index = {} if overwrite else _read_index(target)
        of_grid = "" if grid == "volume" else f" {grid}"
        wanted = {record.id: f"{record.store_sha256}{of_grid}" for record in records}
        kept = {id for id, source in wanted.items() if index.get(id) == source and paths[id].exists()}
        made_from: dict[str, str | None] = {id: wanted[id] for id in kept}
        _write_index(target, made_from)  # what is to be written anew is in it no more
        due_s = time.monotonic() + INDEX_S
        needs = Needs(out=target.at(""), holder=hold.token)
        jobs = [
            ExportJob(record.id, out.at(record.place), grid, format_, str(paths[record.id]))
            for record in records
            if record.id not in kept
        ]
        progress(len(kept), len(records))
        try:
            for number, id in enumerate(_export(jobs, workers, needs), 1 + len(kept)):
                made_from[id] = wanted[id]
                progress(number, len(records))
                if time.monotonic() >= due_s:
                    _write_index(target, made_from)
                    due_s = time.monotonic() + INDEX_S
        finally:
            _write_index(target, made_from)
        manifests = manifest_names(out)
        for name in manifests:
            target.write_rows(name, _moved(out, name, paths))
    return f"{len(records)} volumes, {len(kept)} of them there before; {len(manifests)} manifests in {folder}"


def _export(jobs: list[ExportJob], workers: Workers | None, needs: Needs) -> Iterator[str]:
    """Yield the id of each volume that is written; UsageError for one that cannot be."""
    if workers is None or not pays(workers, len(jobs)):
        for job in jobs:
            _write_one(**job.to_json())
            yield job.id
        return
    jobs.reverse()
    task = partial(child.run_isolated, module=__name__)
    with closing(execute(jobs, task, workers, needs)) as finished:
        for job, reply in finished:
            if wrong := reply.get("wrong") or (DIED in reply and f"{job.store}: {reply[DIED][1]}"):
                raise UsageError(str(wrong))
            yield job.id


def export_one(job: dict[str, Any]) -> dict[str, Any]:
    """Write a volume, and return what is wrong with it, if anything; both as JSON."""
    try:
        _write_one(**job)
    except UsageError as error:
        return {"wrong": str(error)}
    except OSError as error:
        if error.errno in NO_SPACE:
            raise NoSpace(error.errno, f"no space left for {job['path']}") from None
        return {"wrong": f"{job['path']}: {error.strerror or error}"}
    return {}


def _write_one(id: str, store: str, grid: str, format: str, path: str) -> None:
    volume = open_volume(store, grid, id=id, verify="full")  # type: ignore[arg-type]
    FORMATS[format].write(volume, Path(path))


def main(address_space_bytes: int) -> None:
    """Export volumes until the parent ends."""
    child.main(address_space_bytes, export_one)


def _write_ome_zarr_04(volume: Volume, path: Path) -> None:
    """Write an OME-Zarr 0.4 image (zarr v2, zlib, "/" between chunk numbers), which Fiji and older viewers read."""
    multiscale = {
        "version": "0.4",
        "name": path.name,
        "axes": [{"name": axis, "type": "space", "unit": "millimeter"} for axis in "zyx"],
        "datasets": ome_datasets(volume.geometry),
    }
    with write_whole(path) as temporary:
        group = zarr.create_group(temporary, zarr_format=2, attributes={"multiscales": [multiscale]})
        array = group.create_array(
            "0",
            shape=volume.geometry.shape_zyx,
            chunks=CHUNK_ZYX,
            dtype="<i2",
            compressors=numcodecs.Zlib(level=1),
            chunk_key_encoding={"name": "v2", "separator": "/"},
            fill_value=FILL_HU,
        )
        array[...] = volume.numpy()


FORMATS = {"nifti": Format(".nii.gz", write_int16_nifti), "ome-zarr-0.4": Format(".ome.zarr", _write_ome_zarr_04)}


def _read_index(target: Location) -> dict[str, str | None]:
    """Return {id: SHA-256 of the store that its file was made from}; {} where the index is gone or damaged."""
    try:
        return dict(from_json(target.read(INDEX) or b"{}"))
    except (ValueError, TypeError):
        return {}


def _moved(out: Location, name: str, paths: Mapping[str, Path]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a manifest with the paths of the exported files; UsageError for rows that name no volume."""
    try:
        for row in out.rows(name):
            yield {**row, "videos": [str(paths[row["volume_id"]])]}
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{out.at(name)} is damaged: {error}; run photon-data prepare again") from None


def _write_index(target: Location, made_from: Mapping[str, str | None]) -> None:
    target.write(INDEX, json.dumps(made_from, sort_keys=True).encode())
