"""A table of the values of label maps (`--mask-labels`) -> the name of each value."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from photon_data.errors import UsageError
from photon_data.json_text import from_json
from photon_data.questions.table import read_text, read_values
from photon_data.yaml_text import read_yaml, value_of

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
