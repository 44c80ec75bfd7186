"""Whole runs of a small model: resumed, on two processes, with rows that cannot be read."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from answers import put
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from photon_cli.photon import app
from photon_data.errors import UsageError
from photon_train import PhotonForConditionalGeneration
from photon_train.checkpoint import checkpoints
from photon_train.training.log import read_log
from photon_train.training.loop import TrainingStopped, run_steps
from photon_train.training.processes import Interruption, check_processes, make_accelerator
from photon_train.training.setup import MODULES, module_of, start

LOSSES = ("loss", "ce", "band", "robustness", "flip", "threshold", "eval_loss")
COMPUTED = ("step", *LOSSES, "keep_ratio", "questions", "phase")


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")


def trained(config, resume=False):
    run = start(config, resume=resume)
    run_steps(run)
    return [{name: row.get(name) for name in COMPUTED} for row in read_log(run.folder)]


def stop(config, step):
    """Begin the run, and end it with a Ctrl-C after a step."""

    def stop_here(row):
        if row["step"] == step:
            raise KeyboardInterrupt

    run = start(config, resume=False, callback=stop_here)
    with pytest.raises(KeyboardInterrupt):
        run_steps(run)


def command(config, path, *launcher):
    """Return the command that trains with this config, which is written to the path."""
    path.write_text(json.dumps(config.to_json()))
    return [sys.executable, "-m", *launcher, "photon_cli", "train", "s2", "--config", str(path)]


def with_threads(count):
    return {**os.environ, "OMP_NUM_THREADS": str(count)}


def test_a_run_that_was_stopped_anywhere_goes_on_as_if_it_had_not_been(config, tmp_path):
    whole = trained(replace(config, output=str(tmp_path / "whole")))
    assert {row["phase"] for row in whole} == {"dense", "soft", "hard", "flip"}
    for step in (1, 3, 4):
        folder = tmp_path / f"stopped-{step}"
        stop(replace(config, output=str(folder)), step)
        assert trained(replace(config, output=str(folder)), resume=True) == whole
        ends = [
            PhotonForConditionalGeneration.from_pretrained(checkpoints(run)[-1]) for run in (folder, tmp_path / "whole")
        ]
        for one, other in zip(*(model.parameters() for model in ends), strict=True):
            assert one.equal(other)


def test_a_run_stopped_before_anything_is_scheduled_goes_on_as_if_it_had_not_been(config, tmp_path):
    """The threshold has no optimizer state yet: its first step, with its own correction of bias, is still to come."""
    late = replace(
        config, save_every=1, max_steps=7, photon=config.photon | {"soft_start": 3, "hard_start": 5, "flip_start": 6}
    )
    whole = trained(replace(late, output=str(tmp_path / "whole")))
    stop(late, 3)
    assert trained(late, resume=True) == whole


def test_going_on_with_a_run_that_ended_changes_nothing(config, tmp_path):
    ended = replace(config, max_steps=4)
    rows = trained(ended)
    weights = (checkpoints(tmp_path / "run")[-1] / "model.safetensors").read_bytes()
    assert len(rows) == 4
    assert trained(ended, resume=True) == rows
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-2", "checkpoint-4"]
    assert (checkpoints(tmp_path / "run")[-1] / "model.safetensors").read_bytes() == weights


@pytest.mark.slow
def test_a_run_killed_with_9_has_the_same_losses_to_the_last_digit(config, tmp_path):
    whole = trained(replace(config, output=str(tmp_path / "whole")))
    train = command(replace(config, output=str(tmp_path / "killed"), save_every=1), tmp_path / "run.json")
    threads = with_threads(torch.get_num_threads())
    process = subprocess.Popen(train, env=threads)
    while not (tmp_path / "killed/checkpoint-2").exists():
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (tmp_path / "killed/.partial-checkpoint-99").mkdir(exist_ok=True)  # what a kill while saving leaves
    subprocess.run([*train, "--resume"], env=threads, check=True)
    resumed = [{name: row.get(name) for name in COMPUTED} for row in read_log(tmp_path / "killed")]
    assert resumed == whole


def interrupted(train, log, sign, *, to_all, threads):
    """Run the command, and send a signal once the log has two lines. Return the exit code and what was printed."""
    at_once = {"start_new_session": True, "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = subprocess.Popen(
        train, env=with_threads(threads), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **at_once
    )
    while not (log.exists() and log.read_text().count("\n") >= 2):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    for one in psutil.Process(process.pid).children(recursive=True) if to_all else ():  # as SLURM does
        one.send_signal(sign)
    process.send_signal(sign)
    if to_all:  # torchrun has got it too, and sends it on
        time.sleep(0.01)  # else it would be the same one to the kernel
        os.killpg(process.pid, sign)
    said = process.communicate(timeout=120)[0]
    return process.returncode, said


@pytest.mark.parametrize(
    ("sign", "to_all"),
    [
        (signal.SIGTERM, True),
        pytest.param(signal.SIGINT, True, marks=pytest.mark.long),
        pytest.param(signal.SIGUSR1, False, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_told_to_end_saves_after_its_step_and_goes_on_to_the_same_losses(config, tmp_path, sign, to_all):
    config = replace(config, epochs=12, save_every=0, workers=1)
    whole = trained(replace(config, output=str(tmp_path / "whole")))
    folder = tmp_path / "told"
    train = command(replace(config, output=str(folder)), tmp_path / "run.json")
    code, said = interrupted(train, folder / "log.jsonl", sign, to_all=to_all, threads=torch.get_num_threads())
    assert code == 130, said
    (last,) = checkpoints(folder)
    assert f"Interrupted: {last.name} of {folder} holds what is done" in said.replace("\n", " ")
    assert len(read_log(folder)) == int(last.name.removeprefix("checkpoint-")) < len(whole)
    assert trained(replace(config, output=str(folder)), resume=True) == whole


@pytest.mark.slow
def test_two_processes_of_which_one_is_told_to_end_both_save_and_go_on_to_the_same_losses(config, tmp_path):
    config = replace(config, epochs=12, save_every=0, output=str(tmp_path / "told"))
    whole = trained(replace(config, output=str(tmp_path / "whole")))
    train = command(config, tmp_path / "run.json", *TORCHRUN)
    code, said = interrupted(train, tmp_path / "told/log.jsonl", signal.SIGTERM, to_all=False, threads=1)
    assert code != 0, said
    (last,) = checkpoints(tmp_path / "told")
    assert int(last.name.removeprefix("checkpoint-")) < len(whole)
    same_log(trained(config, resume=True), whole, 1e-5)


def test_a_signal_that_is_sent_on_counts_once_and_a_later_one_ends_the_run_at_once(monkeypatch):
    with Interruption() as interruption:
        try:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            pytest.fail("what was sent on ended the run")
        assert interruption.asked
        monkeypatch.setattr("photon_train.training.processes.SENT_ON_S", 0)
        time.sleep(0.01)
        signal.raise_signal(signal.SIGUSR1)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


def test_going_on_where_there_is_no_run_is_refused_unless_asked(config, tmp_path):
    mistyped = ["train", "s2", "--config", str(tmp_path / "run.json"), "--output", str(tmp_path / "rnu")]
    command(replace(config, max_steps=3), tmp_path / "run.json")
    refused = CliRunner().invoke(app, [*mistyped, "--resume"])
    assert refused.exit_code == 2
    assert "expected a run to go on with, found none" in refused.output
    assert CliRunner().invoke(app, [*mistyped, "--resume", "never"]).exit_code == 2
    assert CliRunner().invoke(app, [*mistyped, "--resume", "auto"]).exit_code == 0
    assert CliRunner().invoke(app, [*mistyped, "--resume"]).exit_code == 0


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(config, tmp_path):
    config = replace(
        config, eval=config.data, eval_every=4
    )  # 11 groups: one process has nothing to evaluate when the other has
    one = trained(replace(config, output=str(tmp_path / "one")))
    train = command(replace(config, output=str(tmp_path / "two")), tmp_path / "run.json", *TORCHRUN)
    tried = subprocess.run([*train, "--dry-run"], env=with_threads(1), check=True, capture_output=True, text=True)
    assert tried.stdout.count("9 steps in 3 epochs, each of 4 volumes") == 1
    subprocess.run(train, env=with_threads(1), check=True, timeout=300)
    same_log(read_log(tmp_path / "two"), one, 1e-5)


def read_log_of(config):
    return read_log(Path(config.output))


# What `accelerate launch` sets for fsdp_version 2.
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",  # groups_per_step says it, not the launcher
}


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "wrong"), [("fp32", 1e-5), pytest.param("bf16", 0.1, marks=pytest.mark.long)])
def test_a_run_shared_by_two_processes_is_that_of_one_and_goes_on_with_one(config, tmp_path, precision, wrong):
    config = replace(config, epochs=2, eval=config.data, eval_every=3)
    whole = trained(replace(config, output=str(tmp_path / "whole")))
    _on_two(replace(config, precision=precision), tmp_path)
    same_log(read_log_of(config), whole, wrong)
    ends = [load_file(checkpoints(tmp_path / name)[-1] / "model.safetensors") for name in ("run", "whole")]
    assert ends[0].keys() == ends[1].keys()  # a weight of two names is there once
    if precision == "fp32":
        shutil.rmtree(checkpoints(tmp_path / "run")[-1])
        same_log(trained(config, resume=True), whole, wrong)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "wrong"), [pytest.param("fp32", 1e-5, marks=pytest.mark.long), ("bf16", 0.1)])
def test_a_run_of_one_process_goes_on_with_two_that_share_it(config, tmp_path, precision, wrong):
    config = replace(config, precision=precision, epochs=2)
    whole = trained(config)
    shutil.rmtree(checkpoints(tmp_path / "run")[-1])
    _on_two(config, tmp_path, "--resume")
    same_log(read_log_of(config), whole, wrong)
    last = checkpoints(tmp_path / "run")[-1]
    assert {weight.dtype for weight in load_file(last / "model.safetensors").values()} == {torch.float32}
    assert not any(name.endswith("|master") for name in load_file(last / "optimizer.safetensors"))


def _on_two(config, folder, *options):
    (folder / "run.json").write_text(json.dumps(config.to_json()))
    script = str(Path(__file__).with_name("as_gpus.py"))
    command = [sys.executable, "-m", *TORCHRUN[:-1], script, str(folder / "run.json"), *options]
    done = subprocess.run(command, env=with_threads(1) | FSDP, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def same_log(found, expected, wrong):
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine["questions"] == theirs["questions"]
        for name in LOSSES:
            assert mine.get(name) == pytest.approx(theirs.get(name), abs=wrong), (mine["step"], name)


def test_an_epoch_asks_every_question_once(config):
    rows = trained(config)
    per_epoch = {}
    for row in read_log_of(config):
        per_epoch[row["epoch"]] = per_epoch.get(row["epoch"], 0) + row["questions"]
    assert per_epoch == {0: 19, 1: 19, 2: 19}
    assert (
        len(rows) == 9
    )  # 5 + 1 + 2 + 4 + 1 + 3 questions in threes, and three more rows: 11 groups in fours, three times


@pytest.fixture
def damaged(rows, stores, tmp_path):
    """A manifest in which volume d's copy has a flipped bit, which its checksum tells."""
    target = tmp_path / "damaged.ome.zarr"
    shutil.copytree(stores["d"], target)
    shard = target / "model/0/c.0.0.0"
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 8
    shard.write_bytes(content)
    changed = [{**r, "videos": [str(target) if v == stores["d"] else v for v in r["videos"]]} for r in rows]
    return put(tmp_path / "damaged.jsonl", changed)


