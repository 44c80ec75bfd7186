"""What was kept of the volumes: how much, where, and whether the question made a difference.

Legend: n predictions, V visual tokens of a volume.

How much of organs and lesions lies in the kept tokens, against as many tokens drawn at random.

Legend: n pairs of a question and a mask of its volume, W ways of weighting the patients (see `metric`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from typing import Literal, NamedTuple

import numpy as np

from photon_train.answering.prediction import unpack_mask
from photon_train.evaluation.baselines import grouped
from photon_train.evaluation.cases import Case
from photon_train.evaluation.metric import Patients, resampled_sums
from photon_train.evaluation.tables import Estimate, estimate_of
from photon_train.kept_tokens import CountedMask

# Groups of more masks than this are compared by their first ones, by id.
MOST_COMPARED = 400
BINS = 20


@dataclass(frozen=True)
class Overlap:
    """Mean overlap (intersection / union) of the kept sets of pairs; None where there are no pairs.

    chance: of random sets of the same sizes, on average. pairs: how many pairs; groups: volumes (or questions) with any.
    """

    jaccard: float | None
    chance: float | None
    pairs: int
    groups: int


@dataclass(frozen=True)
class Kept:
    """Kept tokens of the predictions that say them.

    ratio_edges, ratio_counts   histogram of kept / visual tokens
    tokens      by task: mean tokens of text, of the volume, of those kept
    questions_on_a_volume       overlap of different questions on one volume
    volumes_of_a_question       overlap of the same words asked about different volumes
    slabs       the share that is kept of each z slab, foot to head; [] for a grid that is not known
    """

    predictions: int
    mean_ratio: float
    ratio_edges: tuple[float, ...]
    ratio_counts: tuple[int, ...]
    tokens: dict[str, dict[str, float]]
    questions_on_a_volume: Overlap
    volumes_of_a_question: Overlap
    slabs: tuple[float, ...]


def kept(cases: Sequence[Case], grid_zyx: tuple[int, int, int] = (10, 10, 10)) -> Kept | None:
    """Return what was kept, None where no prediction counts visual tokens. Masks of another size than the grid have no slabs."""
    counted = [case for case in cases if case.prediction.visual_tokens]
    if not counted:
        return None
    ratios = np.array([case.prediction.kept_tokens / case.prediction.visual_tokens for case in counted])
    counts, edges = np.histogram(ratios, BINS, (0, 1))
    masked = [case for case in counted if case.prediction.kept]
    return Kept(
        predictions=len(counted),
        mean_ratio=float(ratios.mean()),
        ratio_edges=tuple(map(float, edges)),
        ratio_counts=tuple(map(int, counts)),
        tokens={task: _tokens(group) for task, group in sorted(grouped(counted, lambda case: case.task).items())},
        questions_on_a_volume=_overlap(masked, by="volume_id", unlike="question"),
        volumes_of_a_question=_overlap(masked, by="question", unlike="volume_id"),
        slabs=_slabs(masked, grid_zyx),
    )


def overlap_of(masks_nV: np.ndarray, different_nn: np.ndarray) -> tuple[float, float, int]:
    """Return the sum over pairs of intersection / union, the sum expected by chance, and the number of pairs.

    [1 1 0 0] and [1 0 1 0]: 1 / 3. By chance sets of a and b of V tokens share a b / V. Two empty sets overlap fully.
    """
    sets = masks_nV.astype(np.float64)
    sizes, shared = sets.sum(axis=1), sets @ sets.T
    both = sizes[:, None] + sizes[None, :]
    expected = sizes[:, None] * sizes[None, :] / sets.shape[1]
    pairs = np.triu(different_nn, 1)
    found, chance = (np.where(both > 0, part / np.maximum(both - part, 1), 1.0) for part in (shared, expected))
    return float(found[pairs].sum()), float(chance[pairs].sum()), int(pairs.sum())


def _tokens(cases: Sequence[Case]) -> dict[str, float]:
    names = ("text_tokens", "visual_tokens", "kept_tokens")
    return {name: float(np.mean([getattr(case.prediction, name) for case in cases])) for name in names}


def _overlap(cases: Sequence[Case], *, by: str, unlike: str) -> Overlap:
    """Return the overlap within groups that have `by` in common, of pairs that differ in `unlike`."""
    sums = np.zeros(3)
    groups = 0
    for group in grouped(cases, lambda case: (getattr(case, by), case.prediction.visual_tokens)).values():
        first = group[:MOST_COMPARED]
        other = np.array([getattr(case, unlike) for case in first])
        found = overlap_of(_masks(first), other[:, None] != other[None, :])
        sums += found
        groups += found[2] > 0
    jaccard, chance = (sums[:2] / sums[2]).tolist() if sums[2] else (None, None)
    return Overlap(jaccard, chance, int(sums[2]), groups)


def _slabs(cases: Sequence[Case], grid_zyx: tuple[int, int, int]) -> tuple[float, ...]:
    tokens = int(np.prod(grid_zyx))
    total = np.zeros(grid_zyx)
    fitting = [case for case in cases if case.prediction.visual_tokens == tokens]
    for start, end in pairwise([*range(0, len(fitting), 1000), len(fitting)]):
        total += _masks(fitting[start:end]).sum(axis=0).reshape(grid_zyx)
    return tuple((total / max(len(fitting), 1)).mean(axis=(1, 2)).tolist()) if fitting else ()


def _masks(cases: Sequence[Case]) -> np.ndarray:
    """Return bool[n, V]."""
    return np.stack([unpack_mask(case.prediction.kept, case.prediction.visual_tokens) for case in cases])


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
