import string

import pytest
from answers import case
from hypothesis import given
from hypothesis import strategies as st

from photon_train.evaluation.choice_metrics import ACCURACIES, parse_yes_no
from photon_train.evaluation.parsing import (
    parse_choice,
    parse_letter_v2,
    parse_number,
    parse_number_v2,
    without_punctuation,
)

YES_NO = ("Yes", "No")
TEMPORAL = (
    "Refractory Lesion (Persistent or recurrent, now present)",
    "Resolved Lesion (Previously present or recurrent, now absent)",
    "New Lesion (Absent previously, now present)",
    "No Abnormality (Always absent)",
)
LUNGS = ("lung", "left lung", "both lungs", "A large cyst")


@pytest.mark.parametrize(
    ("response", "choices", "meant"),
    [
        ("B", YES_NO, 1),
        ("B.", YES_NO, 1),
        ("(B)", YES_NO, 1),
        ("B. No", YES_NO, 1),
        ("B) No, there is none.", YES_NO, 1),
        ("no", YES_NO, 1),
        ("No, there is no effusion.", YES_NO, 1),
        ("Yes, but no effusion.", YES_NO, 0),
        ("The answer is B.", YES_NO, 1),
        ("Answer: A", YES_NO, 0),
        ("<think>A. Yes? rather not</think> B", YES_NO, 1),
        ("A. No", YES_NO, None),
        ("C", YES_NO, None),
        ("maybe", YES_NO, None),
        ("", YES_NO, None),
        ("resolved lesion", TEMPORAL, 1),
        ("It is a new lesion", TEMPORAL, 2),
        ("D. No abnormality", TEMPORAL, 3),
        ("in the left lung", LUNGS, 1),
        ("the lung", LUNGS, 0),
        ("A large cyst", LUNGS, 3),
        ("A mass", LUNGS, None),
        ("Both", LUNGS, None),
        ("a", ("b", "a"), 1),
    ],
)
def test_a_response_means_one_choice_or_none(response, choices, meant):
    assert parse_choice(response, choices) == meant


TEXTS = st.lists(st.text(string.ascii_lowercase + " -,", min_size=4, max_size=30), min_size=2, max_size=6).filter(
    lambda texts: (
        len({without_punctuation(t) for t in texts}) == len(texts)
        and all(len(without_punctuation(t)) > 2 for t in texts)
    )
)


@given(TEXTS, st.data())
def test_every_way_of_writing_a_choice_is_read_as_it(choices, data):
    index = data.draw(st.integers(0, len(choices) - 1))
    letter = "ABCDEF"[index]
    ways = [
        letter,
        f"{letter}.",
        f" ({letter}) ",
        f"{letter}. {choices[index]}",
        choices[index],
        choices[index].upper() + ".",
    ]
    assert [parse_choice(way, tuple(choices)) for way in ways] == [index] * len(ways)


def test_the_published_letters_are_read_as_their_authors_do():
    (contains_letter,) = [metric for metric in ACCURACIES if metric.name == "accuracy_contains_letter"]
    assert [contains_letter.value([case("No", text, YES_NO)]) for text in ("A. Yes or B. No", "B")] == [1, 0]
    assert [parse_letter_v2(text) for text in ("b", "A large cyst", "Both", "the answer is c", "none")] == [
        "B",
        "A",
        "B",
        "C",
        None,
    ]
    assert parse_letter_v2("<think>A</think>\nD") == "D"


@pytest.mark.parametrize(
    ("text", "v1", "v2"),
    [
        ("30x13 mm", 30, 30),
        ("about -1e3 HU", -1000, -1),
        ("1e3", 1000, 1),
        ("12.5 cm", 12.5, 12.5),
        (".5", 0.5, 5),
        ("BDMAP_00012", 12, 12),
        ("none", None, None),
    ],
)
def test_the_first_number_counts(text, v1, v2):
    assert (parse_number(text), parse_number_v2(text)) == (v1, v2)


def test_yes_and_no_are_words():
    assert [parse_yes_no(t) for t in ("Yes.", "There is no nodule, yes", "normal", "NO", "Yesterday")] == [
        "yes",
        "no",
        None,
        "no",
        None,
    ]