def test_a_store_that_fails_its_checksum_stops_the_run_by_name(config, damaged):
    with pytest.raises(TrainingStopped, match=r"d\d.* cannot be read"):
        trained(replace(config, data=(str(damaged),)))


def test_a_store_that_fails_its_checksum_is_skipped_when_asked_and_counted(config, damaged, caplog):
    rows = trained(replace(config, data=(str(damaged),), on_bad_row="skip", epochs=1))
    assert sum(row["questions"] for row in rows) == 19 - 4
    assert sum(row["skipped_groups"] for row in read_log_of(config)) == 2  # four questions in threes
    assert "d0" in caplog.text


def test_stage_1_goes_over_text_alone_and_over_rows_that_cannot_be_read(config, models, damaged):
    """Neither has a gradient for the patch embedding, which is all that is trained."""
    frozen = dict.fromkeys(("lr_vision", "lr_merger", "lr_language_model", "lr_threshold"), 0.0)
    first = replace(config, stage="s1", model=str(models / "s1"), photon={}, epochs=1, **frozen)
    rows = trained(replace(first, data=(str(damaged),), on_bad_row="skip"))
    assert sum(row["questions"] for row in rows) == 19 - 4


def test_a_run_of_which_no_row_could_be_read_says_that_nothing_was_learned(config, rows, damaged, tmp_path):
    lost = put(tmp_path / "lost.jsonl", [json.loads(line) for line in damaged.read_text().splitlines() if '"d' in line])
    with pytest.raises(TrainingStopped, match="all 6 groups of rows were left out: nothing was learned"):
        trained(replace(config, data=(str(lost),), on_bad_row="skip"))


