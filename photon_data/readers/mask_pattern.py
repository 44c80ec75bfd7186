"""Which files are the masks of a scan (`--masks PATTERN`), and what the values of label maps are called.

A pattern is a path below SOURCE, with names of the scan in braces:

labelsTr/{case}.nii.gz             one label map a scan: its values have names (`--mask-labels`) or numbers
{name}_seg.nii.gz                  without "/": beside the scan
{folder}/segmentations             a folder, or
{folder}/segmentations/*.nii.gz    globs: each file is a mask, called what "*" stands for in the file's name
"""

from __future__ import annotations

import fnmatch
import glob
import itertools
import os
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Any

from photon_data.errors import Refused, UsageError, first_few, refusal
from photon_data.json_text import from_json
from photon_data.private import words_of
from photon_data.questions.table import read_text, read_values
from photon_data.readers.dicom_header import names_in
from photon_data.readers.header import DATA_FILES
from photon_data.scan import MaskFile, MaskPattern, Source, suffix_of
from photon_data.yaml_text import read_yaml, value_of

# nnU-Net numbers the channels of a case: case_0000.nii.gz has the label map case.nii.gz.
CHANNEL = re.compile(r"_\d{4}\Z")
# What `inspect` tries where it meets label maps.
USUAL = (
    "labelsTr/{name}.nii.gz",
    "labelsTr/{case}.nii.gz",
    "{folder}/../labelsTr/{name}.nii.gz",
    "{folder}/../labelsTr/{case}.nii.gz",
    "{folder}/segmentations",
    "{folder}/masks",
    "{folder}/../masks/{name}",
    "{name}_seg.nii.gz",
    "{name}-seg.nii.gz",
    "{name}_mask.nii.gz",
    "{name}-label.nii.gz",
    "{name}.seg.nrrd",
    "{folder}/segmentation.nii.gz",
    "{folder}/mask.nii.gz",
)
MASKS = "(mask by --masks)"  # how they are counted among the files left alone
NOT_READ = "DICOM SEG and RTSTRUCT are not read, convert them"


def place_of(pattern: MaskPattern, source: Source) -> str:
    """Return the path, or the glob, of the masks of a scan."""
    text, names = pattern.text.removeprefix("./"), _names_of(source)
    if "/" not in text and "{folder}" not in text:
        text = f"{{folder}}/{text}"
    escape = glob.escape if pattern.is_glob else str
    text = re.sub(r"{(\w+)}", lambda found: escape(names[found[1]]), text)
    return os.path.normpath(Path(escape(source.root), text))


def masks_of(
    pattern: MaskPattern, source: Source, common: Collection[str] = (), folders: Folders | None = None
) -> list[MaskFile]:
    """Return the masks of a scan; Refused for a name that is there twice, and for a format that is not read.

    Refused too where the name of a mask has a word of a hidden path, but for those in `common` (see `common_words`).
    One that has a name or an id of the patient, which the headers of the slices alone tell, is called "mask-1".
    """
    place, found = Path(place_of(pattern, source)), []
    for path in _mask_paths(pattern, source, folders):
        suffix = suffix_of(path)
        if not suffix:
            raise refusal("format", path.name, "NIfTI, NRRD or MetaImage", "another format", NOT_READ)
        data = path
        with suppress(Refused, OSError):  # opening it says what is wrong
            data = DATA_FILES[suffix](path) if suffix in DATA_FILES else path
        if pattern.is_glob:
            name = _starred(path.name, pattern.text.rpartition("/")[2], source) or path.name[: -len(suffix)]
        elif path == place:
            name = ""
        else:
            name = "__".join((*path.relative_to(place).parts[:-1], path.name[: -len(suffix)]))
        found.append(MaskFile(name, (path,) if data == path else (path, data)))
    if twice := [name for name, count in Counter(mask.name for mask in found).items() if count > 1]:
        remedy = "let * stand for what tells the files apart"
        raise refusal("mask-names", "", "masks of different names", f"{first_few(twice)} more than once", remedy)
    _refuse_private(found, source, common)
    return _without_person(found, source)


def _refuse_private(masks: Iterable[MaskFile], source: Source, common: Collection[str]) -> None:
    """Raise Refused where names of masks hold a name that is hidden, or a word of one: a store would keep it."""
    parts = [part.casefold() for part in re.split("[/#]", source.path)] if source.hidden else []
    whole = [part for part in parts if len(part) > 2 and re.search(r"[^\W\d_]", part) and part not in common]
    words = words_of(source.path) - set(common) if source.hidden else set()
    for mask in masks:
        if any(part in mask.name.casefold() for part in whole) or words & words_of(mask.name):
            remedy = "let * stand for the mask alone, as in '{folder}/{parent}_*.nii.gz'"
            raise refusal("mask-names", "", "names of masks without a name of the scan", "one in some", remedy)


