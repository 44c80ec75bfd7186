"""Damaged tables of overrides, labels and results, and damaged locks: what they say, or a UsageError in a sentence."""

import json
import math

from hypothesis import given
from hypothesis import strategies as st
from mutations import budget, damaged_bytes, damaged_json, damaged_text, sentence_or, write

from photon_data.dataset_lock import read_lock
from photon_data.override import read_overrides
from photon_data.readers.find import find_scans
from photon_data.readers.mask_pattern import LARGEST_VALUE, read_label_names
from photon_data.recipe import ALGORITHM, chest_ct
from photon_train.evaluation.imported import join_results, read_results
from photon_train.evaluation.paired import read_scored
from photon_train.evaluation.text_metrics import read_labels

OVERRIDES = """volume,affine,spacing_mm,slope,intercept,crop,centre_lps_mm,accept,skip,code,found
s0,,"2.5, -, 0.7",1,-1024,"2:8, :, 1:9","1 2 3",,,uneven,gaps
s1,"-1 0 0 5 0 -1 0 6 0 0 2 7 0 0 0 1",,,,,,non-finite,,,
s2,,,,,,,,the patient moved,,
"""
LABELS = "VolumeName,Effusion,Nodule\ns0.nii.gz,1,0\ns1.nii.gz,0,1.0\n"
NAMES_CSV, NAMES_YAML = "value,name\n1,liver\n2,spleen\n", "labels:\n  background: 0\n  liver: 1\n  spleen: 2\n"
NAMES_JSON = {"name": "x", "labels": {"0": "background", "1": "liver", "2": "left kidney"}}
ROWS = [
    {
        "id": f"q{number}",
        "volume_id": "s0",
        "patient": "p",
        "channel": "vqa",
        "kind": "closed",
        "videos": ["/data/s0.ome.zarr"],
        "messages": [
            {"role": "user", "content": f"<video>{text} A. yes B. no"},
            {"role": "assistant", "content": answer},
        ],
        "answer": answer,
        "task": "t",
        "extra": {"plain_question": text},
        "choices": ["yes", "no"],
    }
    for number, (text, answer) in enumerate([("Any fluid?", "yes"), ("Any nodule?", "no"), ("Any nodule?", "no")])
]
AUTHORS = [
    {"response": "A", "labels": "yes", "messages": ROWS[0]["messages"], "videos": ["/x/s0.nii.gz"], "logprobs": None},
    {"response": "B. no", "labels": None, "query": "<video>Any nodule? A. yes B. no", "images": [{"path": "s0.nii"}]},
    {"response": "", "labels": 3, "messages": [], "videos": "s0.nii.gz", "id": "q2"},
]
RESULTS = "id,volume,question,Pred,label\nq0,s0,Any fluid?,yes,yes\n,s0.nii.gz,Any nodule?,no,\n"
SCORED = [
    {
        "predictions": "its",
        "id": f"q{number}",
        "patient": "p",
        "task": "t",
        "subtask": "",
        "answer": "yes",
        "metric": "accuracy",
        "scores": {"accuracy": 1.0, "f1": None},
    }
    for number in range(3)
]
LOCK = {
    "format": 1,
    "salt": "ab",
    "algorithm": ALGORITHM,
    "recipe": chest_ct().to_json(),
    "grids": "full",
    "versions": {"photon-ct": "0.1.0"},
    "volumes": [{"id": "i", "content": "c", "settings": "s", "arrays": "a"}],
    "questions": {"t": "d"},
}


def _lines(data, rows):
    return b"\n".join(
        data.draw(damaged_json(row)) if data.draw(st.booleans()) else json.dumps(row).encode() for row in rows
    )


@budget(200)
@given(st.data())
def test_a_damaged_table_of_overrides_changes_scans_soundly_or_is_refused(tmp_path, data):
    (tmp_path / "scans").mkdir(exist_ok=True)
    for number in range(3):
        (tmp_path / "scans" / f"s{number}.nii").touch()
    sources = find_scans(tmp_path / "scans").sources
    table = write(tmp_path / "o.csv", data.draw(st.one_of(damaged_text(OVERRIDES), damaged_bytes(OVERRIDES.encode()))))
    made = sentence_or(read_overrides, table, sources) or {}
    assert made.keys() <= {source.id for source in sources}
    for override in made.values():
        numbers = [*(override.rescale or ()), *(override.centre_lps or ())]
        numbers += [value for row in override.affine or () for value in row]
        assert all(math.isfinite(value) for value in numbers)
        assert all(mm is None or 0.001 <= mm <= 100 for mm in override.spacing_mm or ())


