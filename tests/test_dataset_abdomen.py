"""DeepTumorVQA v1 and v2 and AbdomenAtlas 3.0, on invented rows under their published headers."""

import time

import pytest
from published import collected, declare, write_csv, write_json, write_v2

from photon_data.datasets.declare import read_data_manifest
from photon_data.datasets.deeptumorvqa import parse_choices
from photon_data.errors import UsageError
from photon_data.files import Location
from photon_pipelines.plan import gather
from photon_pipelines.request import Request, one_recipe

SPACED = [
    "Question ID",
    "Image ID",
    "spacing",
    "shape",
    "sex",
    "age",
    "scanner",
    "contrast",
    "question",
    "answer",
    "multiple-choice question",
    "correct option",
    "organ",
    "lesion",
    "question type",
    "question subtype",
    "split",
]
A, B, C = (f"BDMAP_0000000{n}" for n in (1, 2, 3))


def v1_row(number, ct, **more):
    row = {
        "Question ID": number,
        "Image ID": ct,
        "sex": "F",
        "age": "61",
        "question": "Is there a liver lesion?",
        "answer": "Yes",
        "multiple-choice question": "Is there a liver lesion? A: No B: Yes",
        "correct option": "B",
        "organ": "liver",
        "question type": "recognition",
        "question subtype": "liver_lesion_existence",
        "split": "train",
    }
    return {**row, **more}


BENCH = {
    "qid": "bench_00017",
    "image_id": B,
    "spacing": "[0.83 0.83 5.0]",
    "shape": "(512, 512, 116)",
    "sex": None,
    "age": None,
    "question": "What is the volume of the spleen?",
    "answer": 204.5,
    "mc_question": "What is the volume of the spleen? A: 204.5 cm³ B: 98 C: 310 D: 12",
    "correct_option": "A",
    "organ": "spleen",
    "lesion": False,
    "question_type": "measurement",
    "question_subtype": "organ_volume measurement",
}


@pytest.fixture
def tumors(tmp_path):
    for n, ct in enumerate((A, B, C)):
        write_v2(tmp_path / "cts" / ct / "ct.nii.gz", n)
        (tmp_path / "cts" / ct / "segmentations").mkdir()
        write_v2(tmp_path / "cts" / ct / "segmentations" / "liver.nii.gz", n)
    numeric = v1_row(
        2, A, **{"question subtype": "organ hu  measurement", "answer": "1e3", "multiple-choice question": ""}
    )
    write_csv(tmp_path / "train_qa.csv", SPACED, [v1_row(1, A), numeric])
    write_json(tmp_path / "test_qa.json", {"version": "2", "num_questions": 1, "questions": [BENCH]})
    return tmp_path


def deeptumorvqa(**more):
    return {
        "adapter": "deeptumorvqa",
        "root": "cts",
        "annotations": {"questions": ["train_qa.csv", "test_qa.json"]},
        **more,
    }


def test_spaced_and_snake_case_headers_give_the_same_fields(tumors):
    first, numeric, bench = collected(tumors, **deeptumorvqa()).questions
    assert (first.volume, first.split, first.task) == (A, "train", "recognition")
    assert first.extra["subtask"] == "liver lesion existence"
    assert (first.extra["choices"], first.extra["letter"]) == (["No", "Yes"], "B")
    assert (first.extra["sex"], first.extra["age"]) == ("F", "61")
    assert (numeric.answer, numeric.extra["answer_type"], numeric.extra["subtask"]) == (
        "1e3",
        "number",
        "organ HU measurement",
    )
    assert "choices" not in numeric.extra
    assert (bench.split, bench.answer, bench.extra["publisher_id"]) == ("test", "204.5", "bench_00017")
    assert bench.extra["choices"] == ["204.5 cm³", "98", "310", "12"]
    assert bench.extra["subtask"] == "organ volume measurement"
    assert bench.patient == f"abdomenatlas:{B}"


def test_a_question_without_some_keys_has_no_text_there(tumors):
    """In a JSON list, where every item has keys of its own."""
    bare = {key: value for key, value in BENCH.items() if key not in ("mc_question", "correct_option", "organ")}
    write_json(tumors / "test_qa.json", [BENCH, {**bare, "qid": "bench_00018"}])
    *_, first, second = collected(tumors, **deeptumorvqa()).questions
    assert (first.extra["letter"], first.extra["organ"]) == ("A", "spleen")
    assert ("choices" in second.extra, second.extra["organ"], second.answer) == (False, "", "204.5")


@pytest.mark.parametrize(
    ("text", "choices"),
    [
        ("How large? A: small B: 2 to 4 cm C: large", ["small", "2 to 4 cm", "large"]),
        ("Ratio of A: and B?\nA: 1:2\nB: 2:1", ["1:2", "2:1"]),
        ("No choices here", []),
        ("Only one? A: yes", []),
        ("Is A: or B: larger? A: a B: b  C: c\nD: A: d", ["a", "b", "c", "A: d"]),
        ("Which? A: a B: b D: d C: c", ["a", "b", "d C: c"]),
        ("Which? A: B: b", []),
        ("Which? B: b A: a", []),
    ],
)
def test_choices_are_taken_out_of_the_text(text, choices):
    assert parse_choices(text) == choices


