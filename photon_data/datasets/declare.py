"""data_manifest.yaml -> the data sets that it declares, checked. docs/datasets.md explains every key.

Every value of the YAML file keeps its line until it is checked, so that an error names the line.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from photon_data.datasets.base import UNPACK, DataSet, RecipeChoice, Share, Wording
from photon_data.errors import UsageError, nearest_name
from photon_data.questions.question import PROMPTS
from photon_data.questions.question_table import NAMES
from photon_data.questions.table import read_text

TOP = ("out", "recipe", "seed", "datasets")
ENTRY = ("adapter", "root", "annotations", "splits", "questions", "volumes", "recipe", "mix", "options")
QUESTIONS = ("prompt", "choices", "report", "instruction", "duplicates")
RECONSTRUCTIONS = ("all", "first", "thinnest", "sharpest")
# The name of a data set begins ids and can be the name of a file.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class DataManifest:
    """All of data_manifest.yaml; `out` is None if the command has to give it."""

    path: Path
    datasets: tuple[DataSet, ...]
    out: str | None = None
    seed: int = 0

    def only(self, names: Collection[str]) -> tuple[DataSet, ...]:
        """Return the named data sets, or all of them without names; UsageError for a name that is not declared."""
        declared = [entry.name for entry in self.datasets]
        unknown = [name for name in names if name not in declared]
        if unknown:
            raise UsageError(f"--only: expected one of {', '.join(declared)}, found {unknown[0]!r}")
        return tuple(entry for entry in self.datasets if not names or entry.name in names)


def read_data_manifest(path: Path) -> DataManifest:
    """Return the checked content of a data_manifest.yaml; relative paths start at its folder. UsageError with a line."""
    top = _read_yaml(path).mapping(TOP)
    if "datasets" not in top:
        raise UsageError(f"{path.name}: expected a mapping `datasets`, found {', '.join(top) or 'nothing'}")
    base, recipe = path.absolute().parent, _recipe(top.get("recipe"), RecipeChoice())
    datasets = tuple(_entry(name, item, base, recipe) for name, item in top["datasets"].mapping().items())
    if not datasets:
        raise top["datasets"].error("at least one data set")
    by_name: dict[str, DataSet] = {}
    for entry in datasets:
        other = by_name.setdefault(entry.name.casefold(), entry)
        if other is not entry:
            raise entry.error(f"expected names that differ in more than upper and lower case, found {other.name!r} too")
    out = top["out"].text() if "out" in top else None
    seed = top["seed"].integer(above=-1) if "seed" in top else 0
    return DataManifest(path, datasets, out if out is None or "://" in out else str(base / out), seed)


def _entry(name: str, item: Node, base: Path, recipe: RecipeChoice) -> DataSet:
    if not NAME.fullmatch(name):
        raise UsageError(f"{item.place}: expected a name of letters, digits, '.', '_' and '-', found {name!r}")
    found = item.mapping(ENTRY)
    if "adapter" not in found:
        raise UsageError(f"{item.place}: data set {name}: expected an adapter, found none")
    splits, fractions = _splits(found.get("splits"))
    return DataSet(
        name=name,
        place=item.place,
        adapter=found["adapter"].text(),
        roots=_paths(found["root"], base) if "root" in found else (),
        annotations=_annotations(found.get("annotations"), base),
        splits=splits,
        fractions=fractions,
        wording=_wording(found.get("questions")),
        volumes=found["volumes"].one_of(RECONSTRUCTIONS) if "volumes" in found else "all",
        recipe=_recipe(found.get("recipe"), recipe),
        mix=_mix(found.get("mix")),
        options=_options(found.get("options"), base),
    )


def _paths(item: Node, base: Path) -> tuple[Path, ...]:
    return tuple(base / Path(text).expanduser() for text in item.texts())


def _annotations(item: Node | None, base: Path) -> dict[str, tuple[Path, ...]]:
    """Return {kind: paths}; paths without a kind are "questions"."""
    if item is None:
        return {}
    if not isinstance(item.value, dict):
        return {"questions": _paths(item, base)}
    return {kind: _paths(paths, base) for kind, paths in item.value.items()}


def _splits(item: Node | None) -> tuple[dict[str, str], dict[str, float]]:
    """Return ({theirs: ours}, {}) for names and ({}, {ours: share}) for numbers."""
    if item is None:
        return {}, {}
    if not isinstance(item.value, dict):
        return {text: text for text in item.texts()}, {}
    if item.value and all(isinstance(share.value, int | float) for share in item.value.values()):
        return {}, {name: float(share.number()) for name, share in item.value.items()}
    return {theirs: ours.text() for theirs, ours in item.value.items()}, {}


def _wording(item: Node | None) -> Wording:
    found: dict[str, Any] = dict(item.mapping(QUESTIONS)) if item else {}
    allowed = {"prompt": PROMPTS, "choices": ("shown", "hidden"), "duplicates": ("keep", "drop")}
    for name, value in found.items():
        if name in allowed:
            found[name] = value.one_of(allowed[name])
        else:
            found[name] = tuple(value.texts()) if name == "report" else value.text()
    return Wording(**found)


def _recipe(item: Node | None, default: RecipeChoice) -> RecipeChoice:
    """Return the recipe of `recipe: NAME` or of `recipe: {name: NAME, spacing_mm: [1, 1, 1]}`."""
    if item is None:
        return default
    if not isinstance(item.value, dict):
        return RecipeChoice(item.text())
    settings = {key: value for key, value in item.value.items() if key != "name"}
    name = item.value["name"].text() if "name" in item.value else default.name
    return RecipeChoice(name, tuple(f"{key}={_setting(value)}" for key, value in settings.items()))


def _setting(item: Node) -> str:
    return ",".join(map(_setting, item.value)) if isinstance(item.value, list) else str(item.value)


def _mix(item: Node | None) -> dict[str, Share]:
    shares = {}
    for split, share in (item.mapping() if item else {}).items():
        found = share.mapping(("weight", "cap"))
        weight = found["weight"].number() if "weight" in found else None
        shares[split] = Share(weight, found["cap"].integer() if "cap" in found else None)
    return shares


def _options(item: Node | None, base: Path) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for name, value in (item.mapping() if item else {}).items():
        if name == UNPACK:
            options[name] = base / Path(value.text()).expanduser()
        elif isinstance(value.value, dict):
            texts = value.mapping(NAMES) if name == "columns" else value.value
            options[name] = {key: text.text() for key, text in texts.items()}
        else:
            options[name] = value.text()
    return options


class Node(NamedTuple):
    """A value of a YAML file and its place, "FILE, line 3". Mappings hold a Node for each key, lists hold Nodes.

    Each method returns the value as one type. It raises UsageError, with the place, for a value of another type.
    """

    value: Any
    place: str

    def error(self, expected: str) -> UsageError:
        """Return the error of a place where something else was expected."""
        kinds = {dict: "a mapping", list: "a list", type(None): "nothing"}
        return UsageError(f"{self.place}: expected {expected}, found {kinds.get(type(self.value)) or repr(self.value)}")

    def mapping(self, names: Collection[str] | None = None) -> Mapping[str, Node]:
        """Return a mapping; its keys have to be among `names`, if they are given."""
        if not isinstance(self.value, dict):
            raise self.error(f"a mapping with {', '.join(names)}" if names else "a mapping")
        for name, item in self.value.items():
            if names is not None and name not in names:
                near = nearest_name(name, names)
                hint = f"; did you mean {near!r}?" if near else ""
                raise UsageError(f"{item.place}: expected one of {', '.join(names)}, found {name!r}{hint}")
        return self.value

    def text(self) -> str:
        """Return a text; numbers and yes/no need quotes."""
        if not isinstance(self.value, str) or not self.value.strip():
            raise self.error("text (in quotes, if it looks like a number)")
        return self.value.strip()

    def texts(self) -> list[str]:
        """Return the texts of a list, or the one text without a list."""
        return [item.text() for item in self.value] if isinstance(self.value, list) else [self.text()]

    def number(self) -> float:
        """Return a number above 0."""
        if isinstance(self.value, bool) or not isinstance(self.value, int | float) or not self.value > 0:
            raise self.error("a number above 0")
        return self.value

    def integer(self, above: int = 0) -> int:
        """Return a whole number above `above`."""
        if isinstance(self.value, bool) or not isinstance(self.value, int) or self.value <= above:
            raise self.error(f"a whole number above {above}")
        return self.value

    def one_of(self, names: Collection[str]) -> str:
        """Return one of `names`."""
        if not isinstance(self.value, str) or self.value not in names:
            raise self.error(f"one of {', '.join(names)}")
        return self.value


def _read_yaml(path: Path) -> Node:
    """Return the one document of a YAML file; UsageError if it is not YAML, or has a key twice."""
    text = read_text(path, (".yaml", ".yml"))
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = mark.line + 1 if mark else 1
        raise UsageError(f"{path.name}, line {line}: expected YAML, found: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path.name}: expected YAML, found: {error}") from None
    if root is None:
        raise UsageError(f"{path.name}: expected data sets, found an empty file")
    scalars = yaml.SafeLoader("")

    def place(node: yaml.Node) -> str:
        return f"{path.name}, line {node.start_mark.line + 1}"

    def value(node: yaml.Node) -> Any:
        if isinstance(node, yaml.SequenceNode):
            return [Node(value(item), place(item)) for item in node.value]
        if not isinstance(node, yaml.MappingNode):
            return scalars.construct_object(node)
        found: dict[str, Node] = {}
        for key, item in node.value:  # the place of an item is that of its key
            name = str(key.value)
            if name in found:
                raise UsageError(f"{place(key)}: expected every key once, found {name!r} again")
            found[name] = Node(value(item), place(key))
        return found

    return Node(value(root), place(root))
