"""Result files of other tools become predictions: by id, or by volume and text; what is in doubt is listed."""

import csv
import json
import random

import pytest
from answers import put, rad3d_rows, row
from typer.testing import CliRunner

from photon_cli.photon import app
from photon_data.errors import UsageError
from photon_train.evaluation.imported import Result, join_results, read_results
from photon_train.rows import question_digest, read_predictions

YES_NO = ("Yes", "No")


def cli(*words):
    result = CliRunner().invoke(app, ["eval", *map(str, words)])
    return result.exit_code, result.output


def as_the_authors_write(row, response):
    """A line of ms-swift's infer output for a row, on their machine and with 3D-RAD's name of the volume."""
    return {
        "response": response,
        "labels": row["answer"],
        "logprobs": None,
        "messages": [row["messages"][0], {"role": "assistant", "content": response}],
        "videos": [f"/mnt/data/3D-RAD/test/{row['volume_id'].replace('valid_', 'test_')}.nii.gz"],
    }


def test_the_authors_lines_in_any_order_get_the_scores_of_their_responses(tmp_path):
    rows = rad3d_rows("test")
    said = {one["id"]: one["answer"] if number % 4 else "I cannot tell" for number, one in enumerate(rows)}
    # Questions that the data have several times are answered alike.
    first = {}
    for one in rows:
        said[one["id"]] = first.setdefault(
            (one["volume_id"], one["messages"][0]["content"], one["answer"]), said[one["id"]]
        )
    lines = [as_the_authors_write(one, said[one["id"]]) for one in rows]
    put(tmp_path / "rows.jsonl", rows)
    put(tmp_path / "results.jsonl", random.Random(0).sample(lines, len(lines)))
    made = tmp_path / "made.jsonl"
    code, text = cli(
        "import", tmp_path / "results.jsonl", "--format", "photon", "--data", tmp_path / "rows.jsonl", "--output", made
    )
    assert (code, "left out" in text) == (0, False)
    assert {one.id: one.response for one in read_predictions(made)} == said
    asked = {one["id"]: question_digest(one) for one in rows}
    assert all(one.asked == asked[one.id] for one in read_predictions(made))
    words = ("--data", tmp_path / "rows.jsonl", "--output", tmp_path / "scores", "--bootstrap", 10)
    assert cli("3d-rad", "--predictions", made, *words)[0] == 0


def result(place, question, response, *, volume="v1.nii.gz", label="", id=""):
    return Result(f"line {place}", id, (f"/x/{volume}",), question, response, label)


def test_what_may_answer_several_questions_or_none_is_left_out_and_listed():
    rows = [
        row("a", "Yes", YES_NO, question="Nodule?", volume_id="v1"),
        row("b", "No", YES_NO, question="Mass?", volume_id="v1"),
        row("c", "Yes", YES_NO, question="Mass?", volume_id="v1", kind="other"),
        row("d", "No", YES_NO, question="Nodule?", volume_id="v11"),
        row("e", "Yes", YES_NO, question="Cyst?", volume_id="v1"),
    ]
    results = [
        result(1, "<video>Nodule?", "Yes"),  # v1 is not v11
        result(2, "<video>Mass?", "No", label="No"),  # told from c by its label
        result(3, "Mass?", "No"),
        result(4, "Node?", "No"),
        result(5, "Nodule?", "No", volume="v2.nii.gz"),
        result(6, "Nodule?", "No", volume="v11.nii.gz", label="Yes"),
        result(7, "Cyst?", "No"),
        result(8, "Cyst?", "Yes"),
    ]
    for order in (results, results[::-1]):
        found = join_results(order, rows)
        assert [(one.id, one.response) for one in found.predictions] == [("a", "Yes"), ("b", "No")]
        assert [(one.place, one.reason) for one in found.left_out] == [
            ("line 3", "ambiguous: it may answer 2 questions (b, c)"),
            ("line 4", "no question of its volume has this text"),
            ("line 5", "no question of the data is about the volume v2"),
            ("line 6", "its label is 'Yes', the answer of d is another"),
            ("line 7", "ambiguous: 2 different responses to e"),
            ("line 8", "ambiguous: 2 different responses to e"),
        ]


