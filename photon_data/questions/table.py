"""A table on disk (csv, tsv, jsonl, json, parquet) -> rows that know their line, and all problems of the file."""

from __future__ import annotations

import csv
import datetime
import io
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from photon_data.errors import UsageError
from photon_data.json_text import from_json

# ms-swift replaces its tags (this one by a volume), and a model obeys its special tokens: no text may hold either.
VIDEO_TAG = "<video>"
TAG = re.compile(r"<(?:video|image|audio|bbox|ref-object|cot-process|start-image)>|<\|\w+\|>")

DELIMITERS = ",;\t|"  # of text tables; a spreadsheet takes ";" where the comma is the decimal sign
# The first line that Excel reads and does not show: the delimiter of the lines below.
SEPARATOR_LINE = re.compile(r'"?sep=([^\r\n])"?[ \t]*(?:\r\n|\r|\n|\Z)', re.IGNORECASE)
DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")
# 1,024 is 1024 for some and 1.024 for others; 0,976 and 1,25 are not in doubt.
AMBIGUOUS_COMMA = re.compile(r"[+-]?[1-9]\d{0,2},\d{3}")


# A larger table does not fit into memory beside what is made of it; a longer cell is no cell.
MAX_BYTES, MAX_CELL = 2 << 30, 1 << 24
# Rows of parquet that are decoded at a time: a few bytes of it can stand for any number of values.
PARQUET_ROWS = 1024


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


def read_values(path: Path) -> list[dict[str, Any]]:
    """Return the values of each row of a table; UsageError with all problems, and as `read_table`."""
    table = read_table(path)
    if table.problems:
        refuse(path, table.problems)
    return [row.values for row in table.rows]


def read_table(path: Path) -> Table:
    """Return the table of a .csv, .tsv, .jsonl, .json (one list of objects) or .parquet file.

    Text is UTF-8, with or without a byte order mark. Cells of csv and tsv are text; values of parquet become those of
    JSON (see `as_json`), other values keep their type. UsageError if nothing can be read: no such file, another suffix
    or encoding, a column twice, no rows.
    """
    if path.suffix.lower() == ".parquet":
        table = _read_parquet(path)
    else:
        text = read_text(path, _READERS)
        table = _READERS[path.suffix.lower()](text)
    if twice := [repr(name) for name, count in Counter(table.columns).items() if count > 1]:
        raise UsageError(
            f"{path}: expected each column name once, found {', '.join(twice)} more than once; rename them"
        )
    if not table.rows and not table.problems:
        raise _no_rows(path)
    return table


def read_lines(path: Path) -> Iterator[TableRow | Problem]:
    """Yield what `read_table` finds in a .jsonl file, a row at a time: all together take twice as much memory."""
    found = None
    for found in _json_lines(read_text(path, (".jsonl",))):
        yield found
    if found is None:
        raise _no_rows(path)


def _no_rows(path: Path) -> UsageError:
    return UsageError(f"{path}: expected rows, found none; is this the right file?")


def read_text(path: Path, suffixes: Collection[str], most: int = MAX_BYTES) -> str:
    """Return the text of a UTF-8 file; UsageError for another suffix, no file, another encoding, or a larger one."""
    if path.suffix.lower() not in suffixes:
        found = repr(path.suffix) if path.suffix else "no suffix"
        raise UsageError(f"{path}: expected {', '.join(suffixes)}, found {found}; save the table as one of these")
    try:
        with path.open("rb") as file:
            buffer = io.BytesIO()  # file.read(most) would ask for that much memory at once
            while buffer.tell() <= most and (part := file.read(1 << 20)):
                buffer.write(part)
        data = buffer.getvalue()
        if len(data) > most:
            raise UsageError(f"{path}: expected at most {most:,} bytes, found more; is this the right file?")
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
    lines = [f"  {problem}" for problem in problems[:10]]
    if len(problems) > len(lines):
        lines.append(f"  and {len(problems) - len(lines)} more")
    number = f"{len(problems)} problems" if len(problems) > 1 else "1 problem"
    raise UsageError("\n".join([f"{source}: {number} ({kinds})", *lines]))


