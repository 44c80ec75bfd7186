"""`photon eval` as a person meets it: files, exit codes, tables, the page."""

import errno
import json
import subprocess
import sys

import numpy as np
import pytest
from answers import put, row
from PIL import Image
from typer.testing import CliRunner

from photon_cli.photon import app
from photon_data.files import Location
from photon_data.lock import exclusive
from photon_train.evaluation.evaluate import evaluate
from photon_train.evaluation.report import write_report
from photon_train.evaluation.results import Settings
from photon_train.rows import Prediction, pack_mask

YES_NO = ("Yes", "No")


def cli(*words):
    result = CliRunner().invoke(app, ["eval", *map(str, words)])
    return result.exit_code, result.output


@pytest.fixture
def files(tmp_path):
    rows = [
        row(f"q{i}", YES_NO[i % 2], YES_NO, patient=f"p{i // 2}", kind=f"k{i % 3}", task=f"t{i % 2}") for i in range(12)
    ]
    rows += [row(f"w{i}", "upper lobe <b>", kind="words", task="words") for i in range(3)]
    put(tmp_path / "data.jsonl", rows)
    put(tmp_path / "preds.jsonl", [Prediction(one["id"], "Yes" if one["choices"] else "upper lobe") for one in rows])
    put(tmp_path / "other.jsonl", [Prediction(one["id"], one["answer"]) for one in reversed(rows)])
    return tmp_path


def ask(files, *more, predictions=("preds.jsonl",)):
    named = [word for name in predictions for word in ("--predictions", files / name)]
    return cli("vqa", "--data", files / "data.jsonl", "--output", files / "out", "--bootstrap", 50, *named, *more)


def test_two_runs_write_the_same_bytes_whatever_the_order_of_the_predictions(files):
    def written():
        return [(files / "out" / name).read_bytes() for name in ("scores.json", "report.html")]

    assert ask(files)[0] == 0
    first = written()
    lines = (files / "preds.jsonl").read_text().splitlines(keepends=True)
    (files / "preds.jsonl").write_text("".join(reversed(lines)))
    assert ask(files)[0] == 0
    assert written() == first


def test_scores_are_told_on_the_terminal_and_written(files):
    code, text = ask(files, predictions=("preds.jsonl", "other.jsonl"))
    assert code == 0
    assert "accuracy_robust" in text
    assert "other minus preds" in text
    scores = json.loads((files / "out" / "scores.json").read_text())
    assert [answers["name"] for answers in scores["predictions"]] == ["preds", "other"]
    (score,) = [
        s for s in scores["predictions"][0]["scores"] if (s["metric"], s["task"]) == ("accuracy_robust", "all")
    ][1:]
    assert (score["average"], score["value"], score["questions"], score["patients"]) == ("question_weighted", 50, 12, 6)
    assert scores["differences"][0]["questions"] == 15


def test_predictions_that_do_not_match_are_misuse_or_partial(files):
    put(files / "preds.jsonl", [Prediction("q0", "Yes"), Prediction("q1", error="no memory"), Prediction("zz", "Yes")])
    code, text = ask(files)
    assert code == 2
    assert "13 without a prediction: q10, q11" in text
    assert not (files / "out").exists()
    code, text = ask(files, "--allow-partial")
    assert code == 1
    assert "PARTIAL: 1 of 15 questions are scored; predictions: 13 missing, 1 failed, 1 of unknown ids" in text.replace(
        "\n", " "
    )
    page = (files / "out" / "report.html").read_text()
    assert page.count("PARTIAL: 1 of 15 questions") >= 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["vqa", "--predictions", "no.jsonl"], "no.jsonl"),
        (["mmlu"], "one of 3d-rad"),
        (["vqa", "--labels", "a.csv"], "expected two tables of labels"),
    ],
)
def test_what_cannot_be_followed_is_said_and_nothing_is_written(files, words, said):
    code, text = cli(*words, "--data", files / "data.jsonl", "--output", files / "out")
    assert code == 2
    assert said in text
    assert not (files / "out").exists()


def test_a_second_evaluation_into_a_folder_is_misuse(files):
    with exclusive(Location(str(files / "out"))):
        code, text = ask(files)
    assert (code, "another run" in text) == (2, True)
    assert not (files / "out" / "scores.json").exists()
    assert ask(files)[0] == 0


def test_a_full_disk_ends_an_evaluation_with_exit_code_3_and_what_was_there_stays(files, monkeypatch):
    assert ask(files)[0] == 0
    before = {path: path.read_bytes() for path in (files / "out").glob("[!.]*")}

    def full(path, temporary=None):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as disk:
        disk.setattr("photon_data.files.write_whole", full)
        code, text = ask(files, predictions=("other.jsonl",))
    assert (code, "Stopped: No space left on device. What is done is kept." in text) == (3, True)
    assert {path: path.read_bytes() for path in (files / "out").glob("[!.]*")} == before
    assert ask(files, predictions=("other.jsonl",))[0] == 0


def test_without_predictions_blind_baselines_are_scored(files):
    code, text = ask(files, predictions=())
    assert code == 0
    assert "blind baselines" in text


def test_the_page_is_one_file_with_the_pictures_of_its_cases(files, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "q1.png")
    rows = [json.loads(line) for line in (files / "data.jsonl").read_text().splitlines()]
    said = [Prediction(one["id"], "Yes", visual_tokens=10, kept_tokens=4, seconds={"answer": 0.5}) for one in rows]
    done = evaluate("vqa", rows, {"<m>": said}, settings=Settings(bootstrap=20))
    scores, report = write_report(done, tmp_path / "page", overlays={"<m>": {"q1": tmp_path / "q1.png"}})
    page = report.read_text()
    assert "data:image/png;base64," in page
    assert "&lt;m&gt;" in page
    assert "<m>" not in page
    assert "upper lobe &lt;b&gt;" in page
    assert "http://" not in page
    assert "Worst cases" in page
    assert "Share of visual tokens kept" in page
    assert json.loads(scores.read_text())["predictions"][0]["kept"]["mean_ratio"] == 0.4


def test_with_the_models_config_flops_and_its_own_grid_are_told(files):
    from photon_train import PhotonConfig

    PhotonConfig(stage=2).save_pretrained(files / "model")
    rows = [json.loads(line) for line in (files / "data.jsonl").read_text().splitlines()]
    keep = np.arange(1000) < 300  # the three slabs at the foot
    made = {"visual_tokens": 1000, "kept_tokens": 300, "text_tokens": 60, "kept": pack_mask(keep)}
    put(files / "preds.jsonl", [Prediction(one["id"], "Yes", **made) for one in rows])
    code, text = ask(files, "--config", files / "model")
    assert code == 0
    assert "TFLOP a question" in text
    (answers,) = json.loads((files / "out" / "scores.json").read_text())["predictions"]
    assert answers["kept"]["slabs"] == [1.0] * 3 + [0.0] * 7
    assert 0 < answers["costs"]["prefill_tflop"] < answers["costs"]["prefill_tflop_unpruned"]


def test_without_the_extra_it_is_named(files):
    words = ["eval", "vqa", "--data", str(files / "data.jsonl"), "--output", str(files / "out")]
    code = f"import sys; sys.modules['sacrebleu'] = None; sys.argv = ['photon', *{words}]; "
    code += "import photon_cli.photon as p; p.main()"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("pip install 'photon-ct[eval]'")) == (2, 1)


def test_evaluating_files_does_not_wait_for_torch():
    code = "import sys; import photon_cli.eval; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
