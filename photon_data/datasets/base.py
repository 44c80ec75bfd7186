"""What an adapter returns: plain values, from which the rest of the toolkit goes on without knowing the data set."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from photon_data.datasets.declare import DataSet
from photon_data.prepare import Rescale
from photon_data.questions.question import Question
from photon_data.questions.table import Problem, Row, Table, nearest, read_table, refuse
from photon_data.scan import Source, TableGrid

OnFile = Callable[[int], None]

# The option of adapters whose scans may come in archives: the folder to unpack them into.
UNPACK = "unpack"


class Collected(NamedTuple):
    """The volumes and questions of one data set.

    sources    the volumes that are there, each under its id
    questions  with the publisher's splits (None: none known); `volume` is an id, or a name that means one volume
               None for a data set that asks nothing: every volume then gets the instruction
    rescale, stated   what the data set's tables say of some volumes, by id
    left_out   {volume id: why} of volumes that the data set or its entry excludes
    notes      sentences for the person who reads along
    """

    sources: list[Source]
    questions: list[Question] | None
    rescale: Mapping[str, Rescale] = MappingProxyType({})
    stated: Mapping[str, TableGrid] = MappingProxyType({})
    left_out: Mapping[str, str] = MappingProxyType({})
    notes: Sequence[str] = ()


class Adapter(NamedTuple):
    """A data set layout: how it is read, which annotations and options its entries may name, and whose patients it has.

    `cohort` is shared by data sets with the same patients; None where the data set is on its own.
    """

    read: Callable[[DataSet, OnFile], Collected]
    annotations: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    cohort: str | None = None


def table_with(path: Path, columns: Iterable[str]) -> Table:
    """Return the table of a file as `sound` does."""
    return sound(path, read_table(path), columns)


def sound(path: Path, table: Table, columns: Iterable[str]) -> Table:
    """Return the table of `path` with a text in every cell; UsageError unless it has these columns and all rows could be read.

    What JSON and parquet have as null, or leave out, becomes "", anything else what JSON writes. `table` itself is changed.
    """
    missing = [column for column in columns if table.rows and column not in table.columns]
    problems = [*(_missing(column, table.columns) for column in missing), *table.problems]
    if problems:
        refuse(path, problems)
    for row in table.rows:
        row.values.update({name: _text(row.values.get(name)) for name in table.columns})
    return table


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, default=str)


def _missing(column: str, columns: Sequence[str]) -> Problem:
    near = nearest(column, columns)
    hint = f"is {near!r} meant? rename it" if near else f"the file has {', '.join(columns[:12])}"
    return Problem("line 1", "missing column", f"column {column!r} wanted, not found; {hint}")


def each_row(paths: Iterable[Path], columns: Iterable[str]) -> Iterator[tuple[Path, Row]]:
    """Yield every row of several tables that have these columns, with its file."""
    columns = list(columns)
    for path in paths:
        for row in table_with(path, columns).rows:
            yield path, row