@budget(150)
@given(st.data())
def test_a_damaged_table_of_label_names_names_each_value_once_or_is_refused(tmp_path, data):
    name, text = data.draw(st.sampled_from([("l.csv", NAMES_CSV), ("l.yaml", NAMES_YAML), ("l.json", None)]))
    damaged = data.draw(damaged_json(NAMES_JSON) if text is None else damaged_text(text))
    names = sentence_or(read_label_names, write(tmp_path / name, damaged)) or {}
    assert all(0 < value <= LARGEST_VALUE and text.strip() for value, text in names.items())
    assert len(set(names.values())) == len(names)


@budget(150)
@given(st.data())
def test_a_damaged_table_of_findings_holds_zeros_and_ones_or_is_refused(tmp_path, data):
    damaged = data.draw(st.one_of(damaged_text(LABELS), damaged_bytes(LABELS.encode())))
    if table := sentence_or(read_labels, write(tmp_path / "l.csv", damaged)):
        assert all(len(row) == len(table.names) and set(row) <= {0, 1} for row in table.rows.values())


@budget(250)
@given(st.data())
def test_damaged_results_of_other_tools_answer_existing_questions_with_their_own_texts_or_are_refused(tmp_path, data):
    form = data.draw(st.sampled_from(["photon", "ms-swift", "table"]))
    name, columns = ("r.csv", {"response": "Pred"}) if form == "table" else ("r.jsonl", {})
    damaged = data.draw(damaged_text(RESULTS)) if form == "table" else _lines(data, AUTHORS)
    results = sentence_or(read_results, write(tmp_path / name, damaged), form, columns) or []
    imported = sentence_or(join_results, results, ROWS)
    responses = {result.response for result in results}
    assert all(one.response in responses and one.id in {row["id"] for row in ROWS} for one in imported.predictions)
    assert all(one.to_json().encode() for one in imported.predictions)
    used = len(imported.predictions) + len(imported.left_out)
    assert used <= len(results) or not results


@budget(150)
@given(st.data())
def test_damaged_scores_of_questions_are_read_whole_or_refused_with_their_line(tmp_path, data):
    path = write(tmp_path / "per_question.jsonl", _lines(data, SCORED))
    for questions in (sentence_or(read_scored, path) or {}).values():
        assert len({one.id for one in questions}) == len(questions)
        for one in questions:
            assert all(isinstance(text, str) for text in (one.id, one.patient, one.task, one.metric))
            assert all(score is None or isinstance(score, int | float) for score in one.scores.values())


@budget(150)
@given(st.data())
def test_a_damaged_dataset_lock_is_a_lock_or_refused(tmp_path, data):
    lock = sentence_or(read_lock, write(tmp_path / "dataset.lock", data.draw(damaged_json(LOCK))))
    if lock:
        assert all(isinstance(volume["content"], str) for volume in lock["volumes"])


def test_what_the_damage_starts_from_is_read(tmp_path):
    """Without this, a test above would pass where everything is refused."""
    (tmp_path / "scans").mkdir()
    for number in range(3):
        (tmp_path / "scans" / f"s{number}.nii").touch()
    sources = find_scans(tmp_path / "scans").sources
    assert read_overrides(write(tmp_path / "o.csv", OVERRIDES), sources)["s2"].skip == "the patient moved"
    assert read_label_names(write(tmp_path / "l.json", json.dumps(NAMES_JSON))) == {1: "liver", 2: "left kidney"}
    assert read_labels(write(tmp_path / "f.csv", LABELS)).rows == {"s0": (1, 0), "s1": (0, 1)}
    authors = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, AUTHORS)))
    assert [one.id for one in join_results(read_results(authors, "photon", {}), ROWS).predictions] == ["q0"]
    table = read_results(write(tmp_path / "r.csv", RESULTS), "table", {"response": "Pred"})
    assert [one.response for one in table] == ["yes", "no"]
    assert len(read_scored(write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, SCORED))))["its"]) == 3
    assert read_lock(write(tmp_path / "dataset.lock", json.dumps(LOCK)))["salt"] == "ab"
