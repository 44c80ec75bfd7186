"""A YAML file -> plain values that know the line they stand on, so that what is wrong with one can be said by line."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from photon_data.errors import UsageError
from photon_data.tables import nearest, read_text


class Placed(NamedTuple):
    """A value of a YAML file and its place, "FILE, line 3". Mappings hold Placed values by text, lists hold Placed items."""

    value: Any
    place: str

    def wrong(self, wanted: str) -> UsageError:
        """Return the error that says what was wanted here."""
        return UsageError(f"{self.place}: {wanted} wanted, got {_said(self.value)}")

    def mapping(self, wanted: str) -> dict[str, Placed]:
        """Return the mapping that this is; UsageError for anything else."""
        if not isinstance(self.value, dict):
            raise self.wrong(wanted)
        return self.value

    def fields(self, names: Collection[str]) -> dict[str, Placed]:
        """Return the mapping that this is; UsageError for another value, and, with the nearest name, for keys not in `names`."""
        found = self.mapping(f"a mapping with {', '.join(names)}")
        for name, item in found.items():
            if name not in names:
                near = nearest(name, names)
                hint = f"did you mean {near!r}?" if near else "nothing of that name is known"
                raise UsageError(f"{item.place}: one of {', '.join(names)} wanted, got {name!r}; {hint}")
        return found

    def text(self) -> str:
        """Return the text that this is; UsageError for anything else, numbers and yes/no without quotes among them."""
        if not isinstance(self.value, str) or not self.value.strip():
            raise self.wrong("text (in quotes, if it looks like a number)")
        return self.value.strip()

    def number(self, least: float) -> float:
        """Return the number that this is, above `least`."""
        if isinstance(self.value, bool) or not isinstance(self.value, int | float) or not self.value > least:
            raise self.wrong(f"a number above {least:g}")
        return self.value

    def whole(self, least: int) -> int:
        """Return the whole number that this is, above `least`."""
        if isinstance(self.value, bool) or not isinstance(self.value, int) or self.value <= least:
            raise self.wrong(f"a whole number above {least}")
        return self.value

    def texts(self) -> list[str]:
        """Return the texts of a list, or the one text that stands in its place."""
        return [item.text() for item in self.value] if isinstance(self.value, list) else [self.text()]

    def one_of(self, names: Collection[str]) -> str:
        """Return the text that this is, one of `names`."""
        if self.value not in names:
            raise self.wrong(f"one of {', '.join(names)}")
        return str(self.value)


def read_yaml(path: Path) -> Placed:
    """Return the one document of a YAML file; UsageError for what is no YAML, or has a key twice."""
    text = read_text(path, (".yaml", ".yml"))
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise UsageError(f"{path.name}, line {mark.line + 1 if mark else 1}: YAML wanted, got: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path.name}: YAML wanted, got: {error}") from None
    if node is None:
        raise UsageError(f"{path.name}: data sets wanted, got an empty file")
    return _placed(node, path.name, yaml.SafeLoader(""))


def _placed(node: yaml.Node, name: str, loader: yaml.SafeLoader) -> Placed:
    place = f"{name}, line {node.start_mark.line + 1}"
    if isinstance(node, yaml.SequenceNode):
        return Placed([_placed(item, name, loader) for item in node.value], place)
    if not isinstance(node, yaml.MappingNode):
        return Placed(loader.construct_object(node), place)
    found: dict[str, Placed] = {}
    for key, item in node.value:
        if key.value in found:
            raise UsageError(f"{name}, line {key.start_mark.line + 1}: every key once wanted, got {key.value!r} again")
        value = _placed(item, name, loader)
        found[str(key.value)] = Placed(value.value, f"{name}, line {key.start_mark.line + 1}")
    return Placed(found, place)


def _said(value: Any) -> str:
    kinds = {dict: "a mapping", list: "a list", type(None): "nothing"}
    return kinds.get(type(value)) or repr(value)
