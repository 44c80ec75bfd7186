"""A table on disk (csv, tsv, jsonl, json) -> rows that know where they stand, and every problem of the file at once."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from photon_data.errors import UsageError

SHOWN_PROBLEMS = 10
PARQUET = ".parquet"

# ms-swift replaces its tags (by a volume, say), and a model obeys its special tokens: no text may hold either.
TAG = re.compile(r"<(?:video|image|audio|bbox|ref-object|cot-process|start-image)>|<\|\w+\|>")

_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")


class TableRow(NamedTuple):
    """One row: `place` is "line 4" (where it starts) or, in a json list, "item 3"."""

    place: str
    values: dict[str, Any]


class Problem(NamedTuple):
    """What is wrong at one place; `kind` is what problems are counted by, `text` says it in full."""

    place: str
    kind: str
    text: str

    @property
    def number(self) -> int:
        """The number of the line or item, to sort by; 0 for the file as a whole."""
        return int(self.place.rpartition(" ")[2]) if " " in self.place else 0


class Table(NamedTuple):
    """Columns in order of first appearance, the rows that could be read, and a problem for each that could not."""

    columns: list[str]
    rows: list[TableRow]
    problems: list[Problem]


def read_table(path: Path) -> Table:
    """Return the table of a .csv, .tsv, .jsonl, .json (one list of objects) or .parquet file.

    Texts are UTF-8, with or without a byte order mark. Cells of csv and tsv are text; values of the others keep their type.
    UsageError where nothing can be read at all: no such file, another suffix, another encoding, a header with a name twice,
    no rows.
    """
    if path.suffix.lower() == PARQUET:
        table = _read_parquet(path)
    else:
        text = read_text(path, _READERS)
        table = _READERS[path.suffix.lower()](text)
    twice = [name for name, count in Counter(table.columns).items() if count > 1]
    if twice:
        raise UsageError(
            f"{path}: every column name once wanted, got {', '.join(map(repr, twice))} more than once; rename them"
        )
    if not table.rows and not table.problems:
        raise UsageError(f"{path}: rows wanted, found none; is this the right file?")
    return table


def read_text(path: Path, suffixes: Collection[str]) -> str:
    """Return the text of a UTF-8 file; UsageError for a suffix not among `suffixes`, a missing file or another encoding."""
    if path.suffix.lower() not in suffixes:
        got = repr(path.suffix) if path.suffix else "no suffix"
        raise UsageError(f"{path}: {', '.join(suffixes)} wanted, got {got}; save the table as one of these")
    try:
        data = path.read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path}: a readable file wanted, got: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = f"byte 0x{data[error.start]:02x} on line {line}"
        raise UsageError(f"{path}: UTF-8 wanted, got {byte}; save the table as UTF-8") from None


def refuse(source: Path | str, problems: list[Problem]) -> NoReturn:
    """Raise the UsageError that tells all problems of `source`: counts by kind, then the first ten."""
    kinds = ", ".join(f"{count} x {kind}" for kind, count in Counter(p.kind for p in problems).most_common())
    shown = [f"  {problem.place}: {problem.text}" for problem in problems[:SHOWN_PROBLEMS]]
    rest = len(problems) - len(shown)
    if rest:
        shown.append(f"  and {rest} more")
    number = f"{len(problems)} problems" if len(problems) > 1 else "1 problem"
    raise UsageError("\n".join([f"{source}: {number} ({kinds})", *shown]))


def _read_delimited(text: str, delimiter: str) -> Table:
    problems: list[Problem] = []
    lines = _delimited_lines(text, delimiter, problems)
    _, header = next(lines, (1, []))
    columns = [name.strip() or f"column_{number}" for number, name in enumerate(header, 1)]
    rows = []
    for number, cells in lines:
        if len(cells) == len(columns):
            rows.append(TableRow(f"line {number}", dict(zip(columns, cells, strict=True))))
        else:
            text = f"{len(columns)} cells wanted, got {len(cells)}: {delimiter.join(cells)[:60]!r}; the row is cut off or not quoted"
            problems.append(Problem(f"line {number}", "ragged row", text))
    return Table(columns, rows, problems)


def _delimited_lines(text: str, delimiter: str, problems: list[Problem]) -> Iterator[tuple[int, list[str]]]:
    """Yield (line it starts on, cells) of every row that is not blank; a row that breaks the quoting ends the file."""
    reader = csv.reader(_lines(text), delimiter=delimiter, strict=True)
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            text = f"closed quotes wanted, got: {error}; the file is cut off, or a quote inside a cell is not doubled"
            problems.append(Problem(f"line {number}", "broken quoting", text))
            return
        if cells is None:
            return
        if cells:
            yield number, cells


def _read_json_lines(text: str) -> Table:
    problems: list[Problem] = []
    values = []
    for number, line in enumerate(_lines(text), 1):
        if not line.strip():
            continue
        try:
            values.append((f"line {number}", _parse_json(line)))
        except ValueError as error:
            problems.append(
                Problem(f"line {number}", "not JSON", f"one JSON object wanted, got {line[:60]!r} ({error})")
            )
    return _json_table(values, problems)


def _read_json_list(text: str) -> Table:
    try:
        values = _parse_json(text)
    except ValueError as error:
        return Table([], [], [Problem("file", "not JSON", f"one JSON list wanted, got: {error}")])
    if not isinstance(values, list):
        return Table([], [], [Problem("file", "not a list", f"one JSON list of objects wanted, got {_kind(values)}")])
    return _json_table([(f"item {number}", value) for number, value in enumerate(values, 1)], [])


def _json_table(values: list[tuple[str, Any]], problems: list[Problem]) -> Table:
    rows = []
    for place, value in values:
        if isinstance(value, dict):
            rows.append(TableRow(place, value))
        else:
            problems.append(Problem(place, "not an object", f"one JSON object wanted, got {_kind(value)}"))
    columns = dict.fromkeys(name for row in rows for name in row.values)
    return Table(list(columns), rows, problems)


def _read_parquet(path: Path) -> Table:
    """Return the table of a parquet file, its rows numbered from 1; UsageError without the extra `parquet`."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UsageError(
            f"{path}: pyarrow wanted to read parquet, not found; pip install 'photon-ct[parquet]'"
        ) from None
    try:
        table = parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise UsageError(f"{path}: a readable parquet file wanted, got: {str(error)[:200]}") from None
    rows = [TableRow(f"row {number}", values) for number, values in enumerate(table.to_pylist(), 1)]
    return Table(table.column_names, rows, [])


def _lines(text: str) -> Iterator[str]:
    """Yield lines with their ends. str.splitlines also splits at U+2028 and U+0085, which may stand inside of a text."""
    return (match[0] for match in _LINE.finditer(text))


def _parse_json(text: str) -> Any:
    """Return the value of a JSON text; ValueError for what is not JSON: NaN and half surrogate pairs (not UTF-8) too."""
    value = json.loads(text, parse_constant=_refuse_constant)
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON; leave the value out or write null")


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "a text", type(None): "null"}.get(
        type(value), "a number or a boolean"
    )


_READERS = {
    ".csv": lambda text: _read_delimited(text, ","),
    ".tsv": lambda text: _read_delimited(text, "\t"),
    ".jsonl": _read_json_lines,
    ".json": _read_json_list,
}
