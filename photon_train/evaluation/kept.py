"""What predictions tell beside their answers: which tokens were kept, what of organs they hold, and what answers cost.

Legend: n predictions, or pairs of a question and a mask of its volume; V visual tokens of a volume; W ways of
weighting the patients (see `metric`).
"""

from __future__ import annotations

from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np

from photon_train.costs import on_a_prefix, prefill, prompt_size
from photon_train.evaluation.cases import Case, grouped
from photon_train.evaluation.metric import Estimate, Patients, estimate_of
from photon_train.rows import unpack_mask

if TYPE_CHECKING:
    from photon_train.configuration_photon import PhotonConfig

# Larger groups of kept sets are compared by their first ones, by id.
MOST_COMPARED = 400
BINS = 20


@dataclass(frozen=True)
class Overlap:
    """Mean overlap (intersection / union) of the kept sets of pairs; None where there are no pairs."""

    jaccard: float | None
    chance: float | None  # of random sets of the same sizes
    pairs: int
    groups: int  # volumes (or questions) with any pair


@dataclass(frozen=True)
class Kept:
    """Kept tokens of the predictions that count them."""

    predictions: int
    mean_ratio: float
    ratio_edges: tuple[float, ...]  # of the histogram of kept / visual tokens
    ratio_counts: tuple[int, ...]
    tokens: dict[str, dict[str, float]]  # by task: mean tokens of text, of the volume, of those kept
    questions_on_a_volume: Overlap  # of different questions on one volume
    volumes_of_a_question: Overlap  # of the same question about different volumes
    slabs: tuple[float, ...]  # the share that is kept of each z slab, foot to head; () for a grid that is not known


def summarise_kept(cases: Sequence[Case], grid_zyx: tuple[int, int, int] = (10, 10, 10)) -> Kept:
    """Return what was kept by the predictions (at least one) that count visual tokens. Slabs: of masks on the grid."""
    counted = [case for case in cases if case.prediction.visual_tokens]

    def mean_tokens(group: Sequence[Case]) -> dict[str, float]:
        names = ("text_tokens", "visual_tokens", "kept_tokens")
        return {name: float(np.mean([getattr(case.prediction, name) for case in group])) for name in names}

    ratios = np.array([case.prediction.kept_tokens / case.prediction.visual_tokens for case in counted])
    counts, edges = np.histogram(ratios, BINS, (0, 1))
    masked = [case for case in counted if case.prediction.kept]
    return Kept(
        predictions=len(counted),
        mean_ratio=float(ratios.mean()),
        ratio_edges=tuple(map(float, edges)),
        ratio_counts=tuple(map(int, counts)),
        tokens={task: mean_tokens(group) for task, group in sorted(grouped(counted, lambda case: case.task).items())},
        questions_on_a_volume=_overlap(masked, same="volume_id", different="question"),
        volumes_of_a_question=_overlap(masked, same="question", different="volume_id"),
        slabs=_slabs(masked, grid_zyx),
    )


def _overlap(cases: Sequence[Case], *, same: str, different: str) -> Overlap:
    """Return the overlap of pairs with the same attribute `same` that differ in the attribute `different`."""
    sums, groups = np.zeros(3), 0
    for group in grouped(cases, lambda case: (getattr(case, same), case.prediction.visual_tokens)).values():
        first = group[:MOST_COMPARED]
        values = np.array([getattr(case, different) for case in first])
        found = overlap_of(np.stack([*map(_mask, first)]), values[:, None] != values[None, :])
        sums += found
        groups += found[2] > 0
    jaccard, chance = (sums[:2] / sums[2]).tolist() if sums[2] else (None, None)
    return Overlap(jaccard, chance, int(sums[2]), groups)


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


def _slabs(cases: Sequence[Case], grid_zyx: tuple[int, int, int]) -> tuple[float, ...]:
    tokens = int(np.prod(grid_zyx))
    fitting = [case for case in cases if case.prediction.visual_tokens == tokens]
    if not fitting:
        return ()
    total_V = np.zeros(tokens)
    for case in fitting:
        total_V += _mask(case)
    return tuple((total_V / len(fitting)).reshape(grid_zyx).mean(axis=(1, 2)).tolist())


def _mask(case: Case) -> np.ndarray:
    return unpack_mask(case.prediction.kept, case.prediction.visual_tokens)


@dataclass(frozen=True)
class Seconds:
    """Of one stage over all questions: mean, median, 95th percentile, sum."""

    mean: float
    median: float
    p95: float
    total: float


