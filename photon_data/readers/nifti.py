"""NIfTI-1 and NIfTI-2, one file or a pair, as the standard reads; what two libraries read differently is refused.

Geometry: the sform where it is coded, else the qform, else the scan is refused. Where both are coded and place the corners of the
scan more than 0.1 mm and 1/1000 of its diagonal apart, it is refused too, until a person picks one.
That share is what a quaternion in float32 can lose near half a turn, the usual one for CT (its w is the root of a difference).
Lengths are millimetres where the header names no unit; metres and microns are converted, in sform and qform alike.

Scaling: HU = slope * stored + intercept; a slope of zero or one that is not finite means "not scaled", intercept included (as the
standard and nibabel have it); a good slope with an intercept that is not finite is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import nibabel as nib
import numpy as np
from nibabel.quaternions import quat2mat

from photon_data.errors import Refused
from photon_data.readers.checks import frame, grid_shape, not_a, scan_of
from photon_data.readers.stream import GZIP_MAGIC, Encoding, Stored, read_head
from photon_data.scan import Scan, Source
from photon_data.volume import RAS_LPS, Geometry

NAME = "nifti"
AFFINES = ("sform", "qform")
# Asks for a header that says nothing of where its voxels are: a table is going to.
BLANK = "blank"

# datatype code -> numpy's letter; what is not here is refused by name or as unknown.
DTYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
COMPLEX, RGB = (32, 1792, 2048), (128, 2304)
MM_PER_UNIT = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}

# Header extensions lie between header and voxels; a header is not believed that claims more of them.
MAX_VOX_OFFSET = 1 << 26
AGREE_MM, AGREE_SHARE = 0.1, 1e-3

DIRECTIONS = "set a right sform (nibabel, ITK-SNAP or dcm2niix write one)"


@dataclass(frozen=True)
class _Kind:
    """One version of the header: its class in nibabel, its length, the magics of a single file and of a pair."""

    header: type[nib.Nifti1Header]
    length: int
    single: bytes
    pair: bytes


NIFTI_1 = _Kind(nib.Nifti1Header, 348, b"n+1", b"ni1")
NIFTI_2 = _Kind(nib.Nifti2Header, 540, b"n+2", b"ni2")


def open_nifti(source: Source, affine: str, max_voxels: int) -> Scan:
    """Return the Scan of a NIfTI file or pair; `affine` is "auto", "sform", "qform" or "blank". Refused as the package lists."""
    path = source.files[0]
    kind, header = _read_header(path)
    data = data_file(path)
    shape_zyx = grid_shape(_sizes(header, path.name), path.name, max_voxels)
    stored = Stored(
        path=data,
        encoding=_encoding(data),
        start=0,
        skip=_vox_offset(header, kind, is_pair=data != path, name=path.name),
        shape_zyx=shape_zyx,
        dtype=_dtype(header, path.name),
    )
    geometry = _geometry(header, shape_zyx, affine, path.name)
    scan = scan_of(stored, geometry, NAME, *_scaling(header, path.name))
    mattered = affine in AFFINES and geometry != _automatic_geometry(header, shape_zyx, path.name)
    return replace(scan, choices={"nifti_affine": affine}) if mattered else scan


def data_file(path: Path) -> Path:
    """Return the file with the voxels: the .img or .img.gz beside a .hdr (Refused data-file unless just one), else `path`."""
    if not _is_header(path):
        return path
    stem = path.name[: path.name.lower().rindex("hdr")]
    ends = ("IMG", "IMG.GZ") if "HDR" in path.name[len(stem) :] else ("img", "img.gz")
    found = [data for data in (path.with_name(stem + end) for end in ends) if data.is_file() and not data.is_symlink()]
    if len(found) != 1:
        raise Refused(
            "data-file", f"{path.name}: one .img or .img.gz beside it wanted, found {len(found)}; copy both files of the pair"
        )
    return found[0]


def _is_header(path: Path) -> bool:
    return path.name.lower().endswith((".hdr", ".hdr.gz"))


def _encoding(path: Path) -> Encoding:
    """Return what the name says; Refused where the content is not that."""
    if not path.name.lower().endswith(".gz"):
        return Encoding.PLAIN
    if read_head(path, len(GZIP_MAGIC)) != GZIP_MAGIC:
        raise not_a("gzip data", path, "if it was uncompressed on the way, take .gz off its name")
    return Encoding.GZIP


def _read_header(path: Path) -> tuple[_Kind, nib.Nifti1Header]:
    """Return which version a header is, and nibabel's view of it (in the file's byte order, nothing corrected)."""
    head = read_head(path, NIFTI_2.length, _encoding(path))
    for kind in (NIFTI_1, NIFTI_2):
        for endian, order in (("<", "little"), (">", "big")):
            if int.from_bytes(head[:4], order) == kind.length:  # type: ignore[arg-type]
                return kind, _parse(path, head, kind, endian)
    raise not_a("a NIfTI header", path, "name the file after what it is, or export it again")


def _parse(path: Path, head: bytes, kind: _Kind, endian: str) -> nib.Nifti1Header:
    if len(head) < kind.length:
        raise Refused(
            "truncated", f"{path.name}: a header of {kind.length} bytes wanted, found {len(head)}; copy or download it again"
        )
    header = kind.header(head[: kind.length], endianness=endian, check=False)
    magic, wanted = bytes(header["magic"])[:3], kind.pair if _is_header(path) else kind.single
    if magic == wanted:
        return header
    if magic in (kind.pair, kind.single):
        _bad_header(path.name, "the magic of a single file in .nii and of a pair in .hdr", "the other one", "rename the files")
    raise Refused(
        "no-geometry",
        f"{path.name}: NIfTI with an orientation wanted, found a header without its magic (Analyze 7.5?), which has none; "
        "convert it where the orientation is known",
    )


def _sizes(header: nib.Nifti1Header, name: str) -> list[int]:
    count = int(header["dim"][0])
    if not 1 <= count <= 7:
        _bad_header(name, "1 to 7 dimensions", str(count))
    return [int(n) for n in header["dim"][1 : count + 1]]


def _dtype(header: nib.Nifti1Header, name: str) -> np.dtype:
    code = int(header["datatype"])
    if code in COMPLEX:
        raise Refused("complex", f"{name}: real intensities wanted, found complex numbers; export the magnitude")
    if code in RGB:
        raise Refused("rgb", f"{name}: one intensity per voxel wanted, found colours; export the scan, not a rendering of it")
    if code not in DTYPES:
        wanted = "integers of 8 to 64 bits, float32 or float64 wanted"
        raise Refused("dtype", f"{name}: {wanted}, found NIfTI datatype {code}; convert it to int16 or float32")
    return np.dtype(DTYPES[code]).newbyteorder(header.endianness)


def _vox_offset(header: nib.Nifti1Header, kind: _Kind, is_pair: bool, name: str) -> int:
    """Return where the voxels begin in the decoded data; zero in a single file means right after the header, as for nibabel."""
    offset, first = float(header["vox_offset"]), 0 if is_pair else kind.length + 4
    if offset == 0:
        return first
    if not first <= offset <= MAX_VOX_OFFSET or offset != int(offset):
        _bad_header(name, f"voxels that begin at byte {first} to {MAX_VOX_OFFSET}", f"{offset:g}")
    return int(offset)


def _scaling(header: nib.Nifti1Header, name: str) -> tuple[float, float]:
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not np.isfinite(slope):
        return 1.0, 0.0
    if not np.isfinite(intercept):
        raise Refused(
            "bad-scaling", f"{name}: a finite intercept beside its slope wanted, found none; set scl_inter in the header"
        )
    return slope, intercept


def _geometry(header: nib.Nifti1Header, shape_zyx: tuple[int, int, int], affine: str, name: str) -> Geometry:
    """Return the frame by the rule at the top of this file."""
    coded = [kind for kind in AFFINES if header[f"{kind}_code"] > 0]
    if affine == BLANK:
        return _blank(header, coded, shape_zyx, name)
    if affine != "auto" and affine not in coded:
        found = f"only its {coded[0]}" if coded else "neither"
        raise Refused(
            "no-geometry", f"{name}: a coded {affine} wanted, found {found}; --set nifti_affine=auto takes what is there"
        )
    if not coded:
        raise Refused(
            "no-geometry", f"{name}: a coded sform or qform wanted, found neither, so left and right are unknown; {DIRECTIONS}"
        )
    if affine != "auto" or len(coded) == 1:
        return _frame(header, coded[0] if affine == "auto" else affine, shape_zyx, name)
    sform, qform = (_frame(header, kind, shape_zyx, name) for kind in AFFINES)
    _refuse_conflict(sform, qform, name)
    return sform


def _automatic_geometry(header: nib.Nifti1Header, shape_zyx: tuple[int, int, int], name: str) -> Geometry | None:
    """Return the frame where nobody picks one, None where that would be refused."""
    try:
        return _geometry(header, shape_zyx, "auto", name)
    except Refused:
        return None


def _blank(header: nib.Nifti1Header, coded: list[str], shape_zyx: tuple[int, int, int], name: str) -> Geometry:
    """Return the grid of indices for a header without an affine, or with no more than the identity; Refused for any other."""
    for kind in coded:
        found = _frame(header, kind, shape_zyx, name)
        if not np.allclose(found.affine_ras, np.eye(4), atol=1e-4):
            raise Refused(
                "not-blank",
                f"{name}: a blank header wanted, since a table is to say where the voxels are, found a {kind} with "
                f"{_words(found)}; this file says so itself (of CT-RATE, it is v2, in a folder of v1)",
            )
    return Geometry.from_arrays(shape_zyx, (0, 0, 0), np.eye(3)[::-1])


def _refuse_conflict(sform: Geometry, qform: Geometry, name: str) -> None:
    corners = sform.corners_lps()
    apart = np.linalg.norm(corners - qform.corners_lps(), axis=1).max()
    if apart <= max(AGREE_MM, AGREE_SHARE * np.linalg.norm(np.ptp(corners, axis=0))):
        return
    both = f"sform {_words(sform)}; qform {_words(qform)}"
    raise Refused(
        "affine-conflict",
        f"{name}: sform and qform that agree wanted, found corners {apart:.3g} mm apart: {both}; "
        "pick one with --set nifti_affine=sform or --set nifti_affine=qform",
    )


def _words(geometry: Geometry) -> str:
    spacing = " x ".join(f"{mm:.4g}" for mm in geometry.spacing_zyx_mm[::-1])
    origin = ", ".join(f"{mm:.2f}" for mm in RAS_LPS @ np.asarray(geometry.origin_lps))
    axes = "".join(nib.aff2axcodes(geometry.affine_ras))
    return f"{spacing} mm, origin ({origin}) RAS, axes {axes}"


def _frame(header: nib.Nifti1Header, kind: str, shape_zyx: tuple[int, int, int], name: str) -> Geometry:
    units = int(header["xyzt_units"]) & 7
    if units not in MM_PER_UNIT:
        _bad_header(name, "lengths in metres, millimetres or microns", f"units code {units}")
    affine = {"sform": _sform, "qform": _qform}[kind](header) * MM_PER_UNIT[units]
    others = [other for other in AFFINES if other != kind and header[f"{other}_code"] > 0]
    remedy = f"its {kind} is broken, try --set nifti_affine={others[0]}" if others else f"its {kind} is broken, {DIRECTIONS}"
    return frame(shape_zyx, RAS_LPS @ affine[:, 3], (RAS_LPS @ affine[:, :3]).T[::-1], name, remedy)


def _sform(header: nib.Nifti1Header) -> np.ndarray:
    """Return the sform [3, 4]: voxel (x, y, z, 1) -> RAS in the header's unit.

    Where the lengths of its axes are pixdim but for float32 rounding they are made pixdim, as ITK has it: 2e-8 of a voxel is
    1e-5 at the far end of 512, enough to differ by more than rounding on noise.
    """
    sform = np.stack([header[f"srow_{axis}"] for axis in "xyz"]).astype(float)
    sides, lengths = np.array(header["pixdim"][1:4], float), np.linalg.norm(sform[:, :3], axis=0)
    if (np.abs(lengths - sides) <= 1e-6 * sides).all():
        sform[:, :3] *= sides / np.where(lengths > 0, lengths, 1)
    return sform


def _qform(header: nib.Nifti1Header) -> np.ndarray:
    """Return the qform [3, 4]; not finite where its quaternion is longer than one or a voxel side is not positive.

    Its w is the root of what its three stored numbers leave of one. Where that is no more than their rounding in float32, w is
    zero: half a turn, as of most CT, stays one. (nibabel's get_qform does so up to three times that, and turns some scans by 0.07
    degrees.)
    """
    vector = np.array([header[f"quatern_{letter}"] for letter in "bcd"], float)
    sides = np.array(header["pixdim"][1:4], float)
    squared = float(vector @ vector)
    if not squared <= 1 + 1e-3 or not (sides > 0).all():
        return np.full((3, 4), np.nan)
    w = np.sqrt(1 - squared) if 1 - squared > np.finfo(np.float32).eps else 0.0
    turn = quat2mat([w, *vector])
    sides[2] *= -1 if header["pixdim"][0] < 0 else 1
    offset = [float(header[f"qoffset_{axis}"]) for axis in "xyz"]
    return np.column_stack([turn * sides, offset])


def _bad_header(name: str, wanted: str, found: str, remedy: str = "export the scan again") -> NoReturn:
    raise Refused("bad-header", f"{name}: {wanted} wanted, found {found}; {remedy}")
