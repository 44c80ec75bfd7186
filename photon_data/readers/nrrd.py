"""NRRD, its data attached or in a file, plain or gzip. Refused unless its space says what left and right are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import compress
from pathlib import Path
from typing import Any, Literal

import nrrd as pynrrd
import numpy as np

from photon_data.errors import EXPORT_AGAIN, not_a, refusal
from photon_data.readers.header import HeaderText, nrrd_data_file, nrrd_text
from photon_data.readers.stream import Compression, Stored, frame, grid_shape, mm_per_unit, scan_of, wrong_values
from photon_data.scan import Scan, Source
from photon_data.volume import Geometry

# Signs that turn the world of a space into LPS.
SPACES = {
    "left-posterior-superior": (1, 1, 1),
    "right-anterior-superior": (-1, -1, 1),
    "left-anterior-superior": (1, -1, 1),
}
SPACES |= {"lps": (1, 1, 1), "ras": (-1, -1, 1), "las": (1, -1, 1)}
COMPRESSIONS = {"raw": Compression.NONE, "gzip": Compression.GZIP, "gz": Compression.GZIP}
BYTE_ORDERS: dict[str, Literal["<", ">"]] = {"little": "<", "big": ">"}
VECTORS = ("space directions", "space origin", "measurement frame")
VECTOR = re.compile(r"none|\(\s*[^\s(),]+(?:\s*,\s*[^\s(),]+)*\s*\)")
VECTOR_LIST = re.compile(rf"(?:\s*(?:{VECTOR.pattern}))+\s*")
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
Header = Mapping[str, Any]
MAX_SKIP = 1 << 26
SPACE_REMEDY = "export it with its space, space directions and space origin (3D Slicer does)"


def open_nrrd(source: Source, max_voxels: int) -> Scan:
    """Return the Scan of an NRRD file or of a header and its data file. Refused as the package lists."""
    path = source.files[0]
    text = nrrd_text(path)
    if not (text.lines and text.lines[0].startswith("NRRD")):
        raise not_a("an NRRD header", path, "name the file after what it is, or export it again")
    header = _parse(text, path.name)
    data = nrrd_data_file(path)
    sizes, directions = _spatial_axes(header, path.name)
    shape_zyx = grid_shape(sizes, path.name, max_voxels)
    dtype = _dtype(header, path.name)
    geometry = _geometry(header, directions, shape_zyx, path.name)
    stored = _stored(header, data, text.length if data == path else 0, shape_zyx, dtype, path.name)
    return scan_of(stored, geometry, "nrrd")


def _parse(text: HeaderText, name: str) -> Header:
    """Return pynrrd's reading of the header; its errors quote the header, so ours does not quote them."""
    try:
        header = pynrrd.read_header([_plain_field(line) + "\n" for line in text.lines])
    except Exception:  # pynrrd lets through whatever its parsers meet: ValueError, KeyError, TypeError, its own
        raise refusal("bad-header", name, "an NRRD header of version 1 to 5", "errors in it", EXPORT_AGAIN) from None
    missing = [field for field in ("dimension", "sizes", "type", "encoding") if field not in header]
    if missing:
        raise refusal("bad-header", name, "a whole NRRD header", f"no {', '.join(missing)}", EXPORT_AGAIN)
    return header


def _plain_field(line: str) -> str:
    """Return a header line as pynrrd reads it, where teem and ITK read more ways to write it.

    "Space Directions: ( 3, 0 , 0 )(0,3,0)" -> "space directions: (3,0,0) (0,3,0)"
    """
    name, colon, value = line.partition(":")
    field = name.strip().lower()
    if not colon or line.startswith("#") or value.startswith("="):
        return line
    if field in VECTORS and VECTOR_LIST.fullmatch(value):
        value = " ".join("".join(vector.split()) for vector in VECTOR.findall(value))
    elif field == "sizes":
        value = value.replace(",", " ")
    return f"{field}: {value}"


def _spatial_axes(header: Header, name: str) -> tuple[list[int], np.ndarray]:
    """Return sizes and direction vectors (rows) of the axes that have a direction, the fastest first.

    An axis without one may only be one voxel long: colours and several volumes are refused.
    """
    sizes, directions = [int(n) for n in header["sizes"]], header.get("space directions")
    kinds = [str(kind).lower() for kind in header.get("kinds", [])]
    if any(kind in COLOURS for kind in kinds):
        raise wrong_values("rgb", name, "colours")
    if "complex" in kinds:
        raise wrong_values("complex", name, "complex numbers")
    if directions is None:
        grid_shape(sizes, name, 2**63)  # what is no volume is called so; all else lacks its geometry
        raise refusal("no-geometry", name, "space directions", "none: left and right are unknown", SPACE_REMEDY)
    if len(directions) != len(sizes) or len(sizes) != header["dimension"] or np.ndim(directions) != 2:
        raise refusal("bad-header", name, "a size and a direction for each axis", "other numbers", EXPORT_AGAIN)
    is_spatial = ~np.isnan(directions).all(axis=1)
    if any(n != 1 for n in compress(sizes, ~is_spatial)):
        found = " x ".join(str(n) for n in sizes)
        raise refusal("several-volumes", name, "one value per voxel", found, "split it into files")
    return list(compress(sizes, is_spatial)), np.asarray(directions)[is_spatial]


def _dtype(header: Header, name: str) -> np.dtype:
    letter = DTYPES.get(str(header["type"]).lower())
    if letter is None:
        raise wrong_values("dtype", name, "another type")
    order = BYTE_ORDERS.get(str(header.get("endian", "")).lower(), "<" if letter.endswith("1") else None)
    if order is None:
        raise refusal("bad-header", name, "an endian of little or big", "none", EXPORT_AGAIN)
    return np.dtype(letter).newbyteorder(order)


def _geometry(header: Header, directions: np.ndarray, shape_zyx: tuple[int, int, int], name: str) -> Geometry:
    space = str(header.get("space", "")).lower()
    if space not in SPACES or "space origin" not in header:
        raise refusal("no-geometry", name, "a space origin in LPS, RAS or LAS", "none", SPACE_REMEDY)
    mm = mm_per_unit(header.get("space units", []), name)
    origin = np.asarray(header["space origin"], float)
    if directions.shape != (3, 3) or origin.shape != (3,):
        raise refusal("bad-geometry", name, "directions and an origin in three dimensions", "others", SPACE_REMEDY)
    signs = np.array(SPACES[space]) * mm
    return frame(shape_zyx, origin * signs, (directions * signs)[::-1], name, SPACE_REMEDY)


def _stored(
    header: Header, data: Path, start: int, shape_zyx: tuple[int, int, int], dtype: np.dtype, name: str
) -> Stored:
    compression = COMPRESSIONS.get(str(header["encoding"]).lower())
    if compression is None:
        raise refusal("encoding", name, "encoding raw or gzip", "another", "save it again as raw or gzip")
    if header.get("line skip", header.get("lineskip", 0)):
        raise refusal("encoding", name, "no line skip", "one", "save the scan again without")
    skip = int(header.get("byte skip", header.get("byteskip", 0)))
    stored = Stored(data, compression, start, 0, shape_zyx, dtype)
    if skip == -1 and compression is Compression.NONE:  # the voxels are the end of the file
        start, skip = max(start, data.stat().st_size - stored.expected_bytes), 0
    if not 0 <= skip <= MAX_SKIP:
        raise refusal("bad-header", name, f"a byte skip of 0 to {MAX_SKIP}", skip, EXPORT_AGAIN)
    return Stored(data, compression, start, skip, shape_zyx, dtype)
