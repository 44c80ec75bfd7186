import json

import numpy as np
import pytest

from photon_train.rows import Prediction, pack_mask, read_predictions, unpack_mask


def test_a_prediction_is_read_back_as_it_was_written(tmp_path):
    path = tmp_path / "preds.jsonl"
    rows = [
        Prediction(
            "q1", "ja, Ödem", kept="c1", kept_tokens=3, visual_tokens=8, choice_scores={"yes": -0.5}, threshold=0.25
        ),
        Prediction("q2", error="no such volume"),
    ]
    path.write_text("".join(row.to_json() for row in rows), encoding="utf-8")
    assert read_predictions(path) == rows


def test_another_models_answers_need_an_id_and_a_response_only(tmp_path):
    path = tmp_path / "preds.jsonl"
    path.write_text(json.dumps({"id": "q1", "response": "no", "theirs": 1}) + "\n\n")
    assert read_predictions(path) == [Prediction("q1", "no")]


@pytest.mark.parametrize(
    "line", ['{"id": "q1", "resp', '["q1"]', '{"id": 1, "response": "no"}', '{"id": "q", "response": null}']
)
def test_a_line_that_is_no_prediction_is_named(tmp_path, line):
    path = tmp_path / "preds.jsonl"
    path.write_text('{"id": "q0", "response": "no"}\n' + line)
    with pytest.raises(ValueError, match=r"preds\.jsonl:2"):
        read_predictions(path)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"kept_tokens": "few"}, "expected a whole number as `kept_tokens`, found 'few'"),
        ({"kept_tokens": 2, "visual_tokens": 1}, "expected 0 <= `kept_tokens` <= `visual_tokens`"),
        ({"threshold": float("nan")}, "as `threshold`"),
        ({"seconds": {"read": "1"}}, "as `seconds`"),
        ({"seconds": {"read": 1e308, "answer": 1e308}}, "expected 0 <= `seconds`, `peak_memory_mib` <"),
        ({"peak_memory_mib": float("inf")}, "expected 0 <= `seconds`, `peak_memory_mib` <"),
        ({"kept": ["c1"]}, "expected a text as `kept`"),
    ],
)
def test_a_value_of_another_type_is_refused_with_its_line(tmp_path, more, said):
    path = tmp_path / "preds.jsonl"
    path.write_text('{"id": "q0", "response": "no"}\n' + json.dumps({"id": "q1", "response": "no", **more}))
    with pytest.raises(ValueError, match=r"preds\.jsonl:2") as error:
        read_predictions(path)
    assert said in str(error.value)


def test_a_line_of_a_hundred_thousand_brackets_is_refused(tmp_path):
    path = tmp_path / "preds.jsonl"
    path.write_text('{"id": "q0", "response": ' + "[" * 100_000)
    with pytest.raises(ValueError, match=r"preds\.jsonl:1.*too deep"):
        read_predictions(path)


def test_a_packed_mask_reads_as_hexadecimal_and_comes_back():
    assert pack_mask(np.array([1, 1, 0, 0, 0, 0, 0, 1])) == "c1"
    keep = np.random.default_rng(0).random(1001) < 0.3
    assert (unpack_mask(pack_mask(keep), 1001) == keep).all()