def test_a_volume_that_is_missing_stops_or_is_left_out_by_name(config, rows, tmp_path, caplog):
    lost = {**rows[0], "id": "lost", "videos": [str(tmp_path / "no.ome.zarr")]}
    path = put(tmp_path / "missing.jsonl", [*rows, lost])
    with pytest.raises(UsageError, match=r"no\.ome\.zarr.*lost"):
        trained(replace(config, data=(str(path),)))
    rows = trained(replace(config, data=(str(path),), on_bad_row="skip", epochs=1))
    assert sum(row["questions"] for row in rows) == 19
    assert "lost" in caplog.text


def with_head_of(models, value, folder):
    """A model whose head is one value: 3e38 makes gradients infinite."""
    model = PhotonForConditionalGeneration.from_pretrained(models / "s2")
    with torch.no_grad():
        model.lm_head.weight[:] = value
    shutil.copytree(models / "s2", folder)
    model.save_pretrained(folder)
    return str(folder)


def test_a_loss_that_is_not_finite_stops_the_run_or_skips_the_step(config, models, tmp_path):
    broken = with_head_of(models, 3e38, tmp_path / "broken")
    with pytest.raises(TrainingStopped, match="step 1: expected a finite loss"):
        trained(replace(config, model=broken))
    skips = replace(config, model=broken, on_nan="skip", output=str(tmp_path / "skipped"), epochs=1)
    with pytest.raises(TrainingStopped, match="all 3 steps were skipped"):
        trained(skips)
    found = [(row["grad_norm/language_model"], row["skipped_steps"]) for row in read_log_of(skips)]
    assert found == [(None, 1)] * 3  # JSON has no NaN


