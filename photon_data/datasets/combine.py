"""How many questions of each data set go into a split: caps, and weights that set their proportions.

Data sets as their publishers lay them out -> plain volumes and questions: one small file each, one signature.

Declared data sets -> the volumes to prepare and the questions to ask, put together; the same for every data set.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

from photon_data.datasets import abdomenatlas, ct_rate, deeptumorvqa, m3d, rad3d, table
from photon_data.datasets.base import Adapter, Collected
from photon_data.datasets.declare import DataSet, Share
from photon_data.errors import UsageError, first_few
from photon_data.prepare import Rescale
from photon_data.questions.join import by_source
from photon_data.questions.question import TAG, Question, put
from photon_data.questions.rows import Unmatched
from photon_data.questions.splits import ALL, FRACTIONS, assign_splits
from photon_data.questions.table import nearest
from photon_data.scan import Source, TableGrid


def mixed(questions: Sequence[Question], shares: Mapping[str, Mapping[str, Share]], seed: int) -> list[Question]:
    """Return the questions that the shares {data set: {split: Share}} leave, in their order.

    Caps first. Then, in a split with weights, the data set that has the fewest questions per weight keeps all, and the others
    as many as their weight is worth: weights a 2, b 1 on 100 and 30 questions -> 60 and 30. No question is ever repeated.
    Who stays depends on the id and the seed alone, so rows added later change little. UsageError for a split in which some
    data sets have a weight and others have none, and for a share of a split that has no question.
    """
    groups: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, question in enumerate(questions):
        groups[str(question.split)][str(question.dataset)].append(index)
    _refuse_unused(groups, shares)
    kept: list[int] = []
    for split, group in groups.items():
        wanted = {name: shares.get(name, {}).get(split, Share()) for name in group}
        for name, count in _counts(split, {name: len(indices) for name, indices in group.items()}, wanted).items():
            kept += _drawn(questions, group[name], count, seed)
    return [questions[index] for index in sorted(kept)]


def _counts(split: str, there: Mapping[str, int], shares: Mapping[str, Share]) -> dict[str, int]:
    """Return how many questions of each data set stay: {"a": 100, "b": 30} with weights 2 and 1 -> {"a": 60, "b": 30}."""
    counts = {name: min(n, shares[name].cap or n) for name, n in there.items()}
    weights = {name: share.weight for name, share in shares.items() if share.weight is not None}
    if not weights:
        return counts
    without = [name for name in counts if name not in weights]
    if without:
        raise UsageError(
            f"a weight for every data set of split {split!r} or for none wanted, got none for {', '.join(without)}; give it one"
        )
    unit = min(counts[name] / weight for name, weight in weights.items())
    return {name: round(unit * weight) for name, weight in weights.items()}


def _drawn(questions: Sequence[Question], indices: list[int], count: int, seed: int) -> list[int]:
    if count >= len(indices):
        return indices

    def order(index: int) -> bytes:
        return hashlib.sha256(f"{seed}:{questions[index].id}".encode()).digest()

    return sorted(indices, key=order)[:count]


def _refuse_unused(groups: Mapping[str, Mapping[str, list[int]]], shares: Mapping[str, Mapping[str, Share]]) -> None:
    for name, by_split in shares.items():
        for split in by_split:
            if name not in groups.get(split, {}):
                there = ", ".join(sorted(s for s, group in groups.items() if name in group)) or "none"
                raise UsageError(f"data set {name}: shares of its splits ({there}) wanted in `mix`, got {split!r}")


__all__ = ["ADAPTERS", "Adapter", "Collected"]

ADAPTERS: Mapping[str, Adapter] = MappingProxyType(
    {
        "ct-rate": ct_rate.ADAPTER,
        "3d-rad": rad3d.ADAPTER,
        "deeptumorvqa": deeptumorvqa.ADAPTER,
        "abdomenatlas3": abdomenatlas.ADAPTER,
        "table": table.TABLE,
        "folder": table.FOLDER,
        "phantom": table.PHANTOM,
        "m3d": m3d.ADAPTER,
    }
)


class Part(NamedTuple):
    """One data set, its questions matched to its volumes: `volume` is an id, and every question has split and data set."""

    entry: DataSet
    found: Collected
    questions: list[Question]
    unmatched: list[Unmatched]
    notes: list[str]


class Combined(NamedTuple):
    """Data sets put together: only volumes that a question needs, each once, by id."""

    sources: list[tuple[Source, DataSet]]
    rescale: dict[str, Rescale]
    stated: dict[str, TableGrid]
    questions: list[Question]
    unmatched: list[Unmatched]
    notes: list[str]


def collect(entry: DataSet, *, instruction: str, seed: int, on_file: Callable[[int], None] = lambda count: None) -> Part:
    """Return a data set as its adapter finds it, with splits and matched; UsageError where it is not as declared.

    `instruction` is the question of what has none (reports, volumes without questions), unless the entry has its own.
    """
    adapter = adapter_of(entry)
    found = adapter.read(entry, on_file)
    if not found.sources:
        raise entry.wrong(f"volumes wanted, found none in {', '.join(map(str, entry.roots)) or 'no root'}; {_more(found.notes)}")
    notes = list(found.notes)
    questions = _worded(entry, found, entry.policy.instruction or instruction)
    _refuse_tags(entry, questions)
    questions = _without_duplicates(entry, questions, notes)
    questions = _with_splits(entry, questions, seed, notes)
    cohort = entry.options.get("cohort") or adapter.cohort or entry.name
    matched, unmatched = _match(entry, found, [_named(q, entry.name, cohort) for q in questions], notes)
    return Part(entry, found, matched, unmatched, notes)


def asked(entry: DataSet) -> set[str]:
    """Return the volumes that an entry's questions ask for, of the splits it wants; no scan is looked for. UsageError."""
    found = adapter_of(entry).read(replace(entry, roots=()), lambda count: None)
    wanted = [q.volume for q in found.questions or () if not entry.splits or q.split in entry.splits]
    return set(wanted) - found.left_out.keys()


