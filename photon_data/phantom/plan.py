"""Which volume has which finding: stratified by design, so that no constant answer and no rule on the question's text can win.

Volumes come in blocks of twelve scans of ten patients (two patients are scanned twice). Within one split, findings are dealt like
cards: every pair of volumes holds each finding once, every two volumes that hold it show it once left and once right, every
three show 1, 2 and 3 of it, and so on. The shuffles are seeded by (seed, split, what is dealt, number of the deal), so volume i
depends on (seed, i) only and more volumes may be added later.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Card = TypeVar("Card")

# (patient within the block, split) of the twelve scans of a block.
BLOCK = (
    (0, "train"),
    (0, "train"),
    (1, "test"),
    (2, "val"),
    (3, "train"),
    (4, "train"),
    (5, "train"),
    (6, "train"),
    (7, "test"),
    (8, "val"),
    (9, "train"),
    (9, "train"),
)
PATIENTS_PER_BLOCK = 10


@dataclass(frozen=True)
class Slot:
    """One scan to be made: who it is of, its split, and its number within that split."""

    seed: int
    index: int
    patient_index: int
    split: str
    index_in_split: int

    @property
    def volume(self) -> str:
        """Id of the scan, and the stem of its file name."""
        return f"phantom-{self.seed}-{self.index:04d}"

    @property
    def patient(self) -> str:
        """Id of the patient."""
        return f"patient-{self.seed}-{self.patient_index:04d}"


@dataclass(frozen=True)
class Finding:
    """A kind of lesion and what may be asked about it; empty tuples where a question makes no sense.

    diffuse: all of the organ is affected, and all that is asked is whether it is.
    """

    name: str
    organ: str
    noun: str
    plural: str
    organ_masks: tuple[str, ...]
    sides: tuple[str, ...] = ()
    places: tuple[str, ...] = ()
    counts: tuple[int, ...] = (1,)
    size_bins_mm: tuple[tuple[int, int], ...] = ()
    substances: tuple[str, ...] = ()
    diffuse: bool = False


@dataclass(frozen=True)
class Occurrence:
    """A finding as one volume shows it. All its lesions share side, place and substance; the size is the largest one's."""

    finding: Finding
    side: str
    place: str
    count: int
    size_bin_mm: tuple[int, int]
    substance: str


# Gaps between the bins and far-apart substances keep the choices clear to a small model on 1.3 mm voxels.
FINDINGS = (
    Finding(
        name="lung_nodule",
        organ="lungs",
        noun="lung nodule",
        plural="lung nodules",
        organ_masks=("lung_left", "lung_right"),
        sides=("left", "right"),
        places=("upper half", "lower half"),
        counts=(1, 2, 3),
        size_bins_mm=((15, 20), (24, 30), (35, 42)),
        substances=("ground-glass", "soft tissue", "calcified"),
    ),
    Finding(
        name="liver_lesion",
        organ="liver",
        noun="liver lesion",
        plural="liver lesions",
        organ_masks=("liver",),
        places=("left lobe", "right lobe"),
        counts=(1, 2, 3),
        size_bins_mm=((15, 20), (24, 29), (34, 40)),
        substances=("fat", "fluid", "calcified"),
    ),
    Finding(
        name="kidney_lesion",
        organ="kidneys",
        noun="kidney lesion",
        plural="kidney lesions",
        organ_masks=("kidney_left", "kidney_right"),
        sides=("left", "right"),
        places=("upper pole", "lower pole"),
        size_bins_mm=((15, 19), (24, 28)),
        substances=("fat", "fluid", "calcified"),
    ),
    Finding(
        name="spleen_lesion",
        organ="spleen",
        noun="splenic lesion",
        plural="splenic lesions",
        organ_masks=("spleen",),
        size_bins_mm=((15, 19), (26, 34)),
        substances=("fat", "fluid", "calcified"),
    ),
    Finding(
        name="pleural_effusion",
        organ="pleura",
        noun="pleural effusion",
        plural="pleural effusions",
        organ_masks=("lung_left", "lung_right"),
        sides=("left", "right"),
    ),
)


def _diffuse(name: str, organ: str, masks: tuple[str, ...], noun: str, substance: str) -> Finding:
    return Finding(name, organ, noun, f"{noun}s", masks, substances=(substance,), diffuse=True)


# For a model of half a million weights that has a few minutes to learn: whole organs are affected, several visual tokens large,
# and brighter than anything of their kind. With a third organ the tiny model did not leave chance in 300 steps.
EASY_FINDINGS = (
    _diffuse("lung_consolidation", "lungs", ("lung_left", "lung_right"), "lung consolidation", "soft tissue"),
    _diffuse("liver_calcification", "liver", ("liver",), "liver calcification", "dense"),
)


def seeded(seed: int, *key: str | int) -> np.random.Generator:
    """A generator of its own for every key: neither the number of volumes nor the order of calls changes what it gives."""
    words = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in key]
    return np.random.default_rng(np.random.SeedSequence([seed, *words]))


def slot(seed: int, index: int) -> Slot:
    """The patient and split of scan number `index`."""
    block, place = divmod(index, len(BLOCK))
    patient, split = BLOCK[place]
    splits = [name for _, name in BLOCK]
    return Slot(
        seed=seed,
        index=index,
        patient_index=block * PATIENTS_PER_BLOCK + patient,
        split=split,
        index_in_split=block * splits.count(split) + splits[:place].count(split),
    )


def deal(at: Slot, what: str, position: int, cards: Sequence[Card]) -> Card:
    """The card at `position` in an endless row of shuffled decks of `cards`."""
    turn, place = divmod(position, len(cards))
    return cards[seeded(at.seed, at.split, what, turn).permutation(len(cards))[place]]


def occurrence(at: Slot, finding: Finding) -> Occurrence | None:
    """How this volume shows the finding, or None: of two consecutive volumes of a split, exactly one does."""
    if not deal(at, finding.name, at.index_in_split, (True, False)):
        return None
    nth = at.index_in_split // 2  # of the volumes of this split that show it, because each pair holds one
    return Occurrence(
        finding=finding,
        side=deal(at, f"{finding.name} side", nth, finding.sides or ("",)),
        place=deal(at, f"{finding.name} place", nth, finding.places or ("",)),
        count=deal(at, f"{finding.name} count", nth, finding.counts),
        size_bin_mm=deal(at, f"{finding.name} size", nth, finding.size_bins_mm or ((0, 0),)),
        substance=deal(at, f"{finding.name} substance", nth, finding.substances or ("fluid",)),
    )
