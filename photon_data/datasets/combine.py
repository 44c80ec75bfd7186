"""Declared data sets -> the volumes to prepare and the questions about them, of one data set or of several together.

Each layout that others publish has a file of its own; folders of scans, alone or with a table, are read here.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from typing import Any, NamedTuple

from photon_data.datasets import abdomenatlas, ct_rate, deeptumorvqa, rad3d
from photon_data.datasets.base import ID_FROM, UNPACK, DataSet, FoundVolumes, OnFile, Share, SourceVolume
from photon_data.errors import UsageError, first_few, nearest_name
from photon_data.questions.manifest import Unmatched
from photon_data.questions.question import Question, by_name, read_questions, with_prompt_style
from photon_data.questions.splits import ALL, FRACTIONS, assign_splits, check_split_names
from photon_data.questions.table import TAG
from photon_data.readers.find import check_id_prefix, find_scans, left_alone
from photon_data.scan import Source


class Collection(NamedTuple):
    """Volumes and the questions about them, of one data set or of several."""

    datasets: tuple[DataSet, ...]
    volumes: list[SourceVolume]  # each id once
    questions: list[Question]  # `volume` is an id; each has a split and the name of its data set
    unmatched: list[Unmatched]  # questions whose volume is not there
    notes: list[str]  # sentences for the user


def read_dataset(
    entry: DataSet,
    *,
    instruction: str,
    seed: int,
    on_file: OnFile = lambda count: None,
    hide: Callable[[DataSet, Sequence[Source]], Sequence[Source]] = lambda entry, sources: sources,
) -> Collection:
    """Return one data set as declared, or UsageError. An empty question gets the entry's instruction, or this one.

    `hide` gives the sources whose names may be patients' other ids, and keyed hashes of their patients.
    """
    adapter = _adapter_of(entry)
    found, questions = adapter.read(entry, on_file)
    notes = list(found.notes)
    if not found.volumes:
        roots, hint = ", ".join(map(str, entry.roots)) or "no root", "; ".join(notes) or "is `root` right?"
        raise entry.error(f"expected volumes, found none in {roots}; {hint}")
    sources = hide(entry, [volume.source for volume in found.volumes])
    found = found._replace(volumes=[v._replace(source=s) for v, s in zip(found.volumes, sources, strict=True)])
    instruction = entry.wording.instruction or instruction
    if questions is None:
        ids = [volume.source.id for volume in found.volumes]
        questions = [Question(id_, id_, instruction, split=None if entry.fractions else ALL) for id_ in ids]
    if keyed := {source.id: source.patient for source in sources if source.hidden and source.patient}:
        find = by_name((source.id, source.path) for source in sources)
        questions = [q if q.patient else replace(q, patient=keyed.get(str(find(q.volume).id))) for q in questions]
    elif not questions:
        raise entry.error("expected questions, found none in its annotations; name some, or use `adapter: folder`")
    questions = [q if q.question else replace(q, question=instruction) for q in questions]
    if tags := [(q.id, tag[0]) for q in questions if (tag := TAG.search(q.question) or TAG.search(q.answer or ""))]:
        found_tags = f"{len(tags)}, first {': '.join(tags[0])}"
        raise entry.error(f"expected texts without tags and special tokens, found {found_tags}; remove them")
    questions = _with_splits(entry, _without_duplicates(entry, questions, notes), seed, notes)
    cohort = entry.options.get("cohort") or adapter.cohort or entry.name
    matched, unmatched = _match(entry, found, questions, cohort, notes)
    return Collection((entry,), found.volumes, matched, unmatched, notes)


def requested_volumes(entry: DataSet) -> set[str]:
    """Return the volumes that the questions of an entry's splits are about, without a look for scans; UsageError."""
    found, questions = _adapter_of(entry).read(replace(entry, roots=()), lambda count: None)
    volumes = {q.volume for q in questions or () if not entry.splits or q.split in entry.splits}
    return volumes - found.left_out.keys()


