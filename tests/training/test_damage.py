"""Checkpoints that were damaged, edited, cut off or half removed; folders that two runs want."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from photon_cli.photon import app
from photon_data.errors import UsageError
from photon_data.files import Location
from photon_data.lock import exclusive
from photon_train import PhotonForConditionalGeneration
from photon_train.checkpoint import checkpoints, newest_whole, remove_leftovers
from photon_train.training.config import TrainConfig
from photon_train.training.loop import run_steps
from photon_train.training.setup import start


@pytest.fixture(scope="module")
def settings(models, manifest):
    rates = dict.fromkeys(("lr_vision", "lr_merger", "lr_language_model", "lr_patch_embedding"), 1e-3)
    small = {"groups_per_step": 4, "max_steps": 2, "save_every": 1, "workers": 0, "precision": "fp32", "track": ()}
    return TrainConfig(stage="s1", model=str(models / "s1"), data=(str(manifest),), **rates, **small)


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    """The folder of a run with checkpoint-1 and checkpoint-2."""
    folder = tmp_path_factory.mktemp("damage") / "run"
    run_steps(start(replace(settings, output=str(folder)), resume=False))
    return folder


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def photon(*words):
    result = CliRunner().invoke(app, list(map(str, words)))
    assert not isinstance(result.exception, Exception) or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output.replace("\n", " ")


def resume(run, settings):
    path = run.with_name("settings.json")
    path.write_text(json.dumps({**settings.to_json(), "output": str(run)}))
    return photon("train", "s1", "--config", path, "--resume")


def flip(path, at, bit):
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def test_a_flipped_bit_in_any_file_is_noticed_and_the_checkpoint_before_is_named(run):
    draw = random.Random(0)
    names = sorted(path.name for path in (run / "checkpoint-2").iterdir())
    assert {"model.safetensors", "optimizer.safetensors", "state.json", "config.json", "digests.json"} <= set(names)
    for name in names:
        path = run / "checkpoint-2" / name
        whole = path.read_bytes()
        for _ in range(6):
            flip(path, draw.randrange(len(whole)), draw.randrange(8))
            with pytest.raises(UsageError, match=r"checkpoint-2 is damaged: .*\n.*checkpoint-1 before it is whole"):
                newest_whole(run)
            path.write_bytes(whole)
    assert newest_whole(run) == run / "checkpoint-2"


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "tokenizer.json"])
@pytest.mark.parametrize("how", ["cut", "longer", "empty", "gone"])
def test_files_that_are_cut_longer_or_gone_are_named(run, name, how):
    path = run / "checkpoint-2" / name
    content = path.read_bytes()
    path.write_bytes({"cut": content[:-3], "longer": content + b" ", "empty": b"", "gone": b""}[how])
    if how == "gone":
        path.unlink()
    with pytest.raises(UsageError, match=name.replace(".", r"\.")):
        newest_whole(run)


def test_where_all_are_damaged_none_is_named(run):
    for checkpoint in checkpoints(run):
        flip(checkpoint / "optimizer.safetensors", 5000, 3)
    with pytest.raises(UsageError, match="no checkpoint before it is whole"):
        newest_whole(run)


def test_resume_of_a_damaged_checkpoint_is_misuse_and_of_a_whole_one_is_not(run, settings):
    assert resume(run, settings)[0] == 0
    state = run / "checkpoint-2" / "state.json"
    state.write_text(state.read_text().replace('"step": 2', '"step": 1'))  # as valid as it was
    code, text = resume(run, settings)
    assert (code, "state.json with other content" in text, "checkpoint-1 before it is whole" in text) == (2, True, True)
    state.write_text("{")
    (run / "checkpoint-2" / "digests.json").unlink()
    code, text = resume(run, settings)
    assert (code, "state.json: expected step" in text) == (2, True)


@pytest.mark.parametrize(
    "more",
    [
        *({"step": -5}, {"epoch": -1}, {"step": True}, {"step_in_epoch": 1.5}, {"rows": None}, {"settings": []}),
        *({"phases": "soft"}, {"phases": {"soft": "1"}}, {"phases": {"harder": 1}}),
        *({"best": None}, {"best": {"step": "2"}}, {"best": {"value": "high"}}),
    ],
)
def test_a_position_without_digests_that_no_run_has_is_refused(run, more):
    state = run / "checkpoint-2" / "state.json"
    (run / "checkpoint-2" / "digests.json").unlink()
    assert newest_whole(run) == run / "checkpoint-2"
    state.write_text(json.dumps(json.loads(state.read_text()) | more))
    with pytest.raises(UsageError, match=r"state\.json: expected step"):
        newest_whole(run)


def without_bar(moments, first):
    return {first.replace("|", "."): moments[first]}


def reshaped(moments, first):
    return moments | {first: torch.zeros(2, 3, 5)}


def of_another_model(moments, first):
    return moments | {f"more.{first}": moments[first].clone()}


def without_one(moments, first):
    return {name: value for name, value in moments.items() if name != first}


@pytest.mark.parametrize("change", [without_bar, reshaped, of_another_model, without_one])
def test_moments_without_digests_that_are_not_those_of_the_weights_are_refused(run, settings, change):
    path = run / "checkpoint-2" / "optimizer.safetensors"
    (run / "checkpoint-2" / "digests.json").unlink()
    moments = load_file(path)
    first = min(name for name in moments if name.endswith("|exp_avg"))
    save_file(change(moments, first), path)
    code, text = resume(run, settings)
    assert (code, "optimizer.safetensors: expected" in text, "moments" in text) == (2, True, True), text


@pytest.mark.parametrize("log", [b"[" * 100_000 + b"\n", b"\xff\xfe\n", b"[1]\n", b'{"step": "2"}\n'])
def test_a_damaged_log_is_named_and_a_last_line_that_was_cut_is_not(run, settings, log):
    path = run / "log.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + log)
    code, text = resume(run, settings)
    assert (code, "log.jsonl: expected a line of JSON for each step" in text) == (2, True), text
    path.write_bytes(whole + log[:4].strip())
    assert resume(run, settings)[0] == (2 if b"\xff" in log else 0)


def test_a_checkpoint_of_an_earlier_version_goes_on_and_is_said_to_be_less_checked(run, caplog):
    (run / "checkpoint-2" / "digests.json").unlink()
    assert newest_whole(run) == run / "checkpoint-2"
    assert "only the sizes and headers" in caplog.text
    path = run / "checkpoint-2" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UsageError, match=r"optimizer\.safetensors"):
        newest_whole(run)


def test_a_flipped_weight_is_noticed_before_a_model_answers(models, tmp_path):
    shutil.copytree(models / "s1", tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    flip(path, path.stat().st_size - 100, 6)
    with pytest.raises(ValueError, match=r"model\.safetensors with other content"):
        PhotonForConditionalGeneration.from_pretrained(tmp_path / "m")
    PhotonForConditionalGeneration.from_pretrained(tmp_path / "m", verify=False)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "q", "messages": [{"role": "user", "content": "Is it?"}]}))
    words = ("--model", tmp_path / "m", "--data", tmp_path / "rows.jsonl", "--output", tmp_path / "p.jsonl")
    code, text = photon("predict", *words)
    assert (code, "model.safetensors with other content" in text) == (2, True)


def test_a_model_that_is_saved_again_over_another_one_is_whole(models, tmp_path):
    shutil.copytree(models / "s1", tmp_path / "m")
    model = PhotonForConditionalGeneration.from_pretrained(tmp_path / "m")
    torch.nn.init.ones_(model.model.language_model.norm.weight)
    model.save_pretrained(tmp_path / "m", max_shard_size="200KB")  # shards in place of one file
    found = PhotonForConditionalGeneration.from_pretrained(tmp_path / "m")
    assert all(a.equal(b) for a, b in zip(found.parameters(), model.parameters(), strict=True))
    shard = next((tmp_path / "m").glob("model-00002-of-*.safetensors"))
    flip(shard, shard.stat().st_size - 10, 0)
    with pytest.raises(ValueError, match=f"{shard.name} with other content"):
        PhotonForConditionalGeneration.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "../x.safetensors", "/x.safetensors", ".safetensors/../y.pt", 3])
def test_an_index_that_names_anything_but_safetensors_beside_it_is_refused(models, tmp_path, name):
    shutil.copytree(models / "s1", tmp_path / "m")
    (tmp_path / "m" / "digests.json").unlink()
    keys = load_file(tmp_path / "m" / "model.safetensors")
    save_file(keys, tmp_path / "x.safetensors")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "pytorch_model.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(keys, name)}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json: expected"):
        PhotonForConditionalGeneration.from_pretrained(tmp_path / "m")


KILLED = """
import os, shutil, signal