def combine(parts: Sequence[Part], seed: int, prompt: str | None = None) -> Combined:
    """Return several data sets as one, caps and weights applied, questions put in the style `prompt` or each entry's own.

    UsageError where two data sets mean different files, or scale them differently, by one id.
    """
    questions = [question for part in parts for question in part.questions]
    kept = mixed(questions, {part.entry.name: part.entry.mix for part in parts}, seed)
    notes = [f"{part.entry.name}: {note}" for part in parts for note in part.notes]
    notes += _about_mix(questions, kept)
    needed = {question.volume for question in kept}
    sources: dict[str, tuple[Source, DataSet]] = {}
    rescale: dict[str, Rescale] = {}
    stated: dict[str, TableGrid] = {}
    for part in parts:
        ours = [source for source in part.found.sources if source.id in needed]
        _refuse_clash(part, ours, sources, rescale, stated)
        sources.update({source.id: sources.get(source.id, (source, part.entry)) for source in ours})
        rescale.update({id_: part.found.rescale[id_] for id_ in needed & part.found.rescale.keys()})
        stated.update({id_: part.found.stated[id_] for id_ in needed & part.found.stated.keys()})
    policies = {part.entry.name: part.entry.policy for part in parts}
    worded = [
        question
        for name, policy in policies.items()
        for question in put([q for q in kept if q.dataset == name], prompt or policy.prompt, policy.choices)
    ]
    unmatched = [missing for part in parts for missing in part.unmatched]
    return Combined([sources[name] for name in sorted(sources)], rescale, stated, worded, unmatched, notes)


def adapter_of(entry: DataSet) -> Adapter:
    """Return the adapter of an entry; UsageError for one that is not known, and for annotations or options it does not have."""
    if entry.adapter not in ADAPTERS:
        near = nearest(entry.adapter, ADAPTERS)
        hint = f"; did you mean {near!r}?" if near else ""
        raise entry.wrong(f"an adapter of {', '.join(ADAPTERS)} wanted, got {entry.adapter!r}{hint}")
    adapter = ADAPTERS[entry.adapter]
    for kind, names, known in (
        ("annotations", entry.annotations, adapter.annotations),
        ("options", entry.options, adapter.options),
    ):
        for name in names:
            if name not in known:
                raise entry.wrong(f"{kind} of {entry.adapter} ({', '.join(known) or 'it has none'}) wanted, got {name!r}")
    missing = missing_paths(entry)
    if missing:
        raise entry.wrong(f"{len(missing)} files or folders are not there: {first_few(missing)}; download or correct them")
    return adapter


def missing_paths(entry: DataSet) -> list[str]:
    """Return the roots and annotations of an entry that do not exist."""
    paths = [*entry.roots, *(path for paths in entry.annotations.values() for path in paths)]
    return [str(path) for path in paths if not path.exists()]


def _worded(entry: DataSet, found: Collected, instruction: str) -> list[Question]:
    """Return the questions, the instruction in place of those without words, one per volume where there are none."""
    if found.questions is None:
        split = None if entry.fractions else ALL
        return [Question(source.id, source.id, instruction, split=split) for source in found.sources]
    if not found.questions:
        raise entry.wrong("questions wanted, found none in its annotations; name some, or use `adapter: folder`")
    return [question if question.question else replace(question, question=instruction) for question in found.questions]


def _refuse_tags(entry: DataSet, questions: Sequence[Question]) -> None:
    tagged = [q for q in questions if TAG.search(q.question) or TAG.search(q.answer or "")]
    if tagged:
        tag = TAG.search(tagged[0].question) or TAG.search(tagged[0].answer or "")
        first = f"{tagged[0].id}: {tag[0]}" if tag else tagged[0].id
        raise entry.wrong(f"texts without tags or special tokens wanted, got {len(tagged)} with one, first {first}; remove them")


