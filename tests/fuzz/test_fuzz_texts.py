"""Damaged tables, predictions, manifests of data sets, settings of runs: values, or a UsageError in a sentence."""

import json
from io import BytesIO

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import budget, damaged_bytes, damaged_json, damaged_text, sentence_or, write
from pyarrow import parquet

from photon_data.datasets.combine import read_dataset
from photon_data.datasets.declare import read_data_manifest
from photon_data.override import rescaling
from photon_data.questions.question import read_questions
from photon_data.readers.find import find_scans
from photon_train.rows import Prediction, read_predictions
from photon_train.training.config import TrainConfig, read_config, with_values

CSV = """id,volume,question,answer,split,patient,choices,note
q1,s0,"Is there ""fluid""?",yes,train,p1,yes|no,1
q2,s1,"Which side, left or right?",left,test,p2,"[""left"", ""right""]",2.5
q3,s2,Größe?,"12,5",train,p3,,x
"""
ROWS = [
    {"id": "q1", "volume": "s0", "question": "Fluid?", "answer": "yes", "split": "train", "choices": ["yes", "no"]},
    {"id": "q2", "volume": "s1", "question": "Größe?", "answer": 12.5, "split": "test", "choices": [], "n": {"a": [1]}},
]
PREDICTIONS = [
    Prediction(
        "q1", "yes", "", "0" * 16, "s0", "its", 10, 4, 30, 0.4, "f00c", {"yes": -0.1, "no": -2.0}, {"read": 0.1}
    ),
    Prediction("q2", "left\nright", visual_tokens=10, kept_tokens=10),
]
MANIFEST = """# data
out: prepared
seed: 3
recipe: {name: chest_ct, spacing_mm: [2, 2, 2]}
datasets:
  own:
    adapter: table
    root: scans
    annotations: table.csv
    splits: {train: train, test: val}
    questions: {prompt: plain, choices: shown}
    mix: {train: {weight: 1, cap: 10}}
    options: {id_prefix: a-, columns: {patient: patient}}
  plain: &other
    adapter: folder
    root: [scans]
    recipe: wide_ct
"""
RUN = """# a run
lr_vision: 2.0e-5
groups_per_step: 4
share_prefix: true
data: [a.jsonl, b.jsonl]
output: run
freeze: ["*.bias"]
photon:
  soft_start: 0.25
  band_low: 0.3
"""


def _check_questions(questions):
    for question in questions or ():
        texts = [question.id, question.volume, question.question, question.answer or "", question.split or ""]
        assert all(isinstance(text, str) and text.encode() is not None for text in texts)
        assert question.id and question.volume.strip() and question.question.strip()
        assert json.dumps(question.extra, allow_nan=False)


@budget(150)
@given(st.data())
def test_a_damaged_csv_gives_whole_questions_or_a_sentence(tmp_path, data):
    damaged = data.draw(st.one_of(damaged_text(CSV), damaged_bytes(CSV.encode())))
    _check_questions(sentence_or(read_questions, write(tmp_path / "a.csv", damaged)))


@budget(150)
@given(st.data())
def test_damaged_json_lines_give_whole_questions_or_a_sentence(tmp_path, data):
    lines = [data.draw(damaged_json(row)) if data.draw(st.booleans()) else json.dumps(row).encode() for row in ROWS]
    _check_questions(sentence_or(read_questions, write(tmp_path / "a.jsonl", b"\n".join(lines))))
    whole = data.draw(damaged_json(ROWS))
    _check_questions(sentence_or(read_questions, write(tmp_path / "a.json", whole)))


@pytest.fixture(scope="module")
def parquet_bytes():
    """A table of texts, numbers, lists and times as parquet."""
    columns = {name: [row.get(name) for row in ROWS] * 8 for name in ("volume", "question", "split", "choices")}
    columns |= {"n": [0.5, None] * 8, "when": pyarrow.array([0, 10**17] * 8, pyarrow.timestamp("us"))}
    parquet.write_table(pyarrow.table(columns), sink := BytesIO())
    return sink.getvalue()


@budget(100)
@given(st.data())
def test_a_damaged_parquet_gives_whole_questions_or_a_sentence(parquet_bytes, tmp_path, data):
    _check_questions(
        sentence_or(read_questions, write(tmp_path / "a.parquet", data.draw(damaged_bytes(parquet_bytes))))
    )


@budget(60)
@given(st.data())
def test_a_damaged_table_of_slopes_gives_numbers_or_a_sentence(tmp_path, data):
    (tmp_path / "scans").mkdir(exist_ok=True)
    for name in ("s0.nii", "s1.nii"):
        (tmp_path / "scans" / name).touch()
    text = "volume,slope,intercept\ns0,1,-1024\ns1,0.5,0\n"
    table = write(tmp_path / "hu.csv", data.draw(damaged_text(text)))
    sources = find_scans(tmp_path / "scans").sources
    if find := sentence_or(rescaling, str(table), sources, {}):
        assert all(len(find(source)) == 3 for source in sources)


@budget(200)
@given(st.data())
def test_damaged_predictions_are_read_as_predictions_or_refused_with_their_line(tmp_path, data):
    lines = [json.loads(prediction.to_json()) for prediction in PREDICTIONS]
    made = [data.draw(damaged_json(row)) if data.draw(st.booleans()) else json.dumps(row).encode() for row in lines]
    for one in sentence_or(read_predictions, write(tmp_path / "p.jsonl", b"\n".join(made))) or ():
        assert one.to_json().encode() and one.kept_tokens <= one.visual_tokens
        assert float(one.kept_tokens) + float(one.text_tokens) + sum(one.seconds.values()) >= 0 or one.seconds


@budget(250)
@given(st.data())
def test_a_damaged_data_manifest_declares_data_sets_or_is_refused_with_its_line(tmp_path, data):
    (tmp_path / "scans").mkdir(exist_ok=True)
    for number in range(3):
        (tmp_path / "scans" / f"s{number}.nii").touch()
    write(tmp_path / "table.csv", CSV)
    damaged = data.draw(st.one_of(damaged_text(MANIFEST), damaged_text(MANIFEST), damaged_bytes(MANIFEST.encode())))
    manifest = sentence_or(read_data_manifest, write(tmp_path / "data_manifest.yaml", damaged))
    for entry in manifest.datasets if manifest else ():
        found = sentence_or(lambda entry=entry: read_dataset(entry, instruction="Describe it.", seed=0))
        for volume in found.volumes if found else ():
            assert not {"/", "\\", "\0"} & set(volume.source.id) and not volume.source.id.startswith(".")


@budget(250)
@given(st.data())
def test_damaged_settings_of_a_run_are_settings_or_are_refused(tmp_path, data):
    damaged = data.draw(st.one_of(damaged_text(RUN), damaged_text(RUN), damaged_bytes(RUN.encode())))
    path = write(tmp_path / "run.yaml", damaged)
    if config := sentence_or(lambda: with_values(TrainConfig(), read_config(path))):
        kinds = {name: type(value) for name, value in vars(TrainConfig()).items()}
        assert all(type(value) is kinds[name] for name, value in vars(config).items())


@budget(100)
@given(st.data())
def test_damaged_json_settings_of_a_run_are_settings_or_are_refused(tmp_path, data):
    value = {**TrainConfig().to_json(), "photon": {"soft_start": 0.5}, "data": ["a.jsonl"]}
    path = write(tmp_path / "run.json", data.draw(damaged_json(value)))
    sentence_or(lambda: with_values(TrainConfig(), read_config(path)))
