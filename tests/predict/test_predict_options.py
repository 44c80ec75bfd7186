"""photon predict and eval: series, earlier scans, adapters, manifests of others, several processes, folders that are no
model.
"""

import json
import os
import shutil
import subprocess
import sys

import nibabel
import numpy as np
import pytest
from answers import put
from askable import QUESTIONS, predictor, row, store
from dicom_files import write_series
from pydicom.uid import generate_uid
from raw import ct_like, write_scan
from typer.testing import CliRunner

from photon_cli.photon import app
from photon_train.answering.generation import AnswerSettings
from photon_train.answering.loading import load_predictor
from photon_train.answering.manifest import predict_rows
from photon_train.rows import read_predictions

FAST = ["--device", "cpu", "--max-new-tokens", "5"]
COARSE = ["--set", "shape_zyx=91,91,91", "--set", "spacing_mm=4,4,4"]


def cli(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.output


def as_json(text):
    return json.loads(text[text.index("{") : text.rindex("}") + 1])


def test_a_series_is_taken_by_its_number_and_by_its_uid(model_dir, tmp_path):
    uids = sorted(generate_uid() for _ in range(2))
    for number, uid in enumerate(uids):
        stored = np.full((12, 24, 24), 24, np.int16)  # air
        stored[:, 6:18, 6:18] = 1030 + 40 * number
        write_series(tmp_path / "scans", stored, uid=uid, names=[f"{number}-{z}.dcm" for z in range(12)])
    words = ("predict", "--model", model_dir, tmp_path / "scans", QUESTIONS[0], *FAST, *COARSE, "--json")
    code, said = cli(*words)
    assert code == 2 and "--series NAME" in said
    by_number = {n: as_json(cli(*words, "--series", n)[1])["volume_id"] for n in (1, 2)}
    by_uid = [as_json(cli(*words, "--series", uid)[1])["volume_id"] for uid in uids]
    assert len(set(by_uid)) == 2 and sorted(by_number.values()) == sorted(by_uid)
    assert cli(*words, "--series", 3)[0] == 2


def test_earlier_scans_stand_before_the_scan_as_the_videos_of_a_row(model_dir, tmp_path):
    places = [store(tmp_path, name, seed) for seed, name in enumerate(("last", "first", "second"))]
    last, first, second = places
    words = ("predict", "--model", model_dir, last, "Has it grown?", *FAST, "--json")
    code, said = cli(*words, "--prior", first, "--prior", second, "--overlay", tmp_path / "shown")
    assert code == 0, said
    found = as_json(said)
    rows = [row("r", "Has it grown?", first, second, last)]
    model = predictor(model_dir)
    model.settings = model.settings.__class__(max_new_tokens=5)
    predict_rows(model, rows, tmp_path / "p.jsonl")
    (expected,) = read_predictions(tmp_path / "p.jsonl")
    assert found["volume_id"] == "last"
    assert (found["predictions"][0]["response"], found["predictions"][0]["kept"]) == (expected.response, expected.kept)
    assert len(list((tmp_path / "shown").rglob("planes.png"))) == 3
    code, said = cli(*words, "--prior", last)
    assert code == 2 and "last twice" in said


def test_an_overlay_that_fails_costs_no_answer(model_dir, tmp_path):
    place = store(tmp_path, "v", 0)
    (tmp_path / "file").write_text("")
    code, said = cli("predict", "--model", model_dir, place, QUESTIONS[0], *FAST, "--overlay", tmp_path / "file" / "o")
    assert code == 1
    assert "of 125 tokens kept" in said and "no overlay: " in said


def test_the_recall_of_an_empty_mask_is_null(model_dir, tmp_path):
    place = store(tmp_path, "v", 0)
    (tmp_path / "masks").mkdir()
    empty = nibabel.Nifti1Image(np.zeros((8, 8, 8), np.uint8), np.diag([40.0, 40, 40, 1]))
    nibabel.save(empty, tmp_path / "masks" / "empty.nii.gz")
    words = ("predict", "--model", model_dir, place, QUESTIONS[0], *FAST, "--masks", tmp_path / "masks")
    code, said = cli(*words, "--overlay", tmp_path / "o")
    assert code == 0 and "empty: an empty mask" in said
    (written,) = (tmp_path / "o").rglob("recall.json")
    assert json.loads(written.read_text(), parse_constant=pytest.fail)["empty"]["recall"] is None


def test_a_manifest_of_ms_swift_alone_is_answered_and_a_bad_row_costs_itself(model_dir, tmp_path):
    place = store(tmp_path, "v", 0)
    parts = [{"type": "video", "video": place}, {"type": "text", "text": QUESTIONS[0]}]
    rows = [
        {"messages": [{"role": "user", "content": f"<video>{QUESTIONS[0]}"}], "videos": [place]},
        {"messages": [{"role": "user", "content": parts}], "videos": []},
        {"messages": [{"role": "user", "content": "<video>Is it?<tool_call>"}], "videos": [place], "choices": "yes|no"},
        {"messages": "?", "videos": [place]},
    ]
    output = tmp_path / "p.jsonl"
    words = ("predict", "--model", model_dir, "--data", put(tmp_path / "own.jsonl", rows), "--output", output, *FAST)
    code, said = cli(*words, "--sample", "--samples", 2)
    assert code == 1 and "2 answered, 0 before, 2 failed" in said, said
    found = {p.id: p for p in read_predictions(output)}
    assert found.keys() == {f"own-{n}" for n in range(1, 5)}
    assert all(len(found[id].samples) == 2 for id in ("own-1", "own-2"))
    assert "choices" in found["own-3"].error and found["own-4"].error
    assert cli(*words, "--samples", 2)[0] == 2  # without --sample all are the same
    assert cli(*words, "--batch", "many")[0] == 2


@pytest.mark.slow
def test_parts_of_an_evaluation_are_answered_by_two_processes_and_scored_by_the_first(model_dir, tmp_path):
    places = [store(tmp_path / "data", f"v{i}", i) for i in range(4)]
    rows = [
        {**row(f"r{i}", "Is there a nodule?", place, answer="yes", choices=["yes", "no"]), "answer": "yes"}
        | {"patient": f"p{i}", "task": "", "kind": "", "organ": "", "channel": "d", "split": "test"}
        for i, place in enumerate(places)
    ]
    words = ["eval", "vqa", "--model", model_dir, "--data", put(tmp_path / "rows.jsonl", rows), *FAST, "--bootstrap", 5]
    words += ["--schedulers", "its,random", "--overlays", 0, "--output", tmp_path / "scores"]
    command = [sys.executable, "-c", "from photon_cli.photon import main; main()", *map(str, words)]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(
            command,
            env=alone | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert (tmp_path / "scores" / "scores.json").is_file()
    for name in ("its", "random"):
        found = read_predictions(tmp_path / "scores" / "predictions" / f"{name}.jsonl")
        assert [p.id for p in found] == ["r0", "r1", "r2", "r3"] and not any(p.error for p in found)
    parts = sorted(path.name for path in (tmp_path / "scores" / "predictions").glob("its.rank*.jsonl"))
    assert parts == ["its.rank0of2.jsonl", "its.rank1of2.jsonl"]


def broken(model_dir, tmp_path, change):
    place = tmp_path / "broken"
    shutil.copytree(model_dir, place)
    (place / "digests.json").unlink()  # of a model that somebody else made
    config = json.loads((place / "config.json").read_text())
    change(place, config)
    return place


def write(place, config, **changed):
    (place / "config.json").write_text(json.dumps({**config, **changed}))


BROKEN = {
    "no config": (lambda place, config: (place / "config.json").unlink(), "expected config.json, found none"),
    "config cut off": (lambda place, config: (place / "config.json").write_text('{"hidden'), "expected a JSON object"),
    "an empty config": (lambda place, config: (place / "config.json").write_text("{}"), "hidden_size"),
    "a ratio that is a text": (lambda p, c: write(p, c, keep_ratio="0.5"), "expected a number as keep_ratio"),
    "a size that is a text": (lambda p, c: write(p, c, hidden_size="64"), "hidden_size, found '64'"),
    "a size that is none": (lambda p, c: write(p, c, num_hidden_layers=True), "num_hidden_layers"),
    "a layer that is not there": (lambda p, c: write(p, c, its_layer=99), "its_layer: expected a layer from 0 to"),
    "an unknown scheduler": (lambda p, c: write(p, c, scheduler="best"), "scheduler: expected one of"),
    "no tokenizer": (lambda p, c: [f.unlink() for f in p.glob("tokenizer*")], "tokenizer.json or vocab.json"),
    "a run": (
        lambda p, c: (shutil.copytree(p, p / "checkpoint-3"), (p / "model.safetensors").unlink()),
        "checkpoint-3",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_folder_that_is_no_whole_model_is_named_in_a_sentence(model_dir, tmp_path, kind):
    change, said = BROKEN[kind]
    place = broken(model_dir, tmp_path, change)
    code, text = cli("predict", "--model", place, store(tmp_path, "v", 0), QUESTIONS[0], *FAST)
    assert code == 2 and said in text.replace("\n", " ").replace("  ", " "), text
    assert "Traceback" not in text


@pytest.mark.parametrize("name", ["nowhere/checkpoint-9", "./nowhere", "runs/a/checkpoint-9"])
def test_a_path_that_is_mistyped_is_not_taken_for_a_name_on_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    place = store(tmp_path, "v", 0)
    code, text = cli("predict", "--model", tmp_path / name, place, QUESTIONS[0])
    assert code == 2 and "expected a model directory or a hub id" in text
    if name.count("/") != 1 or name.startswith("."):
        code, text = cli("predict", "--model", name, place, QUESTIONS[0])
        assert code == 2 and "Repo id" not in text and "expected a model directory or a hub id" in text


def test_a_generation_config_that_turns_the_cache_off_is_not_obeyed(model_dir, tmp_path):
    place = broken(model_dir, tmp_path, lambda p, c: write(p, c, use_cache=False))
    (place / "generation_config.json").write_text(json.dumps({"use_cache": False, "eos_token_id": 3}))
    code, text = cli("predict", "--model", place, store(tmp_path, "v", 0), QUESTIONS[0], *FAST)
    assert code == 0, text
    scan = write_scan(tmp_path / "case.nii.gz", array=ct_like((30, 40, 44)), spacing_mm=(9.0, 7.0, 6.5))
    assert cli("predict", "--model", place, scan, QUESTIONS[0], *FAST, *COARSE)[0] == 0


@pytest.mark.parametrize(
    "own", [{"stop_strings": ["a"]}, {"cache_implementation": "static"}, {"num_beams": 10**6, "max_new_tokens": 10**12}]
)
def test_of_a_generation_config_only_the_ends_of_answers_are_taken(model_dir, tmp_path, own):
    place = broken(model_dir, tmp_path, lambda place, config: None)
    settings = json.loads((place / "generation_config.json").read_text())
    (place / "generation_config.json").write_text(json.dumps(settings | own))
    loaded = load_predictor(str(place), AnswerSettings(max_new_tokens=2), device="cpu").model.generation_config
    assert [getattr(loaded, name) for name in own] == [None] * len(own)
    code, text = cli("predict", "--model", place, store(tmp_path, "v", 0), QUESTIONS[0], *FAST)
    assert code == 0, text
    (place / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": "the end"}))
    code, text = cli("predict", "--model", place, store(tmp_path, "v", 0), QUESTIONS[0], *FAST)
    assert (code, "token ids as eos_token_id, found 'the end'" in text) == (2, True), text
