"""NRRD, with its data attached or in a file of their own, plain or gzip; only where its space says what left and right are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import nrrd as pynrrd
import numpy as np

from photon_data.errors import Refused
from photon_data.readers.checks import frame, grid_shape, not_a, scan_of
from photon_data.readers.stream import Encoding, HeaderText, Stored, beside, read_lines
from photon_data.scan import Scan, Source
from photon_data.volume import Geometry

NAME = "nrrd"

# Signs that turn the world of a space into LPS.
SPACES = {
    "left-posterior-superior": (1, 1, 1),
    "right-anterior-superior": (-1, -1, 1),
    "left-anterior-superior": (1, -1, 1),
    "lps": (1, 1, 1),
    "ras": (-1, -1, 1),
    "las": (1, -1, 1),
}
ENCODINGS = {"raw": Encoding.PLAIN, "gzip": Encoding.GZIP, "gz": Encoding.GZIP}
MILLIMETRES = ("mm", "millimeter", "millimeters", "millimetre", "millimetres", "")
COLOURS = ("rgb-color", "hsv-color", "xyz-color", "rgba-color", "3-color", "4-color")

_SPELLINGS = {
    "i1": "signed char|int8|int8_t",
    "u1": "uchar|unsigned char|uint8|uint8_t",
    "i2": "short|short int|signed short|signed short int|int16|int16_t",
    "u2": "ushort|unsigned short|unsigned short int|uint16|uint16_t",
    "i4": "int|signed int|int32|int32_t",
    "u4": "uint|unsigned int|uint32|uint32_t",
    "i8": "longlong|long long|long long int|signed long long|signed long long int|int64|int64_t",
    "u8": "ulonglong|unsigned long long|unsigned long long int|uint64|uint64_t",
    "f4": "float",
    "f8": "double",
}
DTYPES = {name: letter for letter, names in _SPELLINGS.items() for name in names.split("|")}

SPACE_REMEDY = "export it with its space, space directions and space origin (3D Slicer does)"


class _Axes(NamedTuple):
    """The spatial axes of a header, fastest first: their sizes and their direction vectors [3, 3], one a row."""

    sizes: list[int]
    directions: np.ndarray


def open_nrrd(source: Source, max_voxels: int) -> Scan:
    """Return the Scan of an NRRD file or of a header and its data file. Refused as the package lists."""
    path = source.files[0]
    text = _read_text(path)
    header = _parse(text, path.name)
    data = _data_file(path, header)
    axes = _spatial_axes(header, path.name)
    shape_zyx = grid_shape(axes.sizes, path.name, max_voxels)
    dtype = _dtype(header, path.name)
    geometry = _geometry(header, axes, shape_zyx, path.name)
    stored = _stored(header, data, text.length if data == path else 0, shape_zyx, dtype, path.name)
    return scan_of(stored, geometry, NAME)


def data_file(path: Path) -> Path:
    """Return the file with the voxels of the header in `path`: `path` itself, or one in its folder; Refused data-file."""
    return _data_file(path, _parse(_read_text(path), path.name))


def _data_file(path: Path, header: Mapping[str, Any]) -> Path:
    reference = header.get("data file", header.get("datafile"))
    return path if reference is None else beside(path, reference)


def _read_text(path: Path) -> HeaderText:
    text = read_lines(path, lambda line: line == "")
    if not (text.lines and text.lines[0].startswith("NRRD")):
        raise not_a("an NRRD header", path, "name the file after what it is, or export it again")
    return text


def _parse(text: HeaderText, name: str) -> Mapping[str, Any]:
    """Return pynrrd's reading of the header; its errors quote the header, so ours does not quote them."""
    try:
        header = pynrrd.read_header([line + "\n" for line in text.lines])
    except Exception:  # pynrrd lets through whatever its parsers meet: ValueError, KeyError, TypeError, its own
        raise Refused(
            "bad-header", f"{name}: an NRRD header of version 1 to 5 wanted, found errors in it; export it again"
        ) from None
    missing = [field for field in ("dimension", "sizes", "type", "encoding") if field not in header]
    if missing:
        raise Refused("bad-header", f"{name}: a whole NRRD header wanted, it has no {', '.join(missing)}; export it again")
    return header


