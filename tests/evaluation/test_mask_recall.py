"""Recall of masks by kept tokens, against numbers worked by hand."""

import numpy as np
import pytest
from answers import row

from photon_data.errors import UsageError
from photon_train.evaluation.cases import case_of
from photon_train.evaluation.kept import mask_recalls, organ_relation, size_of
from photon_train.evaluation.metric import draw_patients
from photon_train.kept_tokens import CountedMask
from photon_train.rows import Prediction, pack_mask

# Four tokens. Of the liver's 10 voxels one lies beyond the grid. The spleen fills the last, the lesion is in the first.
LIVER = CountedMask("liver", np.array([6, 3, 0, 0]), 10, 1500.0, None)
SPLEEN = CountedMask("spleen", np.array([0, 0, 0, 4]), 4, 150.0, None)
LESION = CountedMask("liver_lesion", np.array([2, 0, 0, 0]), 2, 0.5, None)
MASKS = {"v0": [LIVER, SPLEEN, LESION], "v1": [LIVER, SPLEEN]}


def asked(id, volume, organ, keep, lesion=""):
    """A question about an organ, and the tokens kept for it."""
    extra = {"organ_masks": f'["{organ}"]' if organ else "", "lesion": lesion}
    said = Prediction(id, "Yes", visual_tokens=len(keep), kept_tokens=sum(keep), kept=pack_mask(np.array(keep, bool)))
    return case_of(row(id, "Yes", ("Yes", "No"), volume_id=volume, patient=f"p-{volume}", extra=extra), said)


CASES = [
    asked("a", "v0", "liver", [1, 1, 0, 0], "liver_lesion"),
    asked("b", "v0", "spleen", [0, 1, 0, 1]),
    asked("c", "v1", "liver", [1, 0, 0, 0], "liver_lesion"),
    asked("d", "v1", "spleen", [1, 1, 1, 1]),
    asked("e", "v1", "", [0, 0, 0, 0]),
]


@pytest.fixture
def recalls():
    return mask_recalls(CASES, MASKS, draw_patients([case.patient for case in CASES], 200, seed=0))


def values(recall):
    return [pytest.approx(estimate.value, abs=1e-3) for estimate in (recall.recall, recall.chance, recall.above_chance)]


def test_recall_and_chance_are_means_over_questions(recalls):
    liver, lesion, spleen = recalls.by_mask
    assert [liver.name, lesion.name, spleen.name] == ["liver", "liver_lesion", "spleen"]
    # recalls .9 .3 .6 .9 0; chance is .9 of the shares kept: .5 .5 .25 1 0
    assert values(liver) == [54.0, 40.5, 13.5]
    assert values(lesion) == [50.0, 50.0, 0.0]
    assert (liver.pairs, liver.volumes, liver.patients) == (5, 2, 2)
    assert (lesion.pairs, lesion.volumes, lesion.patients) == (2, 1, 1)


def test_masks_of_a_size_stand_together(recalls):
    assert [(line.name, line.pairs) for line in recalls.by_size] == [("below 1 ml", 2), ("100 ml or more", 10)]
    assert [size_of(ml) for ml in (0.9, 1, 10, 99.9, 100)] == [
        "below 1 ml",
        "1 to 10 ml",
        "10 to 100 ml",
        "10 to 100 ml",
        "100 ml or more",
    ]


def test_an_organ_that_was_asked_about_is_set_against_questions_about_another(recalls):
    everything, liver, spleen = recalls.organs
    assert values(liver.own) == [75.0, 33.75, 41.25]  # questions a, c: .9, .6
    assert values(liver.other) == [60.0, 67.5, -7.5]  # b, d: .3, .9
    assert liver.own_minus_other.value == pytest.approx(48.75)
    assert values(spleen.own) == [100.0, 75.0, 25.0]  # b, d
    assert values(spleen.other) == [0.0, 37.5, -37.5]  # a, c
    assert spleen.own_minus_other.value == pytest.approx(62.5)
    assert everything.own_minus_other.value == pytest.approx((48.75 + 62.5) / 2)
    assert everything.own.pairs == 4


def test_a_lesion_that_was_asked_about_is_set_against_questions_about_another_organ(recalls):
    _, lesion = recalls.lesions
    assert (lesion.name, lesion.own.pairs, lesion.other.pairs) == ("liver_lesion", 1, 1)
    assert values(lesion.own) == [100.0, 50.0, 50.0]
    assert values(lesion.other) == [0.0, 50.0, -50.0]


def test_intervals_hold_what_single_patients_give(recalls):
    liver = recalls.organs[1]
    low, high = liver.own_minus_other.low, liver.own_minus_other.high
    # v0 alone: (.9 - .45) - (.3 - .45) = .6; v1 alone: (.6 - .225) - (.9 - .9) = .375
    assert (low, high) == (pytest.approx(37.5), pytest.approx(60.0))


def test_a_question_without_an_organ_is_about_no_organ_and_no_other():
    assert [organ_relation(case, "liver") for case in CASES] == ["own", "other", "own", "other", None]


def test_predictions_without_kept_tokens_or_on_another_grid_have_no_recall():
    patients = draw_patients(["p-v0"], 0, 0)
    assert mask_recalls([asked("x", "v0", "liver", [1] * 5)], MASKS, patients) is None
    assert mask_recalls([case_of(row("y", "Yes", volume_id="v0"), Prediction("y"))], MASKS, patients) is None


def test_names_of_masks_that_are_no_list_are_refused():
    with pytest.raises(UsageError, match="expected a JSON list of names"):
        case_of(row("x", "Yes", extra={"organ_masks": "liver"}), Prediction("x"))
