"""What is said of single questions, and comparisons, calibration and bad rows that follow from it."""

import itertools
import json

import numpy as np
import pytest
from answers import case, put, row
from typer.testing import CliRunner

from photon_cli.photon import app
from photon_data.errors import UsageError
from photon_train.evaluation.choice_metrics import CALIBRATION_ERROR, reliability_of
from photon_train.evaluation.evaluate import evaluate
from photon_train.evaluation.results import Settings
from photon_train.rows import Prediction, read_predictions

YES_NO = ("Yes", "No")
FEW = Settings(bootstrap=20)


def cli(*words):
    result = CliRunner().invoke(app, ["eval", *map(str, words)])
    return result.exit_code, result.output


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def files(tmp_path):
    rows = [
        row("c1", "No", YES_NO, task="closed", question="Is it?\nA. Yes\nB. No"),
        row("c2", "Yes", YES_NO, task="closed", question="Is it?\nA. Yes\nB. No"),
        row("n1", "12 mm", task="number"),
        row("s1", "30x13 mm", task="size"),
        row("t1", "upper lobe", task="words"),
    ]
    said = ["**B**", "<think>no", "1.2 cm", "1.3 x 3.0 cm", "lower lobe"]
    put(tmp_path / "rows.jsonl", rows)
    put(tmp_path / "preds.jsonl", [Prediction(one["id"], text) for one, text in zip(rows, said, strict=True)])
    put(tmp_path / "right.jsonl", [Prediction(one["id"], one["answer"]) for one in rows])
    return tmp_path


def score(files, name, *more):
    words = ("--data", files / "rows.jsonl", "--predictions", files / f"{name}.jsonl", "--bootstrap", 20)
    return cli("vqa", *words, "--output", files / name, *more)


def test_every_question_has_a_line_with_what_was_read_and_all_its_scores(files):
    code, text = score(files, "preds")
    assert code == 0
    assert "responses that mean no answer (wrong where one is read): 1 of closed" in text
    lines = {line["id"]: line for line in lines_of(files / "preds" / "per_question.jsonl")}
    assert {id: line["read"] for id, line in lines.items()} == {
        **{"c1": "no", "c2": None, "n1": "12 mm", "s1": "30 x 13 mm", "t1": "lower lobe"},
    }
    main = {id: (line["metric"], line["scores"][line["metric"]]) for id, line in lines.items()}
    assert main == {
        **{"c1": ("accuracy_robust", 100), "c2": ("accuracy_robust", 0), "n1": ("mra_thresholds", 100)},
        **{"s1": ("size_within_10_percent", 100), "t1": ("bleu1_sentence", 50)},
    }
    assert lines["n1"]["scores"]["mra_thresholds_v1"] == 0  # 1.2 is not 12
    assert (lines["c1"]["patient"], lines["c1"]["task"], lines["c1"]["answer"]) == ("p-c1", "closed", "No")
    assert lines["c1"]["response"] == "**B**"
    assert lines["c1"]["scores"]["accuracy_strict"] == 0


def test_the_terminal_shows_one_table_and_verbose_all(files):
    short, long = score(files, "preds")[1], score(files, "preds", "--verbose")[1]
    assert len(short.splitlines()) < 25
    assert "accuracy_strict" not in short and "accuracy_strict" in long
    assert "report.html" in short


def test_letters_are_shown_only_where_a_question_has_letters(tmp_path):
    for name, question in (("with", "Is it? A. Yes B. No"), ("without", "Is it?")):
        put(tmp_path / "rows.jsonl", [row("a", "No", YES_NO, question=question)])
        put(tmp_path / "p.jsonl", [Prediction("a", "No")])
        words = ("--data", tmp_path / "rows.jsonl", "--predictions", tmp_path / "p.jsonl", "--bootstrap", 5)
        assert cli("vqa", *words, "--output", tmp_path / name)[0] == 0
        shown = "accuracy_contains_letter" in (tmp_path / name / "report.html").read_text()
        assert shown is (name == "with")


