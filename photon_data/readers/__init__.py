"""Raw files on disk -> scans that can be streamed, or a clear refusal.

`find_scans` says what is there, `open_scan` reads one header, `Scan.planes()` streams the voxels. Codes of refusal:

    unreadable       it cannot be opened: permissions, or it went away
    empty            a file without bytes
    not-a-scan       the content is not what the name says
    truncated        it ends before its header or its voxels do
    damaged          a checksum or the compressed data are wrong
    surplus          more data than the header describes
    bad-header       a header that cannot be: sizes, offsets, magic
    bad-scaling      a slope without a finite intercept
    no-geometry      nothing says which side is left
    affine-conflict  sform and qform differ
    bad-geometry     axes that are singular, not finite or absurd
    two-d            fewer than 2 voxels along a side
    several-volumes  more than one volume, or several values per voxel
    complex, rgb     no intensities
    dtype            numbers of another type than integers of 8 to 64 bits, float32 or float64
    encoding         voxels stored in a way that is not read (text, bzip2)
    data-file        the file with the voxels is missing, one of several, or outside of its header's folder
    too-large        more voxels than allowed, or a side that is too long
    dicom-*          see `photon_data.readers.dicom`
"""

from __future__ import annotations

from collections.abc import Callable

from photon_data.errors import Refused
from photon_data.readers import metaimage, nifti, nrrd
from photon_data.readers.checks import unreadable
from photon_data.readers.dicom import open_series
from photon_data.readers.find import Found, find_scans, left_alone
from photon_data.scan import MAX_VOXELS, Scan, Source

__all__ = ["Found", "find_scans", "left_alone", "open_scan"]

OPENERS: dict[str, Callable[[Source, str, int], Scan]] = {
    nifti.NAME: nifti.open_nifti,
    nrrd.NAME: lambda source, _, max_voxels: nrrd.open_nrrd(source, max_voxels),
    metaimage.NAME: lambda source, _, max_voxels: metaimage.open_metaimage(source, max_voxels),
    "dicom": lambda source, _, max_voxels: open_series(source, max_voxels=max_voxels),
}


def open_scan(source: Source, *, nifti_affine: str = "auto", max_voxels: int = MAX_VOXELS) -> Scan:
    """Return the Scan of a source, whose header is read and found sound and whose voxels are not touched yet.

    `nifti_affine` is "auto" (sform if coded, else qform, refused where they differ), "sform" or "qform". Refused with one of the
    codes above, here or while the planes are streamed; OSError where the disk fails.
    """
    if source.problem:
        raise Refused(source.code, source.problem)
    try:
        return OPENERS[source.format](source, nifti_affine, max_voxels)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise unreadable(source.files[0], error) from None
