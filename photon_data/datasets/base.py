"""A declared data set, and what the adapter of its layout finds: plain values, the same for every data set."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from photon_data.errors import UsageError, name_hint
from photon_data.questions.table import Problem, Table, TableRow, read_table, refuse
from photon_data.scan import MaskPattern, Rescale, Source, TableGrid

# A callback; it gets the number of files seen so far.
OnFile = Callable[[int], None]

# The option of data sets whose scans may come in archives: the folder to unpack them into.
UNPACK = "unpack"
# The option that says what ids are made from. Without it, DICOM has keyed ones.
ID_FROM = "id_from"


class Wording(NamedTuple):
    """The words of a data set's questions and answers."""

    prompt: str = "plain"  # a style of `photon_data.questions.question.PROMPTS`
    choices: str = "hidden"  # or "shown"
    report: tuple[str, ...] = ()  # columns of a report, in the order in which they become the answer
    instruction: str | None = None  # the question that a report answers; None for the recipe's
    duplicates: str = "keep"  # or "drop", of rows that repeat another


class Share(NamedTuple):
    """What a data set gives to a split: at most `cap` questions, and `weight` parts of the whole (None: all it has)."""

    weight: float | None = None
    cap: int | None = None


class RecipeChoice(NamedTuple):
    """A recipe by name, with "key=value" settings."""

    name: str = "chest_ct"
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataSet:
    """One entry of data_manifest.yaml."""

    name: str
    place: str  # "data_manifest.yaml, line 7", for errors
    adapter: str
    roots: tuple[Path, ...] = ()  # folders of scans
    # {kind: files or folders}; the adapter tells which kinds there are
    annotations: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    # {the publisher's split: ours}, others are left out; empty to keep all under their names
    splits: Mapping[str, str] = field(default_factory=dict)
    # {our split: share}, to draw splits by patient where the publisher has none; empty for the defaults
    fractions: Mapping[str, float] = field(default_factory=dict)
    wording: Wording = field(default_factory=Wording)
    volumes: str = "all"  # which reconstructions of a scan: all, first, thinnest, sharpest
    recipe: RecipeChoice = field(default_factory=RecipeChoice)
    masks: MaskPattern | None = None  # which files are the masks of a scan
    mix: Mapping[str, Share] = field(default_factory=dict)  # {our split: Share}
    # Of this adapter alone: texts, {text: text} or, for UNPACK, a Path
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folders(self) -> set[Path]:
        """Return the folders that its scans are found in: its roots, and where archives are unpacked."""
        unpacked = [self.options[UNPACK]] if UNPACK in self.options else []
        return {folder.absolute() for folder in (*self.roots, *unpacked)}

    def error(self, message: str) -> UsageError:
        """Return the error with this message, which names the data set and its line."""
        return UsageError(f"{self.place}, data set {self.name}: {message}")


class SourceVolume(NamedTuple):
    """One scan of a data set, and what the data set's tables tell instead of its header, or to check its header."""

    dataset: DataSet
    source: Source
    rescale: Rescale | None = None
    table_grid: TableGrid | None = None


class FoundVolumes(NamedTuple):
    """The scans of a data set, each under its id."""

    volumes: list[SourceVolume]
    left_out: Mapping[str, str] = MappingProxyType({})  # {id: reason}, of volumes that data set or entry exclude
    notes: Sequence[str] = ()  # sentences for the user


def read_rows(paths: Iterable[Path], columns: Sequence[str]) -> Iterator[tuple[Path, TableRow]]:
    """Yield every row of several tables, with its file, as `text_rows` returns it."""
    return ((path, row) for path in paths for row in text_rows(path, read_table(path), columns))


def text_rows(path: Path, table: Table, columns: Sequence[str]) -> list[TableRow]:
    """Return the rows of a table, a text in every cell; UsageError if a column is missing or a row could not be read.

    Null and missing values of JSON and parquet become "", other values their JSON text. The rows of `table` change.
    """
    missing = [name for name in columns if table.rows and name not in table.columns]
    expected = [f"expected a column {name!r}, found none; {name_hint(name, table.columns)}" for name in missing]
    problems = [Problem("line 1", "missing column", text) for text in expected] + table.problems
    if problems:
        refuse(path, problems)
    for row in table.rows:
        for name in table.columns:
            value = row.values.setdefault(name, "")
            if not isinstance(value, str):
                row.values[name] = "" if value is None else json.dumps(value, default=str)
    return table.rows
