"""`photon predict` as a person meets it."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
from answers import put
from askable import QUESTIONS, row, store
from PIL import Image
from raw import write_scan
from scans import ct_like
from typer.testing import CliRunner

from photon_cli.photon import app
from photon_cli.terminal import plain
from photon_data.stored_array import StoredArray
from photon_train.answering.manifest import _PredictionFile
from photon_train.rows import read_predictions

FAST = ["--device", "cpu", "--max-new-tokens", "5"]
COARSE = ["--set", "shape_zyx=91,91,91", "--set", "spacing_mm=4,4,4"]  # the model says what grid it reads


def cli(*words):
    result = CliRunner().invoke(app, ["predict", *(str(word) for word in words)])
    return result.exit_code, result.output


@pytest.fixture
def scan(tmp_path):
    return write_scan(tmp_path / "case.nii.gz", array=ct_like((30, 40, 44)), spacing_mm=(9.0, 7.0, 6.5))


@pytest.fixture
def manifest(tmp_path):
    places = [store(tmp_path / "data", name, seed) for seed, name in enumerate(("a", "b"))]
    return put(
        tmp_path / "rows.jsonl",
        [row(f"{Path(p).name[0]}{i}", q, p) for p in places for i, q in enumerate(QUESTIONS[:2])],
    )


def test_questions_about_a_raw_scan_are_answered_with_what_was_kept_and_how_long_it_took(model_dir, scan):
    code, text = cli("--model", model_dir, scan, *QUESTIONS[:2], *FAST, *COARSE)
    assert code == 0, text
    assert text.count("of 125 tokens kept (its)") == 2
    assert all(f"{stage} " in text for stage in ("read", "prepare", "encode", "answer"))
    assert all(question in text for question in QUESTIONS[:2])


def test_json_has_all_that_a_prediction_has_and_streaming_says_the_same(model_dir, scan):
    code, text = cli("--model", model_dir, scan, *QUESTIONS[:2], *FAST, *COARSE, "--json")
    assert code == 0, text
    found = json.loads(text)
    assert [one["question"] for one in found["predictions"]] == list(QUESTIONS[:2])
    assert found["volume_id"] == "case" and set(found["seconds"]) == {"read", "prepare", "encode", "answer"}
    assert all(len(one["kept"]) == 32 and 0 < one["kept_tokens"] < 125 for one in found["predictions"])
    code, streamed = cli("--model", model_dir, scan, *QUESTIONS[:2], *FAST, *COARSE, "--stream")
    assert code == 0, streamed
    for one in found["predictions"]:
        shown = plain(f"{one['question']}\n{one['response']}").split()  # an untrained model answers with anything
        assert streamed[streamed.index(one["question"]) :].split()[: len(shown)] == shown


def test_settings_of_the_model_can_be_overridden(model_dir, scan):
    words = ("--model", model_dir, scan, QUESTIONS[0], *FAST, *COARSE)
    assert "31 of 125 tokens kept (uniform)" in cli(*words, "--scheduler", "uniform", "--keep-ratio", "0.25")[1]
    code, text = cli(*words, "--scheduler", "best")
    assert code == 2 and "one of its, none, random" in text
    code, text = cli(*words, "--dtype", "float8")
    assert code == 2 and "float8" in text


def test_an_overlay_of_a_scan_has_a_picture_files_on_its_grid_and_the_recall_of_masks(model_dir, scan, tmp_path):
    masks = tmp_path / "masks"
    body = ct_like((30, 40, 44)) > -500
    for name, mask in (("body", body), ("everything", np.ones_like(body))):
        write_scan(masks / f"{name}.nii.gz", array=mask.astype(np.uint8), spacing_mm=(9.0, 7.0, 6.5))
    more = ("--overlay", tmp_path / "ov", "--masks", masks, "--window", "lung", "--json")
    code, text = cli("--model", model_dir, scan, *QUESTIONS[:2], *FAST, *COARSE, *more)
    assert code == 0, text
    for one in json.loads(text)["predictions"]:
        folder = tmp_path / "ov" / one["id"]
        assert Image.open(folder / "planes.png").size[0] > 1000
        kept = np.asarray(nibabel.load(folder / "kept.nii.gz").dataobj).transpose(2, 1, 0)
        assert one["recall"] == json.loads((folder / "recall.json").read_text())
        assert one["recall"]["body"]["recall"] == pytest.approx(kept[body].mean())
        assert one["recall"]["everything"]["voxels"] == kept.size
        assert one["recall"]["everything"]["chance"] == pytest.approx(one["kept_tokens"] / 125)


def test_a_refused_scan_or_a_wrong_option_says_so_with_exit_code_2(model_dir, scan, tmp_path):
    cut = tmp_path / "cut.nii.gz"
    cut.write_bytes(scan.read_bytes()[:2000])
    code, text = cli("--model", model_dir, cut, QUESTIONS[0], *FAST)
    assert code == 2 and "cut.nii.gz" in text and "expected" in text
    for words, said in (
        ((), "SCAN"),
        ((scan,), "SCAN"),
        ((scan, "?", "--data", "rows.jsonl", "--output", "p.jsonl"), "SCAN"),
        ((scan, "?", "--choices"), "--choices: expected --data"),
        ((scan, "?", "--stream", "--sample", "--samples", "2"), "--stream: expected no --samples beside it"),
        (("--data", "rows.jsonl"), "--output"),
        (("--manifest", "rows.jsonl", "--output", "p.jsonl"), "--data rows.jsonl"),
        (("--data", "rows.jsonl", "--output", "p.jsonl", "--stream"), "--stream: expected SCAN"),
        (("--data", tmp_path / "no.jsonl", "--output", "p.jsonl"), "no.jsonl"),
        ((scan, "?", *FAST, *COARSE, "--at", "1,2"), "--at: expected 3 numbers"),
        ((scan, " ", *FAST, *COARSE), "expected a question"),
        ((store(tmp_path, "a", 0), "?", *COARSE), "--set: expected a raw scan beside it"),
        ((scan, "?", *COARSE, "--window", "lungs"), "expected a window, full, lung"),
        ((scan, "?", *COARSE, "--window", "5,1"), "low < high"),
        ((scan, "?", *COARSE, "--device", "gpu"), "or cuda:N, found 'gpu'"),
        ((scan, "?", *COARSE, "--device", "cuda:99"), "expected one of this machine"),
        (("--data", "rows.jsonl", "--output", "p.jsonl", "--masks", tmp_path), "expected --overlay beside it"),
    ):
        code, text = cli("--model", model_dir, *words)
        assert code == 2 and said in " ".join(text.split()), text


def test_a_manifest_is_answered_gone_on_with_and_shown(model_dir, manifest, tmp_path):
    words = ("--model", model_dir, "--data", manifest, "--output", tmp_path / "p.jsonl", *FAST)
    code, text = cli(*words, "--overlay", tmp_path / "ov")
    assert code == 0 and "4 answered, 0 before, 0 failed" in text
    found = {p.id: p for p in read_predictions(tmp_path / "p.jsonl")}
    for name, prediction in found.items():
        kept = np.asarray(nibabel.load(tmp_path / "ov" / name / "kept.nii.gz").dataobj)
        assert kept.shape == (28, 28, 14) and 0 < kept.mean() < 1
        assert kept.mean() == pytest.approx(prediction.kept_tokens / 125, abs=0.1)
    code, text = cli(*words)
    assert code == 0 and "4 rows, 4 of them answered before" in text
    code, text = cli(*words, "--scheduler", "random")
    assert code == 2 and "scheduler was 'its' and is 'random'" in text


def test_a_disk_that_fills_up_ends_predict_with_exit_code_3_and_the_same_command_goes_on(
    model_dir, manifest, tmp_path, monkeypatch
):
    words = ["--model", model_dir, "--data", manifest, *FAST, "--questions-per-batch", "1", "--output"]
    append = _PredictionFile.append

    def until_full(file, predictions):
        if not file.done:
            return append(file, predictions)
        file.lines.write('{"id": "ha')  # what was room for
        file.lines.flush()
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(_PredictionFile, "append", until_full)
        code, text = cli(*words, tmp_path / "p.jsonl")
    assert (code, "Stopped: No space left on device. What is done is kept." in text) == (3, True), text
    assert (tmp_path / "p.jsonl").read_text().endswith('{"id": "ha')
    assert [cli(*words, tmp_path / name)[0] for name in ("p.jsonl", "whole.jsonl")] == [0, 0]
    found, whole = ({p.id: p.response for p in read_predictions(tmp_path / f)} for f in ("p.jsonl", "whole.jsonl"))
    assert found == whole and len(found) > 1


def test_for_an_overlay_a_store_is_not_read_whole_again(model_dir, manifest, tmp_path, monkeypatch):
    whole, real = [], StoredArray._whole
    monkeypatch.setattr(StoredArray, "_whole", lambda array: whole.append(array.location.url) or real(array))
    words = ("--model", model_dir, "--data", manifest, "--output", tmp_path / "p.jsonl", *FAST)
    assert cli(*words, "--overlay", tmp_path / "ov")[0] == 0
    assert len(whole) == len(set(whole)) == 2
    assert len(list((tmp_path / "ov").rglob("planes.png"))) == 4


def test_a_volume_that_cannot_be_shown_is_answered_and_listed_with_exit_code_1(model_dir, manifest, tmp_path):
    masks = tmp_path / "masks" / "a"
    masks.mkdir(parents=True)
    (masks / "liver.nii.gz").write_bytes(b"no mask")
    words = ("--model", model_dir, "--data", manifest, "--output", tmp_path / "p.jsonl", *FAST)
    code, text = cli(*words, "--overlay", tmp_path / "ov", "--masks", tmp_path / "masks")
    assert code == 1 and "4 answered" in text and "a.ome.zarr: liver.nii.gz: expected gzip data" in text
    assert not (tmp_path / "ov" / "a0").exists() and (tmp_path / "ov" / "b0" / "kept.nii.gz").exists()


def test_a_picture_can_be_taken_through_a_point(model_dir, scan, tmp_path):
    pictures = []
    for number, at in enumerate(("0,0,100", "40,0,100")):
        more = ("--overlay", tmp_path / str(number), "--window=-1000,1000", f"--at={at}")
        code, text = cli("--model", model_dir, scan, QUESTIONS[0], *FAST, *COARSE, *more)
        assert code == 0, text
        pictures.append((tmp_path / str(number) / "q1" / "planes.png").read_bytes())
    assert pictures[0] != pictures[1]


def test_rows_that_fail_are_listed_with_exit_code_1(model_dir, manifest, tmp_path):
    rows = [json.loads(line) for line in manifest.open()]
    put(tmp_path / "rows.jsonl", [*rows, row("lost", QUESTIONS[0], str(tmp_path / "lost.ome.zarr"))])
    code, text = cli("--model", model_dir, "--data", manifest, "--output", tmp_path / "p.jsonl", *FAST)
    assert code == 1
    assert "4 answered, 0 before, 1 failed" in text and "failed lost: expected a store of photon-data" in text


def test_choices_and_parts_are_options(model_dir, manifest, tmp_path):
    put(tmp_path / "rows.jsonl", [{**json.loads(line), "choices": ["Yes", "No"]} for line in manifest.open()])
    words = ("--model", model_dir, "--data", manifest, "--output", tmp_path / "p.jsonl", "--choices", *FAST)
    assert [cli(*words, "--shard", part)[0] for part in ("1/2", "0/2")] == [0, 0]
    found = read_predictions(tmp_path / "p.jsonl")
    assert len(found) == 4 and all(set(p.choice_scores) == {"Yes", "No"} for p in found)
    assert cli(*words, "--shard", "2/2")[0] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sign", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 130, marks=pytest.mark.long), (signal.SIGKILL, -9)],
)
def test_a_run_that_is_stopped_goes_on_to_the_same_predictions(model_dir, tmp_path, sign, code):
    places = [store(tmp_path / "data", f"v{seed}", seed) for seed in range(3)]
    rows = [row(f"{i}-{k}", f"{QUESTIONS[k % 4]} {k}", place) for i, place in enumerate(places) for k in range(12)]
    words = [
        "--model",
        model_dir,
        "--data",
        put(tmp_path / "rows.jsonl", rows),
        "--questions-per-batch",
        4,
        "--device",
        "cpu",
    ]
    command = [sys.executable, "-c", "from photon_cli.photon import main; main()", "predict", *map(str, words)]
    command += ["--max-new-tokens", "200"]
    path = tmp_path / "p.jsonl"
    process = subprocess.Popen([*command, "--output", str(path)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not (path.exists() and path.read_bytes().count(b"\n") >= 4):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(sign)
    assert process.wait(60) == code
    assert path.read_bytes().count(b"\n") < 36
    subprocess.run([*command, "--output", str(path)], check=True)
    subprocess.run([*command, "--output", str(tmp_path / "whole.jsonl")], check=True)
    found, whole = ({p.id: (p.response, p.kept) for p in read_predictions(f)} for f in (path, tmp_path / "whole.jsonl"))
    assert found == whole and len(found) == 36
    assert path.read_bytes().count(b"\n") == 36


def test_help_answers_without_torch():
    check = "import sys; from photon_cli.photon import app; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)