def combine(collections: Sequence[Collection], seed: int, prompt: str | None = None) -> Collection:
    """Return several data sets as one, in the style `prompt` or each in its own; UsageError if two of them conflict."""
    datasets = tuple(entry for collection in collections for entry in collection.datasets)
    questions = [question for collection in collections for question in collection.questions]
    kept = mixed(questions, {entry.name: entry.mix for entry in datasets}, seed)
    notes = [f"{part.datasets[0].name}: {note}" for part in collections for note in part.notes]
    left = Counter((q.dataset, q.split) for q in kept)
    notes += [
        f"{name}: {count - left[name, split]} of {count} questions of split {split} are left out by cap or weight"
        for (name, split), count in Counter((q.dataset, q.split) for q in questions).items()
        if left[name, split] < count
    ]
    needed = {question.volume for question in kept}
    volumes: dict[str, SourceVolume] = {}
    for collection in collections:
        ours = {volume.source.id: volume for volume in collection.volumes if volume.source.id in needed}
        _refuse_conflicts([(volumes[name], volume) for name, volume in ours.items() if name in volumes])
        volumes = ours | volumes
    worded: list[Question] = []
    for entry in datasets:
        asked = [q for q in kept if q.dataset == entry.name]
        worded += with_prompt_style(asked, prompt or entry.wording.prompt, entry.wording.choices)
    unmatched = [missing for collection in collections for missing in collection.unmatched]
    return Collection(datasets, [volumes[name] for name in sorted(volumes)], worded, unmatched, notes)


def mixed(questions: Sequence[Question], shares: Mapping[str, Mapping[str, Share]], seed: int) -> list[Question]:
    """Return the questions that the shares {data set: {split: Share}} leave, in their order: `mix` of docs/datasets.md.

    {"a": 100, "b": 30} with weights 2 and 1 -> {"a": 60, "b": 30}. Which ones stay depends on their ids and the seed
    alone. UsageError for a weight that other data sets of its split lack, and for a share of a split without questions.
    """
    groups: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, question in enumerate(questions):
        groups[str(question.split)][str(question.dataset)].append(index)
    for name, by_split in shares.items():
        for split in by_split:
            if name not in groups.get(split, {}):
                there = ", ".join(sorted(s for s, group in groups.items() if name in group)) or "none"
                raise UsageError(f"data set {name}: expected shares of its splits ({there}) in `mix`, found {split!r}")

    def order(index: int) -> bytes:
        return hashlib.sha256(f"{seed}:{questions[index].id}".encode()).digest()

    kept: list[int] = []
    for split, group in groups.items():
        of_split = {name: shares.get(name, {}).get(split, Share()) for name in group}
        counts = {name: min(len(indices), of_split[name].cap or len(indices)) for name, indices in group.items()}
        weights = {name: share.weight for name, share in of_split.items() if share.weight is not None}
        if weights:
            if without := ", ".join(name for name in counts if name not in weights):
                expected = f"a weight for every data set of split {split!r} or for none"
                raise UsageError(f"expected {expected}, found none for {without}; add one")
            unit = min(counts[name] / weight for name, weight in weights.items())
            counts = {name: round(unit * weight) for name, weight in weights.items()}
        for name, indices in group.items():
            kept += indices if counts[name] >= len(indices) else sorted(indices, key=order)[: counts[name]]
    return [questions[index] for index in sorted(kept)]


def _refuse_conflicts(both: Sequence[tuple[SourceVolume, SourceVolume]]) -> None:
    """UsageError if two data sets give one id to two files, or other metadata to the same file."""
    files = [(a, b) for a, b in both if a.source.files != b.source.files]
    metadata = [(a, b) for a, b in both if (a.rescale, a.table_grid) != (b.rescale, b.table_grid)]
    if differing := files or metadata:
        a, b = differing[0]
        places = "" if a.source.hidden or b.source.hidden else f": {a.source.files[0]} and {b.source.files[0]}"
        expected = "one file per volume id" if files else "the same metadata for the same file"
        raise UsageError(
            f"{b.dataset.place}: expected {expected}, but data sets {a.dataset.name} and {b.dataset.name} differ "
            f"in {len(differing)}, first {a.source.id}{places}; give both the "
            "same `root` and metadata, or, if these are different volumes, one of them an `id_prefix`"
        )


def _without_duplicates(entry: DataSet, questions: list[Question], notes: list[str]) -> list[Question]:
    """Return the questions, or, if the entry says so, only the first of those that repeat each other."""
    first: dict[tuple[Any, ...], Question] = {}
    for q in questions:
        first.setdefault((q.volume, q.task, q.extra.get("subtask"), q.question, q.answer, q.split), q)
    drop, repeats = entry.wording.duplicates == "drop", len(questions) - len(first)
    if repeats:
        notes.append(f"{repeats} rows repeat another to the letter and are {'left out' if drop else 'kept'}")
    return list(first.values()) if drop else questions


