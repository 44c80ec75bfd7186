"""A JSON text -> its value; a row of one -> the fields of a dataclass, each of its type. Both raise ValueError only."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

# Larger whole numbers are no counts, and no floating-point number holds the largest.
MAX_WHOLE = 2**63
Check = Callable[[Any], bool]
_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", NoneType: "null"}


def from_json(text: str | bytes, *, strict: bool = False) -> Any:
    """Return the value of a JSON text; ValueError for other text, nesting beyond what Python reads, or endless numbers.

    Of a key that occurs twice the last value counts, as for other readers. With `strict`, that is a ValueError too, and
    so are NaN, infinite numbers, and halves of surrogate pairs, which are no UTF-8.
    """
    try:
        if not strict:
            return json.loads(text)
        value = json.loads(
            text, parse_float=_finite, parse_constant=_refuse_constant, object_pairs_hook=_without_duplicates
        )
    except RecursionError:
        raise ValueError("objects or lists nested too deep") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise ValueError(f"{error.msg}: {where}") from None
    except UnicodeDecodeError:
        raise ValueError("bytes that are no UTF-8") from None
    except ValueError as error:
        if "integer string conversion" in str(error):
            raise ValueError(f"a number of more than {sys.get_int_max_str_digits():,} digits") from None
        raise
    if (b"\\ud" if isinstance(text, bytes) else "\\ud") in text.lower():  # type: ignore[operator]
        json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name[:40]} is not JSON; leave the value out or write null")


def _finite(digits: str) -> float:
    return value if math.isfinite(value := float(digits)) else _refuse_constant(digits)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice[:40]!r} twice; remove one")
    return found


def fields_of(cls: type, row: Any) -> dict[str, Any]:
    """Return the values of a row that are fields of a dataclass, without others; ValueError for a missing or wrong one.

    A number is a float or an int and never NaN, a truth value is no number, and texts are UTF-8.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"expected an object, found {row!r:.80}")
    hints, checks, needed = _hints(cls)
    if missing := [name for name in needed if name not in row]:
        raise ValueError(f"expected `{missing[0]}`, found none")
    for name, value in row.items():
        if name in checks and not checks[name](value):
            raise ValueError(f"expected {_words(hints[name])} as `{name}`, found {value!r:.60}")
    return {name: value for name, value in row.items() if name in hints}


@cache
def _hints(cls: type) -> tuple[dict[str, Any], dict[str, Check], tuple[str, ...]]:
    hints = get_type_hints(cls)
    kinds = {field.name: hints[field.name] for field in fields(cls)}
    needed = tuple(f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING)
    return kinds, {name: _check_of(kind) for name, kind in kinds.items()}, needed


def _check_of(kind: Any) -> Check:
    """Return what tells whether a value is of a kind; found once, since a folder has a million rows."""
    if kind is Any:
        return lambda value: True
    if isinstance(kind, UnionType):
        return _one_of([_check_of(one) for one in get_args(kind)])
    if get_origin(kind) in (dict, Mapping):
        is_item = _check_of(item := get_args(kind)[1])
        if item is Any:
            return lambda value: isinstance(value, dict)
        return lambda value: isinstance(value, dict) and all(map(is_item, value.values()))
    if get_origin(kind) is list:
        is_part = _check_of(get_args(kind)[0])
        return lambda value: isinstance(value, list) and all(map(is_part, value))
    if kind in (int, float):
        return lambda value: (
            (type(value) is int and abs(value) <= MAX_WHOLE)
            or (kind is float and type(value) is float and value == value)
        )
    return lambda value: isinstance(value, kind)


def _one_of(checks: Sequence[Check]) -> Check:
    """Return a check that one of the checks has to pass."""
    first, second = checks if len(checks) == 2 else (checks[0], _one_of(checks[1:]))
    return lambda value: first(value) or second(value)


def _words(kind: Any) -> str:
    if isinstance(kind, UnionType):
        return " or ".join(map(_words, get_args(kind)))
    if get_origin(kind) in (dict, Mapping):
        item = get_args(kind)[1]
        return "an object" if item is Any else f"an object whose values are {_words(item).removeprefix('a ')}s"
    if get_origin(kind) is list:
        return f"a list of {_words(get_args(kind)[0]).removeprefix('a ')}s"
    return _WORDS.get(kind, str(kind))
