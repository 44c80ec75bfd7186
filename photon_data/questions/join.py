"""The name by which a table calls a volume -> the one volume that it means, or why there is none. Never a guess."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import cache
from typing import NamedTuple

from photon_data.errors import first_few

# Endings of scans' file names, which the name of a volume may lack.
SCAN_SUFFIXES = (".nii.gz", ".nii", ".hdr", ".img.gz", ".img", ".nrrd", ".nhdr", ".mha", ".mhd", ".dcm")


class Match(NamedTuple):
    """The id of the volume that a name means; None, with the reason, if the name does not mean exactly one volume."""

    id: str | None
    reason: str = ""
    is_ambiguous: bool = False


def by_name(volumes: Iterable[tuple[str, str]]) -> Callable[[str], Match]:
    """Return the function that finds the volume of a name, among volumes given as (id, source path).

    A name is compared with the ids. If none is equal, it is compared with the source paths. If none is equal, it is
    compared with source paths without the scan's suffix, and with file names with and without suffix.
    """
    in_order = sorted(volumes, key=lambda volume: (volume[1], volume[0]))

    @cache  # most tables use ids, and the other indices take as long as all questions together
    def index(names_of: Callable[[str, str], set[str]]) -> dict[str, list[tuple[str, str]]]:
        made: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for volume in in_order:
            for name in names_of(*volume):
                made[name].append(volume)
        return dict(made)

    def find(name: str) -> Match:
        found = next((level[name] for level in map(index, _NAMES_OF) if name in level), [])
        if not found:
            return Match(None, "no such volume")
        if len(found) > 1:
            paths = first_few([path for _, path in found])
            return Match(None, f"ambiguous: {len(found)} volumes have this name ({paths})", is_ambiguous=True)
        return Match(found[0][0])

    return find


def _short_names(id_: str, path: str) -> set[str]:
    file_name = path.rpartition("/")[2]
    return {_without_suffix(path), file_name, _without_suffix(file_name)}


def _without_suffix(name: str) -> str:
    suffix = next((suffix for suffix in SCAN_SUFFIXES if name.lower().endswith(suffix)), "")
    return name[: len(name) - len(suffix)]


# The names of a volume, in the order in which they are tried.
_NAMES_OF: tuple[Callable[[str, str], set[str]], ...] = (
    lambda id_, path: {id_},
    lambda id_, path: {path},
    _short_names,
)