def _spatial_axes(header: Mapping[str, Any], name: str) -> _Axes:
    """Return the axes that have a direction. One without may only be one voxel long: colours and several volumes are refused."""
    sizes, directions = [int(n) for n in header["sizes"]], header.get("space directions")
    kinds = [str(kind).lower() for kind in header.get("kinds", [])]
    if any(kind in COLOURS for kind in kinds):
        raise Refused("rgb", f"{name}: one intensity per voxel wanted, found colours; export the scan, not a rendering of it")
    if "complex" in kinds:
        raise Refused("complex", f"{name}: real intensities wanted, found complex numbers; export the magnitude")
    if directions is None:
        grid_shape(sizes, name, 2**63)  # what is no volume is called so; all else lacks its geometry
        raise Refused("no-geometry", f"{name}: space directions wanted, found none: left and right are unknown; {SPACE_REMEDY}")
    if len(directions) != len(sizes) or len(sizes) != header["dimension"] or np.ndim(directions) != 2:
        raise Refused("bad-header", f"{name}: a size and a direction for each axis wanted, found other numbers; export it again")
    has_direction = ~np.isnan(directions).all(axis=1)
    shown = " x ".join(str(n) for n in sizes)
    if any(n != 1 for n, spatial in zip(sizes, has_direction, strict=True) if not spatial):
        raise Refused("several-volumes", f"{name}: one value per voxel wanted, found {shown}; split it into files")
    spatial_sizes = [n for n, spatial in zip(sizes, has_direction, strict=True) if spatial]
    return _Axes(spatial_sizes, np.asarray(directions)[has_direction])


def _geometry(header: Mapping[str, Any], axes: _Axes, shape_zyx: tuple[int, int, int], name: str) -> Geometry:
    space = str(header.get("space", "")).lower()
    if space not in SPACES or "space origin" not in header:
        raise Refused("no-geometry", f"{name}: a space origin in LPS, RAS or LAS wanted, found none; {SPACE_REMEDY}")
    if any(unit.lower() not in MILLIMETRES for unit in header.get("space units", [])):
        raise Refused("bad-geometry", f"{name}: space units of mm wanted, found others; {SPACE_REMEDY}")
    origin = np.asarray(header["space origin"], float)
    if axes.directions.shape != (3, 3) or origin.shape != (3,):
        raise Refused(
            "bad-geometry", f"{name}: directions and an origin in three dimensions wanted, found others; {SPACE_REMEDY}"
        )
    signs = np.array(SPACES[space])
    return frame(shape_zyx, origin * signs, (axes.directions * signs)[::-1], name, SPACE_REMEDY)


def _dtype(header: Mapping[str, Any], name: str) -> np.dtype:
    letter = DTYPES.get(str(header["type"]).lower())
    if letter is None:
        wanted = "integers of 8 to 64 bits, float or double wanted"
        raise Refused("dtype", f"{name}: {wanted}, found another type; convert it to int16 or float")
    orders: dict[str, Literal["<", ">"]] = {"little": "<", "big": ">"}
    order = orders.get(str(header.get("endian", "")).lower(), "<" if letter.endswith("1") else None)
    if order is None:
        raise Refused("bad-header", f"{name}: an endian of little or big wanted, found none; export it again")
    return np.dtype(letter).newbyteorder(order)


def _stored(
    header: Mapping[str, Any], data: Path, start: int, shape_zyx: tuple[int, int, int], dtype: np.dtype, name: str
) -> Stored:
    encoding = ENCODINGS.get(str(header["encoding"]).lower())
    if encoding is None:
        raise Refused("encoding", f"{name}: encoding raw or gzip wanted, found another; save it again as raw or gzip")
    if header.get("line skip", header.get("lineskip", 0)):
        raise Refused("encoding", f"{name}: no line skip wanted, found one; save the scan again without")
    skip = int(header.get("byte skip", header.get("byteskip", 0)))
    voxel_bytes = Stored(data, encoding, start, 0, shape_zyx, dtype).wanted_bytes
    if skip == -1 and encoding is Encoding.PLAIN:
        start, skip = max(start, data.stat().st_size - voxel_bytes), 0
    if not 0 <= skip <= 1 << 26:
        raise Refused("bad-header", f"{name}: a byte skip of 0 to {1 << 26} wanted, found {skip}; export it again")
    return Stored(data, encoding, start, skip, shape_zyx, dtype)
