"""Which files beside scans are label maps (masks, segmentations): by name and by content, not by one of them alone."""

from __future__ import annotations

import gzip
import math
import re
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import nibabel as nib
import numpy as np

# Words of a file's or folder's name, also as the end of a longer word ("lungmask") or before numbers ("label0001").
NAMED = re.compile(".*(segs?|segmentations?|labels?(tr|ts|val?)?|labelmaps?|masks?|msk|groundtruth)|gt|rois?|contours?")
# 3D Slicer's segmentations say so by their suffix.
SEGMENTATIONS = (".seg.nrrd", ".seg.nhdr")
# Planes that are not constant and are looked at, and how many different values label maps have in them: a few, or up
# to a byte's where nearly all neighbours are equal. A CT has hundreds, and negative ones.
PLANES, FEW_VALUES, MANY_VALUES, EQUAL_NEIGHBOURS = 4, 32, 256, 0.8
# Label maps shrink by this factor and more; a CT of 8 bits does not.
SHRINKS = 20
# The search looks at no more: of a larger plane, at more constant planes, at a header with larger extensions.
LARGEST_PLANE, MOST_VOXELS, MAX_EXTENSIONS = 1 << 24, 1 << 30, 1 << 24
BYTES = {"char", "signed char", "unsigned char", "uchar", "int8", "uint8", "int8_t", "uint8_t", "met_char", "met_uchar"}
INTEGER = re.compile(r"(met_|u|unsigned |signed )*(char|short|int|long)")


class HeaderLines(Protocol):
    """The text of a header."""

    @property
    def lines(self) -> list[str]: ...  # noqa: D102


def is_label_map(path: str, files: Sequence[Path], text_of: Callable[[Path], HeaderLines] | None) -> bool:
    """Tell whether a file is a label map: its `path` below the source says so, and what it holds is one.

    `text_of` reads the header of a file that has a text; without one, it is a NIfTI file.

    Content: integers from 0 on, few different ones. A file that cannot be looked at is none: opening it says why.
    """
    if path.lower().endswith(SEGMENTATIONS):
        return True
    if not is_named_as_one(path):
        return False
    with suppress(Exception):  # damaged headers make libraries raise anything
        return _text_header_is_one(files, text_of(files[0]).lines) if text_of else _nifti_is_one(files)
    return False


def is_named_as_one(path: str) -> bool:
    """Tell whether a folder or the file of a path relative to the source is named as label maps are."""
    words = [word.strip("0123456789") for word in re.split(r"[^a-z0-9]+", path.lower())]
    return any(NAMED.fullmatch(word) for word in words)


def _nifti_is_one(files: Sequence[Path]) -> bool:
    if not _has_sane_header(files[0]):
        return False
    image = nib.load(files[0], keep_file_open=True)
    assert isinstance(image, nib.nifti1.Nifti1Pair)
    count, size = math.prod(image.shape), image.get_data_dtype().itemsize
    if image.ndim < 3 or math.prod(image.shape[:2]) > LARGEST_PLANE:
        return False
    if size == 1 and count > SHRINKS * files[-1].stat().st_size:
        return True
    looked_at, values = 0, np.empty(0)
    for z in range(image.shape[2]):
        plane = np.asarray(image.dataobj[(slice(None), slice(None), z, *[0] * (image.ndim - 3))])
        values = np.union1d(values, plane)
        if not (np.isfinite(values).all() and values[0] >= 0 and (values == np.rint(values)).all()):
            return False
        equal = float((plane[1:] == plane[:-1]).mean()) if len(plane) > 1 else 1.0
        if len(values) > (MANY_VALUES if equal >= EQUAL_NEIGHBOURS else FEW_VALUES):
            return False
        looked_at += bool((plane != plane.flat[0]).any())
        if looked_at == PLANES:
            break
        if (z + 1) * plane.size > MOST_VOXELS:
            return False
    return True


def _has_sane_header(path: Path) -> bool:
    """Tell whether the extensions of a NIfTI header are small: nibabel reads them whole, and gzip can hold GBs."""
    is_pair = path.name.lower().endswith((".hdr", ".hdr.gz"))
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
        head = file.read(MAX_EXTENSIONS + 1 if is_pair else nib.Nifti2Header.sizeof_hdr)
    if is_pair:
        return len(head) <= MAX_EXTENSIONS
    for order in "<>":
        size, offset = struct.unpack_from(f"{order}i104xf", head)
        if size == nib.Nifti2Header.sizeof_hdr:
            (offset,) = struct.unpack_from(f"{order}q", head, 168)
        if size in (nib.Nifti1Header.sizeof_hdr, nib.Nifti2Header.sizeof_hdr):
            return bool(offset <= MAX_EXTENSIONS)
    return False


def _text_header_is_one(files: Sequence[Path], lines: Sequence[str]) -> bool:
    """Tell whether an NRRD or MetaImage header is one of bytes, or of integers that shrink as label maps do."""
    pairs = (re.split(":|=", line.lower(), maxsplit=1) for line in lines if re.search("[:=]", line))
    fields = {key.strip(): value.strip() for key, value in pairs}
    kind = fields.get("type") or fields.get("elementtype", "")
    count = math.prod(map(int, (fields.get("sizes") or fields.get("dimsize", "")).split()))
    return kind in BYTES or (bool(INTEGER.match(kind)) and 2 * count > SHRINKS * files[-1].stat().st_size)