def _without_duplicates(entry: DataSet, questions: list[Question], notes: list[str]) -> list[Question]:
    """Return the questions, those that repeat an earlier one (volume, task, words, answer) left out if the entry says so."""
    seen: set[tuple[Any, ...]] = set()
    first = []
    for q in questions:
        key = (q.volume, q.task, q.extra.get("subtask"), q.question, q.answer, q.split)
        if key not in seen:
            first.append(q)
            seen.add(key)
    repeats = len(questions) - len(first)
    dropped = entry.policy.duplicates == "drop"
    if repeats:
        notes.append(f"{repeats} rows repeat another to the letter and are {'left out' if dropped else 'kept'}")
    return first if dropped else questions


def _with_splits(entry: DataSet, questions: list[Question], seed: int, notes: list[str]) -> list[Question]:
    """Return the questions of the splits that the entry wants, under its names; drawn ones where the publisher has none."""
    theirs = Counter(question.split for question in questions)
    if set(theirs) == {None}:
        if entry.splits:
            raise entry.wrong("shares like {train: 0.8, test: 0.2} wanted in `splits`, since the data set has no splits to name")
        return assign_splits(questions, fractions=entry.fractions or FRACTIONS, seed=seed)
    there = ", ".join(sorted(map(str, theirs)))
    if entry.fractions:
        raise entry.wrong(f"names like {{train: train}} wanted in `splits`, since the data set has its own splits ({there})")
    unknown = [name for name in entry.splits if name not in theirs]
    if unknown:
        raise entry.wrong(f"splits of the data set ({there}) wanted in `splits`, got {unknown[0]!r}")
    if not entry.splits:
        return assign_splits(questions)
    for name, count in sorted(theirs.items(), key=str):
        if name not in entry.splits:
            notes.append(f"{count} questions of split {name!r} are left out, since `splits` does not name it")
    return [replace(q, split=entry.splits[str(q.split)]) for q in questions if q.split in entry.splits]


def _named(q: Question, dataset: str, cohort: str) -> Question:
    """Return a question under its data set's name; people of different cohorts are different, whatever they are called."""
    patient = f"{cohort}:{q.patient}" if q.patient else None
    return Question(f"{dataset}/{q.id}", q.volume, q.question, q.answer, q.split, patient, q.task, q.extra, dataset)


def _match(
    entry: DataSet, found: Collected, questions: Sequence[Question], notes: list[str]
) -> tuple[list[Question], list[Unmatched]]:
    """Return the questions with the id of their volume, and those whose volume is not there; left-out ones become notes."""
    find = by_source(found.sources)
    ids = {source.id for source in found.sources}
    matched, unmatched, left_out = [], [], Counter[str]()
    for question in questions:
        name = question.volume
        if name in found.left_out:
            left_out[found.left_out[name]] += 1
            continue
        volume = name if name in ids else find(name)
        if volume in ids:
            matched.append(question if volume == name else replace(question, volume=volume))
        else:
            unmatched.append(Unmatched(question.id, name, volume))
    if not matched:
        wanted = unmatched[0].volume if unmatched else next(iter(found.left_out))
        raise entry.wrong(
            f"volumes of its questions wanted, found none for any of {len(questions)}; {wanted!r} is asked for first, and "
            f"{found.sources[0].path!r} is the first of {len(ids)} volumes; do root and annotations belong together?"
        )
    notes += [f"{count} questions are left out: {why}" for why, count in sorted(left_out.items())]
    idle = ids - {question.volume for question in matched}
    if idle:
        notes.append(f"{len(idle)} of {len(ids)} volumes have no question and are not prepared, {min(idle)} first")
    return matched, unmatched


def _about_mix(before: Sequence[Question], after: Sequence[Question]) -> list[str]:
    """Return a note for every data set and split of which caps and weights leave out questions."""
    left = Counter((q.dataset, q.split) for q in before)
    kept = Counter((q.dataset, q.split) for q in after)
    return [
        f"{name}: {count - kept[name, split]} of {count} questions of split {split} are left out by cap or weight"
        for (name, split), count in left.items()
        if kept[name, split] < count
    ]


def _refuse_clash(
    part: Part,
    ours: Sequence[Source],
    sources: Mapping[str, tuple[Source, DataSet]],
    rescale: Mapping[str, Rescale],
    stated: Mapping[str, TableGrid],
) -> None:
    """UsageError where this part's volumes have ids of other files, or other tables speak of the same file."""
    entry, found = part.entry, part.found
    both = [(source, *sources[source.id]) for source in ours if source.id in sources]
    of_other_files = [(source, other, owner) for source, other, owner in both if source.files != other.files]
    of_other_words = [
        (source, other, owner)
        for source, other, owner in both
        if (rescale.get(source.id), stated.get(source.id)) != (found.rescale.get(source.id), found.stated.get(source.id))
    ]
    wanted = {"one file per volume id": of_other_files, "the same metadata for the same file": of_other_words}
    for what, clashes in wanted.items():
        if clashes:
            source, other, owner = clashes[0]
            raise UsageError(
                f"{entry.place}: {what} wanted, but data sets {owner.name} and {entry.name} differ in {len(clashes)}, first "
                f"{source.id}: {other.files[0]} and {source.files[0]}; give both the same `root` and metadata, or, if these are "
                "different volumes, one of them an `id_prefix`"
            )


def _more(notes: Sequence[str]) -> str:
    return "; ".join(notes) or "is `root` right?"
