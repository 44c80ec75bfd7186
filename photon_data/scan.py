"""A raw scan between disk and volume: found (`Source`), then opened but not yet read (`Scan`); where its masks are."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from photon_data.errors import Refused, UsageError, name_hint, refusal
from photon_data.volume import Geometry, Volume

# Published tables round spacing to four digits or more.
SPACING_SHARE = 0.005
# What declared padding is in a Volume; a recipe has a value of its own.
PADDING_HU = -1000


@dataclass(frozen=True, slots=True)
class Source:
    """One scan found in a folder, of which names were read, and headers where they tell which files belong to it."""

    id: str  # names the volume everywhere
    path: str  # relative to the source folder, with "/", for people and tables
    # Of one NIfTI, a header and its data file, or the slices of a DICOM series, see `names_below`. A run holds those of
    # every scan, and a Path takes four times as much.
    names: tuple[str, ...]
    format: str  # by its suffix, see SUFFIXES; "dicom" by its content; "folder" of one that cannot be listed
    bytes: int
    mtime_ns: int  # of several files: a number that changes with the name, size or time of any of them
    problem: str | None = None  # set where the search found that it cannot become a volume (an unreadable file, say)
    code: str = "unreadable"  # of the refusal then
    root: str = ""  # the folder, or the URL, that `path` starts from
    patient: str = ""  # a hash that tells patients apart, where headers say; of a hidden source, a keyed one
    hidden: bool = False  # its names may be a patient's: only the private file has them
    headers: str = ""  # the folder where the search kept the headers of a DICOM series, see readers/dicom_cache.py

    @property
    def files(self) -> tuple[Path, ...]:
        """Its files, made anew: absolute, but relative to a URL unless they were fetched."""
        folder = "" if is_url(self.root) else self.root
        return tuple(Path(folder, name) for name in self.names)

    def to_json(self) -> dict[str, Any]:
        """Return the plain dict that `from_json` reads back, with the whole paths of files."""
        data = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "names"}
        return {**data, "files": list(map(str, self.files))}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Source:
        """Return the Source that `to_json` wrote."""
        files, facts = data["files"], {name: value for name, value in data.items() if name != "files"}
        return cls(names=names_below(data["root"], files), **facts)


SUFFIXES = dict.fromkeys((".nii.gz", ".hdr.gz", ".nii", ".hdr"), "nifti")
SUFFIXES |= {".nrrd": "nrrd", ".nhdr": "nrrd", ".mha": "metaimage", ".mhd": "metaimage"}


def suffix_of(path: Path) -> str | None:
    """Return the suffix of a file that may hold a scan or masks, None for other files."""
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def is_url(text: str) -> bool:
    """Tell whether a text names objects of a store, rather than a local path ("/data/a://b" is one)."""
    scheme, mark, _ = text.partition("://")
    return bool(mark) and "/" not in scheme


def place_name(path: Path) -> str:
    """Return the URL of an object or a folder of objects (see readers/object_path.py), the path of a local one."""
    return str(getattr(path, "url", path))


def names_below(root: str, files: Iterable[str | Path]) -> tuple[str, ...]:
    """Return files as texts: relative to `root`, the folder or URL of a Source; whole where they do not lie below it.

    ["/raw/a/b.nii", "/else/c.nii"] below "/raw" -> ("a/b.nii", "/else/c.nii")
    """
    start = os.path.join(root, "")  # noqa: PTH118 - a text: of "" it is "", of "/" it is "/"
    return tuple(str(file).removeprefix(start) for file in files)


def change_mark(facts: Sequence[tuple[str, int, int]]) -> int:
    """Return a number that changes where the (name, size, mtime_ns) of a file does: of one file, its mtime_ns."""
    if len(facts) == 1:
        return facts[0][2]
    digest = hashlib.sha256("".join(f"{fact}\n" for fact in sorted(facts)).encode("utf-8", "surrogateescape"))
    return int.from_bytes(digest.digest()[:7], "big") if facts else 0


class Change(NamedTuple):
    """What a repair, a choice of the policy or an override changed of a scan: numbers and our words, no header text."""

    code: str  # of the refusal that was taken back, or "override"
    before: str  # what was found
    after: str  # what was made of it


class TrueSlices(NamedTuple):
    """Where the slices of a series lie that are not one distance apart; all in mm along the slice normal."""

    positions_mm: tuple[float, ...]  # ascending
    distance_mm: float  # the usual one
    step_mm: float  # of the regular grid that stands for them
    gaps: tuple[tuple[float, float, int], ...]  # wider than usual: from, to, and how many slices are missing between

    @property
    def depths(self) -> np.ndarray:
        """Each slice's index along axis 0 of the grid: 0 for the first, a whole number for the last."""
        return self._depth(np.array(self.positions_mm))

    @property
    def gaps_in_depth(self) -> np.ndarray:
        """The ends [n, 2] of the gaps as indices along axis 0 of the grid."""
        return self._depth(np.array([gap[:2] for gap in self.gaps]).reshape(-1, 2))

    def _depth(self, mm: np.ndarray) -> np.ndarray:
        return np.round((mm - self.positions_mm[0]) / self.step_mm, 9)

    def to_json(self) -> dict[str, Any]:
        """Return what is recorded of them."""
        return {**self._asdict(), "positions_mm": [round(mm, 4) for mm in self.positions_mm]}