@dataclass(frozen=True)
class Costs:
    """Costs of the predictions that have them; None is what they do not tell."""

    predictions: int
    seconds: dict[str, Seconds]  # by stage, and of all stages ("total")
    questions_per_second: float | None  # questions / seconds of all stages, one after the other
    peak_memory_mib: float | None  # the most that any process had used since it began to answer under this scheduler
    prefill_tflop: float | None  # mean of a prefill with the kept tokens, each question alone
    prefill_tflop_unpruned: float | None  # the same with every token kept
    # The same two, the questions on a volume sharing what none of them decides, as `photon predict` computes them.
    shared_tflop: float | None
    shared_tflop_unpruned: float | None


def summarise_costs(cases: Sequence[Case], config: PhotonConfig | None = None) -> Costs:
    """Return what predictions cost, of which one at least has seconds or tokens; `config` is the model's, for FLOPs."""
    timed = [case.prediction.seconds for case in cases if case.prediction.seconds]
    counted = [case for case in cases if case.prediction.visual_tokens] if config else []
    stages = sorted({stage for seconds in timed for stage in seconds})
    seconds = {stage: _seconds([each.get(stage, 0.0) for each in timed]) for stage in stages}
    rate = None
    if timed:
        seconds["total"] = _seconds([sum(each.values()) for each in timed])
        rate = len(timed) / seconds["total"].total if seconds["total"].total else None
    peak = max(case.prediction.peak_memory_mib for case in cases) or None
    tflop = _tflop(counted, config) if config and counted else (None, None, None, None)
    return Costs(len(timed) or len(counted), seconds, rate, peak, *tflop)


def _seconds(values: Sequence[float]) -> Seconds:
    return Seconds(*map(float, (np.mean(values), *np.percentile(values, (50, 95)), np.sum(values))))


def _tflop(cases: Sequence[Case], config: PhotonConfig) -> tuple[float, float, float, float]:
    """Return the mean TFLOP as kept and unpruned, each question alone and then sharing its volume with the others.

    On volumes of the config's shape; equal prompts are computed once. What K questions share counts 1 / K for each.
    """

    @cache
    def flops(scheduler: str, text: int, visual: int, kept: int, questions: int) -> tuple[float, ...]:
        prompt, grid = prompt_size(text, visual), config.patches_thw
        scheduler = scheduler or ("its" if kept < visual else "none")  # of another tool
        alone = [prefill(config, name, prompt, grid, n) for name, n in ((scheduler, kept), ("none", visual))]
        shared = [
            on_a_prefix(config, name, prompt, grid, n, questions) for name, n in ((scheduler, kept), ("none", visual))
        ]
        return *(one.total() for one in alone), *(one.total() / questions for one in shared)

    on_volume = Counter(case.volume_id for case in cases)
    found = [
        flops(one.scheduler, one.text_tokens, one.visual_tokens, one.kept_tokens, on_volume[case.volume_id])
        for case in cases
        for one in [case.prediction]
    ]
    alone, alone_full, shared, shared_full = (np.mean(found, axis=0) / 1e12).tolist()
    return alone, alone_full, shared, shared_full


class VolumeMask(Protocol):
    """A mask of a volume, counted on its tokens: `photon_train.kept_tokens.CountedMask`."""

    name: str
    counts_V: np.ndarray
    voxels: int
    ml: float

    def recall(self, keep_V: np.ndarray) -> Any:
        """Return `recall` and `chance`, shares of the mask."""


# Edges of the bins of masks by volume, and their names.
SIZES_ML, SIZES = (1, 10, 100), ("below 1 ml", "1 to 10 ml", "10 to 100 ml", "100 ml or more")
ALL_MASKS = "all, each alike"
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
class RecallContrast:
    """A mask in questions about it, and in questions about another organ; the difference is of what is above chance."""

    name: str
    own: Recall
    other: Recall
    own_minus_other: Estimate


@dataclass(frozen=True)
class MaskRecalls:
    """Recall of masks."""

    predictions: int  # with a mask of kept tokens, on a volume that has masks
    by_mask: tuple[Recall, ...]  # over all questions
    by_size: tuple[Recall, ...]
    organs: tuple[RecallContrast, ...]  # by the masks that rows name as theirs; first the mean over the masks
    lesions: tuple[RecallContrast, ...]


class Pair(NamedTuple):
    """A question, a mask of its volume, and the share of it (0 to 1) in the kept tokens, and by chance."""

    case: Case
    mask: VolumeMask
    recall: float
    chance: float


