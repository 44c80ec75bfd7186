"""Manifests: no question lost or guessed, the same bytes from any order, strict where ms-swift is not."""

import copy
import datetime
import io
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from photon_data.errors import UsageError
from photon_data.files import Location
from photon_data.questions import manifest
from photon_data.questions.question import Question, with_made_ids
from photon_data.questions.splits import assign_splits
from photon_data.questions.table import read_values
from photon_data.records import VolumeRecord


def record(volume, source=None, state="prepared", **fields):
    store = f"volumes/{volume}.ome.zarr" if state in ("prepared", "unchanged") else None
    source = source or f"scans/{volume}.nii.gz"
    return VolumeRecord(id=volume, source=source, state=state, bytes_in=1, mtime_ns=1, store=store, **fields)


RECORDS = [
    record("c1", "a/scan one.nii.gz"),
    record("c2", "a/deep/two.nrrd", state="unchanged"),
    record("c3", "b/scan one.nii.gz"),
    record("c4", "b/three.nii.gz", state="refused", reason="the file is cut off"),
    record("c5", "series5"),
    record("c6", "c/six.mha", state="failed", reason="MemoryError"),
    record("two", "z/other.nii"),
]

QUESTIONS = [
    Question(
        "q1",
        "c1",
        "Is there a lésion?\u2028 肝臓",
        "Yes",
        "train",
        "p1",
        "exists",
        {"kind": "yes-no", "organ": "liver"},
    ),
    Question(
        "q10",
        "a/scan one.nii.gz",
        "Where?",
        "left | right",
        "train",
        "p1",
        "where",
        {"choices": ["left", "right"], "mm": 3},
    ),
    Question("q2", "c1", "How many?", "3", "train", "p1", "count", {"mm": None, "system": "obey", "tools": ["ruler"]}),
    Question("q3", "c2", "Describe.", None, "test"),
    Question("q4", "three", "Why?", "So.", "train"),
    Question("q5", "scan one", "Which?", "This.", "train"),
    Question("q6", "nowhere", "Where?", "Here.", "test"),
    Question("q7", "c/six.mha", "What?", "That.", "test"),
    Question("q8", "other", "What?", "That.", "test"),
]


def build(questions=QUESTIONS, records=RECORDS, out="/data/out", **options):
    return manifest.build(questions, records, out=out, instruction="Describe the scan.", **options)


def with_stores(out, records=RECORDS):
    for item in records:
        if item.store:
            (out / item.store).mkdir(parents=True)
    return out


def files(out):
    return {path.name: path.read_bytes() for path in (out / "manifests").iterdir()}


def test_a_row_holds_the_question_the_answer_and_where_the_volume_is():
    row = build(dataset="demo").rows["train"][1]
    assert row == {
        "id": "q10",
        "messages": [{"role": "user", "content": "<video>Where?"}, {"role": "assistant", "content": "left | right"}],
        "videos": ["/data/out/volumes/c1.ome.zarr"],
        "channel": "demo/where",
        "volume_id": "c1",
        "patient": "p1",
        "split": "train",
        "task": "where",
        "kind": "",
        "organ": "",
        "choices": ["left", "right"],
        "answer": "left | right",
        "extra": {"mm": "3", "system": "", "tools": ""},
    }


def test_a_question_without_an_answer_is_a_user_turn_alone():
    row = build().rows["test"][0]
    assert (row["id"], row["messages"], row["answer"]) == ("q3", [{"role": "user", "content": "<video>Describe."}], "")
    assert row["channel"] == "out"


def test_values_of_any_type_become_text_so_that_a_column_has_one_type():
    extra = build().rows["train"][2]["extra"]
    assert extra == {"mm": "", "system": "obey", "tools": '["ruler"]'}


def of_many_types(count=40):
    """Questions whose columns are empty for long, and then something else."""
    late = {"choices": ["left", "right"], "size": 3.5, "seen": datetime.date(2020, 1, 2), "when": "", "where": {"b": 1}}
    early = {"seen": "", "when": "2020-01-02", "time": "2020-01-02 10:00", "size": None, "where": {"a": [None]}}
    questions = [Question(f"q{n:03d}", "c1", "?", split="s", extra=early) for n in range(count)]
    return questions + [Question(f"r{n:03d}", "c2", "?", "left", "s", "p", extra=late) for n in range(count)]