def _without_person(masks: list[MaskFile], source: Source) -> list[MaskFile]:
    """Return masks, those called after the patient of a hidden DICOM series by a number instead."""
    if not (source.hidden and source.format == "dicom" and any(mask.name for mask in masks)):
        return masks
    person, taken = set[str]().union(*map(names_in, source.files)), {mask.name for mask in masks}
    numbers = (name for n in count(1) if (name := f"mask-{n}") not in taken)
    return [mask._replace(name=next(numbers)) if _tells(mask.name, person) else mask for mask in masks]


def _tells(name: str, person: Collection[str]) -> bool:
    """Tell whether a name has one of a person's names or ids: as a word of its own, or a long one anywhere."""
    name = name.casefold()
    words = {*re.findall(r"[^\W_]+", name), *re.findall(r"[^\W\d_]+|\d+", name)}
    return any((part in words and len(part) > 1) or (part in name and len(part) > 3) for part in person)


def common_words(sources: Iterable[Source]) -> set[str]:
    """Return the words that paths of most patients have, of three at least: no name of one of them ("pancreas")."""
    patients: dict[str, set[str]] = {}
    for source in sources:
        patients.setdefault(source.patient, set()).update(words_of(source.path))
    counts = Counter(word for words in patients.values() for word in words)
    return {word for word, count in counts.items() if count > max(2, len(patients) / 2)}


def scans_alone(sources: Sequence[Source], pattern: MaskPattern) -> tuple[list[Source], int]:
    """Return the sources without those that are masks of another one by the pattern, and how many these are.

    UsageError where two are masks of each other: which of them is the scan?
    """
    scans = [source for source in sources if source.names]
    by_file = {source.files[0]: source for source in scans}
    folders = Folders()
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(lambda source: _mask_paths(pattern, source, folders), scans))
    claims = {s.id: {by_file[p].id for p in paths if p in by_file} for s, paths in zip(scans, found, strict=True)}
    masks = {mask for scan, claimed in claims.items() for mask in claimed}
    both = [s.path for s in sources if s.id in masks and any(s.id in claims.get(c, ()) for c in claims.get(s.id, ()))]
    if both:
        those = f"{len(both)} that are masks of each other, {first_few(both)}"
        remedy = "name the masks' files more closely, or choose the scans with --include"
        raise UsageError(f"--masks {pattern.text}: expected files that are a scan or its mask, found {those}; {remedy}")
    return [source for source in sources if source.id not in masks], len(masks)


def usual_pattern(sources: Sequence[Source]) -> tuple[str, int] | None:
    """Return the one of USUAL that finds masks for most scans, and for how many; None where none does."""
    folders = Folders()
    counts = {text: sum(bool(_mask_paths(MaskPattern(text), s, folders)) for s in sources) for text in USUAL}
    best = max(USUAL, key=lambda text: counts[text])
    return (best, counts[best]) if counts[best] else None


def claimed_twice(found: Mapping[str, tuple[str, Sequence[MaskFile]]]) -> Iterator[tuple[str, Path]]:
    """Yield (id, file) of scans with a file that another scan has under another pattern of its own.

    `found` are {id: (place, masks)}. "p1_*.nii.gz" is for p1_2.nii.gz and the masks of p1_2 too.
    """
    owners: dict[Path, set[str]] = {}
    for place, masks in found.values():
        for mask in masks:
            owners.setdefault(mask.files[0], set()).add(place)
    for id, (_, masks) in found.items():
        for mask in masks:
            if len(owners[mask.files[0]]) > 1:
                yield id, mask.files[0]
                break


def _mask_paths(pattern: MaskPattern, source: Source, folders: Folders | None = None) -> list[Path]:
    """Return the mask files of a scan, sorted; none where there are none. Its own files are never masks of it."""
    place = place_of(pattern, source)
    if pattern.is_glob:
        found = (folders or Folders()).matches(place)
    elif Path(place).is_dir():
        found = [path for path in Path(place).rglob("*") if not _is_hidden(path.relative_to(place))]
    else:
        return [Path(place)] if Path(place).is_file() and Path(place) not in source.files else []
    own = set(source.files)
    return sorted(path for path in found if suffix_of(path) and path not in own and path.is_file())


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


