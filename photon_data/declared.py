"""data_manifest.yaml -> the data sets that people declare in it, checked, with lines to point at. See docs/datasets.md."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from photon_data.errors import UsageError
from photon_data.mix import Share
from photon_data.prompts import PROMPTS
from photon_data.questions import NAMES
from photon_data.splits import check_names
from photon_data.yaml_lines import Placed, read_yaml

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
    check_names(entries)
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
    check_names(set(named.values()))
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