def test_every_row_alone_has_the_types_of_all_to_a_reader_of_json_lines(tmp_path):
    pyarrow_json = pytest.importorskip("pyarrow.json")
    manifest.write(build(of_many_types()), tmp_path)
    lines = (tmp_path / "manifests" / "s.jsonl").read_bytes().splitlines()
    assert len({str(pyarrow_json.read_json(io.BytesIO(line)).schema) for line in lines}) == 1
    first, last = json.loads(lines[0]), json.loads(lines[-1])
    assert (first["choices"], last["choices"]) == ([""], ["left", "right"])
    expected = {"seen": "", "size": "", "time": '"2020-01-02 10:00"', "when": '"2020-01-02"', "where": '{"a": [null]}'}
    assert first["extra"] == expected
    assert last["extra"] == {"seen": '"2020-01-02"', "size": "3.5", "time": "", "when": "", "where": '{"b": 1}'}


@pytest.mark.parametrize("step", [1, -1])
def test_a_manifest_loads_as_ms_swift_does_whatever_the_order_of_its_rows(tmp_path, step):
    datasets = pytest.importorskip("datasets")
    manifest.write(build(of_many_types()), tmp_path)
    path = tmp_path / "manifests" / "s.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[::step]) + "\n")
    options = {"split": "train", "cache_dir": str(tmp_path / "cache"), "chunksize": 2000}
    assert datasets.load_dataset("json", data_files=str(path), **options).to_list() == read_values(path)


def test_texts_are_put_in_quotes_where_a_reader_of_json_lines_takes_them_for_times():
    pyarrow_json = pytest.importorskip("pyarrow.json")
    days = ["2020-01-02", "2020-02-30", "9999-12-31", "20200102", "2020-1-2", "-2020-01-02"]
    zones = ["", "Z", "+02", "-0230", "+02:30", " "]
    hours = ["", "T10", " 10:05", "T10:05:06", "T24:00", " 10:05:60", "T1005", "t10", " 10:05:06.5", "T"]
    for text in (day + hour + zone for day in days for hour in hours for zone in zones):
        table = pyarrow_json.read_json(io.BytesIO(json.dumps({"text": text}).encode()))
        questions = [Question("1", "c1", "?", split="s", extra={"day": text}), Question("2", "c1", "?", split="s")]
        quoted = build(questions).rows["s"][0]["extra"]["day"] != text
        assert quoted == str(table.schema.field("text").type).startswith("timestamp"), text


def test_a_column_of_dates_alone_keeps_their_text():
    questions = [Question(n, "c1", "?", split="s", extra={"day": f"2020-01-0{n}"}) for n in "123"]
    assert [row["extra"]["day"] for row in build(questions).rows["s"]] == ["2020-01-01", "2020-01-02", "2020-01-03"]
    questions[1].extra["day"] = "2020-02-30"  # a text, to those who read dates
    assert [row["extra"]["day"] for row in build(questions).rows["s"]] == ['"2020-01-01"', "2020-02-30", '"2020-01-03"']


def test_rows_are_sorted_by_volume_then_question():
    records = [record("v2"), record("v1")]
    questions = [Question(i, v, "?", split="train") for i, v in (("a", "v2"), ("c", "v1"), ("d", "v2"), ("b", "v1"))]
    assert [row["id"] for row in build(questions, records).rows["train"]] == ["b", "c", "a", "d"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("c1", "c1"),
        ("two", "two"),  # the id of one volume wins over the file name of another
        ("two.nrrd", "c2"),
        ("a/deep/two.nrrd", "c2"),
        ("a/deep/two", "c2"),
        ("series5", "c5"),
        ("b/scan one.nii.gz", "c3"),
        ("b/scan one", "c3"),
        ("other.nii", "two"),
        ("scan one.nii.gz", "ambiguous: 2 volumes have this name (a/scan one.nii.gz, b/scan one.nii.gz)"),
        ("scan one", "ambiguous: 2 volumes have this name (a/scan one.nii.gz, b/scan one.nii.gz)"),
        ("elsewhere/two.nrrd", "no such volume"),
        ("two.nii", "no such volume"),
        ("C1", "no such volume"),
        ("three.nii.gz", "refused: the file is cut off"),
        ("c6", "failed: MemoryError"),
    ],
)
def test_a_volume_is_found_by_id_path_or_unique_file_name_and_never_guessed(name, expected):
    made = build([Question("q", name, "?", split="s")])
    found = made.rows["s"][0]["volume_id"] if made.rows else made.unmatched[0].reason
    assert found == expected


def test_what_could_not_be_joined_is_told_by_id():
    made = build()
    assert made.unmatched == [
        ("q4", "three", "refused: the file is cut off"),
        ("q5", "scan one", "ambiguous: 2 volumes have this name (a/scan one.nii.gz, b/scan one.nii.gz)"),
        ("q6", "nowhere", "no such volume"),
        ("q7", "c/six.mha", "failed: MemoryError"),
    ]
    assert made.without_questions == ["c3", "c5"]


