"""data_manifest.yaml -> the data sets that it declares, checked. docs/datasets.md explains every key.

Every value of the YAML file keeps its line until it is checked, so that an error names the line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml

from photon_data.datasets.base import UNPACK, DataSet, RecipeChoice, Share, Wording
from photon_data.errors import UsageError, nearest_name
from photon_data.questions.question import NAMES, PROMPTS
from photon_data.readers.mask_pattern import read_label_names
from photon_data.scan import MaskPattern, is_url
from photon_data.yaml_text import read_yaml, value_of

T = TypeVar("T")
LARGEST = 1 << 63  # number; infinity is none

ENTRY = ("adapter", "root", "annotations", "splits", "questions", "volumes", "recipe", "masks", "mix", "options")
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
        if unknown := [name for name in names if name not in declared]:
            raise UsageError(f"--only: expected one of {', '.join(declared)}, found {unknown[0]!r}")
        return tuple(entry for entry in self.datasets if not names or entry.name in names)


def read_data_manifest(path: Path) -> DataManifest:
    """Return the checked data_manifest.yaml; relative paths start at its folder. UsageError with a line."""
    top = _read_yaml(path).mapping(("out", "recipe", "seed", "datasets"))
    if "datasets" not in top:
        raise UsageError(f"{path.name}: expected a mapping `datasets`, found {', '.join(top) or 'nothing'}")
    recipe = _read(top, "recipe", _recipe, RecipeChoice())
    datasets: dict[str, DataSet] = {}
    for name, item in top["datasets"].mapping().items():
        if not NAME.fullmatch(name):
            raise UsageError(f"{item.place}: expected a name of letters, digits, '.', '_' and '-', found {name!r}")
        if name.casefold() in datasets:
            raise UsageError(f"{item.place}: expected names that differ in more than case, found {name!r} again")
        datasets[name.casefold()] = _entry(name, item, recipe)
    if not datasets:
        raise top["datasets"].error("at least one data set")
    out = _read(top, "out", _Node.text, None)
    if out is not None and "://" not in out:
        out = str(path.absolute().parent / out)
    return DataManifest(path, tuple(datasets.values()), out, _read(top, "seed", lambda seed: seed.whole(-1), 0))


def _read(found: Mapping[str, _Node], key: str, convert: Callable[[_Node], T], default: T) -> T:
    return convert(found[key]) if key in found else default


def _entry(name: str, item: _Node, recipe: RecipeChoice) -> DataSet:
    found = item.mapping(ENTRY)
    if "adapter" not in found:
        raise UsageError(f"{item.place}: data set {name}: expected an adapter, found none")
    splits, fractions = _splits(found["splits"]) if "splits" in found else ({}, {})
    return DataSet(
        name=name,
        place=item.place,
        adapter=found["adapter"].text(),
        roots=_read(found, "root", _Node.paths, ()),
        annotations=_read(found, "annotations", _annotations, {}),
        splits=splits,
        fractions=fractions,
        wording=_read(found, "questions", _wording, Wording()),
        volumes=_read(found, "volumes", lambda which: which.one_of(("all", "first", "thinnest", "sharpest")), "all"),
        recipe=_read(found, "recipe", lambda choice: _recipe(choice, recipe.name), recipe),
        masks=_read(found, "masks", _masks, None),
        mix=_read(found, "mix", lambda mix: {split: _share(share) for split, share in mix.mapping().items()}, {}),
        options=_read(
            found, "options", lambda all_: {name: _option(name, one) for name, one in all_.mapping().items()}, {}
        ),
    )


def _annotations(item: _Node) -> dict[str, tuple[Path, ...]]:
    """Return {kind: paths}; paths without a kind are "questions"."""
    kinds = item.value if isinstance(item.value, dict) else {"questions": item}
    return {kind: paths.paths() for kind, paths in kinds.items()}


def _splits(item: _Node) -> tuple[dict[str, str], dict[str, float]]:
    """Return ({theirs: ours}, {}) for names and ({}, {ours: share}) for numbers."""
    if not isinstance(item.value, dict):
        return {text: text for text in item.texts()}, {}
    if item.value and all(isinstance(share.value, int | float) for share in item.value.values()):
        return {}, {name: float(share.number(0)) for name, share in item.value.items()}
    return {theirs: ours.text() for theirs, ours in item.value.items()}, {}


def _wording(item: _Node) -> Wording:
    allowed = {"prompt": PROMPTS, "choices": ("shown", "hidden"), "duplicates": ("keep", "drop")}
    found: dict[str, Any] = {}
    for name, value in item.mapping(Wording._fields).items():
        if name == "report":
            found[name] = tuple(value.texts())
        else:
            found[name] = value.one_of(allowed[name]) if name in allowed else value.text()
    return Wording(**found)


def _recipe(item: _Node, default_name: str = RecipeChoice().name) -> RecipeChoice:
    """Return the recipe of `recipe: NAME` or of `recipe: {name: NAME, spacing_mm: [1, 1, 1]}`."""
    if not isinstance(item.value, dict):
        return RecipeChoice(item.text())
    settings = tuple(f"{key}={_setting(value)}" for key, value in item.value.items() if key != "name")
    return RecipeChoice(_read(item.value, "name", _Node.text, default_name), settings)


def _setting(item: _Node) -> str:
    return ",".join(map(_setting, item.value)) if isinstance(item.value, list) else str(item.value)


def _masks(item: _Node) -> MaskPattern:
    """Return the pattern of `masks: PATTERN` or of `masks: {files: PATTERN, labels: TABLE}`."""
    found = item.mapping(("files", "labels")) if isinstance(item.value, dict) else {"files": item}
    labels = read_label_names(found["labels"].paths()[0]) if "labels" in found else {}
    try:
        return MaskPattern(_read(found, "files", _Node.text, ""), labels)
    except UsageError as error:
        raise UsageError(f"{item.place}: {error}") from None


def _share(item: _Node) -> Share:
    found = item.mapping(Share._fields)
    weight = _read(found, "weight", lambda weight: weight.number(0), None)
    return Share(weight, _read(found, "cap", lambda cap: cap.whole(0), None))


def _option(name: str, item: _Node) -> Any:
    if isinstance(item.value, dict):
        return {key: text.text() for key, text in item.mapping(NAMES if name == "columns" else None).items()}
    text = item.text()  # refuses a list
    return item.paths()[0] if name == UNPACK else text


class _Node(NamedTuple):
    """A value of a YAML file. Each method returns it as one type; UsageError, with the line, if it is of another."""

    value: Any  # mappings hold a node for each key, lists hold nodes
    path: Path
    line: int

    @property
    def place(self) -> str:
        return f"{self.path.name}, line {self.line}"

    def error(self, expected: str) -> UsageError:
        kinds = {dict: "a mapping", list: "a list", type(None): "nothing"}
        found = kinds.get(type(self.value)) or f"{self.value!r:.100}"
        return UsageError(f"{self.place}: expected {expected}, found {found}")

    def mapping(self, names: Collection[str] | None = None) -> Mapping[str, _Node]:
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
        if not isinstance(self.value, str) or not self.value.strip():
            raise self.error("text (in quotes, if it looks like a number)")
        return self.value.strip()

    def texts(self) -> list[str]:
        """Return the texts of a list, or the one text without a list."""
        return [item.text() for item in self.value] if isinstance(self.value, list) else [self.text()]

    def paths(self) -> tuple[Path, ...]:
        """Return `texts` as paths; relative ones start at the folder of the file."""
        if any(map(is_url, self.texts())):
            raise self.error("local paths (a URL can be SOURCE of a command, not in a manifest: mount or copy it)")
        try:
            return tuple(self.path.absolute().parent / Path(text).expanduser() for text in self.texts())
        except RuntimeError:
            raise self.error("a path whose ~ is a home folder") from None

    def number(self, above: int, kind: str = "number") -> float:
        allowed = int if kind == "whole number" else int | float
        is_number = isinstance(self.value, allowed) and not isinstance(self.value, bool)
        if not (is_number and above < self.value < LARGEST):
            raise self.error(f"a {kind} above {above}")
        return self.value

    def whole(self, above: int) -> int:
        return int(self.number(above, "whole number"))

    def one_of(self, names: Collection[str]) -> str:
        if not isinstance(self.value, str) or self.value not in names:
            raise self.error(f"one of {', '.join(names)}")
        return self.value


def _read_yaml(path: Path) -> _Node:
    """Return the one document of a YAML file; UsageError as `read_yaml`."""

    def value(node: yaml.Node) -> Any:
        if isinstance(node, yaml.SequenceNode):
            return [_Node(value(item), path, item.start_mark.line + 1) for item in node.value]
        if not isinstance(node, yaml.MappingNode):
            return value_of(node)
        lines = [(str(key.value), item, key.start_mark.line + 1) for key, item in node.value]  # the lines of the keys
        return {name: _Node(value(item), path, line) for name, item, line in lines}

    return read_yaml(path, (".yaml", ".yml"), lambda root: _Node(value(root), path, root.start_mark.line + 1))