def mask_recalls(
    cases: Sequence[Case], masks: Mapping[str, Sequence[VolumeMask]], patients: Patients
) -> MaskRecalls | None:
    """Return the recalls of `masks` (by volume id) that are not empty, None where no prediction fits their grid."""

    def recall(name: str, group: Sequence[Pair]) -> Recall:
        return _recall(name, group, _replicates(group, patients))

    pairs = [pair for case in cases for pair in _pairs(case, masks.get(case.volume_id, ()))]
    if not pairs:
        return None
    by_mask = dict(sorted(grouped(pairs, lambda pair: pair.mask.name).items()))
    sizes = grouped(pairs, lambda pair: size_of(pair.mask.ml))
    return MaskRecalls(
        predictions=len({pair.case.id for pair in pairs}),
        by_mask=tuple(recall(name, group) for name, group in by_mask.items()),
        by_size=tuple(recall(size, sizes[size]) for size in SIZES if size in sizes),
        organs=tuple(_contrasts(by_mask, organ_relation, patients)),
        lesions=tuple(_contrasts(by_mask, _lesion_relation(cases), patients)),
    )


def _pairs(case: Case, masks: Sequence[VolumeMask]) -> Iterator[Pair]:
    keep_V = _mask(case) if case.prediction.kept else np.zeros(0, bool)
    for mask in masks:
        if mask.voxels and len(mask.counts_V) == len(keep_V):
            found = mask.recall(keep_V)
            yield Pair(case, mask, found.recall, found.chance)


def size_of(ml: float) -> str:
    """Return the bin of a volume: 10 ml and 99 ml are "10 to 100 ml"."""
    return SIZES[bisect(SIZES_ML, ml)]


def organ_relation(case: Case, mask: str) -> Relation | None:
    """Tell whether a question is about the organ of that mask, or about another; None where it names none."""
    return ("own" if mask in case.organ_masks else "other") if case.organ_masks else None


def _lesion_relation(cases: Sequence[Case]) -> Callable[[Case, str], Relation | None]:
    """Return the same for lesions: a question is about another organ if none of its organs ever has this lesion."""
    organs: dict[str, set[str]] = defaultdict(set)
    for case in cases:
        organs[case.lesion].update(case.organ_masks)

    def relation(case: Case, mask: str) -> Relation | None:
        if case.lesion == mask:
            return "own"
        return "other" if mask in organs and case.organ_masks and organs[mask].isdisjoint(case.organ_masks) else None

    return relation


def _contrasts(
    by_mask: Mapping[str, Sequence[Pair]], relation: Callable[[Case, str], Relation | None], patients: Patients
) -> Iterator[RecallContrast]:
    """Yield the masks that some questions are about and others are not; first the mean over them."""
    pairs: dict[str, tuple[list[Pair], list[Pair]]] = {}
    for name, group in by_mask.items():
        by_relation = grouped(group, lambda pair: relation(pair.case, pair.mask.name))
        if "own" in by_relation and "other" in by_relation:
            pairs[name] = by_relation["own"], by_relation["other"]
    if not pairs:
        return
    values = {name: [_replicates(part, patients) for part in own_other] for name, own_other in pairs.items()}
    # The mean over masks; a resampling that lacks one has none.
    means = [np.mean(parts, axis=0) for parts in zip(*values.values(), strict=True)]
    pooled = [[pair for part in parts for pair in part] for parts in zip(*pairs.values(), strict=True)]
    lines = [(ALL_MASKS, pooled, means), *((name, pairs[name], values[name]) for name in pairs)]
    for name, own_other, replicates in lines:
        own, other = (_recall(name, part, value) for part, value in zip(own_other, replicates, strict=True))
        (own_recall, own_chance), (other_recall, other_chance) = replicates
        difference = (own_recall - own_chance) - (other_recall - other_chance)
        yield RecallContrast(name, own, other, estimate_of(difference))


def _recall(name: str, pairs: Sequence[Pair], replicates_2W: np.ndarray) -> Recall:
    recall_W, chance_W = replicates_2W
    recall, chance, above = (estimate_of(values_W) for values_W in (recall_W, chance_W, recall_W - chance_W))
    volumes, people = ({getattr(pair.case, key) for pair in pairs} for key in ("volume_id", "patient"))
    return Recall(name, recall, chance, above, len(pairs), len(volumes), len(people))


def _replicates(pairs: Sequence[Pair], patients: Patients) -> np.ndarray:
    """Return float[2, W]: mean recall and mean chance under every weighting of the patients."""
    return patients.means([(pair.recall, pair.chance) for pair in pairs], [pair.case.patient for pair in pairs])