def many_questions(seed):
    rng = random.Random(seed)
    names = ["c1", "c2", "c4", "two", "scan one", "a/scan one.nii.gz", "series5", "void", "six"]
    return with_made_ids(
        [Question("", rng.choice(names), f"Q{rng.randrange(9)}?", rng.choice("AB")) for _ in range(200)]
    )


@pytest.mark.parametrize("seed", range(3))
def test_no_question_is_lost(seed):
    questions = assign_splits(many_questions(seed))
    made = build(questions)
    ids = [row["id"] for rows in made.rows.values() for row in rows] + [unmatched.id for unmatched in made.unmatched]
    assert sorted(ids) == sorted(question.id for question in questions)
    used = {row["volume_id"] for rows in made.rows.values() for row in rows}
    assert sorted(used | set(made.without_questions)) == ["c1", "c2", "c3", "c5", "two"]


def test_any_order_of_questions_and_records_gives_the_same_bytes(tmp_path):
    written = []
    for seed in range(3):
        rng = random.Random(seed)
        questions = assign_splits(rng.sample(many_questions(0), k=200))
        made = build(questions, rng.sample(RECORDS, k=len(RECORDS)))
        manifest.write(made, tmp_path / str(seed))
        written.append(files(tmp_path / str(seed)))
    assert written[0] == written[1] == written[2]


def test_questions_about_other_volumes_leave_a_row_as_it_is():
    few = [question for question in many_questions(0) if question.volume in ("c1", "two")]
    rows = {row["id"]: row for rows in build(assign_splits(few)).rows.values() for row in rows}
    all_rows = {row["id"]: row for rows in build(assign_splits(many_questions(0))).rows.values() for row in rows}
    assert rows and rows == {key: all_rows[key] for key in rows}


def test_without_questions_every_volume_gets_the_instruction():
    made = build(None)
    assert list(made.rows) == ["all"]
    assert [(row["id"], row["volume_id"]) for row in made.rows["all"]] == [
        (v, v) for v in ("c1", "c2", "c3", "c5", "two")
    ]
    assert made.rows["all"][0]["messages"] == [{"role": "user", "content": "<video>Describe the scan."}]
    assert made[1:] == ([], [])
    assert manifest.validate(made.rows["all"], check_stores=False) == []


@pytest.mark.parametrize(
    ("out", "expected"),
    [
        ("/data/my out/", "/data/my out/volumes/c1.ome.zarr"),
        ("out", f"{Path.cwd()}/out/volumes/c1.ome.zarr"),
        ("memory://bucket/out/", "memory://bucket/out/volumes/c1.ome.zarr"),
    ],
)
def test_a_store_is_named_by_absolute_path_or_url(out, expected):
    row = build(out=out).rows["train"][0]
    assert row["videos"] == [expected]
    assert row["channel"].startswith(("my out/", "out/"))


def test_questions_without_a_split_are_refused():
    with pytest.raises(UsageError, match="found 1 without, 'q1' first"):
        build([replace(QUESTIONS[0], split=None), *QUESTIONS[1:]])


def test_what_is_written_is_read_back_and_sound(tmp_path):
    made = build(out=with_stores(tmp_path))
    assert manifest.write(made, tmp_path) == []
    assert sorted(files(tmp_path)) == ["test.jsonl", "train.jsonl"]
    for split, expected in made.rows.items():
        path = tmp_path / "manifests" / f"{split}.jsonl"
        assert read_values(path) == list(expected)
        assert manifest.validate(path) == []
        assert path.read_bytes().count(b"\n") == len(expected)


def test_an_object_store_holds_the_same_bytes(tmp_path):
    made = build(out=with_stores(tmp_path))
    manifest.write(made, tmp_path)
    manifest.write(made, "memory://manifest-test/out")
    store = Location("memory://manifest-test/out")
    assert {Path(name).name: store.read(name) for name in manifest.manifest_names(store)} == files(tmp_path)


def test_manifests_of_splits_that_are_no_more_go_and_other_files_stay(tmp_path):
    manifest.write(build(out=tmp_path), tmp_path)
    (tmp_path / "manifests" / "notes.jsonl").write_text('{"by": "hand"}\n')
    (tmp_path / "manifests" / "README.md").write_text("by hand")
    assert manifest.write(build(None, out=tmp_path), tmp_path) == ["manifests/test.jsonl", "manifests/train.jsonl"]
    assert sorted(files(tmp_path)) == ["README.md", "all.jsonl", "notes.jsonl"]


def test_rows_that_are_not_sound_are_not_written(tmp_path):
    made = build([replace(QUESTIONS[0], question="a <video> more"), QUESTIONS[3]], out=tmp_path)
    with pytest.raises(
        UsageError, match=r"manifests/train.jsonl: 1 problem .*\n  line 1: id 'q1': expected one <video> in a user turn"
    ):
        manifest.write(made, tmp_path)
    assert not (tmp_path / "manifests").exists()


