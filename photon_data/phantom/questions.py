"""Questions whose answers are true by construction, in several wordings, each wording balanced over its own answers."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from photon_data.phantom.body import Layer, Lesions
from photon_data.phantom.plan import Finding, Occurrence, Occurrences, Slot

# Not among WORDINGS, whose words are the tokens of the tiny model.
COMPARISONS = ("Which is larger, {choices}?", "Is the largest one {choices}?", "Of {choices}, which is larger?")
CAPTION = "What does this scan show?"
WORDINGS = {
    "presence": ("Any {noun}?", "Is there {noun}?", "Is {noun} seen?"),
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


# Rows of questions.jsonl.
Rows = list[dict[str, Any]]


class Item(NamedTuple):
    """One thing to ask of one volume: `form` is a key of WORDINGS. An open question has no choices."""

    form: str
    answer: str
    choices: tuple[str, ...] = ()
    value: int | None = None
    unit: str = ""


def question_rows(slot: Slot, findings: Sequence[Finding], occurrences: Occurrences, lesions: Lesions) -> Rows:
    """The rows of questions.jsonl for one volume: whether each finding exists, and more about those that do."""
    rows = []
    for finding in findings:
        items = [Item("existence", _yes_no(finding, occurrences), ("yes", "no"))]
        if finding.name in occurrences and not finding.diffuse:
            items += _items(occurrences[finding.name], lesions[finding.name][0])
        for item in items:
            row = _row(slot, f"{finding.name}-{item.form}", _wording(slot, finding, item), item.answer)
            row["kind"] = item.form.removesuffix("-class")  # the same for the open question and the one with choices
            row |= {"organ": finding.organ, "choices": list(item.choices), "lesion": finding.name}
            row |= {"organ_masks": list(finding.organ_masks), "answer_value": item.value, "unit": item.unit}
            rows.append(row)
    return rows


def comparison_rows(slot: Slot, findings: Sequence[Finding], lesions: Lesions) -> Rows:
    """The row that asks which of two findings is larger, for a volume that shows both (plan.with_one_larger)."""
    if len(shown := [finding for finding in findings if finding.name in lesions]) != 2:
        return []
    larger = max(shown, key=lambda finding: lesions[finding.name][0].diameter_mm)
    item = Item("comparison", larger.noun, tuple(finding.noun for finding in shown))
    row = _row(slot, "comparison", _wording(slot, shown[0], item), item.answer)
    masks = [mask for finding in shown for mask in finding.organ_masks]
    row |= {"kind": item.form, "organ": larger.organ, "choices": list(item.choices), "lesion": larger.name}
    return [row | {"organ_masks": masks, "answer_value": None, "unit": ""}]


def caption_rows(slot: Slot, findings: Sequence[Finding], occurrences: Occurrences) -> Rows:
    """The captions of a volume: what all its questions ask in one text, once with each finding first."""
    parts = [f"{finding.noun} {_yes_no(finding, occurrences)}" for finding in findings]
    answers = [", ".join(parts[first:] + parts[:first]) for first in range(len(parts))]
    numbered = enumerate(answers, start=1)
    return [_row(slot, f"caption-{number}", CAPTION, answer) | {"kind": "caption"} for number, answer in numbered]


def _row(slot: Slot, name: str, question: str, answer: str) -> dict[str, Any]:
    row = {"id": f"{slot.volume}-{name}", "volume": slot.volume, "patient": slot.patient, "split": slot.split}
    return row | {"question": question, "answer": answer}


def _yes_no(finding: Finding, occurrences: Occurrences) -> str:
    return "yes" if finding.name in occurrences else "no"


def _items(occurrence: Occurrence, largest: Layer) -> list[Item]:
    finding, diameter_mm, hu = occurrence.finding, largest.diameter_mm, int(largest.hu)
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
        items.append(Item("size-class", answer, classes, diameter_mm, "mm"))
        items.append(Item("size", f"{diameter_mm} mm", (), diameter_mm, "mm"))
    if len(finding.substances) > 1:
        items.append(Item("attenuation-class", occurrence.substance, finding.substances, hu, "HU"))
        items.append(Item("attenuation", f"{hu} HU", (), hu, "HU"))
    return items


def size_classes(bins_mm: Sequence[tuple[int, int]]) -> tuple[str, ...]:
    """One phrase per bin, parted within the gaps: ((15, 20), (24, 30)) -> "smaller than 22 mm", "larger than 22 mm"."""
    edges = [(high + low) // 2 for (_, high), (low, _) in pairwise(bins_mm)]
    middle = [f"{low} to {high} mm" for low, high in pairwise(edges)]
    return (f"smaller than {edges[0]} mm", *middle, f"larger than {edges[-1]} mm")


def _wording(slot: Slot, finding: Finding, item: Item) -> str:
    """A wording that changes only when a whole deck of answers was dealt: within each wording answers stay balanced."""
    position = slot.index_in_split if item.form == "existence" else slot.index_in_split // 2
    number = position // max(len(item.choices), 1) + zlib.crc32(f"{finding.name} {item.form}".encode())
    form = "presence" if finding.diffuse else item.form
    wordings = COMPARISONS if form == "comparison" else WORDINGS[form]
    choices = f"{', '.join(item.choices[:-1])} or {item.choices[-1]}" if item.choices else ""
    wording = wordings[number % len(wordings)]
    return wording.format(noun=finding.noun, plural=finding.plural, organ=finding.organ, choices=choices)
