"""Raw files on disk -> scans that can be streamed, or a clear refusal.

`find.find_scans` says what is in a folder, `open_scan` reads one header, `Scan.planes()` streams the voxels.
`read` does all of it for one scan. docs/reading.md lists the codes of refusal.
"""

from __future__ import annotations

from pathlib import Path

from photon_data.errors import Refused, refuse_placeholder, unreadable
from photon_data.readers.dicom import open_series
from photon_data.readers.find import find_one_scan
from photon_data.readers.metaimage import open_metaimage
from photon_data.readers.nifti import open_nifti
from photon_data.readers.nrrd import open_nrrd
from photon_data.recipe import MAX_VOXELS, Policy
from photon_data.scan import Scan, Source
from photon_data.volume import Volume

__all__ = ["open_scan", "read"]

OPENERS = {"nrrd": open_nrrd, "metaimage": open_metaimage}


def open_scan(source: Source, policy: Policy | None = None, *, affine: str | None = None) -> Scan:
    """Return the Scan of a source: its header is read and found sound, its voxels are not touched yet.

    `affine` is for NIfTI alone, in place of the policy's: "blank" or "given", see `open_nifti`. Refused, here or while
    the planes are streamed; OSError where the disk fails.
    """
    policy = policy or Policy()
    if source.problem:
        raise Refused(source.code, source.problem)
    try:
        for file in () if source.format == "dicom" else source.files:
            refuse_placeholder(file)
        if source.format == "nifti":
            return open_nifti(source, policy.max_voxels, affine or policy.nifti_affine)
        if source.format == "dicom":
            return open_series(source, policy)
        return OPENERS[source.format](source, policy.max_voxels)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise unreadable(source.files[0], error) from None


def read(path: str | Path, *, nifti_affine: str = "auto", max_voxels: int = MAX_VOXELS) -> Volume:
    """Return the one scan at `path` as a Volume in HU on its native grid, axes [z, y, x] as they lie in the file.

    `path` is a file, a header with its data file, or a folder that holds exactly one scan, such as a DICOM series. The
    header's slope and intercept are applied: float32, or the stored integers where they are HU already. The options
    are those of `Policy`. UsageError where there is not exactly one scan; Refused for a scan that is not sound.

    >>> volume = photon_data.read("a.nii.gz")
    >>> volume.array_zyx.shape, volume.array_zyx.dtype, volume.geometry.spacing_zyx_mm
    ((16, 24, 28), dtype('int16'), (2.0, 1.125, 0.875))
    """
    return open_scan(find_one_scan(Path(path)), Policy(nifti_affine=nifti_affine, max_voxels=max_voxels)).volume()