def number(value: Any) -> float:
    """Return the finite number that a cell holds, "0,5" as 0.5; ValueError for anything else, and for "1,024"."""
    text, doubt = str(value).strip(), ""
    if isinstance(value, str) and AMBIGUOUS_COMMA.fullmatch(text):
        doubt = f" ({text.replace(',', '')} or {text.replace(',', '.')}?)"
    elif isinstance(value, str) and DECIMAL_COMMA.fullmatch(text):
        text = text.replace(",", ".")
    try:
        found = math.nan if doubt or isinstance(value, bool) else float(text)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(f"expected a number, found {value!r}{doubt}; write it with a point, 0.5 or -1024")
    return found


def as_name(value: Any) -> Any:
    """Return a value that is to name something: 10004.0, which a column with gaps makes of 10004, as 10004."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _read_delimited(text: str, usual: str) -> Table:
    """Return the table of a csv or tsv text, whose delimiter is said by its first line or seen in its header."""
    said = SEPARATOR_LINE.match(text)
    body, before = (text[said.end() :], 1) if said else (text, 0)
    if said and len(_header(body, said[1])) > 1:
        return _split(body, said[1], before)
    seen = [delimiter for delimiter in DELIMITERS if len(_header(body, delimiter)) > 1]
    if len(seen) < 2:
        return _split(body, seen[0] if seen else usual, before)
    # A name of the header holds a comma, say: of the delimiters that suit most rows, the one with most columns.
    tables = [_split(body, delimiter, before) for delimiter in sorted(seen, key=lambda d: d != usual)]
    return min(tables, key=lambda table: (len(table.problems), -len(table.columns)))


def _header(text: str, delimiter: str) -> list[str]:
    try:
        return next(filter(None, csv.reader(_lines(text), delimiter=delimiter)), [])
    except csv.Error:  # it opens a quote that nothing closes
        return []


def _split(text: str, delimiter: str, lines_before: int) -> Table:
    """Return the table of a text. Rows without any text are skipped; a row that breaks the quoting ends the file."""
    columns: list[str] = []
    table = Table(columns, [], [])
    csv.field_size_limit(MAX_CELL)
    reader = csv.reader(_lines(text), delimiter=delimiter, strict=True)
    while True:
        place = f"line {lines_before + reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if "field limit" in str(error):
                text = f"expected at most {MAX_CELL:,} characters in a cell, found more; is a quote never closed?"
                table.problems.append(Problem(place, "long cell", text))
                return table
            found = f"{error}; the file is cut off, or a quote inside a cell is not doubled"
            table.problems.append(Problem(place, "broken quoting", f"expected closed quotes, found: {found}"))
            return table
        if cells is None:
            return table
        if not any(map(str.strip, cells)):
            continue
        if not columns:
            columns += [name.strip() or f"column_{number}" for number, name in enumerate(cells, 1)]
        elif len(cells) == len(columns):
            table.rows.append(TableRow(place, dict(zip(columns, cells, strict=True))))
        else:
            found = f"{len(cells)}: {delimiter.join(cells)[:60]!r}; the row is cut off or not quoted"
            table.problems.append(Problem(place, "ragged row", f"expected {len(columns)} cells, found {found}"))


def _json_lines(text: str) -> Iterator[TableRow | Problem]:
    """Yield the row of each line that is not empty, or what is wrong with it."""
    for number, line in enumerate(_lines(text), 1):
        if line.strip():
            try:
                yield _object(f"line {number}", from_json(line, strict=True))
            except ValueError as error:
                found = f"{line[:60]!r} ({error})"
                yield Problem(f"line {number}", "not JSON", f"expected one JSON object, found {found}")


def _read_json_list(text: str) -> Table:
    try:
        values = from_json(text, strict=True)
    except ValueError as error:
        return Table([], [], [Problem("file", "not JSON", f"expected one JSON list, found: {error}")])
    if not isinstance(values, list):
        return Table([], [], [Problem("file", "not a list", f"expected one JSON list, found {_type(values)}")])
    return _json_table(_object(f"item {number}", value) for number, value in enumerate(values, 1))


def _object(place: str, value: Any) -> TableRow | Problem:
    if isinstance(value, dict):
        return TableRow(place, value)
    return Problem(place, "not an object", f"expected one JSON object, found {_type(value)}")


def _json_table(found: Iterable[TableRow | Problem]) -> Table:
    rows, problems = list[TableRow](), list[Problem]()
    for one in found:
        rows.append(one) if isinstance(one, TableRow) else problems.append(one)
    return Table(list(dict.fromkeys(name for row in rows for name in row.values)), rows, problems)


def _type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", type(None): "null"}
    return names.get(type(value), "a number or a boolean")


def _lines(text: str) -> Iterable[str]:
    """Yield lines with their ends. str.splitlines also splits at U+2028 and U+0085, which a text may hold."""
    return (match[0] for match in re.finditer(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+", text))


def _read_parquet(path: Path) -> Table:
    """Return the table of a parquet file, its rows numbered from 1; UsageError without the extra `parquet`."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        remedy = "pip install 'photon-ct[parquet]'"
        raise UsageError(f"{path}: expected pyarrow to read parquet, found none; {remedy}") from None
    try:
        with parquet.ParquetFile(path) as file:
            batches, size = [], 0
            for batch in file.iter_batches(PARQUET_ROWS):
                batches.append(batch)
                size += sum(map(_decoded_bytes, batch.columns))
                if size > MAX_BYTES:
                    raise ValueError(f"more than {MAX_BYTES:,} bytes of values")
            table = pyarrow.Table.from_batches(batches, file.schema_arrow)
    except (OSError, ValueError, MemoryError, pyarrow.ArrowException) as error:
        raise UsageError(f"{path}: expected a readable parquet file, found: {str(error)[:200]}") from None
    problems: list[Problem] = []
    columns = [
        _parquet_values(path, name, column, problems)
        for name, column in zip(table.column_names, table.columns, strict=True)
    ]
    rows = [
        TableRow(f"row {number}", dict(zip(table.column_names, values, strict=True)))
        for number, values in enumerate(zip(*columns, strict=True), 1)
    ]
    return Table(table.column_names, rows, problems)


