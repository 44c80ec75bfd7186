"""What was kept of the volumes: how much, where, and whether the question made a difference.

Legend: n predictions, V visual tokens of a volume.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from photon_train.evaluation.baselines import grouped
from photon_train.evaluation.cases import Case
from photon_train.predictions import unpack_mask

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
