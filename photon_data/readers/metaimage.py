"""MetaImage (.mha, or .mhd with a data file), plain or zlib; what ITK would fill in by default is refused, not guessed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from photon_data.errors import Refused
from photon_data.readers.checks import frame, grid_shape, not_a, scan_of
from photon_data.readers.stream import Encoding, Stored, beside, read_lines
from photon_data.scan import Scan, Source
from photon_data.volume import Geometry

NAME = "metaimage"

# MET_LONG has 4 bytes in MetaIO on every platform; ITK writes 8 as MET_LONG_LONG.
DTYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG": "i4",
    "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}
# One name for what the format has several for.
SYNONYMS = {
    "Position": "Offset",
    "Origin": "Offset",
    "Rotation": "TransformMatrix",
    "Orientation": "TransformMatrix",
    "ElementByteOrderMSB": "BinaryDataByteOrderMSB",
}
LAST = "ElementDataFile"
REMEDY = "export the scan again with SimpleITK or 3D Slicer"


class _Header:
    """The fields of a header by name, read as numbers or flags; Refused bad-header where they are not that."""

    def __init__(self, fields: Mapping[str, str], length: int, path: Path) -> None:
        self.fields = fields
        self.length = length
        self.path = path

    def numbers(self, key: str, count: int) -> np.ndarray | None:
        """Return exactly `count` numbers, None where the field is missing."""
        if key not in self.fields:
            return None
        try:
            values = np.array([float(word) for word in self.fields[key].split()])
        except ValueError:
            values = np.array([])
        if len(values) != count:
            raise self.bad(f"{count} numbers as {key}", "others")
        return values

    def whole(self, key: str, default: int | None = None) -> int:
        """Return one whole number."""
        try:
            return int(self.fields[key]) if default is None or key in self.fields else default
        except (KeyError, ValueError):
            raise self.bad(f"a whole number as {key}", "none") from None

    def flag(self, key: str, default: bool | None = None) -> bool:
        """Return True or False."""
        value = {"t": True, "1": True, "f": False, "0": False}.get(self.fields.get(key, "")[:1].lower(), default)
        if value is None:
            raise self.bad(f"{key} = True or False", "neither")
        return value

    def bad(self, wanted: str, found: str) -> Refused:
        """Return the refusal of a header that cannot be."""
        return Refused("bad-header", f"{self.path.name}: {wanted} wanted, found {found}; {REMEDY}")


def open_metaimage(source: Source, max_voxels: int) -> Scan:
    """Return the Scan of a MetaImage file or of a header and its data file. Refused as the package lists."""
    header = _read_header(source.files[0])
    data = _data_file(header)
    shape_zyx = grid_shape(_sizes(header), header.path.name, max_voxels)
    return scan_of(_stored(header, data, shape_zyx, _dtype(header)), _geometry(header, shape_zyx), NAME)


def data_file(path: Path) -> Path:
    """Return the file with the voxels of the header in `path`: `path` itself, or one in its folder; Refused data-file."""
    return _data_file(_read_header(path))


def _data_file(header: _Header) -> Path:
    reference = header.fields[LAST]
    return header.path if reference.upper() == "LOCAL" else beside(header.path, reference)


def _read_header(path: Path) -> _Header:
    text = read_lines(path, lambda line: _field(line)[0] == LAST)
    fields = dict(_field(line) for line in text.lines)
    if "NDims" not in fields or LAST not in fields:
        raise not_a("a MetaImage header", path, "name the file after what it is, or export it again")
    return _Header(fields, text.length, path)


def _field(line: str) -> tuple[str, str]:
    key, _, value = line.partition("=")
    return SYNONYMS.get(key.strip(), key.strip()), value.strip()


def _sizes(header: _Header) -> list[int]:
    count = header.whole("NDims")
    sizes = header.numbers("DimSize", count) if 1 <= count <= 8 else None
    if sizes is None or not (np.isfinite(sizes).all() and (sizes == np.floor(sizes)).all()):
        raise header.bad("NDims whole numbers as DimSize", "others")
    channels, name = header.whole("ElementNumberOfChannels", 1), header.path.name
    if channels in (3, 4):
        raise Refused("rgb", f"{name}: one intensity per voxel wanted, found {channels} channels; export the scan itself")
    if channels != 1:
        raise Refused("several-volumes", f"{name}: one value per voxel wanted, found {channels}; split them into files")
    return [int(n) for n in sizes]


def _dtype(header: _Header) -> np.dtype:
    letter = DTYPES.get(header.fields.get("ElementType", ""))
    if letter is None:
        wanted = "integers of 8 to 64 bits, MET_FLOAT or MET_DOUBLE wanted"
        raise Refused("dtype", f"{header.path.name}: {wanted}, found another type; convert it to MET_SHORT or MET_FLOAT")
    one_byte = letter.endswith("1")
    is_big = header.flag("BinaryDataByteOrderMSB", default=False if one_byte else None)
    return np.dtype(letter).newbyteorder(">" if is_big else "<")


def _geometry(header: _Header, shape_zyx: tuple[int, int, int]) -> Geometry:
    """Return the frame; the rows of TransformMatrix are the unit directions of x, y, z in LPS."""
    count, name = header.whole("NDims"), header.path.name
    spacing = header.numbers("ElementSpacing", count)
    spacing = header.numbers("ElementSize", count) if spacing is None else spacing
    origin, matrix = header.numbers("Offset", count), header.numbers("TransformMatrix", count * count)
    if spacing is None or origin is None or matrix is None:
        remedy = "add the lines where you know them, or export the scan again"
        raise Refused("no-geometry", f"{name}: ElementSpacing, Offset and TransformMatrix wanted, found not all; {remedy}")
    if not (spacing[:3] > 0).all():
        raise Refused("bad-geometry", f"{name}: an ElementSpacing above zero wanted, found others; {REMEDY}")
    directions = matrix.reshape(count, count)
    if directions[:3, 3:].any():
        raise Refused("bad-geometry", f"{name}: axes in three dimensions wanted, found a fourth mixed in; {REMEDY}")
    steps = directions[:3, :3] * spacing[:3, None]
    return frame(shape_zyx, origin[:3], steps[::-1], name, REMEDY)


def _stored(header: _Header, data: Path, shape_zyx: tuple[int, int, int], dtype: np.dtype) -> Stored:
    start, name = header.length if data == header.path else 0, header.path.name
    if not header.flag("BinaryData", default=True):
        raise Refused("encoding", f"{name}: binary data wanted, found numbers as text; {REMEDY}")
    is_compressed, before = header.flag("CompressedData", default=False), header.whole("HeaderSize", 0)
    stored = Stored(data, Encoding.ZLIB if is_compressed else Encoding.PLAIN, start, 0, shape_zyx, dtype)
    if is_compressed:
        _check_compressed_size(header, stored)
    if before and (is_compressed or before < -1 or data == header.path):
        raise header.bad("no HeaderSize, or one for plain data in a file of its own,", str(before))
    if before == -1:
        before = max(0, data.stat().st_size - stored.wanted_bytes)
    return Stored(data, stored.encoding, start + before, 0, shape_zyx, dtype)


def _check_compressed_size(header: _Header, stored: Stored) -> None:
    wanted = header.whole("CompressedDataSize", 0)
    found = stored.path.stat().st_size - stored.start
    if wanted and wanted != found:
        code, remedy = ("truncated", "copy or download it again") if found < wanted else ("surplus", REMEDY)
        raise Refused(code, f"{stored.path.name}: {wanted:,} compressed bytes wanted by its header, found {found:,}; {remedy}")
