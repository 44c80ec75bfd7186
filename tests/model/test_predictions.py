import json

import numpy as np
import pytest

from photon_train.answering.prediction import Prediction, pack_mask, read_predictions, unpack_mask


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


def test_a_packed_mask_reads_as_hexadecimal_and_comes_back():
    assert pack_mask(np.array([1, 1, 0, 0, 0, 0, 0, 1])) == "c1"
    keep = np.random.default_rng(0).random(1001) < 0.3
    assert (unpack_mask(pack_mask(keep), 1001) == keep).all()