def test_tasks_and_limit_leave_the_other_predictions_aside(files):
    assert score(files, "right", "--tasks", "number,words")[0] == 0
    assert [line["id"] for line in lines_of(files / "right" / "per_question.jsonl")] == ["n1", "t1"]
    code, text = score(files, "right", "--limit", 2)
    assert (code, "only the first 2" in text) == (0, True)
    assert json.loads((files / "right" / "scores.json").read_text())["settings"]["limit"] == 2
    code, text = score(files, "right", "--tasks", "numbers")
    assert code == 2
    assert "expected tasks of the data (closed, number, size, words), found numbers" in text


def test_evaluations_are_compared_question_by_question(files):
    assert score(files, "preds")[0] == score(files, "right")[0] == 0
    code, text = cli("compare", files / "preds", files / "right", "--output", files / "c.json", "--bootstrap", 50)
    assert code == 0
    assert "right minus preds" in text
    (difference,) = json.loads((files / "c.json").read_text())
    assert difference["questions"] == 5
    by_metric = {(one["metric"], one["task"], one["average"]): one for one in difference["second_minus_first"]}
    assert by_metric["accuracy_robust", "closed", "macro_over_subtasks"]["value"] == 50
    assert by_metric["mra_thresholds", "number", "macro_over_subtasks"]["value"] == 0
    assert by_metric["mra_thresholds", "number", "macro_over_subtasks"]["p_value"] == 1
    assert cli("compare", files / "preds")[0] == 2
    put(files / "rows.jsonl", [row("c1", "Yes", YES_NO, task="closed")])
    put(files / "other.jsonl", [Prediction("c1", "Yes")])
    assert score(files, "other")[0] == 0
    code, text = cli("compare", files / "preds", files / "other")
    assert (code, "expected the answers, patients and tasks of preds" in text) == (2, True)


def test_a_p_value_is_that_of_all_swaps_of_patients():
    # Patients with 1, 2 and 3 questions ...; the second model is better in most of them.
    gains = [1, 1, 2, 2, -1, 1, 3, 0]
    rows, first, second = [], [], []
    for patient, gain in enumerate(gains):
        for k in range(3):
            id = f"{patient}-{k}"
            rows.append(row(id, "Yes", YES_NO, patient=f"p{patient}"))
            first.append(Prediction(id, "Yes" if gain < 0 and k < -gain else "No"))
            second.append(Prediction(id, "Yes" if k < gain else "No"))
    done = evaluate("vqa", rows, {"a": first, "b": second}, settings=Settings(bootstrap=4000))
    (found,) = [s for s in done.comparisons[0].scores if (s.metric, s.average) == ("accuracy_robust", "subtask")]
    sums = [abs(np.dot(signs, gains)) for signs in itertools.product((-1, 1), repeat=len(gains))]
    assert found.p_value == pytest.approx(np.mean(np.array(sums) >= sum(gains)), abs=0.02)
    same = evaluate("vqa", rows, {"a": first, "b": first}, settings=FEW).comparisons[0].scores
    assert {one.p_value for one in same} <= {1.0, None}


def test_the_calibration_error_of_a_hand_worked_table():
    def sure(probability, answer):
        scores = {"Yes": np.log(probability), "No": np.log(1 - probability)}
        return case(answer, "Yes", YES_NO, scores=scores)

    # 0.95 is right in 1 of 2, 0.75 in 2 of 2: (|0.95 - 0.5| + |0.75 - 1|) / 2
    cases = [sure(0.95, "Yes"), sure(0.95, "No"), sure(0.75, "Yes"), sure(0.75, "Yes")]
    assert CALIBRATION_ERROR.value(cases) == pytest.approx(0.35)
    low, high = reliability_of([*cases, case("Yes", "Yes", YES_NO)])
    assert (low.questions, low.confidence, low.accuracy) == (2, pytest.approx(0.75), 1)
    assert (high.questions, high.confidence, high.accuracy) == (2, pytest.approx(0.95), 0.5)


# --- rows and predictions as they come


def test_an_answer_that_is_none_of_the_choices_is_a_bad_row():
    rows = [row("a", "Maybe", YES_NO), row("b", "No", YES_NO)]
    with pytest.raises(UsageError, match="1 whose answer is none of their choices: a"):
        evaluate("vqa", rows, {}, settings=FEW)


@pytest.mark.parametrize(("answer", "choices", "text"), [("B", YES_NO, "No"), ("left", ("Left", "Right"), "Left")])
def test_an_answer_may_be_the_letter_or_the_text_of_a_choice(answer, choices, text):
    one = case(answer, text, choices)
    assert (one.answer, one.letter) == (text, "AB"[choices.index(text)])


