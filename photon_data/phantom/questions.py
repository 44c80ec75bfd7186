"""Questions whose answers are true by construction, in several wordings, each wording balanced over its own answers."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from photon_data.phantom.lesions import Lesion
from photon_data.phantom.plan import Finding, Occurrence, Slot

CAPTION = "What does this scan show?"
WORDINGS = {
    "presence": (
        "Any {noun}?",
        "Is there {noun}?",
        "Is {noun} seen?",
    ),
    "existence": (
        "Is there a {noun} in this scan?",
        "Does this CT show a {noun}?",
        "Can a {noun} be seen in the {organ}?",
    ),
    "side": (
        "On which side does the patient have {plural}, left or right?",
        "Which side of the patient shows {plural}, right or left?",
        "Where are the {plural}: on the patient's left or on the right?",
    ),
    "count": (
        "How many {plural} are there?",
        "What is the number of {plural} in this scan?",
        "Count the {plural}. Are there {choices}?",
    ),
    "location": (
        "Which part of the {organ} is affected by {plural}: {choices}?",
        "Where in the {organ} are {plural} found: {choices}?",
        "In this CT, do {plural} lie in the {choices}?",
    ),
    "size-class": (
        "Is the diameter of the largest {noun} {choices}?",
        "How large is the largest {noun}: {choices}?",
        "Measured across, is the largest {noun} {choices}?",
    ),
    "size": (
        "What is the diameter of the largest {noun} in mm?",
        "How many millimetres across is the largest {noun}?",
        "Measure the largest {noun} in mm.",
    ),
    "attenuation-class": (
        "What is the largest {noun} made of: {choices}?",
        "Judging by its attenuation, is the largest {noun} {choices}?",
        "Which attenuation does the largest {noun} have: {choices}?",
    ),
    "attenuation": (
        "What is the mean attenuation of the largest {noun} in HU?",
        "How many Hounsfield units does the largest {noun} measure?",
        "Measure the attenuation of the largest {noun} in HU.",
    ),
}


@dataclass(frozen=True)
class Item:
    """One thing to ask of one volume. An open question has no choices."""

    form: str
    answer: str
    choices: tuple[str, ...] = ()
    value: int | None = None
    unit: str = ""

    @property
    def kind(self) -> str:
        """The kind of question, the same for its open form and the one with choices."""
        return self.form.removesuffix("-class")


def question_rows(
    at: Slot, findings: Sequence[Finding], occurrences: dict[str, Occurrence], lesions: dict[str, tuple[Lesion, ...]]
) -> list[dict[str, Any]]:
    """The rows of questions.jsonl for one volume: whether each finding exists, and more about those that do."""
    rows = []
    for finding in findings:
        items = [Item("existence", _yes_no(finding, occurrences), ("yes", "no"))]
        if finding.name in occurrences and not finding.diffuse:
            items += _items(occurrences[finding.name], lesions[finding.name][0])
        rows += [_row(at, finding, item) for item in items]
    return rows


def caption_rows(at: Slot, findings: Sequence[Finding], occurrences: dict[str, Occurrence]) -> list[dict[str, Any]]:
    """The captions of a training volume: every finding, present or not, once with each finding first. Others have none.

    They say in one text what the questions ask: where the name of an organ stands, what is seen there comes next.
    """
    said = [f"{finding.noun} {_yes_no(finding, occurrences)}" for finding in findings]
    turned = [said[first:] + said[:first] for first in range(len(said))] if at.split == "train" else []
    return [
        {
            "id": f"{at.volume}-caption-{number}",
            "volume": at.volume,
            "patient": at.patient,
            "split": at.split,
            "question": CAPTION,
            "answer": ", ".join(parts),
            "kind": "caption",
        }
        for number, parts in enumerate(turned, start=1)
    ]


def _yes_no(finding: Finding, occurrences: dict[str, Occurrence]) -> str:
    return "yes" if finding.name in occurrences else "no"


def size_classes(bins_mm: Sequence[tuple[int, int]]) -> tuple[str, ...]:
    """One phrase per bin, parted within the gaps: ((15, 20), (24, 30)) -> "smaller than 22 mm", "larger than 22 mm"."""
    edges = [(high + low) // 2 for (_, high), (low, _) in pairwise(bins_mm)]
    middle = [f"{low} to {high} mm" for low, high in pairwise(edges)]
    return (f"smaller than {edges[0]} mm", *middle, f"larger than {edges[-1]} mm")


def _items(occurrence: Occurrence, largest: Lesion) -> list[Item]:
    finding = occurrence.finding
    items = []
    if finding.sides:
        items.append(Item("side", occurrence.side, finding.sides))
    if len(finding.counts) > 1:
        items.append(Item("count", str(occurrence.count), tuple(map(str, finding.counts)), occurrence.count))
    if finding.places:
        items.append(Item("location", occurrence.place, finding.places))
    if finding.size_bins_mm:
        classes = size_classes(finding.size_bins_mm)
        answer = classes[finding.size_bins_mm.index(occurrence.size_bin_mm)]
        items.append(Item("size-class", answer, classes, largest.diameter_mm, "mm"))
        items.append(Item("size", f"{largest.diameter_mm} mm", (), largest.diameter_mm, "mm"))
    if finding.substances:
        items.append(Item("attenuation-class", occurrence.substance, finding.substances, largest.hu, "HU"))
        items.append(Item("attenuation", f"{largest.hu} HU", (), largest.hu, "HU"))
    return items


def _row(at: Slot, finding: Finding, item: Item) -> dict[str, Any]:
    return {
        "id": f"{at.volume}-{finding.name}-{item.form}",
        "volume": at.volume,
        "patient": at.patient,
        "split": at.split,
        "question": _ask(at, finding, item),
        "answer": item.answer,
        "kind": item.kind,
        "organ": finding.organ,
        "choices": list(item.choices),
        "lesion": finding.name,
        "organ_masks": list(finding.organ_masks),
        "answer_value": item.value,
        "unit": item.unit,
    }


def _ask(at: Slot, finding: Finding, item: Item) -> str:
    """A wording that changes only when a whole deck of answers was dealt: within each wording answers stay balanced."""
    position = at.index_in_split if item.form == "existence" else at.index_in_split // 2
    turn = position // max(len(item.choices), 1) + zlib.crc32(f"{finding.name} {item.form}".encode())
    wordings = WORDINGS["presence" if finding.diffuse else item.form]
    choices = f"{', '.join(item.choices[:-1])} or {item.choices[-1]}" if item.choices else ""
    return wordings[turn % len(wordings)].format(noun=finding.noun, plural=finding.plural, organ=finding.organ, choices=choices)
