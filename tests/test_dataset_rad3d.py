"""3D-RAD: rows of the real files (a few dozen, MIT licence, in tests/data), and broken ones made from them."""

import csv
import shutil
from pathlib import Path

import pytest
from published import collected, place, write_v2

from photon_data.datasets.rad3d import read_subtask
from photon_data.errors import UsageError

REAL = Path(__file__).parent / "data" / "3d-rad" / "3DRAD"
FILES = sorted(REAL.rglob("*.csv"))


def rows_of(file):
    with file.open(encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


@pytest.mark.parametrize("file", FILES, ids=lambda file: "/".join(file.parts[-3:]))
def test_every_real_row_becomes_a_question_with_its_words_unchanged(file):
    rows, questions = rows_of(file), list(read_subtask(file))
    assert len(questions) == len(rows) > 0
    for row, question in zip(rows, questions, strict=True):
        assert (question.question, question.answer) == (row["Question"], row["Answer"])
        assert question.volume == row["VolumeName"].removesuffix(".nii.gz").replace("test_", "valid_")
        assert question.extra["subtask"] == file.stem
        choices = [row[f"Choice {letter}"] for letter in "ABCD" if row[f"Choice {letter}"] != "-"]
        assert question.extra.get("choices", []) == choices
        if choices:
            assert choices["ABCD".index(question.extra["letter"])] == question.answer


@pytest.fixture
def rad3d(tmp_path):
    """All real rows, and every volume they ask about but one."""
    shutil.copytree(REAL, tmp_path / "3DRAD")
    names = sorted({question.volume for file in FILES for question in read_subtask(file)})
    first = write_v2(place(tmp_path / "CT-RATE", names[0], "v2"))
    for name in names[1:]:
        path = place(tmp_path / "CT-RATE", name, "v2")
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(first, path)
    place(tmp_path / "CT-RATE", names[-1], "v2").unlink()
    write_v2(place(tmp_path / "CT-RATE", "valid_1304_c_2", "v2"))
    return tmp_path, names


def entry(**more):
    return {"adapter": "3d-rad", "root": "CT-RATE", "annotations": {"questions": "3DRAD"}, **more}


def test_splits_tasks_subtasks_and_patients_are_those_of_the_folders_and_names(rad3d):
    folder, names = rad3d
    part = collected(folder, **entry())
    total = sum(len(rows_of(file)) for file in FILES)
    assert len(part.questions) + len(part.unmatched) == total
    assert {missing.volume for missing in part.unmatched} == {names[-1]}
    static = {question.split: question for question in part.questions if question.task == "Static_Temporal_Diagnosis"}
    assert {split: q.extra["subtask"] for split, q in static.items()} == {"test": "b", "train": "c"}
    assert {q.extra["publisher_subtask"] for q in static.values()} == {"1"}
    assert all(q.patient == "ct-rate:" + q.volume.rsplit("_", 2)[0] for q in part.questions)
    assert len({question.id for question in part.questions}) == len(part.questions)
    assert any(
        "1 of" in note and "have no question and are not prepared, valid_1304_c_2 first" in note for note in part.notes
    )
    assert any(
        "train, task 5 (Static_Temporal_Diagnosis): 13158 questions were published, 4 are here" in n for n in part.notes
    )


def test_rows_that_repeat_are_kept_with_ids_of_their_own_unless_they_are_to_be_dropped(rad3d):
    folder, _ = rad3d
    kept, dropped = collected(folder, **entry()), collected(folder, **entry(questions={"duplicates": "drop"}))
    (note,) = [note for note in kept.notes if "repeat another" in note]
    repeats = int(note.split()[0])
    assert repeats > 0
    assert len(kept.questions) + len(kept.unmatched) - len(dropped.questions) - len(dropped.unmatched) == repeats


def edit(file, old, new):
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("VolumeName", "volume", "expected a column 'VolumeName', found none; did you mean 'volume'"),
        (",Close,A,Yes", ",Close,B,Yes", "answer is not its choice"),
        ("test_1000_a_1", "train_1000_a_1", "expected a volume like test_1_a_1.nii.gz, found 'train_1000_a_1.nii.gz'"),
        ("\n4,10,", "\n5,10,", "expected task 4, as its folder is called, found '5'"),
        (",Yes,No,-,-\n", ",Yes,No\n", "expected 11 cells, found 9"),
    ],
)
def test_a_file_that_is_not_as_published_is_refused_with_counts_and_lines(rad3d, old, new, message):
    folder, _ = rad3d
    edit(folder / "3DRAD" / "test" / "Task4_Existence_Detection" / "Lung nodule.csv", old, new)
    with pytest.raises(UsageError, match=r"Lung nodule.csv: \d+ problem") as error:
        collected(folder, **entry())
    assert message in str(error.value)


def test_annotations_of_another_data_set_are_refused(rad3d):
    folder, _ = rad3d
    with pytest.raises(UsageError, match=r"line \d+, data set data: expected the folder 3DRAD"):
        collected(folder, **entry(annotations={"questions": "CT-RATE"}))


def test_a_root_without_any_of_the_volumes_is_refused_with_what_was_asked_for(rad3d):
    folder, _ = rad3d
    shutil.rmtree(folder / "CT-RATE")
    write_v2(place(folder / "CT-RATE", "valid_1304_c_2", "v2"))
    with pytest.raises(UsageError, match=r"found none for any of \d+; the first question is about "):
        collected(folder, **entry())