def _with_splits(entry: DataSet, questions: list[Question], seed: int, notes: list[str]) -> list[Question]:
    """Return the questions of the entry's splits, under its names; drawn splits if the publisher has none."""
    theirs = Counter(question.split for question in questions)
    if set(theirs) == {None}:
        if entry.splits:
            raise entry.error("expected shares like {train: 0.8} in `splits`, found names; it has no splits to name")
        return assign_splits(questions, fractions=entry.fractions or FRACTIONS, seed=seed)
    there = ", ".join(sorted(map(str, theirs)))
    if entry.fractions:
        raise entry.error(f"expected names like {{train: train}} in `splits`, found shares; its splits are {there}")
    if not entry.splits:
        return assign_splits(questions)
    if unknown := [name for name in entry.splits if name not in theirs]:
        raise entry.error(f"expected splits of the data set ({there}) in `splits`, found {unknown[0]!r}")
    for name, count in sorted(theirs.items(), key=str):
        if name not in entry.splits:
            notes.append(f"{count} questions of split {name!r} are left out, since `splits` does not name it")
    return [replace(q, split=entry.splits[str(q.split)]) for q in questions if q.split in entry.splits]


def _match(
    entry: DataSet, found: FoundVolumes, questions: Sequence[Question], cohort: str, notes: list[str]
) -> tuple[list[Question], list[Unmatched]]:
    """Return the questions whose volume is there, with its id, and the others; those left out become notes."""
    ids, is_hidden = {volume.source.id for volume in found.volumes}, any(v.source.hidden for v in found.volumes)
    keyed = {volume.source.patient for volume in found.volumes if volume.source.hidden}  # the same in every data set
    find = by_name((volume.source.id, volume.source.path) for volume in found.volumes)
    matched, unmatched, left_out = [], [], Counter[str]()
    for q in questions:
        if q.volume in found.left_out:
            left_out[found.left_out[q.volume]] += 1
            continue
        # Patients of two cohorts are different people.
        id_, patient = f"{entry.name}/{q.id}", f"{cohort}:{q.patient}" if q.patient else None
        patient = q.patient if q.patient in keyed else patient
        match = find(q.volume)
        if match.id:
            matched.append(Question(id_, match.id, q.question, q.answer, q.split, patient, q.task, q.extra, entry.name))
        else:
            volume, reason = ("(name)", match.reason.partition(" (")[0]) if is_hidden else (q.volume, match.reason)
            unmatched.append(Unmatched(id_, volume, reason))
    if not matched:
        requested = unmatched[0].volume if unmatched else next(iter(found.left_out))
        first = min(ids) if is_hidden else found.volumes[0].source.path
        raise entry.error(
            f"expected volumes of its questions, found none for any of {len(questions)}; the first question is about "
            f"{requested!r}, and the first of {len(ids)} volumes is {first!r}; do root and "
            "annotations belong together?"
        )
    notes += [f"{count} questions are left out: {why}" for why, count in sorted(left_out.items())]
    if idle := ids - {question.volume for question in matched}:
        notes.append(f"{len(idle)} of {len(ids)} volumes have no question and are not prepared, {min(idle)} first")
    return matched, unmatched


# --- adapters, one for each layout of data sets


class Adapter(NamedTuple):
    """One layout of data sets."""

    # Returns the volumes, and the questions with the publisher's splits (None: not known), whose `volume` is an id or a
    # name that means one volume. None instead of questions: each volume gets the instruction.
    read: Callable[[DataSet, OnFile], tuple[FoundVolumes, list[Question] | None]]
    annotations: tuple[str, ...] = ()  # the kinds that an entry may name
    options: tuple[str, ...] = ()  # the options that an entry may set
    cohort: str | None = None  # a name shared by data sets with the same patients; None for patients of its own


