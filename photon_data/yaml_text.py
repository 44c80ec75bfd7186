"""A YAML text -> its one document, of a sane size: nodes that know their lines, or plain values. UsageErrors only."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

import yaml

from photon_data.errors import UsageError
from photon_data.questions.table import read_text

# Settings are typed by people. An alias counts as often as it is used, so that a few lines cannot mean billions.
MAX_BYTES, MAX_NODES, MAX_DEPTH = 1 << 20, 100_000, 30
# What Python has plain values for; other tags are a program's.
_NAMES = ("null", "bool", "int", "float", "str", "timestamp", "seq", "map", "merge")
TAGS = {f"tag:yaml.org,2002:{name}" for name in _NAMES}

T = TypeVar("T")


def read_yaml(path: Path, suffixes: Collection[str], convert: Callable[[yaml.Node], T]) -> T:
    """Return what `convert` makes of the one document of a YAML file.

    UsageError, with the line where it is known, for another suffix, what is no YAML, no document or several, a key that
    is no text or there twice, tags, control characters, and what is larger or nested deeper than settings are.
    """
    text = read_text(path, suffixes, MAX_BYTES)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None:
            raise UsageError(f"{path.name}: expected settings, found an empty file")
        _check(root, path.name, 0, 0)
        return convert(root)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path.name}, line {mark.line + 1}" if mark else path.name
        raise UsageError(f"{place}: expected YAML, found: {getattr(error, 'problem', None) or error}") from None
    except RecursionError:
        raise UsageError(f"{path.name}: expected at most {MAX_DEPTH} levels of nesting, found more") from None


def _check(node: yaml.Node, name: str, depth: int, seen: int) -> int:
    """Return the number of nodes down to and with this one, aliases counted at each use; UsageError."""
    place, seen = f"{name}, line {node.start_mark.line + 1}", seen + 1
    if depth > MAX_DEPTH or seen > MAX_NODES:
        expected = f"at most {MAX_DEPTH} levels and {MAX_NODES:,} values"
        raise UsageError(f"{place}: expected {expected}, aliases written out, found more; write it plainly")
    if node.tag not in TAGS:
        raise UsageError(f"{place}: expected plain values, found the tag {node.tag!r:.80}; remove it")
    if isinstance(node, yaml.ScalarNode):
        if odd := next((sign for sign in node.value if _is_odd(sign)), None):
            raise UsageError(f"{place}: expected text without control characters, found {odd!r}; remove it")
        return seen
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            seen = _check(item, name, depth + 1, seen)
        return seen
    keys = set()
    for key, item in node.value:
        place = f"{name}, line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise UsageError(f"{place}: expected a text as key, found a list or a mapping")
        if key.value in keys:
            raise UsageError(f"{place}: expected every key once, found {key.value!r:.80} again")
        keys.add(key.value)
        seen = _check(item, name, depth + 1, _check(key, name, depth + 1, seen))
    return seen


def _is_odd(sign: str) -> bool:
    return unicodedata.category(sign) in ("Cc", "Cs") and sign not in "\n\t"


def value_of(node: yaml.Node) -> Any:
    """Return the plain value of a checked node, of a mapping a dict; YAMLError for a date or a number that is none."""
    try:
        return yaml.SafeLoader("").construct_document(node)
    except (ValueError, OverflowError) as error:
        problem = f"a date or number that is none ({error}); put it in quotes"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None
