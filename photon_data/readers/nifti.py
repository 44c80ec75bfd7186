"""NIfTI-1 and NIfTI-2, one file or a pair, as the standard reads; what two libraries read differently is refused.

Geometry: the sform where it is coded, else the qform, else the scan is refused. Where both are coded and differ (or the
sform is broken), it is refused too, until a person picks one. A pick changes nothing where there is no conflict.
Lengths are millimetres where the header names no unit; metres and microns are converted, in sform and qform alike.

Scaling: HU = slope * stored + intercept. A slope of zero or one that is not finite means "not scaled", intercept
included (as the standard and nibabel have it); a good slope with an intercept that is not finite is refused.

What is written here is repeatable: neither time nor name is in it, so the same voxels always give the same bytes.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.quaternions import quat2mat

from photon_data.errors import COPY_AGAIN, EXPORT_AGAIN, Refused, not_a, refusal
from photon_data.files import write_whole
from photon_data.readers.header import nifti_data_file
from photon_data.readers.stream import Compression, Stored, frame, grid_shape, read_head, scan_of, wrong_values
from photon_data.scan import Change, Scan, Source
from photon_data.volume import RAS_LPS, Geometry, Volume

AFFINES = ("sform", "qform")
# Values of `affine`: the header must have no affine, since a table gives the grid; a person gives one, whatever it has.
BLANK, GIVEN = "blank", "given"

# datatype code -> numpy's letter; what is not here is refused by name or as unknown.
DTYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
COMPLEX, RGB = (32, 1792, 2048), (128, 2304)
MM_PER_UNIT = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}

# Header extensions lie between header and voxels; a header that claims more of them is not believed.
MAX_VOX_OFFSET = 1 << 26
# How far apart sform and qform may place the corners of a scan: 0.1 mm, or this share of its diagonal. A
# float32 quaternion can be off by so much near half a turn, which is usual for CT (w is the root of a difference).
AGREE_MM, AGREE_SHARE = 0.1, 1e-3
LEAST_DEGREES = 0.05  # smaller turns are not worth a word

DIRECTIONS = "set a right sform (nibabel, ITK-SNAP or dcm2niix write one)"


def open_nifti(source: Source, max_voxels: int, affine: str = "auto") -> Scan:
    """Return the Scan of a NIfTI file or pair; Refused as the package lists.

    `affine` is "auto", "sform", "qform", "blank" or "given". A pick without which the scan would be refused is recorded
    in `Scan.choices`. With "given", a scan whose header has no geometry is on the grid of its indices.
    """
    path = source.files[0]
    header = _read_header(path)
    data = nifti_data_file(path) if _is_pair(path) else path
    shape_zyx = grid_shape(_sizes(header, path.name), path.name, max_voxels)
    compression = _compression(data)
    skip = _vox_offset(header, header.single_vox_offset if data == path else 0, path.name)
    stored = Stored(data, compression, 0, skip, shape_zyx, _dtype(header, path.name))
    scaling, change = _scaling(header, path.name), None
    try:
        geometry = _geometry(header, shape_zyx, BLANK if affine == BLANK else "auto", path.name)
    except Refused as conflict:
        if affine not in (*AFFINES, GIVEN):
            raise
        geometry = _indices(shape_zyx) if affine == GIVEN else _geometry(header, shape_zyx, affine, path.name)
        taken = "the affine of the overrides" if affine == GIVEN else f"the {affine}"
        change = Change(conflict.code, f"found {conflict.found}", f"{taken} was taken")
    scan = scan_of(stored, geometry, "nifti", *scaling)
    if change is None:
        return scan
    return replace(scan, choices={} if affine == GIVEN else {"nifti_affine": affine}, changes=(change,))


def _compression(path: Path) -> Compression:
    """Return what the name says; Refused where the content is not that."""
    if not path.name.lower().endswith(".gz"):
        return Compression.NONE
    if read_head(path, 2, Compression.NONE) != b"\x1f\x8b":
        raise not_a("gzip data", path, "if it was uncompressed on the way, take .gz off its name")
    return Compression.GZIP


def _read_header(path: Path) -> nib.Nifti1Header:
    """Return nibabel's view of a header, of either version and in the file's byte order, nothing corrected."""
    head = read_head(path, nib.Nifti2Header.sizeof_hdr, _compression(path))
    for version, order in product((nib.Nifti1Header, nib.Nifti2Header), "<>"):
        length = version.sizeof_hdr
        if int.from_bytes(head[:4], "little" if order == "<" else "big") == length:
            break
    else:
        raise not_a("a NIfTI header", path, "name the file after what it is, or export it again")
    if len(head) < length:
        raise refusal("truncated", path.name, f"a header of {length} bytes", len(head), COPY_AGAIN)
    header = version(head[:length], endianness=order, check=False)
    magic, magics = bytes(header["magic"])[:3], (version.single_magic, version.pair_magic)
    if magic == magics[_is_pair(path)]:
        return header
    if magic in magics:
        expected = "the magic of a single file in .nii and of a pair in .hdr"
        raise refusal("bad-header", path.name, expected, "the other one", "rename the files")
    found = "a header without its magic (Analyze 7.5?), which has none"
    remedy = "convert it where the orientation is known"
    raise refusal("no-geometry", path.name, "NIfTI with an orientation", found, remedy)


def _is_pair(path: Path) -> bool:
    return path.name.lower().endswith((".hdr", ".hdr.gz"))


def _sizes(header: nib.Nifti1Header, name: str) -> list[int]:
    count = int(header["dim"][0])
    if not 1 <= count <= 7:
        raise refusal("bad-header", name, "1 to 7 dimensions", count, EXPORT_AGAIN)
    return [int(n) for n in header["dim"][1 : count + 1]]


def _dtype(header: nib.Nifti1Header, name: str) -> np.dtype:
    code = int(header["datatype"])
    if code in COMPLEX:
        raise wrong_values("complex", name, "complex numbers")
    if code in RGB:
        raise wrong_values("rgb", name, "colours")
    if code not in DTYPES:
        raise wrong_values("dtype", name, f"NIfTI datatype {code}")
    return np.dtype(DTYPES[code]).newbyteorder(header.endianness)


def _vox_offset(header: nib.Nifti1Header, first: int, name: str) -> int:
    """Return where the voxels begin in the decoded data, not before `first`; zero means there, as for nibabel."""
    offset = float(header["vox_offset"])
    if offset == 0:
        return first
    if not first <= offset <= MAX_VOX_OFFSET or offset != int(offset):
        expected = f"voxels that begin at byte {first} to {MAX_VOX_OFFSET}"
        raise refusal("bad-header", name, expected, f"{offset:g}", EXPORT_AGAIN)
    return int(offset)


def _scaling(header: nib.Nifti1Header, name: str) -> tuple[float, float]:
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not np.isfinite(slope):
        return 1.0, 0.0
    if not np.isfinite(intercept):
        raise refusal("bad-scaling", name, "a finite intercept beside its slope", "none", "set scl_inter in the header")
    return slope, intercept


def _geometry(header: nib.Nifti1Header, shape_zyx: tuple[int, int, int], affine: str, name: str) -> Geometry:
    """Return the frame by the rule at the top of this file."""
    coded = [form for form in AFFINES if header[f"{form}_code"] > 0]
    if affine == BLANK:
        return _blank(header, coded, shape_zyx, name)
    if not coded:
        found = "neither, so left and right are unknown"
        raise refusal("no-geometry", name, "a coded sform or qform", found, DIRECTIONS)
    if affine in coded or len(coded) == 1:
        return _frame(header, affine if affine in coded else coded[0], shape_zyx, name)
    sform, qform = (_frame(header, form, shape_zyx, name) for form in AFFINES)
    corners = sform.corners_lps()
    apart = np.linalg.norm(corners - qform.corners_lps(), axis=1).max()
    if apart > max(AGREE_MM, AGREE_SHARE * np.linalg.norm(np.ptp(corners, axis=0))):
        found = f"corners {apart:.3g} mm apart ({_difference(sform, qform)}): sform {_words(sform)}; "
        found += f"qform {_words(qform)}"
        remedy = "pick one with --set nifti_affine=sform or --set nifti_affine=qform"
        raise refusal("affine-conflict", name, "sform and qform that agree", found, remedy, "affine-conflict=?")
    return sform


def _blank(header: nib.Nifti1Header, coded: list[str], shape_zyx: tuple[int, int, int], name: str) -> Geometry:
    """Return the grid of indices for a header with no affine, or none but the identity; Refused for any other."""
    for form in coded:
        own = _frame(header, form, shape_zyx, name)
        if not np.allclose(own.affine_ras, np.eye(4), atol=1e-4):
            expected = "a blank header, because a table says where the voxels are"
            remedy = "this file says so itself (of CT-RATE, it is v2, in a folder of v1)"
            raise refusal("not-blank", name, expected, f"a {form} with {_words(own)}", remedy)
    return _indices(shape_zyx)


def _indices(shape_zyx: tuple[int, int, int]) -> Geometry:
    return Geometry.from_arrays(shape_zyx, (0, 0, 0), np.eye(3)[::-1])


def _difference(sform: Geometry, qform: Geometry) -> str:
    """Return in words what makes two frames differ: shear, flip, turn, spacing, shift; "only" where it is one of them.

    A qform has no spacing of its own but pixdim's, so that both say the same is no evidence.
    """
    both = [np.asarray(geometry.steps_lps)[::-1] for geometry in (sform, qform)]  # rows: x, y, z
    lengths = [np.linalg.norm(steps, axis=1) for steps in both]
    units = [steps / mm[:, None] for steps, mm in zip(both, lengths, strict=True)]
    angles = [np.degrees(np.arccos(np.clip(rows @ np.roll(rows, 1, axis=0).T, -1, 1).diagonal())) for rows in units]
    shear = np.abs(angles[0] - 90).max()
    turns = np.degrees(np.arccos(np.clip((units[0] * units[1]).sum(axis=1), -1, 1)))
    flips = [axis for axis, degrees in zip("xyz", turns, strict=True) if degrees > 180 - LEAST_DEGREES]
    turn = turns.max() if len(flips) < np.count_nonzero(turns > LEAST_DEGREES) else 0.0
    shift = np.linalg.norm(np.subtract(sform.origin_lps, qform.origin_lps))
    steps = [
        f"{axis} step {mm:.4g} mm in the sform, {pixdim:.4g} in qform and pixdim"
        for axis, mm, pixdim in zip("xyz", *lengths, strict=True)
        if abs(mm - pixdim) > AGREE_SHARE * pixdim
    ]
    parts = [f"sform sheared by {shear:.3g} degrees, as by a tilted gantry"] if shear > LEAST_DEGREES else []
    parts += [f"axes turned by {turn:.3g} degrees"] if turn > LEAST_DEGREES else []
    parts += [f"{' and '.join(flips)} flipped"] if flips and not turn else []
    parts += steps
    parts += [f"first voxels {shift:.3g} mm apart"] if shift > AGREE_MM else []
    return ("only " if len(parts) == 1 else "") + ", ".join([*parts, *([] if steps else ["pixdim agrees with both"])])


def _words(geometry: Geometry) -> str:
    spacing = " x ".join(f"{mm:.4g}" for mm in geometry.spacing_zyx_mm[::-1])
    ends = (geometry.world((0, 0, 0)), geometry.world((geometry.shape_zyx[0] - 1, 0, 0)))
    first, last = (", ".join(f"{mm:.1f}" for mm in RAS_LPS @ end + 0.0) for end in ends)
    axes = "".join(nib.aff2axcodes(geometry.affine_ras))
    return f"{spacing} mm, axes {axes}, slices ({first}) to ({last}) RAS"


def _frame(header: nib.Nifti1Header, form: str, shape_zyx: tuple[int, int, int], name: str) -> Geometry:
    units = int(header["xyzt_units"]) & 7
    if units not in MM_PER_UNIT:
        raise refusal("bad-header", name, "lengths in m, mm or microns", f"units code {units}", EXPORT_AGAIN)
    affine = (_sform(header) if form == "sform" else _qform(header)) * MM_PER_UNIT[units]
    others = [other for other in AFFINES if other != form and header[f"{other}_code"] > 0]
    remedy = f"its {form} is broken, {f'try --set nifti_affine={others[0]}' if others else DIRECTIONS}"
    return frame(shape_zyx, RAS_LPS @ affine[:, 3], (RAS_LPS @ affine[:, :3]).T[::-1], name, remedy)


def _sform(header: nib.Nifti1Header) -> np.ndarray:
    """Return the sform [3, 4]: voxel (x, y, z, 1) -> RAS in the header's unit.

    Where the lengths of its axes are pixdim but for float32 rounding they are made pixdim, as ITK has it: 2e-8 of a
    voxel is 1e-5 at the far end of 512, enough to differ by more than rounding on noise.
    """
    sform = header.get_sform()[:3]
    sides, lengths = np.array(header["pixdim"][1:4], float), np.linalg.norm(sform[:, :3], axis=0)
    if (np.abs(lengths - sides) <= 1e-6 * sides).all():
        sform[:, :3] *= sides / np.where(lengths > 0, lengths, 1)
    return sform


def _qform(header: nib.Nifti1Header) -> np.ndarray:
    """Return the qform [3, 4]; not finite where its quaternion is longer than one or a voxel side is not positive.

    Its w is the root of what its three numbers leave of one; zero where that is no more than their rounding in float32:
    half a turn, as of most CT, stays one. (nibabel's get_qform goes three times as far and turns some by 0.07 degrees.)
    """
    vector = np.array([header[f"quatern_{letter}"] for letter in "bcd"], float)
    sides = np.array(header["pixdim"][1:4], float)
    squared = float((vector * vector).sum())  # no BLAS, see `photon_data.volume.inverse`
    if not squared <= 1 + 1e-3 or not (sides > 0).all():
        return np.full((3, 4), np.nan)
    w = np.sqrt(1 - squared) if 1 - squared > np.finfo(np.float32).eps else 0.0
    turn = quat2mat([w, *vector])
    sides[2] *= -1 if header["pixdim"][0] < 0 else 1
    return np.column_stack([turn * sides, [float(header[f"qoffset_{axis}"]) for axis in "xyz"]])


# --- files of ours


def write_int16_nifti(volume: Volume, path: Path) -> None:
    """Write int16 HU as .nii.gz, axes L, P, S: what the authors' code reads."""
    write_nifti(path, nifti_header(volume.geometry, "<i2"), volume.numpy().astype("<i2", copy=False), compresslevel=3)


def nifti_header(geometry: Geometry, dtype: str, slope: float = 1.0, intercept: float = 0.0) -> bytes:
    """Return the 352 bytes before the voxels. sform and qform agree; a sheared grid has a sform only."""
    header = nib.Nifti1Header(endianness="<")
    header.set_data_shape(geometry.shape_zyx[::-1])
    header.set_data_dtype(dtype)
    header.set_sform(geometry.affine_ras, code=1)
    if geometry.is_orthogonal():
        header.set_qform(geometry.affine_ras, code=1)
    else:
        header["pixdim"][1:4] = geometry.spacing_zyx_mm[::-1]
    header.set_xyzt_units("mm")
    header["vox_offset"] = 352
    header.set_slope_inter(slope, intercept)
    return header.binaryblock + bytes(4)


def write_nifti(path: Path, header: bytes, planes: Iterable[np.ndarray], compresslevel: int = 1) -> None:
    """Write header and voxels, gzipped if the name ends in .gz; the name appears when the file is complete.

    The gzip stream carries neither time nor file name, so the same voxels always give the same bytes.
    """
    with write_whole(path) as temporary, temporary.open("wb") as raw:
        file = gzip.GzipFile("", "wb", compresslevel, raw, mtime=0) if path.suffix == ".gz" else raw
        with file:
            file.write(header)
            for plane in planes:
                file.write(plane.tobytes())
