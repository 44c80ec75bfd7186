"""The questions of a run: those of a table with ids of scans in place of names, and with them all that OUT holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from photon_data.errors import UsageError, first_few, nearest_name
from photon_data.files import Location
from photon_data.prepare_file import Job
from photon_data.questions.kept import UNKNOWN, file_of, kept_questions
from photon_data.questions.manifest import Unmatched, by_name
from photon_data.questions.question import Question
from photon_data.questions.splits import leaks, refuse_leaks
from photon_data.records import Rows, read_again
from photon_data.scan import Source


def joined(
    asked: Sequence[Question], sources: Sequence[Source], dataset: str
) -> tuple[list[Question], list[Unmatched]]:
    """Return the questions with ids of scans in place of names, and those that name no scan or several.

    Two names of one scan must not be two patients, and a scan of another source never answers to a name.
    """
    by_id = {source.id: source for source in sources}
    is_hidden = any(source.hidden for source in sources)
    find, made, unmatched = by_name((source.id, source.path) for source in sources), [], []
    for question in asked:
        match = find(question.volume)
        if match.id is None:
            shown, reason = question.volume, match.reason
            if is_hidden:
                shown, reason = "(name)", reason.partition(" (")[0]
            unmatched.append(Unmatched(question.id, shown, reason))
            made.append(replace(question, volume=f"{UNKNOWN}{shown}", dataset=dataset))
        else:
            patient = question.patient or by_id[match.id].patient or None
            made.append(replace(question, volume=match.id, dataset=dataset, patient=patient))
    return made, unmatched


def notes_of_unmatched(
    questions: Sequence[Question], unmatched: Sequence[Unmatched], sources: Sequence[Source]
) -> list[str]:
    """Return a sentence about the questions that name no scan or several, before hours of work."""
    reasons = {one.volume: one.reason for one in unmatched}
    if not reasons:
        return []
    paths = [source.id if source.hidden else source.path for source in sources]
    near = {name: nearest_name(name, paths) or paths[0] for name in list(reasons)[:4]}
    told = [f"{name!r}: {reasons[name]} (a name that there is: {path!r})" for name, path in near.items()]
    found = f"{len(unmatched)} of {len(questions)} questions do not name one scan of this source"
    return [f"{found}: {first_few(told)}"]


def collect(
    own: Mapping[str, list[Question]], jobs: Sequence[Job], out: Location, rows: Rows | None, *, allow_leaks: bool
) -> dict[str, list[Question]]:
    """Return the questions of all data sets that OUT holds, with a run's own in place of their earlier ones.

    UsageError for a name or a question's id that two data sets have, and for leaks.
    """
    kept, roots = kept_questions(out), {job.source.root for job in jobs}
    own_again = own.keys() & kept.keys()
    known = read_again(out, rows).records if own_again else []
    ids = {job.source.id for job in jobs} | {record.id for record in known if record.root in roots}
    for name in own_again:
        earlier = {question.volume for question in kept[name] if not question.volume.startswith(UNKNOWN)}
        if earlier and not earlier & ids:
            found = f"questions about other scans, {first_few(sorted(earlier))}"
            remedy = "rename the table, or give --id-prefix"
            raise UsageError(f"expected that {out.at(file_of(name))} is of this source, found {found}; {remedy}")
    parts, owner = {**kept, **own}, dict[str, str]()
    for name, questions in parts.items():
        if again := [question.id for question in questions if owner.setdefault(question.id, name) != name]:
            found = f"{len(again)} of {owner[again[0]]} in {name}, {again[0]} first"
            remedy = f"change them, or remove {out.at(file_of(name))} if it is not needed"
            raise UsageError(f"expected question ids that no other data set has, found {found}; {remedy}")
    if not allow_leaks:
        refuse_leaks(leaks(as_row(question) for questions in parts.values() for question in questions))
    return parts


def as_row(question: Question) -> dict[str, object]:
    """Return what the leak check looks at."""
    return {
        "volume_id": question.volume,
        "patient": question.patient,
        "split": question.split,
        "extra": {"source_id": question.extra.get("source_id")},
    }