def test_a_question_put_with_its_choices_is_found_by_its_own_text():
    rows = [row("a", "No", YES_NO, question="Is there a nodule?", volume_id="set__v1")]
    asked = "<video>Is there a nodule?\nChoices: A. Yes B. No C. - D. -\nAnswer:"
    assert [one.id for one in join_results([result(1, asked, "B. No", label="B. No")], rows).predictions] == ["a"]
    assert not join_results([result(1, "<video>Is there a nodule? Or a mass?", "B")], rows).predictions


def test_a_label_in_any_of_an_answers_ways_is_the_rows_answer():
    rows = [
        row("letter", "B", YES_NO, volume_id="v1"),
        row("both", "B. No", YES_NO, volume_id="v2", extra={"plain_answer": "No", "letter": "B"}),
        row("text", "no", YES_NO, volume_id="v3"),
        row("open", "-. No nodule", volume_id="v4"),
    ]
    labels = dict.fromkeys(("v1", "v2", "v3"), ("B", "No", "b. no")) | {"v4": ("-. No nodule", "No nodule")}
    for volume, own in labels.items():
        for label in (*own, "Yes", "A"):
            found = join_results([result(1, "What?", "So", volume=volume, label=label)], rows)
            expected = (1, 0) if label in own else (0, 1)
            assert (len(found.predictions), len(found.left_out)) == expected, (volume, label)


def test_a_table_is_joined_by_its_mapped_columns(tmp_path):
    put(tmp_path / "rows.jsonl", [row("1", "Yes", YES_NO), row("2", "No", YES_NO)])
    with (tmp_path / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("qid", "Pred"), (1, "Yes"), (2, "no, none"), (3, "Yes")])
    words = ("--format", "table", "--data", tmp_path / "rows.jsonl", "--output", tmp_path / "made.jsonl")
    code, text = cli("import", tmp_path / "table.csv", *words, "--columns", "id=qid,response=Pred")
    assert code == 1
    assert "line 4: no question of the data has the id '3'" in text
    assert [(one.id, one.response) for one in read_predictions(tmp_path / "made.jsonl")] == [
        ("1", "Yes"),
        ("2", "no, none"),
    ]
    (left,) = [json.loads(line) for line in (tmp_path / "made.left_out.jsonl").read_text().splitlines()]
    assert left["place"] == "line 4"
    code, text = cli("import", tmp_path / "table.csv", *words, "--columns", "id=qid,response=Pred")
    assert (code, "expected a new file" in text) == (2, True)


@pytest.mark.parametrize(
    ("form", "columns", "said"),
    [
        ("table", {}, "name them with --columns"),
        ("table", {"response": "Prad"}, "did you mean 'Pred'"),
        ("table", {"answer": "Pred"}, "expected --columns OURS=THEIRS"),
        ("photon", {"response": "Pred"}, "expected --columns beside --format table"),
        ("ms-swift", {}, "is this another --format?"),
        ("excel", {}, "expected --format photon"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path, form, columns, said):
    (tmp_path / "table.csv").write_text("qid,Pred\n1,Yes\n")
    with pytest.raises(UsageError, match=said):
        read_results(tmp_path / "table.csv", form, columns)


@pytest.mark.parametrize("videos", [5, True, {"url": "a"}, [[1]], [{"path": [1]}]])
def test_a_line_whose_videos_are_none_names_no_volume_or_is_refused_with_its_place(tmp_path, videos):
    line = {"response": "yes", "messages": [{"role": "user", "content": "<video>?"}], "videos": videos}
    put(tmp_path / "results.jsonl", [line])
    rows = [row("q", "Yes", volume_id="v1")]
    try:
        found = join_results(read_results(tmp_path / "results.jsonl", "ms-swift", {}), rows)
    except UsageError as error:
        assert "line 1" in str(error)
    else:
        assert (found.predictions, len(found.left_out)) == ([], 1)