class Folders:
    """Which names match a glob. A folder is listed once, however many scans lie in it, not once for each of them."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}

    def matches(self, place: str) -> list[Path]:
        """Return what matches a glob, hidden files aside."""
        folder, pattern = os.path.split(place)
        if glob.has_magic(folder) or "**" in pattern or "[" in pattern:
            return [Path(path) for path in glob.glob(place, recursive=True)]  # noqa: PTH207 - it may be absolute
        if (names := self._names.get(folder)) is None:
            try:
                names = sorted(os.listdir(folder))  # noqa: PTH208 - names alone
            except OSError:
                names = []
            self._names[folder] = names
        start = re.split("[*?]", pattern, maxsplit=1)[0]
        first = bisect_left(names, start)
        beginning = itertools.takewhile(lambda name: name.startswith(start), itertools.islice(names, first, None))
        fits = re.compile(fnmatch.translate(pattern)).match
        return [Path(folder, name) for name in beginning if fits(name) and (name[0] != "." or pattern[0] == ".")]


def _starred(name: str, pattern: str, source: Source) -> str:
    """Return what the wild part of a pattern stands for in a file's name, without the suffix."""
    names = _names_of(source)
    pattern = re.sub(r"{(\w+)}", lambda found: glob.escape(names[found[1]]), pattern)
    letters = re.findall(r"\[[*?\[]\]|\[[^\]]+\]|.", pattern)  # "[*]" is what glob.escape makes of "*"
    wild = [i for i, letter in enumerate(letters) if letter in "*?" or letter[1:-1] not in "*?["]
    middle = name[wild[0] : len(name) - (len(letters) - wild[-1] - 1)]
    suffix = suffix_of(Path(middle))
    return middle[: -len(suffix)] if suffix else middle


def _names_of(source: Source) -> dict[str, str]:
    """Return what stands for each of SCAN_NAMES; of a DICOM series, `name` is that of its folder."""
    is_series = source.format == "dicom"
    path = PurePosixPath(source.path.rpartition("#")[0] if is_series else source.path)
    folder = path if is_series else path.parent
    parent = folder.name or Path(source.root).name
    suffix = None if is_series else suffix_of(Path(path.name))
    name = parent if is_series else path.name[: -len(suffix)] if suffix else path.name
    return {
        "folder": folder.as_posix(),
        "parent": parent,
        "name": name,
        "case": CHANNEL.sub("", name),
        "id": source.id,
    }


# --- names of values
JSON, YAML = (".json",), (".yaml", ".yml")
LARGEST_VALUE = 65535


def read_label_names(path: Path) -> dict[int, str]:
    """Return {value: name}, without the background 0, of a json or yaml file or of a table.

    {"1": "liver"} and {"liver": 1} are both read, also under a key `labels` (dataset.json of the Medical Segmentation
    Decathlon and of nnU-Net). A table (csv, tsv, ...) has a column of values and one of names, in either order.
    UsageError for another content: a value or a name that is there twice, several values for one name.
    """
    if not path.is_file():
        raise UsageError(f"--mask-labels: expected a file of values and names, found none at {path}")
    names: dict[int, str] = {}
    for one, other in _pairs(path):
        value, name = (one, other) if _is_value(one) else (other, one)
        if not _is_value(value) or isinstance(name, list | dict | None) or not str(name).strip():
            expected = f"a value of 0 to {LARGEST_VALUE} and a name"
            raise UsageError(f"--mask-labels: expected {expected}, found {one!r} and {other!r} in {path}")
        if int(value) in names or str(name).strip() in names.values():
            raise UsageError(f"--mask-labels: expected every value and name once, found {value} {name!r} again")
        names[int(value)] = str(name).strip()
    names.pop(0, None)
    if not names:
        raise UsageError(f"--mask-labels: expected names of values, found none in {path}")
    return names


def _pairs(path: Path) -> Iterator[tuple[Any, Any]]:
    suffix = path.suffix.lower()
    if suffix in (*JSON, *YAML):
        try:
            content = (
                read_yaml(path, YAML, value_of) if suffix in YAML else from_json(read_text(path, JSON), strict=True)
            )
        except UsageError:
            raise
        except ValueError as error:
            raise UsageError(f"--mask-labels: expected JSON in {path}, found: {error}") from None
        content = content.get("labels", content) if isinstance(content, dict) else content
        if not isinstance(content, dict):
            raise UsageError(f"--mask-labels: expected values with names in {path}, found {content!r:.80}")
        yield from content.items()
        return
    rows = read_values(path)
    if len(rows[0]) < 2:
        raise UsageError(f"--mask-labels: expected two columns in {path}, found {', '.join(rows[0])}")
    first, second = list(rows[0])[:2]
    yield from ((row.get(first), row.get(second)) for row in rows)


def _is_value(found: Any) -> bool:
    text = str(found).strip()
    is_short = len(text) <= 20  # Python refuses to read thousands of digits
    return not isinstance(found, bool) and is_short and text.isdecimal() and int(text) <= LARGEST_VALUE