@dataclass(frozen=True)
class Scan:
    """One raw scan whose header has been read and found sound."""

    geometry: Geometry  # native grid; axis 0 is the slowest of the file, so planes arrive in its order
    dtype: np.dtype  # of the stored values
    slope: float  # HU = slope * stored + intercept
    intercept: float
    # Call it to stream the stored values: one array [y, x] per index of axis 0. The next plane may reuse it.
    # Exhausting it verifies length and checksums; Refused is raised on damage.
    planes: Callable[[], Iterator[np.ndarray]]
    format: str
    # Of the policy, without which the header would be refused or give another geometry.
    choices: Mapping[str, Any] = field(default_factory=dict)
    changes: tuple[Change, ...] = ()  # what these choices, and a person's override, made of what was found
    padded: bool = False  # the header declares padding: it is NaN among the values of the planes
    rescaled: bool = False  # planes are HU already, since slices differ in slope or intercept
    # Of a series that is repaired: planes are its slices, which do not lie at 0, 1, 2, ... of axis 0.
    slices: TrueSlices | None = None
    uncropped: Geometry | None = None  # the grid of the whole file, where a person's crop left a part of it

    def volume(self) -> Volume:
        """Return the whole scan in HU on its native grid: float32, or stored integers that are HU already; Refused.

        Padding that the header declares is PADDING_HU, in float32.
        """
        assert self.slices is None, "only a resampled volume is repaired"
        is_hu = self.slope == 1 and self.intercept == 0
        are_integers = is_hu and self.dtype.kind in "iu" and not self.padded
        array = np.empty(self.geometry.shape_zyx, self.dtype if are_integers else np.float32)
        for z, plane in enumerate(self.planes()):
            array[z] = plane if is_hu else plane * self.slope + self.intercept
            if self.padded:
                array[z][np.isnan(array[z])] = PADDING_HU
        return Volume(array, self.geometry)


class Rescale(NamedTuple):
    """HU = slope * stored + intercept, and who gives them."""

    slope: float
    intercept: float
    # "stored": nobody, values are taken as they are. "table": a user's table, which is followed. "metadata": a table of
    # a data set of raw files; a file that holds HU already is refused.
    given_by: Literal["stored", "table", "metadata"]


class TableGrid(NamedTuple):
    """A grid that a data set's table gives for one of its files."""

    geometry: Geometry
    replaces_header: bool  # True: the header is blank. False: the header counts, and has to agree with this grid.

    def reconcile(self, native: Geometry) -> Geometry:
        """Return the grid to use for a file whose header says `native`; Refused ("table-conflict") where they differ.

        The shape is always compared. Of a header that counts, spacing is compared too, axis by axis as in the file.
        """
        table = self.geometry
        if native.shape_zyx != table.shape_zyx:
            raise _conflict("voxels", native.shape_zyx, table.shape_zyx)
        if self.replaces_header:
            return table
        if not np.allclose(native.spacing_zyx_mm, table.spacing_zyx_mm, rtol=SPACING_SHARE):
            raise _conflict("mm", native.spacing_zyx_mm, table.spacing_zyx_mm)
        return native

    def to_json(self) -> dict[str, Any]:
        """Return the plain dict that `from_json` reads back. Resume keys depend on its keys."""
        return {"geometry": self.geometry.to_json(), "instead": self.replaces_header}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TableGrid:
        """Return the TableGrid that `to_json` wrote."""
        return cls(Geometry.from_json(data["geometry"]), data["instead"])


def _conflict(unit: str, in_header: tuple[float, ...], in_table: tuple[float, ...]) -> Refused:
    header, table = (" x ".join(f"{value:.4g}" for value in values) for values in (in_header, in_table))
    expected = f"a header that agrees with the data set's table, {table} {unit} (z, y, x)"
    remedy = "one of the two belongs to another version or file"
    return refusal("table-conflict", "", expected, f"{header} {unit}", remedy)


# What may stand in braces in a MaskPattern.
SCAN_NAMES = ("folder", "parent", "name", "case", "id")
WILD = re.compile(r"[*?\[]")


class MaskFile(NamedTuple):
    """One file of masks of a scan."""

    name: str  # of its one mask; "" for a label map, whose values have names or numbers
    files: tuple[Path, ...]  # it, and the data file that its header names


@dataclass(frozen=True)
class MaskPattern:
    """Where the masks of scans are, and what the values of label maps are called."""

    text: str
    labels: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """UsageError for a pattern that cannot be meant."""
        fields = re.findall(r"{(\w*)}", self.text)
        if unknown := [name for name in fields if name not in SCAN_NAMES]:
            expected = f"names in braces among {', '.join(SCAN_NAMES)}"
            raise UsageError(f"--masks: expected {expected}, found {unknown[0]!r}; {name_hint(unknown[0], SCAN_NAMES)}")
        if not fields or re.search("[{}]", re.sub(r"{\w*}", "", self.text)):
            remedy = "for example 'labelsTr/{name}.nii.gz' or '{folder}/segmentations/*.nii.gz'"
            raise UsageError(
                f"--masks: expected a path with names of the scan in braces, found {self.text!r}; {remedy}"
            )
        if self.is_glob and not WILD.search(self.text.rpartition("/")[2]):
            expected = "a file's name with *, which stands for the name of the mask"
            raise UsageError(f"--masks: expected {expected}, found {self.text!r}")
        if self.labels and self.is_glob:
            remedy = "each file is one mask then, called after its file"
            raise UsageError(f"--mask-labels: expected a pattern of one file per scan, found {self.text!r}; {remedy}")

    @property
    def is_glob(self) -> bool:
        """Whether each file is a mask of its own name."""
        return bool(WILD.search(self.text))
