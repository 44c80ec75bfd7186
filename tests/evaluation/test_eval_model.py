"""`photon eval --model`: answers, scores, and what was kept, of a small random model."""

import json

import numpy as np
import pytest
from answers import put, row
from askable import QUESTIONS, TOKENS, blocks, lively_model, store
from typer.testing import CliRunner

from photon_cli.photon import app
from photon_data.readers.nifti import nifti_header, write_nifti
from photon_data.volume import Geometry
from photon_train import rows as rows_of_files
from photon_train.rows import read_predictions, unpack_mask
from photon_train.tiny import tiny

YES_NO = ("Yes", "No")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return lively_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two volumes, three questions on each; the liver is asked about in the first, the lungs in the others."""
    folder = tmp_path_factory.mktemp("data")
    organs = ('["liver"]', '["lungs"]', '["lungs"]')
    rows = []
    for number in range(2):
        place = store(folder, f"v{number}", number)
        for k, question in enumerate(QUESTIONS[:3]):
            more = {
                "question": question,
                "volume_id": f"v{number}",
                "patient": f"p{number}",
                "extra": {"organ_masks": organs[k]},
            }
            rows.append(row(f"{number}-{k}", YES_NO[k % 2], YES_NO, videos=[place], **more))
    put(folder / "rows.jsonl", rows)
    return folder


def cli(*words):
    result = CliRunner().invoke(app, ["eval", "vqa", *map(str, words)])
    return result.exit_code, result.output


def ask(model_dir, data, out, *more):
    usual = ("--bootstrap", 20, "--max-new-tokens", 3, "--device", "cpu", "--overlays", 0)
    return cli("--model", model_dir, "--data", data / "rows.jsonl", "--output", out, *usual, *more)


def read(out, name):
    return {prediction.id: prediction for prediction in read_predictions(out / "predictions" / f"{name}.jsonl")}


def test_running_twice_goes_on_where_the_first_run_was_cut_off(model_dir, data, tmp_path):
    code, text = ask(model_dir, data, tmp_path, "--choices")
    assert code == 0, text
    assert "6 rows, 0 of them answered before" in text
    path, scores = tmp_path / "predictions" / "its.jsonl", (tmp_path / "scores.json").read_text()
    whole = path.read_bytes()
    code, text = ask(model_dir, data, tmp_path, "--choices")
    assert "0 answered, 6 before" in text
    assert (path.read_bytes(), (tmp_path / "scores.json").read_text()) == (whole, scores)
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:4]))
    code, text = ask(model_dir, data, tmp_path, "--choices")
    assert "2 answered, 4 before" in text
    assert len(read(tmp_path, "its")) == 6


def test_a_models_answers_are_read_once_to_be_scored_matched_and_compared(model_dir, data, tmp_path, monkeypatch):
    read, real = [], rows_of_files.read_text
    monkeypatch.setattr(rows_of_files, "read_text", lambda path, kinds: read.append(path.name) or real(path, kinds))
    more = ("--schedulers", "its,random", "--counterfactual", "erase=kept")
    code, text = ask(model_dir, data, tmp_path, *more)
    assert code == 0, text
    assert read.count("its.jsonl") == 2  # the other time, its writer puts the lines into their order


def test_schedulers_share_the_budget_of_its_and_one_table_and_plot(model_dir, data, tmp_path):
    code, text = ask(model_dir, data, tmp_path, "--schedulers", "random,none,its")
    assert code == 0, text
    its, none, random = (read(tmp_path, name) for name in ("its", "none", "random"))
    assert {p.kept_tokens for p in none.values()} == {TOKENS}
    mean = sum(p.kept_tokens for p in its.values()) / len(its)
    assert 0 < mean < TOKENS
    assert all(abs(p.kept_tokens - mean) <= 1 for p in random.values())
    written = json.loads((tmp_path / "scores.json").read_text())
    assert [one["name"] for one in written["predictions"]] == ["its", "random", "none"]
    (trade_off,) = written["trade_offs"]
    assert trade_off["metric"] == "accuracy_robust"
    points = {point["name"]: point for point in trade_off["points"]}
    assert points["its"]["minus_first"] is None
    assert points["its"]["kept_tokens"] == pytest.approx(mean, abs=1e-3)
    assert points["none"]["kept_share"] == 1
    assert points["random"]["minus_first"]["value"] == pytest.approx(
        points["random"]["estimate"]["value"] - points["its"]["estimate"]["value"], abs=1e-3
    )
    assert "against visual tokens kept" in text
    assert "equal shares side by side" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(("keep", "tokens"), [("0.4", 50), ("7", 7)])
def test_a_share_or_a_number_of_ones_own_needs_no_its(model_dir, data, tmp_path, keep, tokens):
    names = ("uniform", "fastv", "divprune")
    code, text = ask(model_dir, data, tmp_path, "--schedulers", ",".join(names), "--keep", keep, "--choices")
    assert code == 0, text
    assert {p.kept_tokens for name in names for p in read(tmp_path, name).values()} == {tokens}
    one, _, last = json.loads((tmp_path / "scores.json").read_text())["predictions"]
    # Before the decoder, the volume runs through the layers once, and short; after layer its, a row for each question.
    assert last["costs"]["shared_tflop"] < one["costs"]["shared_tflop"]


def test_more_tokens_than_a_volume_has_are_refused(model_dir, data, tmp_path):
    code, text = ask(model_dir, data, tmp_path, "--schedulers", "random", "--keep", "126")
    assert (code, "expected at most the 125 tokens of a volume, found 126" in text) == (2, True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--schedulers", "none,random"], "expected 'its' among --schedulers"),
        (["--schedulers", "its,best"], "found 'best'"),
        (["--schedulers", "random", "--keep", "1.5"], "a share above 0, at most 1, or a number of tokens"),
        (
            ["--keep", "0.4"],
            "expected one of random, uniform, foreground, fastv, visionzip, divprune among",
        ),
        (["--predictions", "preds.jsonl"], "--predictions: expected no --model beside it"),
        (["--config", "model"], "--config: expected no --model beside it"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_the_model_answers(model_dir, data, tmp_path, words, said):
    code, text = ask(model_dir, data, tmp_path / "out", *words)
    assert code == 2
    assert said in text
    assert not (tmp_path / "out").exists()


def test_options_of_a_model_need_one(data, tmp_path):
    code, text = cli("--data", data / "rows.jsonl", "--output", tmp_path / "out", "--schedulers", "its,none")
    assert code == 2
    assert "--schedulers: expected --model beside it" in text


def test_a_model_without_threshold_predictor_has_no_its_to_match(data, tmp_path):
    tiny(tmp_path / "s1", stage=1, model_shape_zyx=(70, 140, 140))
    code, text = ask(tmp_path / "s1", data, tmp_path / "out", "--schedulers", "its,random")
    assert code == 2
    assert "threshold predictor" in text


def put_mask(path, geometry):
    """Write a mask that fills its grid."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_nifti(path, nifti_header(geometry, "<u1"), np.ones(geometry.shape_zyx, np.uint8))


