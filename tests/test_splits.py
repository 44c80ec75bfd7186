"""Splits by patient: who goes where never depends on anybody else."""

import random
from collections import Counter
from dataclasses import replace

import pytest

from photon_data.errors import UsageError
from photon_data.questions.question import Question
from photon_data.questions.splits import Leak, assign_splits, leaks, refuse_leaks

# Two volumes per patient, three questions per volume; the last ten volumes have no patient.
QUESTIONS = [
    Question(id=f"{v}-{n}", volume=f"v{v}", question="?", patient=f"p{v // 2}" if v < 190 else None)
    for v in range(200)
    for n in range(3)
]


def splits_of(questions, **options):
    return {q.id: q.split for q in assign_splits(questions, **options)}


def row(volume, split, patient=""):
    return {"volume_id": volume, "split": split, "patient": patient}


def test_a_patient_is_in_one_split():
    assigned = assign_splits(QUESTIONS)
    splits = {}
    for q in assigned:
        splits.setdefault(q.patient or q.volume, set()).add(q.split)
    assert all(len(found) == 1 for found in splits.values())
    rows = [row(q.volume, q.split, q.patient or "") for q in assigned]
    assert leaks(rows, {f"v{v}": f"sha256:{v}" for v in range(200)}) == []


def test_one_row_with_a_patient_is_enough_for_its_volume():
    questions = [Question(f"q{n}", f"v{n % 9}", "?", patient="p" if n < 9 else None) for n in range(90)]
    assert len(set(splits_of(questions).values())) == 1


def test_fractions_are_met_on_average():
    questions = [Question(str(n), str(n), "?") for n in range(10_000)]
    counts = Counter(splits_of(questions, fractions={"train": 0.7, "val": 0.1, "test": 0.2, "none": 0.0}).values())
    # Three standard deviations of a binomial count of 10,000 are at most 150.
    assert counts == pytest.approx({"train": 7000, "val": 1000, "test": 2000}, abs=150)


def test_order_and_further_rows_move_nobody_and_the_seed_moves_some():
    full = splits_of(QUESTIONS)
    assert splits_of(random.Random(1).sample(QUESTIONS, k=600)) == full
    part = splits_of(QUESTIONS[:120])
    assert part == {key: full[key] for key in part}
    assert splits_of(QUESTIONS, fractions={"val": 0.1, "test": 0.1, "train": 0.8}) == full
    moved = sum(split != full[key] for key, split in splits_of(QUESTIONS, seed=1).items())
    assert 60 < moved < 400


def test_splits_of_the_table_are_kept():
    questions = [replace(q, split=("train", "dev")[n % 2]) for n, q in enumerate(QUESTIONS)]
    assert assign_splits(questions) == questions
    assert assign_splits([]) == []


def test_a_table_with_splits_for_some_rows_is_refused():
    questions = [replace(QUESTIONS[0], split="train"), *QUESTIONS[1:4]]
    with pytest.raises(UsageError, match=r"3 of 4 without \(0-1, 0-2, 1-0\)"):
        assign_splits(questions)


@pytest.mark.parametrize("name", ["../train", "a b", ".hidden", "train/1"])
def test_a_split_that_cannot_name_a_file_is_refused(name):
    with pytest.raises(UsageError, match="expected split names of at most 100 letters"):
        assign_splits([replace(QUESTIONS[0], split=name)])


def test_two_spellings_of_a_split_are_refused():
    with pytest.raises(UsageError, match="expected one spelling per split, found 'Train' and 'train'"):
        assign_splits([replace(QUESTIONS[0], split="train"), replace(QUESTIONS[1], split="Train")])


@pytest.mark.parametrize("fractions", [{}, {"train": 0.9}, {"train": 1.5, "test": -0.5}])
def test_fractions_that_do_not_add_up_are_refused(fractions):
    with pytest.raises(UsageError, match="expected fractions that add up to 1"):
        assign_splits(QUESTIONS, fractions=fractions)


def test_a_volume_of_two_patients_is_refused():
    with pytest.raises(UsageError, match="found 'p' and 'q' for 'v'"):
        assign_splits([Question("1", "v", "?", patient="p"), Question("2", "v", "?", patient="q")])


def test_what_is_in_two_splits_is_found():
    rows = [
        row("v1", "train", "p1"),
        row("v2", "test", "p1"),  # the patient of v1
        row("v3", "train"),
        row("v3", "val"),  # one volume, two splits
        row("v4", "train", "p4"),
        row("v5", "test", "p5"),  # the bytes of v4
        row("v6", "train", "p6"),
        row("v6", "train", "p6"),
        row("v7", "val", "p7"),
    ]
    contents = {"v1": "sha256:1", "v2": "sha256:2", "v3": "sha256:3", "v4": "sha256:4", "v5": "sha256:4", "v7": None}
    found = leaks(rows, contents)
    assert found == [
        Leak("patient", "p1", ("test", "train"), ("v1", "v2")),
        Leak("volume", "v3", ("train", "val"), ("v3",)),
        Leak("content", "sha256:4", ("test", "train"), ("v4", "v5")),
    ]
    with pytest.raises(UsageError, match=r"(?s)3 x the same .*patient p1 in test and train \(volumes v1, v2\)"):
        refuse_leaks(found)
    refuse_leaks([])
