import string
import time

import phrasings
import pytest
from answers import case, row
from hypothesis import given
from hypothesis import strategies as st

from photon_train.answering.request import texts_of_choices
from photon_train.evaluation.choice_metrics import ACCURACIES
from photon_train.evaluation.parsing import parse_choice, parse_quantity, parse_size, parse_yes_no, said
from photon_train.evaluation.readings import (
    collapsed,
    parse_letter_v2,
    parse_number_v1,
    parse_number_v2,
    parse_yes_no_v2,
    without_punctuation,
    without_thinking,
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
def test_the_published_numbers_are_the_first_ones(text, v1, v2):
    assert (parse_number_v1(text), parse_number_v2(text)) == (v1, v2)


def test_the_published_yes_or_no_is_the_first_of_the_words():
    assert [parse_yes_no_v2(t) for t in ("Yes.", "There is no nodule, yes", "normal", "NO", "Yesterday")] == [
        "yes",
        "no",
        None,
        "no",
        None,
    ]


# --- as people write


def test_there_are_two_hundred_phrasings():
    choices = sum(len(rows) for _, rows in phrasings.CHOICES)
    assert choices + len(phrasings.YES_OR_NO) + len(phrasings.NUMBERS) + len(phrasings.SIZES) >= 200


@pytest.mark.parametrize(("choices", "rows"), phrasings.CHOICES)
def test_a_choice_is_read_as_a_person_reads_it(choices, rows):
    read = [(text, parse_choice(text, choices)) for text, _ in rows]
    assert [(text, None if index is None else choices[index]) for text, index in read] == rows


def test_yes_and_no_are_read_as_a_person_reads_them():
    assert [(text, parse_yes_no(text)) for text, _ in phrasings.YES_OR_NO] == phrasings.YES_OR_NO


def test_numbers_and_sizes_are_read_as_a_person_reads_them():
    numbers = [(text, unit, parse_quantity(text, unit)) for text, unit, _ in phrasings.NUMBERS]
    assert [(text, unit, read and str(read)) for text, unit, read in numbers] == phrasings.NUMBERS
    sizes = [(text, parse_size(text)) for text, _ in phrasings.SIZES]
    assert [(text, read and str(read)) for text, read in sizes] == phrasings.SIZES


# --- what a model that loops writes, and a table that is made to hold one up

CHOICES = ("Left lung", "Right lung", "Both lungs", "<3 cm", ">3 cm")
READERS = {
    "choice": lambda text: parse_choice.__wrapped__(text, CHOICES),
    "number": lambda text: parse_quantity.__wrapped__(text, "mm"),
    "size": parse_size.__wrapped__,
    "said": said,
    "without_thinking": without_thinking,
    "letter_v2": parse_letter_v2,
    "yes_no_v2": parse_yes_no_v2,
    "number_v1": parse_number_v1,
    "number_v2": parse_number_v2,
    "collapsed": collapsed,
    "without_punctuation": without_punctuation,
    "the form of a label": lambda text: case(text, "").form,
    "the form of a prompt": lambda text: texts_of_choices(row("q", "", YES_NO, question=text)),
}
LOOPS = [
    *(
        "<think>",
        "</think>",
        "<think>a</think>b ",
        "\\boxed{",
        "(A) ",
        "A, B, ",
        " ",
        "\u3000",
        "9",
        "1,",
        "1x",
        "1 x ",
        "1 x",
        " Choices: A. \nAnswer: ",
    ),
    *(
        f"1{' ' * 50}x",
        "1\u00a0",
        "- 1",
        "answer is ",
        "Answer: A ",
        "wait ",
        "not ",
        "left lung ",
        "less than ",
        "3 cm ",
    ),
    *("a\u0316\u0301", "选B", "a'", "a", "A. Left lung or (B) no 3x4 cm <think> "),
]


@pytest.mark.parametrize("name", READERS)
def test_the_time_to_read_a_loop_is_linear(name):
    """A quadratic reader takes 64 times as long for 8 times the text: minutes for 400 kB."""
    for loop in LOOPS:
        for size, most_s in (
            (100_000, 5),
            (400_000, 1),
        ):  # the longest text that is read as an answer, and a longer one
            start = time.process_time()
            READERS[name]((loop * (size // len(loop) + 1))[:size])
            assert time.process_time() - start < most_s, (name, loop, size)


def test_the_time_to_read_a_choice_of_20000_is_linear_in_them():
    choices = (*(f"segment {number}" for number in range(20_000)), "segment 7")
    start = time.process_time()
    assert [parse_choice(text, choices) for text in ("segment 19", "segment 7")] == [19, None]
    assert time.process_time() - start < 5