def test_a_model_with_a_weight_that_is_not_finite_is_refused_where_it_is_loaded(config, models, tmp_path):
    broken = with_head_of(models, float("nan"), tmp_path / "broken")
    with pytest.raises(UsageError, match="found NaN or infinity in "):
        start(replace(config, model=broken), resume=False)


def test_what_a_run_saves_has_no_setting_of_training(config):
    trained(replace(config, max_steps=1, photon={"soft_start": 0, "hard_start": 0}))
    (last,) = checkpoints(Path(config.output))
    saved = json.loads((last / "config.json").read_text())
    assert saved.get("use_cache", True) is True


def test_a_tracker_that_is_not_installed_or_known_is_refused(config):
    for name in ("tensorbord", "aim"):
        with pytest.raises(UsageError, match=f"found {name}; install it"):
            start(replace(config, track=("tensorboard", name)), resume=False)


def test_tensorboard_shows_each_step_once_after_going_on(config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = replace(config, track=("tensorboard",), max_steps=4)
    stop(config, 3)  # behind the checkpoint of step 2: step 3 is made again
    trained(config, resume=True)
    shown = EventAccumulator(str(Path(config.output) / "photon")).Reload()
    assert [event.step for event in shown.Scalars("loss")] == [1, 2, 3, 4]


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU nothing changes")
def test_precision_changes_without_a_gpu_only_where_nobody_set_it_and_is_said(tmp_path):
    said = "no GPU: precision=fp32, not the bf16 of s2"
    words = ["train", "s2", "--output", str(tmp_path / "run")]  # no data: refused right behind
    file = tmp_path / "own.yaml"
    file.write_text("precision: bf16\n")
    assert said in CliRunner().invoke(app, words).output
    for own in (["--set", "precision=bf16"], ["--config", str(file)]):
        output = CliRunner().invoke(app, [*words, *own]).output
        assert said not in output
        assert "expected manifests with rows" in output


@pytest.mark.parametrize(("scheduler", "kept"), [("random", 3), ("uniform", 3), ("foreground", 3), ("none", 8)])
def test_other_schedulers_are_trained_under_the_same_curriculum(config, tmp_path, scheduler, kept):
    config = replace(config, epochs=2, questions_per_volume=5)
    trained(replace(config, output=str(tmp_path / "its")))
    its = read_log(tmp_path / "its")
    other = replace(config, photon={**config.photon, "scheduler": scheduler, "keep_ratio": 3 / 8})
    trained(other)
    rows = read_log_of(other)
    assert [row["phase"] for row in rows] == [row["phase"] for row in its] == ["dense", "soft", "hard", *["flip"] * 3]
    assert [row["robustness"] != 0 for row in rows] == [row["robustness"] != 0 for row in its]
    for row in rows:
        share = 1 if row["phase"] in ("dense", "soft") else kept / 8  # of the 8 tokens of each volume
        assert row["visual_tokens_kept"] == share * row["visual_tokens"] > 0
        assert row["flip"] == row["band"] == 0  # both are of the threshold
    saved = PhotonForConditionalGeneration.from_pretrained(checkpoints(Path(other.output))[-1])
    assert saved.config.scheduler == scheduler


@pytest.mark.parametrize("change", ["renamed", "left out"])
def test_an_adapter_that_lacks_a_weight_is_refused(config, change):
    lora = replace(config, lora_rank=2, max_steps=3, lr_vision=0.0)
    run = start(lora, resume=False)
    assert not any("pos_proj" in name and "lora" in name for name, _ in run.model.named_parameters())
    run_steps(run)
    last = checkpoints(Path(config.output))[-1]
    weights = load_file(last / "adapter.safetensors")
    name = next(iter(weights))
    value = weights.pop(name)
    save_file(weights | ({f"{name}.old": value} if change == "renamed" else {}), last / "adapter.safetensors")
    (last / "digests.json").unlink()
    with pytest.raises(UsageError, match="weights that are trained, found"):
        start(lora, resume=True)


FULL = [
    OSError(28, "No space left on device"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),  # as it says it
]


@pytest.mark.parametrize("reason", FULL)
def test_a_disk_that_is_full_while_saving_leaves_the_last_checkpoint(config, monkeypatch, reason):
    import photon_train.checkpoint as module

    save = module.save_file

    def full(tensors, path, metadata=None):
        if "checkpoint-4" in str(path):
            save({"begun": torch.zeros(3)}, path)
            raise reason
        save(tensors, path, metadata=metadata)

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError, match="No space left") as full_disk:
        trained(config)
    assert full_disk.value.errno == 28
    monkeypatch.undo()
    run = start(config, resume=True)
    assert run.state["step"] == 2
    assert [path.name for path in run.folder.iterdir() if path.is_dir()] == ["checkpoint-2"]


