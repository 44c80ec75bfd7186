"""Ours: the function that every worker of `photon-data prepare` runs, in a process set up as its workers are."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from subprocess import DEVNULL

from photon_data.prepare_file import Job, prepare_file
from photon_data.readers.find import find_scans
from photon_data.recipe import Recipe
from photon_data.records import PREPARED, store_name
from photon_data.scan import Source
from photon_pipelines.child import single_threaded

single_threaded()


def prepare(scan: str, out: str) -> str:
    """Fingerprint, read, resample, make the model grid, write both arrays with checksums, sync, rename; return the
    store.
    """
    path = Path(scan)
    status = path.stat()
    source = Source(path.name.partition(".")[0], path.name, (str(path),), "nifti", status.st_size, status.st_mtime_ns)
    return _store(source, out)


def prepare_converted(folder: str, out: str) -> None:
    """Convert a DICOM series by dcm2niix, as people do, and prepare the .nii.gz."""
    dcm2niix = shutil.which("dcm2niix")
    if dcm2niix is None:
        raise ModuleNotFoundError("dcm2niix", name="dcm2niix")
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(
            [dcm2niix, "-z", "y", "-b", "n", "-f", "scan", "-o", scratch, folder], check=True, stdout=DEVNULL
        )
        (scan,) = Path(scratch).glob("*.nii.gz")
        prepare(str(scan), out)


def prepare_folder(folder: str, out: str) -> None:
    """Find the scans of a folder and prepare them, one after the other."""
    for source in find_scans(Path(folder)).sources:
        _store(source, out)


def _store(source: Source, out: str) -> str:
    record = prepare_file(Job(source, out, Recipe(), overwrite=True))
    if record.state != PREPARED:
        raise RuntimeError(f"{source.path} is {record.state}: {record.reason}")
    return str(Path(out, store_name(source.id)))
