"""How much of organs and lesions lies in the kept tokens, against as many tokens drawn at random.

Legend: n pairs of a question and a mask of its volume, W ways of weighting the patients (see `metric`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from typing import Literal, NamedTuple

import numpy as np

from photon_train.evaluation.baselines import grouped
from photon_train.evaluation.bootstrap import Patients
from photon_train.evaluation.cases import Case
from photon_train.evaluation.metric import resampled_sums
from photon_train.evaluation.scores import Estimate, estimate_of
from photon_train.masks import CountedMask
from photon_train.predictions import unpack_mask

SIZES_ML = (0.0, 1.0, 10.0, 100.0, inf)
ALL_ALIKE = "all, each alike"
Relation = Literal["own", "other"]


@dataclass(frozen=True)
class Recall:
    """Mean share of masks in kept tokens, in points: recall, what chance gives, and their difference. n of pairs."""

    name: str
    recall: Estimate
    chance: Estimate
    above_chance: Estimate
    pairs: int
    volumes: int
    patients: int


@dataclass(frozen=True)
class Asked:
    """A mask in questions about it, and in questions about another organ; the difference is of what is above chance."""

    name: str
    own: Recall
    other: Recall
    own_minus_other: Estimate


@dataclass(frozen=True)
class MaskRecalls:
    """Recall of masks over the predictions that say which tokens they kept, of one volume that has masks.

    by_mask, by_size   over all questions; sizes in ml
    organs, lesions    by the masks that rows name as theirs; the first line is the mean over the masks
    """

    predictions: int
    by_mask: tuple[Recall, ...]
    by_size: tuple[Recall, ...]
    organs: tuple[Asked, ...]
    lesions: tuple[Asked, ...]


class Pair(NamedTuple):
    """A question, a mask of its volume, and what the kept tokens hold of it: shares from 0 to 1."""

    case: Case
    mask: CountedMask
    recall: float
    chance: float


def mask_recalls(cases: Sequence[Case], masks: Mapping[str, Sequence[CountedMask]], patients: Patients) -> MaskRecalls | None:
    """Return the recalls of `masks` (by volume id), None where no prediction says what it kept on their grid.

    Empty masks are left out.
    """
    pairs = [pair for case in cases for pair in _pairs(case, masks.get(case.volume_id, ()))]
    if not pairs:
        return None
    return MaskRecalls(
        predictions=len({pair.case.id for pair in pairs}),
        by_mask=tuple(_by(pairs, lambda pair: pair.mask.name, patients)),
        by_size=tuple(_by(pairs, lambda pair: size_of(pair.mask.ml), patients, [_size(*ends) for ends in pairwise(SIZES_ML)])),
        organs=tuple(_asked(pairs, organ_relation, patients)),
        lesions=tuple(_asked(pairs, _LesionRelation(cases), patients)),
    )


def size_of(ml: float) -> str:
    """Return the bin of a volume: 10 ml and 99 ml are "10 to 100 ml"."""
    return next(_size(low, high) for low, high in pairwise(SIZES_ML) if ml < high)


def organ_relation(case: Case, mask: str) -> Relation | None:
    """Tell whether a question is about the organ of that mask, or about another; None where it names none."""
    if not case.organ_masks:
        return None
    return "own" if mask in case.organ_masks else "other"


class _LesionRelation:
    """Tells the same of a lesion's mask: a question is about another organ if none of its organs ever has this lesion."""

    def __init__(self, cases: Iterable[Case]) -> None:
        self.organs: dict[str, set[str]] = {}
        for case in cases:
            if case.lesion:
                self.organs.setdefault(case.lesion, set()).update(case.organ_masks)

    def __call__(self, case: Case, mask: str) -> Relation | None:
        if case.lesion == mask:
            return "own"
        return "other" if mask in self.organs and case.organ_masks and self.organs[mask].isdisjoint(case.organ_masks) else None


class _Replicates(NamedTuple):
    """float[W] each: mean recall and chance under every weighting of the patients."""

    recall: np.ndarray
    chance: np.ndarray

    @property
    def above(self) -> np.ndarray:
        return np.asarray(self.recall - self.chance)


def _pairs(case: Case, masks: Sequence[CountedMask]) -> Iterable[Pair]:
    said = case.prediction
    fitting = [mask for mask in masks if said.kept and mask.voxels and len(mask.counts_V) == said.visual_tokens]
    if fitting:
        keep_V = unpack_mask(said.kept, said.visual_tokens)
        for mask in fitting:
            found = mask.recall(keep_V)
            yield Pair(case, mask, found.recall, found.chance)


def _by(
    pairs: Sequence[Pair], key: Callable[[Pair], str], patients: Patients, names: Sequence[str] | None = None
) -> Iterable[Recall]:
    groups = grouped(pairs, key)
    for name in names or sorted(groups):
        if name in groups:
            yield _recall(name, groups[name], _replicates(groups[name], patients))


def _asked(pairs: Sequence[Pair], relation: Callable[[Case, str], Relation | None], patients: Patients) -> Iterable[Asked]:
    """Yield the masks that some questions are about and others are not; first the mean over them."""
    by_mask = sorted(grouped(pairs, lambda pair: pair.mask.name).items())
    groups = {name: grouped(part, lambda pair: relation(pair.case, pair.mask.name)) for name, part in by_mask}
    both = {name: {how: group[how] for how in _HOW} for name, group in groups.items() if group.keys() >= {*_HOW}}
    values = {name: {how: _replicates(part, patients) for how, part in group.items()} for name, group in both.items()}
    if both:
        pooled = {how: [pair for group in both.values() for pair in group[how]] for how in _HOW}
        yield _one(ALL_ALIKE, pooled, {how: _mean([value[how] for value in values.values()]) for how in _HOW})
    for name in both:
        yield _one(name, both[name], values[name])


_HOW: tuple[Relation, ...] = ("own", "other")


def _one(name: str, pairs: Mapping[Relation, Sequence[Pair]], values: Mapping[Relation, _Replicates]) -> Asked:
    own, other = (_recall(name, pairs[how], values[how]) for how in _HOW)
    return Asked(name, own, other, estimate_of(values["own"].above - values["other"].above))


def _recall(name: str, pairs: Sequence[Pair], values: _Replicates) -> Recall:
    volumes, people = ({getattr(pair.case, key) for pair in pairs} for key in ("volume_id", "patient"))
    recall, chance, above = (estimate_of(each) for each in (values.recall, values.chance, values.above))
    return Recall(name, recall, chance, above, len(pairs), len(volumes), len(people))


def _replicates(pairs: Sequence[Pair], patients: Patients) -> _Replicates:
    observed = np.array([(pair.recall, pair.chance, 1.0) for pair in pairs])
    sums_Wk = resampled_sums(observed, patients.of([pair.case.patient for pair in pairs]), patients.weights)
    with np.errstate(invalid="ignore"):  # a resampling without any of these patients has no mean
        return _Replicates(sums_Wk[:, 0] / sums_Wk[:, 2], sums_Wk[:, 1] / sums_Wk[:, 2])


def _mean(values: Sequence[_Replicates]) -> _Replicates:
    """Return the mean over masks; a resampling that lacks one has none."""
    return _Replicates(*(np.mean([getattr(value, name) for value in values], axis=0) for name in _Replicates._fields))


def _size(low: float, high: float) -> str:
    if high == inf:
        return f"{low:g} ml or more"
    return f"{low:g} to {high:g} ml" if low else f"below {high:g} ml"
