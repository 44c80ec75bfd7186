"""MetaImage (.mha, or .mhd with a data file), plain or zlib. What ITK fills in by default is refused, not guessed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from photon_data.errors import COPY_AGAIN, Refused, not_a, refusal
from photon_data.readers.header import METAIMAGE_LAST, metaimage_data_file, metaimage_text
from photon_data.readers.stream import Compression, Stored, frame, grid_shape, mm_per_unit, scan_of, wrong_values
from photon_data.scan import Scan, Source
from photon_data.volume import Geometry

# Bytes of an integer: MET_LONG has 4 in MetaIO on every platform; ITK writes 8 as MET_LONG_LONG.
INTEGERS = {"CHAR": 1, "SHORT": 2, "INT": 4, "LONG": 4, "LONG_LONG": 8}
DTYPES = {"MET_FLOAT": "f4", "MET_DOUBLE": "f8"}
DTYPES |= {f"MET_{name}": f"i{size}" for name, size in INTEGERS.items()}
DTYPES |= {f"MET_U{name}": f"u{size}" for name, size in INTEGERS.items()}
# One name for what the format has several for.
SYNONYMS = {"Position": "Offset", "Origin": "Offset", "ElementByteOrderMSB": "BinaryDataByteOrderMSB"}
SYNONYMS |= {"Rotation": "TransformMatrix", "Orientation": "TransformMatrix"}
REMEDY = "export the scan again with SimpleITK or 3D Slicer"


class _Header:
    """The fields of a header by name, read as numbers (None where missing) or flags; Refused for anything else."""

    def __init__(self, fields: Mapping[str, str], name: str) -> None:
        self.fields, self.name = fields, name

    def numbers(self, key: str, count: int) -> np.ndarray | None:
        if key not in self.fields:
            return None
        try:
            values = np.array([float(word) for word in self.fields[key].split()])
        except ValueError:
            values = np.array([])
        if len(values) != count:
            raise self.refused("bad-header", f"{count} numbers as {key}", "others")
        return values

    def whole(self, key: str, default: int | None = None) -> int:
        try:
            return int(self.fields[key]) if default is None or key in self.fields else default
        except (KeyError, ValueError):
            raise self.refused("bad-header", f"a whole number as {key}", "none") from None

    def flag(self, key: str, default: bool | None = None) -> bool:
        value = {"t": True, "1": True, "f": False, "0": False}.get(self.fields.get(key, "")[:1].lower(), default)
        if value is None:
            raise self.refused("bad-header", f"{key} = True or False", "neither")
        return value

    def refused(self, code: str, expected: str, found: str, remedy: str = REMEDY) -> Refused:
        return refusal(code, self.name, expected, found, remedy)


def open_metaimage(source: Source, max_voxels: int) -> Scan:
    """Return the Scan of a MetaImage file or of a header and its data file. Refused as the package lists."""
    path = source.files[0]
    text = metaimage_text(path)
    pairs = [(key.strip(), value.strip()) for key, _, value in (line.partition("=") for line in text.lines)]
    header = _Header({SYNONYMS.get(key, key): value for key, value in pairs}, path.name)
    if "NDims" not in header.fields or METAIMAGE_LAST not in header.fields:
        raise not_a("a MetaImage header", path, "name the file after what it is, or export it again")
    data = metaimage_data_file(path)
    shape_zyx = grid_shape(_sizes(header), path.name, max_voxels)
    stored = _stored(header, data, text.length if data == path else 0, shape_zyx)
    return scan_of(stored, _geometry(header, shape_zyx), "metaimage", *_scaling(header))


def _scaling(header: _Header) -> tuple[float, float]:
    """Return slope and intercept, which MetaIO defines and ITK reads over; Refused where they are no numbers to use."""
    slope, intercept = (
        float(usual if (found := header.numbers(f"ElementToIntensityFunction{name}", 1)) is None else found[0])
        for name, usual in (("Slope", 1), ("Offset", 0))
    )
    if slope == 0 or not np.isfinite([slope, intercept]).all():
        raise header.refused("bad-scaling", "a finite slope (not 0) and offset of its intensities", "others")
    return slope, intercept


def _sizes(header: _Header) -> list[int]:
    count = header.whole("NDims")
    sizes = header.numbers("DimSize", count) if 1 <= count <= 8 else None
    if sizes is None or not (np.isfinite(sizes).all() and (sizes == np.floor(sizes)).all()):
        raise header.refused("bad-header", "NDims whole numbers as DimSize", "others")
    channels = header.whole("ElementNumberOfChannels", 1)
    if channels in (3, 4):
        raise wrong_values("rgb", header.name, f"{channels} channels")
    if channels != 1:
        raise header.refused("several-volumes", "one value per voxel", str(channels), "split them into files")
    return [int(n) for n in sizes]


def _stored(header: _Header, data: Path, start: int, shape_zyx: tuple[int, int, int]) -> Stored:
    dtype = _dtype(header)
    if not header.flag("BinaryData", default=True):
        raise header.refused("encoding", "binary data", "numbers as text")
    is_compressed, skip = header.flag("CompressedData", default=False), header.whole("HeaderSize", 0)
    stored = Stored(data, Compression.ZLIB if is_compressed else Compression.NONE, start, 0, shape_zyx, dtype)
    found = data.stat().st_size - start
    expected = header.whole("CompressedDataSize", 0) if is_compressed else 0
    if expected and expected != found:
        code, remedy = ("truncated", COPY_AGAIN) if found < expected else ("surplus", REMEDY)
        raise header.refused(code, f"{expected:,} compressed bytes by its header", f"{found:,}", remedy)
    if skip and (is_compressed or skip < -1 or start):
        raise header.refused("bad-header", "no HeaderSize, or one for plain data in a file of its own", str(skip))
    if skip == -1:  # the voxels are the end of the file
        skip = max(0, found - stored.expected_bytes)
    return replace(stored, start=start + skip)


def _dtype(header: _Header) -> np.dtype:
    letter = DTYPES.get(header.fields.get("ElementType", ""))
    if letter is None:
        raise wrong_values("dtype", header.name, "another type")
    is_big = header.flag("BinaryDataByteOrderMSB", default=False if letter.endswith("1") else None)
    return np.dtype(letter).newbyteorder(">" if is_big else "<")


def _geometry(header: _Header, shape_zyx: tuple[int, int, int]) -> Geometry:
    """Return the frame; the rows of TransformMatrix are the unit directions of x, y, z in LPS."""
    count = header.whole("NDims")
    spacing = header.numbers("ElementSpacing", count)
    spacing = header.numbers("ElementSize", count) if spacing is None else spacing
    origin, matrix = header.numbers("Offset", count), header.numbers("TransformMatrix", count * count)
    if spacing is None or origin is None or matrix is None:
        remedy = "add the lines where you know them, or export the scan again"
        raise header.refused("no-geometry", "ElementSpacing, Offset and TransformMatrix", "not all of them", remedy)
    if not (spacing[:3] > 0).all():
        raise header.refused("bad-geometry", "an ElementSpacing above zero", "others")
    directions = matrix.reshape(count, count)
    if directions[:3, 3:].any():
        raise header.refused("bad-geometry", "axes in three dimensions", "a fourth mixed in")
    mm = mm_per_unit([header.fields.get("DistanceUnits", "")], header.name)
    steps = directions[:3, :3] * spacing[:3, None] * mm
    return frame(shape_zyx, origin[:3] * mm, steps[::-1], header.name, REMEDY)