def _adapter_of(entry: DataSet) -> Adapter:
    """Return the adapter of an entry; UsageError for what the entry cannot name, or for paths that are not there."""
    if entry.adapter in REFUSED:
        raise entry.error(REFUSED[entry.adapter])
    if entry.adapter not in ADAPTERS:
        near = nearest_name(entry.adapter, ADAPTERS)
        hint = f"; did you mean {near!r}?" if near else ""
        raise entry.error(f"expected an adapter of {', '.join(ADAPTERS)}, found {entry.adapter!r}{hint}")
    adapter = ADAPTERS[entry.adapter]
    for kind in ("annotations", "options"):
        known = getattr(adapter, kind)
        if unknown := [name for name in getattr(entry, kind) if name not in known]:
            names = ", ".join(known) or "it has none"
            raise entry.error(f"expected {kind} of {entry.adapter} ({names}), found {unknown[0]!r}")
    check_split_names({*entry.splits.values(), *entry.fractions})
    if missing := missing_paths(entry):
        few = first_few(missing)
        raise entry.error(f"expected files and folders, found {len(missing)} missing ({few}); download or correct them")
    return adapter


def missing_paths(entry: DataSet) -> list[str]:
    """Return the roots and annotations of an entry that do not exist."""
    paths = [*entry.roots, *(path for paths in entry.annotations.values() for path in paths)]
    return [str(path) for path in paths if not path.exists()]


def _read_tables(entry: DataSet, on_file: OnFile) -> tuple[FoundVolumes, list[Question]]:
    """Return the scans of folders and the questions of tables, whose columns the option `columns` can map."""
    paths = entry.annotations.get("questions", ())
    questions = [q for path in paths for q in read_questions(path, entry.options.get("columns"))]
    return _scans(entry, on_file), questions


def _read_folder(entry: DataSet, on_file: OnFile) -> tuple[FoundVolumes, None]:
    """Return the scans of folders; each gets the instruction as its question."""
    return _scans(entry, on_file), None


def _read_phantoms(entry: DataSet, on_file: OnFile) -> tuple[FoundVolumes, list[Question]]:
    """Return what `photon-data phantom ROOT` made: scans, and questions whose task is their kind."""
    questions = [q for root in entry.roots for q in read_questions(root / "questions.jsonl")]
    scans = _scans(replace(entry, roots=tuple(root / "scans" for root in entry.roots)), on_file)
    return scans, [replace(question, task=question.extra.get("kind")) for question in questions]


def _scans(entry: DataSet, on_file: OnFile) -> FoundVolumes:
    """Return the scans below the roots whose path matches the option `pattern`; `id_prefix` begins their ids."""
    pattern, id_from = entry.options.get("pattern", "*"), entry.options.get(ID_FROM, "path")
    prefix = entry.options.get("id_prefix", "")
    check_id_prefix(prefix, f"{entry.place}, data set {entry.name}: id_prefix")
    volumes, notes = [], []
    for root in entry.roots:
        scans = find_scans(root, id_from=id_from, on_file=on_file)
        sources = [replace(source, id=prefix + source.id) for source in scans.sources if fnmatch(source.path, pattern)]
        volumes += [SourceVolume(entry, source) for source in sources]
        notes += [f"files left alone in {root}: {left_alone(scans.ignored)}"] if scans.ignored else []
    ids = {volume.source.id for volume in volumes}
    if len(ids) < len(volumes):
        found = f"{len(ids)} for {len(volumes)} scans"
        raise entry.error(f"expected one id per scan, found {found}; declare one data set per root")
    return FoundVolumes(volumes, notes=notes)


_TABLE_OPTIONS = ("pattern", "id_from", "id_prefix", "cohort")
ADAPTERS = {
    "ct-rate": Adapter(ct_rate.read, ("metadata", "no_chest", "reports", "labels", "vqa"), ("version",), "ct-rate"),
    "3d-rad": Adapter(rad3d.read, ("questions", "metadata", "no_chest"), ("version",), "ct-rate"),
    "deeptumorvqa": Adapter(deeptumorvqa.read, ("questions", "ids"), (UNPACK,), "abdomenatlas"),
    "abdomenatlas3": Adapter(abdomenatlas.read, ("reports", "splits", "benchmark", "ids"), (UNPACK,), "abdomenatlas"),
    "table": Adapter(_read_tables, ("questions",), (*_TABLE_OPTIONS, "columns")),
    "folder": Adapter(_read_folder, (), _TABLE_OPTIONS),
    "phantom": Adapter(_read_phantoms, (), _TABLE_OPTIONS),
}
# Data sets that cannot become right stores, and why.
REFUSED = {
    "m3d": "expected scans in Hounsfield units with spacing, found M3D-Cap and M3D-VQA: 8-bit slices (jpeg, png) or "
    "arrays resized to 32 x 256 x 256, windowed, without spacing and orientation, of which no store would be right; "
    "declare questions on your own CTs with `adapter: table`"
}