remove = shutil.rmtree

def half(folder, **options):
    if os.path.exists(os.path.join(folder, "model.safetensors")):
        os.unlink(os.path.join(folder, "model.safetensors"))
        os.kill(os.getpid(), signal.SIGKILL)
    remove(folder, **options)

shutil.rmtree = half
from photon_cli.photon import main
main()
"""


@pytest.mark.slow
def test_a_kill_while_an_old_checkpoint_is_removed_leaves_whole_ones_and_the_next_run_cleans_up(
    settings, manifest, models, tmp_path
):
    given = ["train", "s1", "--data", manifest, "--model", models / "s1", "--output", tmp_path / "run"]
    changes = [f"--set={name}" for name in ("groups_per_step=4", "save_every=1", "keep_checkpoints=1", "workers=0")]
    words = [str(word) for word in (*given, *changes, "--set=track=", "--set=max_steps=3")]
    killed = subprocess.run([sys.executable, "-c", KILLED, *words], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "run" / ".removed-checkpoint-1").is_dir()
    assert newest_whole(tmp_path / "run").name == "checkpoint-2"
    (tmp_path / "run" / ".mine.partial").mkdir()
    assert photon(*words, "--resume")[0] == 0
    left = sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_dir())
    assert left == [".mine.partial", "checkpoint-3"]


def test_only_what_a_run_itself_leaves_is_cleaned_up(tmp_path):
    ours = [".partial-checkpoint-3", ".removed-checkpoint-1", ".checkpoint-2.0123abcd.partial", ".partial-merged"]
    others = ["checkpoint-2", "checkpoint-2-best", ".partial-notes", ".checkpoint-2.partial", "removed-checkpoint-1"]
    for name in (*ours, *others):
        (tmp_path / name).mkdir()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


def test_a_second_run_into_a_folder_is_misuse(run, settings):
    with exclusive(Location(str(run))):
        code, text = resume(run, settings)
    assert (code, "another run" in text, str(os.getpid()) in text) == (2, True, True)
    assert resume(run, settings)[0] == 0


WITHOUT_TORCH = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
from photon_cli.photon import main
main()
"""


@pytest.mark.parametrize("command", ["init", "train", "predict", "eval"])
def test_without_torch_the_extra_to_install_is_named(command, tmp_path):
    words = {
        "init": ["--tiny", tmp_path / "m"],
        "train": ["s1"],
        "predict": ["--model", "m", "scan.nii.gz", "Is it?"],
        "eval": ["vqa", "--data", "d.jsonl", "--output", tmp_path / "o", "--model", "m"],
    }[command]
    words = [sys.executable, "-c", WITHOUT_TORCH, command, *map(str, words)]
    found = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (found.returncode, "pip install 'photon-ct[train]'" in found.stderr) == (2, True), found.stderr


def test_workers_that_cannot_go_on_stop_the_run_with_what_to_change(settings, tmp_path, monkeypatch):
    def loader(*args, **kwargs):
        yield from ()
        raise RuntimeError("Too many open files. Communication with the workers is no longer possible.")

    monkeypatch.setattr("photon_train.training.batches.DataLoader", loader)
    with pytest.raises(OSError, match=r"2 processes that read ahead cannot go on: Too many open files; raise `ulimit"):
        run_steps(start(replace(settings, output=str(tmp_path / "r"), workers=2), resume=False))
