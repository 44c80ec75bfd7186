"""`--masks auto`: organs of prepared volumes by TotalSegmentator, kept as masks beside the stores (OUT/masks).

TotalSegmentator is a program of its own, in an environment of its own: it is run as a command, never imported. It gets
the prepared volume, so its masks lie on the grid that the model sees.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from photon_cli.terminal import ProgressBar, console
from photon_data.errors import UsageError
from photon_data.files import Location
from photon_data.lock import exclusive
from photon_data.mask_store import ROWS, home_of, open_masks, read_rows, write_rows
from photon_data.prepare_masks import MaskJob, prepare_masks
from photon_data.readers.find import find_scans
from photon_data.readers.nifti import write_int16_nifti
from photon_data.recipe import Recipe
from photon_data.records import VolumeRecord, read_records
from photon_data.scan import MaskFile, Source, names_below
from photon_data.store import is_store, open_volume, read_metadata
from photon_train.kept_tokens import MaskFolder

AUTO = "auto"
COMMAND = "TotalSegmentator"
OPTIONS = ("--fast",)  # 3 mm voxels: a visual token is about 36 mm wide
LAST_WORDS = 300  # characters of what the command says when it fails


def mask_folder(masks: str, places: Iterable[str]) -> MaskFolder:
    """Return where the masks of the volumes at `places` are; "auto" is the prepared folder that these are in."""
    return MaskFolder(_prepared_folder(places) if masks == AUTO else masks)


def segment(places: Mapping[str, str]) -> None:
    """Have the volumes {id: store} segmented that have no masks of their own yet.

    UsageError without the command, and for volumes that are not stores of one prepared folder. A volume that cannot be
    segmented is named, and costs only its own masks. What was made stays: the next run goes on.
    """
    out = Location(str(_prepared_folder(places.values())))
    records = {record.id: record for record in read_records(out) if record.is_there}
    todo = [id for id in places if id in records and not _has_masks(places[id], out)]
    if not todo:
        return
    if (command := shutil.which(COMMAND)) is None:
        found = f"none, and {len(todo)} of {len(places)} volumes without masks"
        remedy = "install it in an environment of its own (pipx install TotalSegmentator), or give a folder of masks"
        raise UsageError(f"--masks auto: expected the command {COMMAND} on the PATH, found {found}; {remedy}")
    with exclusive(out) as hold, ProgressBar("segmenting", total=len(todo)) as bar:
        rows = {row.id: row for row in read_rows(out)} if out.exists(ROWS) else {}
        for id in todo:
            rows[id] = _segmented(command, records[id], places[id], out, hold.token)
            write_rows(out, rows.values())
            if not rows[id].is_there:
                console.print(f"no masks of {id}: {rows[id].reason}", soft_wrap=True)
            bar.update(advance=1)


def _prepared_folder(places: Iterable[str]) -> Path:
    """Return the one folder that all of the stores lie in."""
    stores = list(places)
    folders = {Path(home_of(str(Path(store).resolve()))) for store in stores if is_store(store)}
    if len(folders) != 1 or not all(map(is_store, stores)):
        expected = "stores of one folder that photon-data prepare made, on a local disk"
        raise UsageError(f"--masks auto: expected {expected}, found {len(folders)}; give a folder of masks instead")
    return folders.pop()


def _has_masks(place: str, out: Location) -> bool:
    """Tell whether there are masks of the volume as it is."""
    try:
        return bool(open_masks(place, out.at("")).names)
    except UsageError:  # none, or of another content or recipe
        return False


def _segmented(command: str, volume: VolumeRecord, place: str, out: Location, token: str) -> VolumeRecord:
    """Return the record of the masks of a volume, which are then in the prepared folder unless they were refused."""
    grid, metadata = dict(volume.facts or {})["grid"], read_metadata(Location(place), "")
    assert metadata is not None, "segment has opened the store"
    with TemporaryDirectory(prefix="photon-") as name:
        scan, masks = Path(name, "volume.nii.gz"), Path(name, "masks")
        write_int16_nifti(open_volume(place, id=volume.id), scan)
        words = [command, "-i", str(scan), "-o", str(masks), *OPTIONS]
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
        sources = find_scans(masks, label_maps=True).sources if masks.is_dir() else []
        files = names_below("", (file for source in sources for file in source.files))
        problem = None
        if done.returncode or not files:
            said = (done.stderr.strip() or done.stdout.strip())[-LAST_WORDS:]
            problem = f"expected masks of {COMMAND}, found none (exit code {done.returncode}): {said}"
        job = MaskJob(
            source=Source(volume.id, COMMAND, files, "nifti", 0, 0, problem=problem, code="no-mask"),
            masks=tuple(MaskFile(source.id, source.files) for source in sources),
            labels={},
            volume=replace(volume, facts={"grid": grid, "geometry": grid}),  # the scan is the prepared volume itself
            out=out.url,
            recipe=Recipe.from_json(metadata["recipe"]),
            holder=token,
        )
        return prepare_masks(job)
