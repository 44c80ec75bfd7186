"""A declared data set, and what the adapter of its layout finds: plain values, the same for every data set."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from photon_data.errors import UsageError, name_hint
from photon_data.hounsfield import Rescale
from photon_data.questions.table import Problem, Table, TableRow, read_table, refuse
from photon_data.scan import Source, Stated

# A callback; it gets the number of files seen so far.
OnFile = Callable[[int], None]

# The option of data sets whose scans may come in archives: the folder to unpack them into.
UNPACK = "unpack"


class Wording(NamedTuple):
    """The words of a data set's questions and answers.

    prompt       a style of `photon_data.questions.question.PROMPTS`; choices "shown" or "hidden"
    report       columns of a report, in the order in which they become the answer
    instruction  the question that a report answers; None for the recipe's
    duplicates   rows that repeat another: "keep" or "drop"
    """

    prompt: str = "plain"
    choices: str = "hidden"
    report: tuple[str, ...] = ()
    instruction: str | None = None
    duplicates: str = "keep"


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
    """One entry of data_manifest.yaml.

    place        "data_manifest.yaml, line 7", for errors
    roots        folders of scans
    annotations  {kind: files or folders}; the adapter tells which kinds there are
    splits       {the publisher's split: ours}, others are left out; empty to keep all under their names
    fractions    {our split: share}, to draw splits by patient where the publisher has none; empty for the defaults
    volumes      which reconstructions of a scan: all, first, thinnest, sharpest
    mix          {our split: Share}
    options      of this adapter alone: texts, {text: text} or, for UNPACK, a Path
    """

    name: str
    place: str
    adapter: str
    roots: tuple[Path, ...] = ()
    annotations: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    splits: Mapping[str, str] = field(default_factory=dict)
    fractions: Mapping[str, float] = field(default_factory=dict)
    wording: Wording = field(default_factory=Wording)
    volumes: str = "all"
    recipe: RecipeChoice = field(default_factory=RecipeChoice)
    mix: Mapping[str, Share] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def error(self, message: str) -> UsageError:
        """Return the error with this message, which names the data set and its line."""
        return UsageError(f"{self.place}, data set {self.name}: {message}")


class SourceVolume(NamedTuple):
    """One scan of a data set, and what the data set's tables tell instead of its header, or to check its header."""

    dataset: DataSet
    source: Source
    rescale: Rescale | None = None
    table_grid: Stated | None = None


class FoundVolumes(NamedTuple):
    """The scans of a data set, each under its id, and sentences for the user.

    `left_out` is {volume id: reason}, of volumes that the data set or its entry excludes.
    """

    volumes: list[SourceVolume]
    left_out: Mapping[str, str] = MappingProxyType({})
    notes: Sequence[str] = ()


def read_rows(paths: Iterable[Path], columns: Sequence[str]) -> Iterator[tuple[Path, TableRow]]:
    """Yield every row of several tables, with its file, as `text_rows` returns it."""
    for path in paths:
        for row in text_rows(path, read_table(path), columns):
            yield path, row


def text_rows(path: Path, table: Table, columns: Sequence[str]) -> list[TableRow]:
    """Return the rows of a table, a text in every cell; UsageError if a column is missing or a row could not be read.

    Null and missing values of JSON and parquet become "", other values their JSON text. The rows of `table` change.
    """
    problems = [
        Problem("line 1", "missing column", f"expected a column {name!r}, found none; {name_hint(name, table.columns)}")
        for name in columns
        if table.rows and name not in table.columns
    ]
    problems += table.problems
    if problems:
        refuse(path, problems)
    for row in table.rows:
        row.values.update({name: _text(row.values.get(name)) for name in table.columns})
    return table.rows


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, default=str)
