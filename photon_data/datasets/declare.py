"""A YAML file -> plain values that know the line they stand on, so that what is wrong with one can be said by line.

data_manifest.yaml -> the data sets that people declare in it, checked, with lines to point at. See docs/datasets.md.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml

from photon_data.errors import UsageError, nearest_name
from photon_data.questions.question import NAMES, PROMPTS
from photon_data.questions.splits import check_split_names
from photon_data.questions.table import read_text


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
                near = nearest_name(name, names)
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


TOP = ("out", "recipe", "seed", "datasets")
ENTRY = ("adapter", "root", "annotations", "splits", "questions", "volumes", "recipe", "mix", "options")
# Options that are folders.
FOLDERS = ("unpack",)
RECONSTRUCTIONS = ("all", "first", "thinnest", "sharpest")


@dataclass(frozen=True)
class Policy:
    """How a data set's questions are put.

    prompt       a style of `photon_data.prompts`; choices "shown" or "hidden"
    report       columns of a report, in the order in which they become the answer
    instruction  the question that a report answers; the recipe's if None
    duplicates   rows that repeat another: "keep" or "drop"
    """

    prompt: str = "plain"
    choices: str = "hidden"
    report: tuple[str, ...] = ()
    instruction: str | None = None
    duplicates: str = "keep"


@dataclass(frozen=True)
class RecipeChoice:
    """A recipe by name, with "key=value" settings."""

    name: str = "chest_ct"
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataSet:
    """One entry of data_manifest.yaml.

    place        "data_manifest.yaml, line 7", for errors
    roots        folders of scans
    annotations  {what it is: files or folders}; which there are depends on the adapter
    splits       {the publisher's split: ours}, others are left out; empty keeps all as they are called
    fractions    {our split: share}, to draw splits by patient where the publisher has none; empty for the defaults
    volumes      which reconstructions of a scan: all, first, thinnest, sharpest
    mix          {our split: Share}
    options      of the adapter alone, as texts, {text: text} or, of FOLDERS, a Path
    """

    name: str
    place: str
    adapter: str
    roots: tuple[Path, ...] = ()
    annotations: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    splits: Mapping[str, str] = field(default_factory=dict)
    fractions: Mapping[str, float] = field(default_factory=dict)
    policy: Policy = Policy()
    volumes: str = "all"
    recipe: RecipeChoice = RecipeChoice()
    mix: Mapping[str, Share] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def wrong(self, said: str) -> UsageError:
        """Return the error of this data set that says so."""
        return UsageError(f"{self.place}, data set {self.name}: {said}")


@dataclass(frozen=True)
class DataManifest:
    """All of data_manifest.yaml: `out` is None where the command has to say it."""

    path: Path
    datasets: tuple[DataSet, ...]
    out: str | None = None
    seed: int = 0

    def only(self, names: Collection[str]) -> tuple[DataSet, ...]:
        """Return the named data sets, all of them for no name; UsageError for a name that is not declared."""
        declared = [entry.name for entry in self.datasets]
        unknown = [name for name in names if name not in declared]
        if unknown:
            raise UsageError(f"--only: one of {', '.join(declared)} wanted, got {unknown[0]!r}")
        return tuple(entry for entry in self.datasets if not names or entry.name in names)


def read_data_manifest(path: Path) -> DataManifest:
    """Return the checked content of a data_manifest.yaml; relative paths start at its folder. UsageError with a line."""
    top = read_yaml(path).fields(TOP)
    if "datasets" not in top:
        raise UsageError(f"{path.name}: a mapping `datasets` wanted, got {', '.join(top) or 'nothing'}")
    entries = top["datasets"].mapping("a mapping from names to data sets")
    if not entries:
        raise top["datasets"].wrong("at least one data set")
    base, recipe = path.absolute().parent, _recipe(top.get("recipe"), RecipeChoice())
    datasets = tuple(_entry(name, item, base, recipe) for name, item in entries.items())
    check_split_names(entries)
    out = top["out"].text() if "out" in top else None
    seed = top["seed"].whole(-1) if "seed" in top else 0
    return DataManifest(path, datasets, out if out is None or "://" in out else str(base / out), seed)


def _entry(name: str, item: Placed, base: Path, recipe: RecipeChoice) -> DataSet:
    found = item.fields(ENTRY)
    if "adapter" not in found:
        raise UsageError(f"{item.place}: data set {name}: an adapter wanted, got none")
    splits, fractions = _splits(found.get("splits"))
    return DataSet(
        name=name,
        place=item.place,
        adapter=found["adapter"].text(),
        roots=_paths(found["root"], base) if "root" in found else (),
        annotations=_annotations(found.get("annotations"), base),
        splits=splits,
        fractions=fractions,
        policy=_policy(found.get("questions")),
        volumes=found["volumes"].one_of(RECONSTRUCTIONS) if "volumes" in found else "all",
        recipe=_recipe(found.get("recipe"), recipe),
        mix=_mix(found.get("mix")),
        options=_options(found.get("options"), base),
    )


def _paths(item: Placed, base: Path) -> tuple[Path, ...]:
    return tuple(base / Path(text).expanduser() for text in item.texts())


def _annotations(item: Placed | None, base: Path) -> dict[str, tuple[Path, ...]]:
    """Return {kind: paths}; a path alone is of the kind "questions"."""
    if item is None:
        return {}
    if not isinstance(item.value, dict):
        return {"questions": _paths(item, base)}
    return {kind: _paths(paths, base) for kind, paths in item.value.items()}


def _splits(item: Placed | None) -> tuple[dict[str, str], dict[str, float]]:
    """Return ({theirs: ours}, {}) for names and ({}, {ours: share}) for numbers."""
    if item is None:
        return {}, {}
    if not isinstance(item.value, dict):
        named = {text: text for text in item.texts()}
    elif item.value and all(isinstance(share.value, int | float) for share in item.value.values()):
        return {}, {name: float(share.number(0)) for name, share in item.value.items()}
    else:
        named = {theirs: ours.text() for theirs, ours in item.value.items()}
    check_split_names(set(named.values()))
    return named, {}


def _policy(item: Placed | None) -> Policy:
    found = item.fields(_POLICY) if item else {}
    return Policy(**{name: _POLICY[name](said) for name, said in found.items()})


# Field of Policy -> how it is read.
_POLICY: Mapping[str, Callable[[Placed], Any]] = MappingProxyType(
    {
        "prompt": lambda said: said.one_of(PROMPTS),
        "choices": lambda said: said.one_of(("shown", "hidden")),
        "report": lambda said: tuple(said.texts()),
        "instruction": Placed.text,
        "duplicates": lambda said: said.one_of(("keep", "drop")),
    }
)


def _recipe(item: Placed | None, default: RecipeChoice) -> RecipeChoice:
    """Return the recipe of `recipe: NAME` or of `recipe: {name: NAME, spacing_mm: [1, 1, 1]}`."""
    if item is None:
        return default
    if not isinstance(item.value, dict):
        return RecipeChoice(item.text())
    settings = {key: value for key, value in item.value.items() if key != "name"}
    name = item.value["name"].text() if "name" in item.value else default.name
    return RecipeChoice(name, tuple(f"{key}={_setting(value)}" for key, value in settings.items()))


def _setting(item: Placed) -> str:
    return ",".join(_setting(part) for part in item.value) if isinstance(item.value, list) else str(item.value)


def _mix(item: Placed | None) -> dict[str, Share]:
    shares = {}
    for split, share in (item.mapping("a mapping from splits to weight and cap") if item else {}).items():
        found = share.fields(("weight", "cap"))
        weight = found["weight"].number(0) if "weight" in found else None
        shares[split] = Share(weight, found["cap"].whole(0) if "cap" in found else None)
    return shares


def _options(item: Placed | None, base: Path) -> dict[str, Any]:
    found = item.mapping("a mapping of the adapter's own options") if item else {}
    if "columns" in found:
        found["columns"].fields(NAMES)
    folders = {name: base / Path(found[name].text()).expanduser() for name in FOLDERS if name in found}
    return {name: _plain(option) for name, option in found.items()} | folders


def _plain(item: Placed) -> Any:
    return {key: value.text() for key, value in item.value.items()} if isinstance(item.value, dict) else item.text()


class Share(NamedTuple):
    """What a data set gives to a split: at most `cap` questions, and `weight` parts of the whole (None: all it has)."""

    weight: float | None = None
    cap: int | None = None