def test_going_on_with_other_rows_or_settings_is_refused(config, rows, tmp_path):
    trained(replace(config, epochs=1))
    path = put(tmp_path / "fewer.jsonl", rows[1:])
    with pytest.raises(UsageError, match=r"the rows that .* was begun with"):
        start(replace(config, data=(str(path),), epochs=1), resume=True)
    with pytest.raises(UsageError, match=r"lr_vision=0\.5 \(was 0\.001\)"):
        start(replace(config, lr_vision=0.5, epochs=1), resume=True)
    with pytest.raises(UsageError, match="holds a run"):
        start(config, resume=False)


def test_frozen_modules_do_not_move_and_stage_2_starts_by_keeping_nearly_everything(config, models, tmp_path):
    begun = replace(
        config,
        model=str(models / "s1"),
        lr_vision=0.0,
        lr_merger=0.0,
        freeze=("*.layers.3.*",),
        photon={"soft_start": 1, "hard_start": 2},
        epochs=1,
    )
    rows = trained(begun)
    assert rows[0]["keep_ratio"] == 7 / 8  # of 8 tokens only the one of saliency 0 is below the threshold
    assert rows[0]["threshold"] < 0.02
    before = dict(PhotonForConditionalGeneration.from_pretrained(models / "s1").named_parameters())
    after = PhotonForConditionalGeneration.from_pretrained(checkpoints(tmp_path / "run")[-1])
    for name, parameter in after.named_parameters():
        if name not in before:
            continue
        frozen = ("visual." in name and "patch_embed" not in name) or ".layers.3." in name
        assert parameter.equal(before[name]) == frozen, name


