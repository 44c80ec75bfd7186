"""Answers that are scored while a run trains, the best checkpoint, early ends; and a run that is made longer."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from answers import put
from askable import row
from test_runs import COMPUTED, FSDP, TORCHRUN, with_threads
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from photon_cli.photon import app
from photon_data.errors import UsageError
from photon_train.checkpoint import checkpoints
from photon_train.configuration_photon import Phase
from photon_train.training.batches import MicroBatches
from photon_train.training.config import TrainConfig
from photon_train.training.evaluation import answering_of
from photon_train.training.interruption import TrainingInterrupted
from photon_train.training.log import read_log
from photon_train.training.loop import run_steps
from photon_train.training.plan import plan_epoch
from photon_train.training.resume import Best
from photon_train.training.setup import start as start_run
from photon_train.training.speed import rates, training_flops

SCORE = "eval/accuracy_robust"


@pytest.fixture(scope="module")
def asked(stores, tmp_path_factory):
    """12 rows as photon-data prepare writes them: on each of six volumes one to be answered yes, one no."""
    columns = {"patient": "", "channel": "x/y", "task": "t", "kind": "k", "extra": {}, "choices": ["yes", "no"]}
    rows = [
        row(f"{name}-{answer}", f"Is there {thing}?", store, answer=answer) | columns | {"answer": answer}
        for name, store in stores.items()
        for answer, thing in (("yes", "a liver"), ("no", "a third lung"))
    ]
    rows = [{**each, "patient": each["volume_id"]} for each in rows]
    return put(tmp_path_factory.mktemp("asked") / "val.jsonl", rows)


@pytest.fixture
def config(models, asked, tmp_path):
    rates = dict.fromkeys(("lr_vision", "lr_merger", "lr_language_model"), 3e-3) | {"lr_threshold": 1e-3}
    evaluation = {"eval_every": 1, "eval_benchmark": "vqa", "eval_questions": 8, "eval_max_new_tokens": 3}
    return TrainConfig(
        stage="s2",
        model=str(models / "s2"),
        data=(str(asked),),
        eval=(str(asked),),
        output=str(tmp_path / "run"),
        groups_per_step=6,
        questions_per_volume=2,
        epochs=5,
        precision="fp32",
        workers=0,
        save_every=0,
        keep_checkpoints=1,
        best_metric="eval_loss",
        best_mode="min",
        track=(),
        photon={"soft_start": 0, "hard_start": 1, "flip_start": 0.8},
        **rates,
        **evaluation,
    )


def start(config, **options):
    return start_run(config, answering=answering_of(config), **options)


def trained(config, resume=False):
    run = start(config, resume=resume)
    run_steps(run)
    return computed(config)


def stop(config, step):
    """Begin the run, and end it with a Ctrl-C after a step."""

    def stop_here(row):
        if row["step"] == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_steps(start(config, resume=False, callback=stop_here))


def rows_in(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def computed(config):
    rows = read_log(Path(config.output))
    return [{k: v for k, v in one.items() if k in COMPUTED or k.startswith("eval")} for one in rows]


@pytest.mark.slow
def test_the_scores_are_those_that_photon_eval_gives_the_checkpoint(config, tmp_path):
    slow = dict.fromkeys(("lr_vision", "lr_merger", "lr_language_model"), 1e-4)  # else it learns to say nothing
    config = replace(config, max_steps=2, save_every=1, keep_checkpoints=9, **slow)
    rows = trained(config)
    run = Path(config.output)
    answers = run / "answers" / "step-1.jsonl"
    said = {one["id"]: one["response"] for one in rows_in(answers)}
    assert len(said) == 8
    assert len({*said.values()}) > 1
    asked = put(tmp_path / "asked.jsonl", [one for one in rows_in(config.eval[0]) if one["id"] in said])
    words = ["eval", "vqa", "--data", asked, "--output", tmp_path / "scores", "--bootstrap", 5, "--max-new-tokens", 3]
    result = CliRunner().invoke(app, [str(word) for word in (*words, "--model", run / "checkpoint-1", "--overlays", 0)])
    assert result.exit_code == 0, result.output
    assert {one["id"]: one["response"] for one in rows_in(tmp_path / "scores/predictions/its.jsonl")} == said
    (found,) = json.loads((tmp_path / "scores/scores.json").read_text())["predictions"]
    expected = {f"eval/{s['metric']}": s["value"] for s in found["scores"] if s["average"] == "question_weighted"}
    assert expected == {name: value for name, value in rows[0].items() if name.startswith("eval/")}
    assert SCORE in expected


@pytest.mark.slow
def test_evaluation_leaves_the_training_as_it_is_and_goes_on_after_a_stop_as_without(config, tmp_path):
    whole = trained(replace(config, output=str(tmp_path / "whole")))
    summary = json.loads((tmp_path / "whole/summary.json").read_text())
    losses = [one["eval_loss"] for one in whole]
    assert summary["best"] == {
        "metric": "eval_loss",
        "step": 1 + losses.index(min(losses)),
        "value": min(losses),
        "waited": len(losses) - 1 - losses.index(min(losses)),
    }
    stopping = replace(config, save_every=2)
    stop(stopping, 3)
    assert trained(stopping, resume=True) == whole
    without = replace(config, eval=(), eval_benchmark="", best_metric="", output=str(tmp_path / "without"))
    assert [one["loss"] for one in trained(without)] == [one["loss"] for one in whole]


def test_an_evaluation_that_a_signal_put_off_is_made_when_the_run_goes_on(config, tmp_path, monkeypatch):
    whole = trained(replace(config, output=str(tmp_path / "whole")))
    run = start(config, resume=False)
    monkeypatch.setattr("photon_train.training.interruption.Interruption.__enter__", asked_at_once)
    with pytest.raises(TrainingInterrupted):
        run_steps(run)
    monkeypatch.undo()
    assert "eval_loss" not in computed(config)[-1]
    assert trained(config, resume=True) == whole


def asked_at_once(interruption):
    interruption.asked = True
    return interruption


def scripted(monkeypatch, values):
    """Let evaluations find these losses, one after the other."""
    left = iter(values)
    monkeypatch.setattr("photon_train.training.loop.validate", lambda run: {"eval_loss": next(left), "eval_x": 0})


def test_the_best_checkpoint_stays_beside_the_last_and_a_run_without_a_better_one_ends(config, monkeypatch, tmp_path):
    config = replace(config, eval_benchmark="", save_every=1, patience=3)
    scripted(monkeypatch, [5.0, 3.0, 4.0, 3.0, float("nan"), 1.0])
    run = start(replace(config, epochs=9), resume=False)
    summary = run_steps(run)
    assert (summary["steps"], summary["stopped_early"], summary["best"]["step"]) == (5, True, 2)
    assert [path.name for path in checkpoints(Path(config.output))] == ["checkpoint-2", "checkpoint-5"]
    scripted(monkeypatch, [2.0, 2.5, 2.5, 2.5])
    assert run_steps(start(replace(config, epochs=9), resume=True))["steps"] == 5  # it has ended
    longer = run_steps(start(replace(config, epochs=9, patience=4), resume=True))
    assert (longer["steps"], longer["best"]["step"]) == (9, 6)
    assert [path.name for path in checkpoints(Path(config.output))] == ["checkpoint-6", "checkpoint-9"]


def test_the_best_is_the_highest_or_the_lowest_and_never_what_is_not_known():
    best = Best()
    for step, value in enumerate([None, 1.0, 2.0, 2.0, float("nan"), 1.5], start=1):
        best = best.after(step, value, "max")
    assert best == Best(step=3, value=2.0, waited=3)
    assert Best(3, 2.0, 3).after(7, 1.5, "min") == Best(7, 1.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"best_metric": "eval/bleu"},
            r"best_metric: expected one of eval_loss, eval_forced_exact, eval/accuracy_robust",
        ),
        ({"eval_benchmark": "vqq"}, "expected one of 3d-rad"),
        ({"best_mode": "max"}, "best_mode: expected min"),
        ({"eval": ()}, "none without eval"),
        ({"best_metric": "", "patience": 2}, "patience: expected 0 without best_metric"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_anything_is_trained(config, change, message):
    with pytest.raises(UsageError, match=message):
        start(replace(config, **change), resume=False)


def test_rows_whose_ids_are_numbers_are_answered_too(config, asked, tmp_path):
    numbered = put(tmp_path / "numbered.jsonl", [one | {"id": i} for i, one in enumerate(rows_in(asked))])
    trained(replace(config, eval=(str(numbered),), max_steps=2, eval_every=0, eval_questions=0))
    assert [one["id"] for one in rows_in(tmp_path / "run/answers/step-2.jsonl")] == sorted(map(str, range(12)))


def test_other_rows_of_eval_are_refused_where_the_best_was_chosen_on_them(config, tmp_path):
    trained(replace(config, max_steps=2, eval_benchmark=""))
    lines = Path(config.eval[0]).read_text().splitlines(keepends=True)
    (tmp_path / "fewer.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(UsageError, match="expected the rows of eval that"):
        start(replace(config, max_steps=2, eval=(str(tmp_path / "fewer.jsonl"),), eval_benchmark=""), resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [pytest.param(False, marks=pytest.mark.long), True], ids=["DDP", "FSDP2"])
def test_two_processes_answer_and_choose_as_one_does(config, tmp_path, shared):
    one = trained(replace(config, output=str(tmp_path / "one")))
    (tmp_path / "run.json").write_text(json.dumps(config.to_json()))
    launcher = [sys.executable, "-m", *TORCHRUN[:-1]]
    script = [str(Path(__file__).with_name("as_gpus.py")), str(tmp_path / "run.json")]
    words = ["-m", "photon_cli", "train", "s2", "--config", str(tmp_path / "run.json")]
    env = with_threads(1) | (FSDP if shared else {})
    done = subprocess.run([*launcher, *(script if shared else words)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for mine, theirs in zip(computed(config), one, strict=True):
        scores = [name for name in theirs if name.startswith("eval")]
        assert SCORE in scores
        assert {n: mine[n] for n in scores} == pytest.approx({n: theirs[n] for n in scores}, abs=1e-4, nan_ok=True)


# A run that is made longer


@pytest.mark.slow
def test_a_run_that_ended_goes_on_to_more_steps_and_phases_that_began_stay_where_they_began(config, tmp_path):
    shares = {"soft_start": 0.2, "hard_start": 0.4, "flip_start": 0.9}
    short = replace(config, eval=(), eval_benchmark="", best_metric="", photon=shares, schedule="constant", warmup=0.0)
    rows = trained(replace(short, max_steps=5))
    assert [one["phase"] for one in rows] == ["dense", "soft", "hard", "hard", "hard"]
    run = start(replace(short, epochs=10), resume=True)
    assert run.curriculum == "curriculum: soft from step 1, hard from 2, flip from 9, of 10"
    run_steps(run)
    longer = computed(short)
    assert longer[:5] == rows
    assert [one["phase"] for one in longer[5:]] == ["hard"] * 4 + ["flip"]
    # Its optimizer state went on with it: with the same phases, the steps are those of a run planned so long.
    planned = {**shares, "soft_start": 1, "hard_start": 2}
    whole = trained(replace(short, epochs=10, photon=planned, output=str(tmp_path / "whole")))
    assert longer == whole
    with pytest.raises(UsageError, match=r"expected at least the 10 steps that .* has made, found 4"):
        start(replace(short, max_steps=4), resume=True)


def test_a_run_goes_on_where_its_folder_its_rows_and_its_stores_were_moved(config, asked, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    rows = rows_in(asked)
    for store in {one["videos"][0] for one in rows}:
        shutil.copytree(store, old / "volumes" / Path(store).name)
    shutil.copytree(config.model, old / "model")
    (old / "manifests").mkdir()
    put(old / "manifests/t.jsonl", [one | {"videos": [f"volumes/{Path(one['videos'][0]).name}"]} for one in rows])

    def placed(home):
        files = (str(home / "manifests/t.jsonl"),)
        return replace(
            config, model=str(home / "model"), data=files, eval=files, output=str(home / "run"), save_every=2
        )

    whole = trained(replace(placed(old), output=str(tmp_path / "whole")))
    stop(placed(old), 3)
    old.rename(new)
    assert trained(placed(new), resume=True) == whole
    changed = [{**one, "volume_id": "other"} for one in rows_in(new / "manifests/t.jsonl")]
    put(new / "manifests/t.jsonl", changed[:1])
    with pytest.raises(UsageError):
        start(placed(new), resume=True)


# What is said of a run


def test_a_run_says_its_settings_versions_and_speed(config, tmp_path):
    config = replace(config, max_steps=2, track=("tensorboard",), eval_benchmark="", best_metric="")
    trained(config)
    run = Path(config.output)
    saved = json.loads((run / "config.json").read_text())
    assert saved["made_with"]["torch"] == torch.__version__
    assert len(saved["made_with"]["photon-commit"].removesuffix("-dirty")) == 40
    again = CliRunner().invoke(app, ["train", "s2", "--config", str(run / "config.json"), "--resume"])
    assert again.exit_code == 0, again.output
    hparams = "".join(path.read_text() for path in run.rglob("hparams.yml"))
    assert "photon.hard_start: 1" in hparams
    assert f"torch: {torch.__version__}" in hparams
    row = read_log(run)[-1]
    assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
    assert row["tflops_per_second"] > 0
    assert "mfu" not in row  # of a CPU no peak is known


@pytest.mark.parametrize(
    ("frozen", "photon", "shared"),
    [
        ((), {}, False),
        (("lr_vision", "lr_merger"), {}, False),
        ((), {"scheduler": "divprune", "keep_ratio": 0.25}, False),  # dropped before the decoder
        ((), {"scheduler": "divprune", "keep_ratio": 0.25}, True),
    ],
)
def test_the_flops_of_a_step_are_those_that_torch_counts(config, frozen, photon, shared):
    """To 3 %: the scores of the scheduler are not counted."""
    settings = {"attention": "eager", "gradient_checkpointing": False, "vision_gradient_checkpointing": False}
    settings |= {"photon": {**config.photon, **photon}, **dict.fromkeys(frozen, 0.0)}
    run = start(replace(config, questions_per_volume=1, **settings), resume=False)
    (step, *_) = plan_epoch(run.rows, run.config, 0)
    items = MicroBatches(run.rows, run.processor, run.config, training=False, same_calls=shared)
    batch = items[step[0]].to("cpu", run.processor)
    assert ("prefix" in batch.inputs) == shared
    with FlopCounterMode(display=False) as counter:
        output = run.model(**batch.inputs)
        output.loss.backward()
    needed = training_flops(run.processor.config, run.config, batch, output, Phase.HARD)
    assert float(needed) == pytest.approx(counter.get_total_flops(), rel=0.03)


@pytest.mark.parametrize(("precision", "is_known"), [("bf16", True), ("autocast", True), ("fp32", False)])
def test_the_utilisation_of_a_known_gpu_is_logged_of_every_precision_that_multiplies_in_bfloat16(
    monkeypatch, precision, is_known
):
    """989 TFLOP/s are the peak of an H100."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr("photon_train.training.speed.peak_memory_mib", lambda device: 0.0)
    devices = SimpleNamespace(device=torch.device("cuda"), num_processes=2)
    row = {"questions": 1.0, "volumes": 1.0, "tokens": 1.0, "flops": 989e12}
    found = rates(row, 1.0, 0.0, devices, precision)
    assert found.get("mfu") == (pytest.approx(0.5) if is_known else None)


def test_a_profile_has_the_operators_of_a_few_steps(config):
    run_steps(start(replace(config, eval=(), eval_benchmark="", best_metric=""), resume=False), profile=True)
    trace = json.loads(gzip.decompress((Path(config.output) / "profile/trace.json.gz").read_bytes()))
    assert any(event.get("name") == "aten::mm" for event in trace["traceEvents"])


@pytest.mark.slow
def test_too_few_open_files_end_a_run_with_a_sentence(config, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(replace(config, workers=2).to_json()))
    train = f"{sys.executable} -m photon_cli train s2 --config {tmp_path / 'run.json'}"
    done = subprocess.run(
        ["bash", "-c", f"ulimit -n 34; exec {train}"], env=os.environ, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, "raise `ulimit -n` (now 34)" in done.stderr) == (3, True), done.stderr[-2000:]