def test_masks_and_pictures_come_from_the_kept_tokens_of_every_volume(model_dir, data, tmp_path):
    grid = blocks(0).geometry
    small = Geometry.axis_aligned((4, 4, 4), (2, 2, 2), grid.centre_lps)  # half a millilitre in the middle token
    sheared = Geometry.from_arrays((4, 4, 4), small.origin_lps, [[0, 0.6, 2], [0, 2, 0], [2, 0, 0]])
    for number in range(2):
        put_mask(tmp_path / "masks" / f"v{number}" / "liver.nii.gz", small)
        put_mask(tmp_path / "masks" / f"v{number}" / "lungs.nii.gz", sheared)
    code, text = ask(model_dir, data, tmp_path / "out", "--masks", tmp_path / "masks", "--overlays", "3")
    assert code == 0, text
    assert "masks of 2 of 2 volumes" in text
    (answers,) = json.loads((tmp_path / "out" / "scores.json").read_text())["predictions"]
    organs = {line["name"]: line for line in answers["masks"]["organs"]}
    assert {name: (line["own"]["pairs"], line["other"]["pairs"]) for name, line in organs.items()} == {
        "all, each alike": (6, 6),
        "liver": (2, 4),
        "lungs": (4, 2),
    }
    kept = [
        unpack_mask(p.kept, TOKENS)[TOKENS // 2] for id, p in read(tmp_path / "out", "its").items() if id.endswith("-0")
    ]
    assert organs["liver"]["own"]["recall"]["value"] == pytest.approx(100 * sum(kept) / 2)
    assert (answers["masks"]["by_size"][0]["name"], answers["masks"]["by_size"][0]["pairs"]) == ("below 1 ml", 12)
    assert (tmp_path / "out" / "report.html").read_text().count("data:image/png;base64,") == 3