@pytest.mark.parametrize("loop", [" A: ", " A: x  ", " A: x B: ", " B: "])
def test_choices_of_a_text_that_repeats_its_letters_are_looked_for_once(loop):
    start = time.process_time()
    parse_choices(loop * (400_000 // len(loop)) + "!")
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"correct option": "D"}, "expected an option of A to B, found 'D'"),
        ({"Image ID": "train_1_a_2"}, "expected an image id like BDMAP_00000001"),
        ({"multiple-choice question": "A - yes, B - no"}, "choices 'A: .. B: ..'"),
        ({"answer": ""}, "expected a question and an answer, found none"),
    ],
)
def test_a_row_that_is_not_as_published_is_refused_by_id_and_line(tumors, more, message):
    write_csv(tumors / "train_qa.csv", SPACED, [v1_row(1, A), v1_row(7, A, **more)])
    with pytest.raises(UsageError, match=r"train_qa.csv: 1 problem .*\n  line 3: 7: ") as error:
        collected(tumors, **deeptumorvqa())
    assert message in str(error.value)


def test_the_multiple_choice_form_has_the_letter_as_its_answer(tumors):
    path = declare(tumors, tumor=deeptumorvqa(questions={"prompt": "deeptumorvqa", "choices": "shown"}))
    datasets = read_data_manifest(path).datasets
    data = gather(Request(path, Location(str(tumors / "out")), one_recipe(datasets), datasets=datasets))
    bench = next(q for part in data.questions.values() for q in part if q.split == "test")
    assert bench.question == (
        "You are given the full 3D abdominal CT volume (NIfTI, native voxel spacing).\n"
        "Voxel spacing (mm): [0.83 0.83 5.0].  Volume shape: (512, 512, 116).\n"
        "What is the volume of the spleen? A: 204.5 cm³ B: 98 C: 310 D: 12\n"
        "Answer with ONLY the single letter (A, B, C, or D)."
    )
    assert (bench.answer, bench.extra["plain_answer"]) == ("A", "204.5")


ATLAS = ("BDMAP ID", "sex", "age", "radiologist note", "structured report", "narrative report")


def atlas(tmp_path, **more):
    rows = [
        {"BDMAP ID": ct, "sex": "M", "structured report": f"Liver volume: {n} cc."} for n, ct in enumerate((A, B), 1)
    ]
    write_csv(tmp_path / "meta.csv", ATLAS, [*rows, {"BDMAP ID": C, "structured report": "nan"}])
    annotations = {"reports": "meta.csv", **more.pop("annotations", {})}
    return {
        "adapter": "abdomenatlas3",
        "root": "cts",
        "annotations": annotations,
        "questions": {"report": "structured report"},
        "splits": {"train": 1},
        **more,
    }


def test_a_report_column_has_to_be_chosen(tumors):
    with pytest.raises(UsageError, match=r"expected some of radiologist note, structured report, .*, found none"):
        collected(tumors, **atlas(tumors, questions={}))
    part = collected(tumors, **atlas(tumors))
    assert [(q.volume, q.answer) for q in part.questions] == [(A, "Liver volume: 1 cc."), (B, "Liver volume: 2 cc.")]
    assert f"1 CTs have no text in structured report and make no question, {C} first" in part.notes


def order(folder, **datasets):
    path = declare(folder, **datasets)
    declared = read_data_manifest(path).datasets
    return Request(path, Location(str(folder / "out")), one_recipe(declared), datasets=declared)


def test_reports_of_benchmark_scans_leak_into_its_test_split_unless_they_are_left_out(tumors):
    with pytest.raises(UsageError, match=f"patient abdomenatlas:{B} in test and train"):
        gather(order(tumors, reports=atlas(tumors), tumor=deeptumorvqa()))
    safe = atlas(tumors, annotations={"benchmark": "test_qa.json"})
    data = gather(order(tumors, reports=safe, tumor=deeptumorvqa()))
    splits = {(question.volume, question.split) for part in data.questions.values() for question in part}
    assert splits == {(A, "train"), (B, "test")}
    assert "reports: 1 questions are left out: in DeepTumorVQA's benchmark" in data.notes


def test_one_original_scan_under_two_ids_is_a_leak(tumors):
    ids = [{"original id": "KiTS_7", "AbdomenAtlas_id": ct} for ct in (A, B)]
    write_csv(tumors / "ids.csv", ("original id", "AbdomenAtlas_id"), ids)
    files = {"questions": ["train_qa.csv", "test_qa.json"], "ids": "ids.csv"}
    with pytest.raises(UsageError, match="source KiTS_7 in test and train"):
        gather(order(tumors, tumor=deeptumorvqa(annotations=files)))


def test_the_publishers_split_lists_are_followed_and_may_not_contradict(tumors):
    for name, cts in {"IID_train": [A], "IID_test": [B], "OOD_test": [A]}.items():
        write_csv(tumors / f"{name}.csv", ("BDMAP ID",), [{"BDMAP ID": ct} for ct in cts])
    lists = {"splits": ["IID_train.csv", "IID_test.csv"]}
    part = collected(tumors, **atlas(tumors, annotations=lists, splits=["train", "test"]))
    assert {question.volume: question.split for question in part.questions} == {A: "train", B: "test"}
    with pytest.raises(UsageError, match=f"expected one split per CT, found 1 in several \\({A}\\)"):
        collected(tumors, **atlas(tumors, annotations={"splits": [*lists["splits"], "OOD_test.csv"]}))


def test_archives_that_nobody_asked_to_unpack_are_spoken_of(tumors):
    (tumors / "empty").mkdir()
    (tumors / "empty" / "AbdomenAtlas_part1.tar.gz").write_bytes(b"")
    with pytest.raises(
        UsageError, match=r"found none in .*1 archives are not read, AbdomenAtlas_part1.tar.gz first: .*unpack"
    ):
        collected(tumors, **atlas(tumors, root="empty"))
