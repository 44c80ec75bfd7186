"""Does the answer depend on what was asked about? How many answers move on edited volumes (edited_volume.py).

An answer has moved if it is read as another one than on the volume itself. Mirrored, it should be the same with "left"
and "right" exchanged: that is what `expected` compares, there and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from photon_train.answering.prediction import Prediction
from photon_train.evaluation.cases import Case, Row, case_of
from photon_train.evaluation.choice_metrics import what_is_read
from photon_train.evaluation.edited_volume import FLIP, SIDES, about_the_other_side, mirrored
from photon_train.evaluation.metric import Estimate, Patients, estimate_of
from photon_train.evaluation.results import Counterfactuals, Moved, MovedMore


def says(case: Case) -> str:
    """Return what an answer is compared by: what is read from the response, else its text, case left out."""
    return " ".join((what_is_read(case) or case.response).casefold().split())


def summarise(
    questions: Mapping[str, Row],
    base: Mapping[str, Sequence[Prediction]],
    edited: Mapping[str, Mapping[str, Sequence[Prediction]]],
    patients: Patients,
) -> Counterfactuals:
    """Return what the edits moved, of predictions by name (`base`), and by name and edit (`edited`)."""
    moved, more, responses = list[Moved](), list[MovedMore](), dict[str, dict[str, dict[str, str]]]()
    for name, by_edit in edited.items():
        before = {one.id: one for one in base[name] if one.id in questions and not one.error}
        by_id = responses.setdefault(name, {})
        pairs: dict[str, dict[str, tuple[Case, Case]]] = {}
        for edit, predictions in by_edit.items():
            after = {one.id: one for one in predictions if one.id in before and not one.error}
            pairs[edit] = {id: _pair(questions[id], before[id], after[id], edit) for id in sorted(after)}
            for id, one in after.items():
                by_id.setdefault(id, {})[edit] = one.response
            moved += _moved(name, edit, [*pairs[edit].values()], patients)
        for first, second in (("erase=asked", "erase=other"), ("erase=kept", "erase=dropped")):
            if both := [id for id in pairs.get(first, {}) if id in pairs.get(second, {})]:
                changes = [
                    float(says(pairs[first][id][0]) != says(pairs[first][id][1]))
                    - float(says(pairs[second][id][0]) != says(pairs[second][id][1]))
                    for id in both
                ]
                cases = [pairs[first][id][0] for id in both]
                more.append(MovedMore(name, first, second, len(both), _mean(changes, cases, patients)))
    return Counterfactuals(tuple(moved), tuple(more), responses)


def _pair(row: Row, before: Prediction, after: Prediction, edit: str) -> tuple[Case, Case]:
    asked = about_the_other_side(row) if edit == FLIP else row
    return case_of(row, before), case_of(asked, after)


def _moved(name: str, edit: str, pairs: Sequence[tuple[Case, Case]], patients: Patients) -> Iterator[Moved]:
    groups = {"all": pairs}
    if edit == FLIP:
        with_side = [pair for pair in pairs if SIDES.search(pair[0].answer)]
        groups = {"a side": with_side, "no side": [pair for pair in pairs if not SIDES.search(pair[0].answer)]}
    for group, found in groups.items():
        if not found:
            continue
        cases, is_mirrored = [before for before, _ in found], edit == FLIP

        def share(values: Iterator[bool], cases: Sequence[Case] = cases) -> Estimate:
            return _mean([float(value) for value in values], cases, patients)

        def answer_of(case: Case, is_mirrored: bool = is_mirrored) -> str:
            answer = says(replace(case, response=case.answer))
            return mirrored(answer) if is_mirrored else answer

        yield Moved(
            predictions=name,
            edit=edit,
            questions_of=group,
            questions=len(found),
            patients=len({case.patient for case in cases}),
            moved=share(says(before) != says(after) for before, after in found),
            expected=share(mirrored(says(before)) == says(after) for before, after in found) if is_mirrored else None,
            right_before=share(says(before) == answer_of(before, False) for before, _ in found),
            right_after=share(says(after) == answer_of(before) for before, after in found),
        )


def _mean(values: Sequence[float], cases: Sequence[Case], patients: Patients) -> Estimate:
    (mean_W,) = patients.means([(value,) for value in values], [case.patient for case in cases])
    return estimate_of(mean_W)