def test_ten_choices_have_ten_letters():
    ten = tuple(f"segment {number}" for number in range(1, 11))
    assert (case("segment 10", "", ten).letter, case("segment 10", "", ten).answer) == ("J", "segment 10")


def test_choices_that_are_one_text_are_refused():
    with pytest.raises(UsageError, match=r"a: expected a list of texts in choices, found 'yes\|no'"):
        evaluate("vqa", [{**row("a", "yes"), "choices": "yes|no"}], {}, settings=FEW)


def test_the_best_scored_choice_is_written_as_the_label_is():
    extra = {"mc_question": "What? A. Cyst B. Stone", "letter": "B", "plain_answer": "Stone"}
    scores = {"Cyst": -9.0, "Stone": -0.1}
    rows = [row("a", "B", ("Cyst", "Stone"), extra=extra)]
    done = evaluate("deeptumorvqa-v2", rows, {"m": [Prediction("a", "Stone", choice_scores=scores)]}, settings=FEW)
    own = done.answers[0].scored_cases[0].scores
    assert (own["score_v2"], own["accuracy_strict"], own["accuracy_letter_v2"]) == (100, 100, 100)


def test_a_manifest_of_ms_swift_alone_is_scored_by_what_the_assistant_says_last(tmp_path):
    rows = []
    for volume, answer in (("a.1", "Yes"), ("a.1", "No"), ("b", "No")):
        turns = [{"role": "user", "content": "<video>Is it?"}, {"role": "assistant", "content": answer}]
        rows.append({"messages": turns, "videos": [f"/data/{volume}.nii.gz"]})
    rows[2]["videos"] = rows[2]["videos"][0]  # a text, as ms-swift takes one
    put(tmp_path / "own.jsonl", rows)
    put(tmp_path / "p.jsonl", [Prediction(f"own-{n}", "Yes") for n in (1, 2, 3)])
    words = ("vqa", "--data", tmp_path / "own.jsonl", "--predictions", tmp_path / "p.jsonl", "--bootstrap", 5)
    code, text = cli(*words, "--output", tmp_path / "out")
    assert code == 0, text
    lines = lines_of(tmp_path / "out" / "per_question.jsonl")
    assert [(one["id"], one["patient"], one["volume_id"], one["answer"]) for one in lines] == [
        *(("own-1", "a.1", "a.1", "Yes"), ("own-2", "a.1", "a.1", "No"), ("own-3", "b", "b", "No")),
    ]
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())["predictions"][0]["scores"]
    assert {one["value"] for one in scores if one["metric"] == "accuracy_yes_no"} == {33.3333}


@pytest.mark.parametrize("messages", [None, "?", [], ["?"], [{"role": "user"}], [{"role": "user", "content": None}]])
def test_a_row_that_cannot_be_scored_is_named_with_its_line(tmp_path, messages):
    put(tmp_path / "own.jsonl", [{"messages": messages, "videos": ["/data/a.nii.gz"]}])
    code, text = cli("vqa", "--data", tmp_path / "own.jsonl", "--output", tmp_path / "out")
    assert (code, "own-1" in text, "Traceback" in text) == (2, True, False), text


@pytest.mark.parametrize(
    "odd", [{"seconds": 1.5}, {"kept": 390}, {"choice_scores": [-0.1]}, {"visual_tokens": "many"}, {"threshold": True}]
)
def test_a_key_of_ours_with_another_meaning_is_refused_with_its_line(tmp_path, odd):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"id": "a", "response": "Yes", **odd}), encoding="utf-8-sig")
    with pytest.raises(UsageError, match=rf"p\.jsonl:1: expected .*`{next(iter(odd))}`.*leave that key out"):
        read_predictions(path)


def test_predictions_of_other_tools_are_read_without_their_own_keys(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"id": "a", "response": "Yes", "error": None, "model": 7}), encoding="utf-8-sig")
    assert read_predictions(path) == [Prediction("a", "Yes")]
    path.write_text("{}", encoding="utf-16")
    with pytest.raises(UsageError, match=r"p\.jsonl: expected UTF-8, found byte 0xff"):
        read_predictions(path)