@pytest.mark.parametrize("beside", [(), ("vision", "threshold")])
def test_lora_trains_its_updates_and_what_else_has_a_rate_resumes_and_ends_as_an_ordinary_model(
    config, models, tmp_path, beside
):
    rates = {f"lr_{module}": 1e-3 if module in beside else 0.0 for module in MODULES}
    lora = replace(config, lora_rank=2, epochs=1, **rates)
    whole = trained(replace(lora, output=str(tmp_path / "whole")))
    stop(replace(lora, output=str(tmp_path / "stopped")), 3)  # behind a checkpoint
    assert trained(replace(lora, output=str(tmp_path / "stopped")), resume=True) == whole
    before = dict(PhotonForConditionalGeneration.from_pretrained(models / "s2").named_parameters())
    after = PhotonForConditionalGeneration.from_pretrained(tmp_path / "whole" / "merged")
    moved = {name for name, parameter in after.named_parameters() if not parameter.equal(before[name])}
    assert {module_of(name) for name in moved} == {"language_model", *beside}
    assert all("_proj.weight" in name for name in moved if module_of(name) == "language_model")


def test_a_dry_run_says_what_would_be_trained_and_leaves_nothing(config, tmp_path):
    train = command(replace(config, lr_merger=0.0), tmp_path / "run.json")[3:]
    result = CliRunner().invoke(app, [*train, "--set", "epochs=2", "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "19 rows on 6 volumes, all stores are there" in result.output
    assert "6 steps in 2 epochs, each of 4 volumes with up to 3 questions" in result.output
    assert "curriculum: soft from step 1, hard from 2, flip from 3, of 6" in result.output
    assert "threshold        113 of 113 parameters, learning rate 0.001" in result.output
    assert any("merger" in line and "frozen" in line for line in result.output.splitlines())
    assert not (tmp_path / "run").exists()


def test_a_setting_that_does_not_exist_is_refused_before_anything_is_loaded():
    result = CliRunner().invoke(app, ["train", "s2", "--set", "lr_visoin=1"])
    assert result.exit_code == 2
    assert "did you mean 'lr_vision'" in result.output


def test_deepspeed_is_refused_with_what_to_launch_instead(config, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UsageError, match="expected DDP or FSDP2, found DeepSpeed; launch with torchrun"):
        make_accelerator(config)


def test_processes_that_cannot_share_the_steps_of_a_run_are_refused(config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UsageError, match="the 3 processes that were launched, found that accelerate sees 1"):
        check_processes(config, 1)
    with pytest.raises(UsageError, match="expected a multiple of the 3 processes, found 4"):
        check_processes(config, 3)