def _decoded_bytes(column: Any) -> int:
    """Return how many bytes the values of a column of pyarrow take once each is one of its own."""
    import pyarrow
    from pyarrow import compute

    if not (
        pyarrow.types.is_dictionary(column.type) and column.type.value_type in (pyarrow.string(), pyarrow.binary())
    ):
        return int(column.nbytes)
    return int(compute.sum(compute.binary_length(column.dictionary).take(column.indices)).as_py() or 0)


def _parquet_values(path: Path, name: str, column: Any, problems: list[Problem]) -> list[Any]:
    """Return the values of a column of pyarrow, as JSON has them; those that it cannot have go to `problems`."""
    try:
        values = column.to_pylist()
    except (ValueError, OverflowError) as error:  # nanoseconds, years beyond 9999
        found = f"{column.type} with a value that Python cannot hold ({str(error)[:100]})"
        raise UsageError(f"{path}: expected a readable column {name!r}, found {found}; save it as text") from None
    for index, value in enumerate(values):
        if value is not None and not isinstance(value, str):
            try:
                values[index] = as_json(value)
            except ValueError as error:
                text = f"column {name!r}: {error}; save it as text or leave the column out"
                problems.append(Problem(f"row {index + 1}", "value of another type", text))
    return values


def as_json(value: Any) -> Any:
    """Return a value as JSON can hold it: NaN as None, dates as ISO text, bytes as UTF-8; ValueError where it cannot.

    Decimals become text with all their digits, other objects the text that Python prints.
    """
    if value is None or value != value:  # NaN and NaT differ from themselves
        return None
    if isinstance(value, float) and math.isinf(value):
        raise ValueError(f"expected a finite number, found {value}")
    if isinstance(value, str | int | float):
        return value
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise ValueError(f"expected text, found {len(value)} bytes that are no UTF-8") from None
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):  # of nanoseconds it is one of pandas, where that is installed
        plain = datetime.timedelta(value.days, value.seconds, value.microseconds)
        return str(plain if plain == value else value)
    return format(value, "f") if isinstance(value, Decimal) else str(value)


_READERS: dict[str, Callable[[str], Table]] = {
    ".csv": lambda text: _read_delimited(text, ","),
    ".tsv": lambda text: _read_delimited(text, "\t"),
    ".jsonl": lambda text: _json_table(_json_lines(text)),
    ".json": _read_json_list,
}