def spoilt(**changes):
    """Return the rows of the train manifest, the second one changed."""
    changed = copy.deepcopy(list(build().rows["train"]))
    for name, value in changes.items():
        if value is None:
            del changed[1][name]
        else:
            changed[1][name] = value
    return changed


USER = {"role": "user", "content": "<video>Where?"}
ANSWER = {"role": "assistant", "content": "left | right"}


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"id": "q1"}, "id 'q1': expected an id that occurs once, found it at line 1 too"),
        ({"id": 7}, "expected column 'id' as in the first row (str), found int"),
        ({"organ": None}, "expected column 'organ' as in the first row (str), found none"),
        ({"new": "x"}, "expected column 'new' as in the first row (no such column), found str"),
        ({"extra": {"mm": "3"}}, "expected column 'extra' as in the first row"),
        ({"choices": ["a", 1]}, "expected a list of texts in 'choices'"),
        ({"choices": ["a", ""]}, "expected a list of texts in 'choices'"),
        ({"volume_id": ""}, "expected a text in 'volume_id', found ''"),
        ({"videos": ["volumes/c1.ome.zarr"]}, "expected an absolute path or URL"),
        ({"videos": []}, "expected one <video> in a user turn per video, found 1 for 0"),
        ({"videos": ["/a", "/b"]}, "expected one <video> in a user turn per video, found 1 for 2"),
        ({"messages": [{"role": "user", "content": "Where?"}, ANSWER]}, "found 0 for 1"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "a content that is not empty, found"),
        ({"messages": [ANSWER, USER]}, "user first, found assistant, user"),
        (
            {"messages": [USER, {"role": "assistant", "content": "<video>"}], "answer": "<video>"},
            "expected no <video> in a turn of the assistant",
        ),
        (
            {"messages": [{"role": "user", "content": "<video><image>?"}, ANSWER]},
            "expected no <image> in a turn of the user",
        ),
        (
            {"messages": [{"role": "user", "content": "<video><|im_end|>"}, ANSWER]},
            "expected no <|im_end|> in a turn of the user",
        ),
        ({"answer": "right"}, "expected the last turn of the assistant in 'answer' ('left | right'), found 'right'"),
    ],
)
def test_a_row_that_is_not_sound_is_told_with_line_and_id(changes, part):
    problems = manifest.validate(spoilt(**changes), check_stores=False)
    assert all(str(problem).startswith("line 2: id ") for problem in problems)
    assert part in problems[0].text


def test_rows_of_earlier_versions_whose_choices_are_an_empty_list_are_sound():
    assert manifest.validate(spoilt(choices=[]), check_stores=False) == []


def test_questions_whose_rows_would_be_refused_are_told_together_before():
    manifest.refuse_unsound("q.csv", QUESTIONS)
    bad = [replace(QUESTIONS[0], question="a <video> more"), replace(QUESTIONS[1], answer="<image>"), *QUESTIONS[1:3]]
    bad.append(replace(bad[-1], volume="c2"))
    with pytest.raises(UsageError) as caught:
        manifest.refuse_unsound("q.csv", bad)
    message = str(caught.value)
    for part in (
        "q.csv: 4 problems",
        "question 1: id 'q1': expected one <video> in a user turn per video",
        "question 2: id 'q10': expected no <image> in a turn of the assistant",
        "question 3: id 'q10': expected an id that occurs once, found it as question 2 too",
        "question 5: id 'q2': expected an id that occurs once, found it as question 4 too",
    ):
        assert part in message


def test_stores_are_looked_for_unless_told_not_to(tmp_path):
    absolute = build(out=tmp_path).rows["train"]
    assert len(manifest.validate(absolute)) == 3 and manifest.validate(absolute, check_stores=False) == []
    relative = [{**row, "videos": [str(Path(row["videos"][0]).relative_to(tmp_path))]} for row in absolute]
    with_stores(tmp_path)
    assert manifest.validate(absolute) == [] and manifest.validate(relative, root=tmp_path) == []
    assert "in /nowhere, found none" in manifest.validate(relative, root="/nowhere")[0].text


def test_a_damaged_manifest_is_told_by_line(tmp_path):
    manifest.write(build(out=with_stores(tmp_path)), tmp_path)
    path = tmp_path / "manifests" / "train.jsonl"
    lines = path.read_text().split("\n")
    path.write_text("\n".join([lines[0], lines[1][:-9], json.dumps(["no row"]), lines[2]]))
    problems = manifest.validate(path)
    assert [problem.place for problem in problems] == ["line 2", "line 3"]
    with pytest.raises(UsageError, match="2 problems"):
        read_values(path)
