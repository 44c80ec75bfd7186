"""Which volume has which finding: stratified, so that no constant answer and no rule on the question's text can win.

Volumes come in blocks of twelve scans of ten patients (two patients are scanned twice). Within one split, findings are
dealt like cards: of every two volumes one has the finding; of every three that have it, one shows 1, one 2 and one 3 of
it; and so on. A deck is shuffled with a seed of its own, so that more volumes may be added later.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

Card = TypeVar("Card")

# The split of each of a block's ten patients, and the patients of its twelve scans.
SPLITS = ("train", "test", "val", "train", "train", "train", "train", "test", "val", "train")
SCANNED = (0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9)


@dataclass(frozen=True)
class Slot:
    """One scan to be made: its patient, its split, and its number within that split."""

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
    """A kind of lesion and what may be asked about it; empty tuples where a question makes no sense."""

    name: str
    organ: str
    noun: str
    organ_masks: tuple[str, ...]
    sides: tuple[str, ...] = ()
    places: tuple[str, ...] = ()
    counts: tuple[int, ...] = (1,)
    size_bins_mm: tuple[tuple[int, int], ...] = ()
    substances: tuple[str, ...] = ()
    diffuse: bool = False  # all of the organ is affected, and the only question is whether it is

    @property
    def plural(self) -> str:
        """The noun for several of them."""
        return f"{self.noun}s"


@dataclass(frozen=True)
class Occurrence:
    """A finding as one volume shows it. Its lesions share side, place and substance; the size is the largest one's."""

    finding: Finding
    side: str
    place: str
    count: int
    size_bin_mm: tuple[int, int]
    substance: str

    @property
    def organ_mask(self) -> str:
        """The mask of the organ, or of the organ on the affected side."""
        return next(mask for mask in self.finding.organ_masks if mask.endswith(self.side))


# What one volume shows, by the name of the finding.
Occurrences = dict[str, Occurrence]

LUNGS = ("lung_left", "lung_right")
SIDES = ("left", "right")
DISTINCT = ("fat", "fluid", "calcified")
# Gaps between the bins and far-apart substances keep the choices clear to a small model on 1.3 mm voxels.
FINDINGS = (
    Finding(
        name="lung_nodule",
        organ="lungs",
        noun="lung nodule",
        organ_masks=LUNGS,
        sides=SIDES,
        places=("upper half", "lower half"),
        counts=(1, 2, 3),
        size_bins_mm=((15, 20), (24, 30), (35, 42)),
        substances=("ground-glass", "soft tissue", "calcified"),
    ),
    Finding(
        name="liver_lesion",
        organ="liver",
        noun="liver lesion",
        organ_masks=("liver",),
        places=("left lobe", "right lobe"),
        counts=(1, 2, 3),
        size_bins_mm=((15, 20), (24, 29), (34, 40)),
        substances=DISTINCT,
    ),
    Finding(
        name="kidney_lesion",
        organ="kidneys",
        noun="kidney lesion",
        organ_masks=("kidney_left", "kidney_right"),
        sides=SIDES,
        places=("upper pole", "lower pole"),
        size_bins_mm=((15, 19), (24, 28)),
        substances=DISTINCT,
    ),
    Finding(
        "spleen_lesion", "spleen", "splenic lesion", ("spleen",), size_bins_mm=((15, 19), (26, 34)), substances=DISTINCT
    ),
    Finding("pleural_effusion", "pleura", "pleural effusion", LUNGS, sides=SIDES),
)

# For a model of half a million weights that has a few minutes to learn: whole organs are affected. They are several
# visual tokens large, and brighter than healthy ones. With a third organ the tiny model stayed at chance for 300 steps.
EASY_FINDINGS = (
    Finding("lung_consolidation", "lungs", "lung consolidation", LUNGS, substances=("soft tissue",), diffuse=True),
    Finding("liver_calcification", "liver", "liver calcification", ("liver",), substances=("dense",), diffuse=True),
)

# Small evidence: a lesion fills a sixth of one visual token of 125, and the answers depend on it, on its side, and on
# which of two such lesions is larger. What is kept can matter here.
SMALL_BINS_MM = ((30, 36), (48, 54))
SMALL_FINDINGS = (
    Finding(
        *("lung_nodule", "lungs", "lung nodule", LUNGS),
        sides=SIDES,
        size_bins_mm=SMALL_BINS_MM,
        substances=("dense",),
    ),
    Finding("liver_lesion", "liver", "liver lesion", ("liver",), size_bins_mm=SMALL_BINS_MM, substances=("dense",)),
)


def seeded(seed: int, *key: str | int) -> np.random.Generator:
    """A generator of its own for every key: neither the number of volumes nor the order of calls changes its values."""
    words = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in key]
    return np.random.default_rng(np.random.SeedSequence([seed, *words]))


def slot_of(seed: int, index: int) -> Slot:
    """The patient and split of scan number `index`."""
    block, number = divmod(index, len(SCANNED))
    splits = [SPLITS[patient] for patient in SCANNED]
    split = splits[number]
    index_in_split = block * splits.count(split) + splits[:number].count(split)
    return Slot(seed, index, block * len(SPLITS) + SCANNED[number], split, index_in_split)


def deal(slot: Slot, what: str, cards: Sequence[Card], position: int | None = None) -> Card:
    """The card at `position` (by default the slot's in its split) in an endless row of shuffled decks of `cards`."""
    deck, place = divmod(slot.index_in_split if position is None else position, len(cards))
    return cards[seeded(slot.seed, slot.split, what, deck).permutation(len(cards))[place]]


def occurrence_of(slot: Slot, finding: Finding) -> Occurrence | None:
    """How this volume shows the finding, or None: of two consecutive volumes of a split, exactly one shows it."""
    if not deal(slot, finding.name, (True, False)):
        return None
    nth = slot.index_in_split // 2  # of the volumes of this split that show it, because each pair holds one

    def dealt(what: str, cards: Sequence[Card]) -> Card:
        return deal(slot, f"{finding.name} {what}", cards, nth)

    return Occurrence(
        finding=finding,
        side=dealt("side", finding.sides or ("",)),
        place=dealt("place", finding.places or ("",)),
        count=dealt("count", finding.counts),
        size_bin_mm=dealt("size", finding.size_bins_mm or ((0, 0),)),
        substance=dealt("substance", finding.substances or ("fluid",)),
    )


def with_one_larger(slot: Slot, occurrences: Occurrences) -> Occurrences:
    """The same findings, but of two the one has its smallest size and the other its largest; which is dealt."""
    if len(occurrences) != 2:
        return occurrences
    sizes = deal(slot, "larger", ((0, -1), (-1, 0)))
    return {
        name: replace(one, size_bin_mm=one.finding.size_bins_mm[size])
        for (name, one), size in zip(occurrences.items(), sizes, strict=True)
    }
