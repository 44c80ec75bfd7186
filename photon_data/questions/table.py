"""A table on disk (csv, tsv, jsonl, json, parquet) -> rows that know their line, and all problems of the file."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

from photon_data.errors import UsageError

# ms-swift replaces its tags (this one by a volume), and a model obeys its special tokens: no text may hold either.
VIDEO_TAG = "<video>"
TAG = re.compile(r"<(?:video|image|audio|bbox|ref-object|cot-process|start-image)>|<\|\w+\|>")
SHOWN_PROBLEMS = 10


class TableRow(NamedTuple):
    """One row: `place` is "line 4" (where it starts) or, in a json list, "item 3"."""

    place: str
    values: dict[str, Any]


class Problem(NamedTuple):
    """What is wrong at one place; `kind` is what problems are counted by, `text` is the whole sentence."""

    place: str
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"

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

    Text is UTF-8, with or without a byte order mark. Cells of csv and tsv are text; other values keep their type.
    UsageError if nothing can be read: no such file, another suffix or encoding, a column twice, no rows.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        table = _read_parquet(path)
    else:
        text = read_text(path, _READERS)
        table = _READERS[suffix](text)
    twice = [repr(name) for name, count in Counter(table.columns).items() if count > 1]
    if twice:
        raise UsageError(
            f"{path}: expected each column name once, found {', '.join(twice)} more than once; rename them"
        )
    if not table.rows and not table.problems:
        raise UsageError(f"{path}: expected rows, found none; is this the right file?")
    return table


def read_text(path: Path, suffixes: Collection[str]) -> str:
    """Return the text of a UTF-8 file; UsageError for another suffix, no file or another encoding."""
    if path.suffix.lower() not in suffixes:
        found = repr(path.suffix) if path.suffix else "no suffix"
        raise UsageError(f"{path}: expected {', '.join(suffixes)}, found {found}; save the table as one of these")
    try:
        data = path.read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path}: expected a readable file, found: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{data[error.start]:02x} on line {line}"
        raise UsageError(f"{path}: expected UTF-8, found {found}; save the table as UTF-8") from None


def refuse(source: Path | str, problems: list[Problem]) -> NoReturn:
    """Raise the UsageError of all problems of `source`: counts by kind, then the first ten problems."""
    kinds = ", ".join(f"{count} x {kind}" for kind, count in Counter(p.kind for p in problems).most_common())
    lines = [f"  {problem}" for problem in problems[:SHOWN_PROBLEMS]]
    if len(problems) > len(lines):
        lines.append(f"  and {len(problems) - len(lines)} more")
    number = f"{len(problems)} problems" if len(problems) > 1 else "1 problem"
    raise UsageError("\n".join([f"{source}: {number} ({kinds})", *lines]))


def _read_delimited(text: str, delimiter: str) -> Table:
    """Return the table of a csv or tsv text. Blank lines are skipped; a row that breaks the quoting ends the file."""
    table = Table([], [], [])
    reader = csv.reader(_lines(text), delimiter=delimiter, strict=True)
    while True:
        place = f"line {reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return table
        except csv.Error as error:
            problem = (
                f"expected closed quotes, found: {error}; the file is cut off, or a quote inside a cell is not doubled"
            )
            table.problems.append(Problem(place, "broken quoting", problem))
            return table
        if not cells:
            continue
        if not table.columns:
            table.columns.extend(name.strip() or f"column_{number}" for number, name in enumerate(cells, 1))
        elif len(cells) == len(table.columns):
            table.rows.append(TableRow(place, dict(zip(table.columns, cells, strict=True))))
        else:
            found = f"{len(cells)}: {delimiter.join(cells)[:60]!r}"
            problem = f"expected {len(table.columns)} cells, found {found}; the row is cut off or not quoted"
            table.problems.append(Problem(place, "ragged row", problem))


def _read_json_lines(text: str) -> Table:
    problems: list[Problem] = []
    values = []
    for number, line in enumerate(_lines(text), 1):
        if line.strip():
            try:
                values.append((f"line {number}", _parse_json(line)))
            except ValueError as error:
                found = f"{line[:60]!r} ({error})"
                problems.append(Problem(f"line {number}", "not JSON", f"expected one JSON object, found {found}"))
    return _json_table(values, problems)


def _read_json_list(text: str) -> Table:
    try:
        values = _parse_json(text)
    except ValueError as error:
        return Table([], [], [Problem("file", "not JSON", f"expected one JSON list, found: {error}")])
    if not isinstance(values, list):
        return Table(
            [], [], [Problem("file", "not a list", f"expected one JSON list of objects, found {_type(values)}")]
        )
    return _json_table([(f"item {number}", value) for number, value in enumerate(values, 1)], [])


def _json_table(values: list[tuple[str, Any]], problems: list[Problem]) -> Table:
    rows = []
    for place, value in values:
        if isinstance(value, dict):
            rows.append(TableRow(place, value))
        else:
            problems.append(Problem(place, "not an object", f"expected one JSON object, found {_type(value)}"))
    columns = dict.fromkeys(name for row in rows for name in row.values)
    return Table(list(columns), rows, problems)


def _type(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "a text", type(None): "null"}.get(
        type(value), "a number or a boolean"
    )


def _parse_json(text: str) -> Any:
    """Return the value of a JSON text; ValueError for other text, NaN, and halves of surrogate pairs (not UTF-8)."""
    value = json.loads(text, parse_constant=_refuse_constant)
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON; leave the value out or write null")


def _lines(text: str) -> Iterator[str]:
    """Yield lines with their ends. str.splitlines also splits at U+2028 and U+0085, which a text may hold."""
    return (match[0] for match in re.finditer(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+", text))


def _read_parquet(path: Path) -> Table:
    """Return the table of a parquet file, its rows numbered from 1; UsageError without the extra `parquet`."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UsageError(
            f"{path}: expected pyarrow to read parquet, found none; pip install 'photon-ct[parquet]'"
        ) from None
    try:
        table = parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise UsageError(f"{path}: expected a readable parquet file, found: {str(error)[:200]}") from None
    rows = [TableRow(f"row {number}", values) for number, values in enumerate(table.to_pylist(), 1)]
    return Table(table.column_names, rows, [])


_READERS: Mapping[str, Callable[[str], Table]] = MappingProxyType(
    {
        ".csv": lambda text: _read_delimited(text, ","),
        ".tsv": lambda text: _read_delimited(text, "\t"),
        ".jsonl": _read_json_lines,
        ".json": _read_json_list,
    }
)
