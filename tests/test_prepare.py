"""`photon-data prepare` as a whole, on small scans: through Dask and child processes, as users run it."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from distributed import LocalCluster
from raw import write_scan
from scans import as_scan, frame

from photon_data import open_volume
from photon_data.errors import UsageError
from photon_data.files import Location, from_jsonl
from photon_data.lock import exclusive
from photon_data.prepare_file import Job, prepare_file, prepare_volume
from photon_data.readers.find import find_scans
from photon_data.recipe import ALGORITHM, Policy, Recipe
from photon_data.records import NoSpace
from photon_data.scan import Source
from photon_pipelines.cluster import Workers
from photon_pipelines.plan import Callback
from photon_pipelines.prepare import prepare
from photon_pipelines.request import Request
from photon_pipelines.verify import verify_output

SMALL = Recipe(shape_zyx=(40, 32, 32), model_shape_zyx=(14, 28, 28))
TWO = Workers(count=2, timeout_s=120)


@pytest.fixture
def source(tmp_path):
    for seed, name in enumerate(["a.nii.gz", "b.nii", "deep/er/c.nii.gz", "d.nii.gz"]):
        write_scan(tmp_path / "raw" / name, seed)
    return tmp_path / "raw"


def request(source, out, **more):
    return Request(**{"source": source, "out": Location(str(out)), "recipe": SMALL, "pictures": 2, **more})


def states(out):
    rows = from_jsonl((Path(out) / "volumes.jsonl").read_text())
    return {row["id"]: row["state"] for row in rows}


def digests(out):
    """SHA-256 of every file of every store and manifest."""
    roots = [Path(out) / "volumes", Path(out) / "manifests"]
    files = [path for root in roots for path in root.rglob("*") if path.is_file()]
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_good_and_bad_files_in_one_folder_each_end_in_one_state_and_the_good_ones_are_right(source, tmp_path):
    whole = (source / "a.nii.gz").read_bytes()
    (source / "truncated.nii.gz").write_bytes(whole[: len(whole) // 2])
    (source / "empty.nii.gz").write_bytes(b"")
    (source / "text.nii").write_text("not a scan")
    write_scan(
        source / "raw-values.nii.gz", array=(np.random.default_rng(0).integers(0, 3000, (9, 10, 11)).astype(np.int16))
    )
    (source / "notes.txt").write_text("left alone")
    result = prepare(request(source, tmp_path / "out"), TWO)
    assert result.states == {"prepared": 4, "unchanged": 0, "refused": 4, "failed": 0}
    assert set(states(tmp_path / "out")) == {"a", "b", "deep__er__c", "d", "truncated", "empty", "text", "raw-values"}
    assert not result.complete
    rows = {row["id"]: row for row in from_jsonl((tmp_path / "out" / "volumes.jsonl").read_text())}
    assert rows["raw-values"]["code"] == "hu-implausible"
    assert rows["truncated"]["code"] == "truncated"
    assert rows["a"]["facts"]["geometry"]["shape_zyx"] == [16, 24, 28]
    assert len(list((tmp_path / "out" / "volumes").iterdir())) == 4
    assert list(verify_output(Location(str(tmp_path / "out")))) == []
    assert "truncated.nii.gz" in (tmp_path / "out" / "report.html").read_text()


def test_bytes_do_not_depend_on_workers_scheduler_or_order(source, tmp_path):
    prepare(request(source, tmp_path / "one"), Workers(count=1))
    prepare(request(source, tmp_path / "two"), TWO)
    for found in reversed(find_scans(source).sources):
        prepare_file(Job(found, str(tmp_path / "bare"), SMALL))
    with LocalCluster(n_workers=1, threads_per_worker=2, processes=True, dashboard_address="127.0.0.1:0") as cluster:
        prepare(request(source, tmp_path / "cluster"), Workers(scheduler=cluster.scheduler_address))
    stores = {name: digest for name, digest in digests(tmp_path / "one").items() if name.startswith("volumes")}
    assert len(stores) == 4 * 6
    for other in ("two", "bare", "cluster"):
        found = {name: digest for name, digest in digests(tmp_path / other).items() if name.startswith("volumes")}
        assert found == stores, other


def test_the_same_command_again_does_only_what_is_missing_or_changed(source, tmp_path):
    out = tmp_path / "out"
    prepare(request(source, out), TWO)
    before = digests(out)
    assert prepare(request(source, out), TWO).states["unchanged"] == 4
    os.utime(source / "b.nii")  # touched, same content
    write_scan(source / "d.nii.gz", seed=99)
    write_scan(source / "e.nii.gz", seed=5)
    (out / "volumes" / "a.ome.zarr" / "0" / "c.0.0.0").unlink()
    prepare(request(source, out), TWO)
    assert states(out) == {
        "a": "prepared",
        "b": "unchanged",
        "deep__er__c": "unchanged",
        "d": "prepared",
        "e": "prepared",
    }
    after = digests(out)
    changed = {name.split("/")[1] for name in before if before[name] != after[name] and name.startswith("volumes")}
    assert changed == {"d.ome.zarr"}


def test_another_recipe_prepares_everything_anew_and_never_mixes(source, tmp_path):
    out = tmp_path / "out"
    prepare(request(source, out), TWO)
    coarse = replace(SMALL, spacing_mm=(2.0, 2.0, 2.0))
    with pytest.raises(UsageError, match="one recipe per folder"):
        prepare(request(source, out, recipe=coarse, limit=2), TWO)
    assert set(states(out).values()) == {"prepared"}
    assert prepare(request(source, out, recipe=coarse), TWO).states["prepared"] == 4
    assert open_volume(out / "volumes" / "a.ome.zarr").geometry.spacing_zyx_mm == (2.0, 2.0, 2.0)
    assert json.loads((out / "dataset.json").read_text())["digest"] == coarse.digest


def test_a_run_cut_short_keeps_the_rows_of_what_is_still_there(source, tmp_path):
    out = tmp_path / "out"
    prepare(request(source, out), TWO)

    class Interrupted(Callback):
        def on_record(self, record):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(request(source, out, overwrite=True), Workers(count=1), Interrupted())
    assert set(states(out)) == {"a", "b", "d", "deep__er__c"}
    assert prepare(request(source, out), TWO).states["unchanged"] == 4
    assert list(verify_output(Location(str(out)))) == []


def test_a_change_of_recipe_that_was_killed_does_not_leave_a_mixture_behind(source, tmp_path):
    out = tmp_path / "out"
    prepare(request(source, out), TWO)
    dataset = json.loads((out / "dataset.json").read_text())
    other = replace(SMALL, pad_hu=-900.0)
    (out / "dataset.json").write_text(json.dumps({**dataset, "digest": other.digest}))  # as kill -9 leaves it early on
    with pytest.raises(UsageError, match="3 volumes of another recipe"):
        prepare(request(source, out, recipe=other, limit=1), TWO)


def test_a_volume_whose_store_is_gone_is_in_no_manifest(source, tmp_path):
    out = tmp_path / "out"
    prepare(request(source, out), TWO)
    shutil.rmtree(out / "volumes" / "d.ome.zarr")
    result = prepare(request(source, out, limit=2), TWO)
    assert sorted(row["volume_id"] for row in result.manifests.rows["all"]) == ["a", "b", "deep__er__c"]
    assert list(verify_output(Location(str(out)))) == []


@pytest.mark.parametrize("damage", [{"dataset.json": "{bad"}, {"dataset.json": "[]"}, {".lock": '{"pid'}])
def test_damaged_files_of_ours_do_not_stop_a_run(source, tmp_path, damage):
    out = tmp_path / "out"
    prepare(request(source, out, limit=1), TWO)
    for name, text in damage.items():
        (out / name).write_text(text)
    assert prepare(request(source, out), TWO).complete


@pytest.mark.parametrize("row", ["[]", "{bad", '{"id": 1'])
def test_a_damaged_table_of_volumes_is_misuse_that_says_what_to_do(source, tmp_path, row):
    out = tmp_path / "out"
    prepare(request(source, out, limit=1), TWO)
    (out / "volumes.jsonl").write_text(row + "\n")
    with pytest.raises(UsageError, match=r"damaged.*bring it back"):
        prepare(request(source, out), TWO)


def test_names_that_are_no_text_end_in_one_state_like_others(source, tmp_path):
    (source / os.fsdecode(b"odd\xff.nii.gz")).write_bytes((source / "a.nii.gz").read_bytes())
    (source / os.fsdecode(b"bad\xfe.dcm")).write_bytes(b"no scan")
    result = prepare(request(source, tmp_path / "out"), TWO)
    assert result.states == {"prepared": 5, "unchanged": 0, "refused": 1, "failed": 0}
    assert "\\udcff" in (tmp_path / "out" / "volumes.jsonl").read_text()
    assert prepare(request(source, tmp_path / "out"), TWO).states["unchanged"] == 5


@pytest.mark.parametrize("scheduler", ["nonsense", "file"])
def test_a_scheduler_that_is_none_is_misuse(source, tmp_path, scheduler):
    if scheduler == "file":
        (tmp_path / "scheduler.json").write_text("{}")
        scheduler = str(tmp_path / "scheduler.json")
    with pytest.raises(UsageError, match=r"expected the address .* of a running Dask scheduler"):
        prepare(request(source, tmp_path / "out"), Workers(scheduler=scheduler))


@pytest.mark.parametrize("damage", ["missing", "a row less", "one more"])
def test_verify_finds_manifests_that_are_not_those_that_were_written(source, tmp_path, damage):
    out = tmp_path / "out"
    prepare(request(source, out), TWO)
    manifest = out / "manifests" / "all.jsonl"
    if damage == "missing":
        manifest.unlink()
    elif damage == "a row less":
        manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[:-1]))
    else:
        (manifest.parent / "more.jsonl").write_text(manifest.read_text())
    assert len(list(verify_output(Location(str(out))))) == 1


def test_the_same_scan_gives_the_bytes_that_this_number_of_the_algorithm_stands_for():
    """A change here is a change of every store: raise ALGORITHM in recipe.py, so that folders are not mixed, then pin
    it anew.
    """
    ramp = (np.arange(30 * 40 * 50).reshape(30, 40, 50) * 7919 % 2000 - 1000).astype(np.int16)
    prepared = prepare_volume(as_scan(ramp, frame((30, 40, 50))), SMALL, Policy(modality="other"))
    digest = hashlib.sha256(prepared.volume.array_zyx.tobytes() + prepared.model.array_zyx.tobytes()).hexdigest()
    assert (ALGORITHM, digest[:16]) == (2, "7510cea2764b4dac")


def test_volumes_of_earlier_runs_stay_in_the_table_and_the_manifests(source, tmp_path):
    out = tmp_path / "out"
    prepare(request(source / "deep", out), TWO)
    result = prepare(request(source, out, limit=1), TWO)
    assert [record.id for record in result.kept] == ["er__c"]
    assert sorted(row["volume_id"] for row in result.manifests.rows["all"]) == ["a", "er__c"]


def test_two_runs_into_one_folder_are_not_both_let_in(source, tmp_path):
    out = Location(str(tmp_path / "out"))
    with exclusive(out), pytest.raises(UsageError, match="another run"):
        prepare(request(source, out.path), TWO)
    assert not (out.path / "volumes.jsonl").exists()
    prepare(request(source, out.path, limit=1), TWO)


def test_questions_become_rows_of_prepared_volumes_and_the_rest_is_named(source, tmp_path):
    table = tmp_path / "q.csv"
    table.write_text(
        "qid,scan,question,answer,split\n1,a,Is it?,Yes,train\n2,b.nii,Is it?,No,val\n3,nowhere,Is it?,No,val\n"
    )
    columns = {"id": "qid", "volume": "scan"}
    result = prepare(request(source, tmp_path / "out", questions=table, columns=columns), TWO)
    (train,) = from_jsonl((tmp_path / "out" / "manifests" / "train.jsonl").read_text())
    assert train["videos"] == [str(tmp_path / "out" / "volumes" / "a.ome.zarr")]
    assert train["messages"][1] == {"role": "assistant", "content": "Yes"}
    assert [(missing.id, missing.volume) for missing in result.manifests.unmatched] == [("3", "nowhere")]


def test_a_table_that_leaks_patients_is_refused_before_anything_is_prepared(source, tmp_path):
    table = tmp_path / "q.csv"
    table.write_text("volume,question,answer,split,patient\na,Q?,Yes,train,p1\nb,Q?,No,test,p1\n")
    with pytest.raises(UsageError, match="patient p1"):
        prepare(request(source, tmp_path / "out", questions=table), TWO)
    assert not (tmp_path / "out").exists()


def test_one_volume_under_two_names_is_one_patient_when_splits_are_drawn(source, tmp_path):
    table = tmp_path / "q.csv"
    table.write_text(
        "volume,question,answer\n" + "".join(f"{name},Is it?,Yes\n" for name in ("a", "a.nii.gz", "d", "d.nii.gz"))
    )
    for seed in range(4):
        result = prepare(request(source, tmp_path / f"out{seed}", questions=table, seed=seed, limit=1), TWO)
        assert (
            len({row["split"] for rows in result.manifests.rows.values() for row in rows if row["volume_id"] == "a"})
            == 1
        )


def test_the_same_content_in_two_splits_gets_no_manifests_and_the_old_ones_go(source, tmp_path):
    (source / "copy.nii.gz").write_bytes((source / "a.nii.gz").read_bytes())
    table, out = tmp_path / "q.csv", tmp_path / "out"
    table.write_text("volume,question,answer,split\na,Q?,Yes,train\n")
    prepare(request(source, out, questions=table), TWO)
    table.write_text("volume,question,answer,split\na,Q?,Yes,train\ncopy,Q?,Yes,test\n")
    result = prepare(request(source, out, questions=table), TWO)
    assert result.leak is not None
    assert "content" in result.leak
    assert not result.complete
    assert not list((out / "manifests").iterdir())
    assert prepare(request(source, out, questions=table, allow_leaks=True), TWO).complete


def test_a_rescaling_table_applies_to_its_volumes_and_the_others_are_refused(source, tmp_path):
    table = tmp_path / "hu.csv"
    table.write_text("volume,slope,intercept\na,1,0\nb,1,-5\n")
    prepare(request(source, tmp_path / "out", hu_source=str(table)), TWO)
    assert states(tmp_path / "out") == {"a": "prepared", "b": "prepared", "d": "refused", "deep__er__c": "refused"}
    rows = {row["id"]: row for row in from_jsonl((tmp_path / "out" / "volumes.jsonl").read_text())}
    assert rows["b"]["facts"]["intercept"] == -5
    assert rows["d"]["code"] == "not-in-table"


def test_a_folder_that_cannot_be_listed_is_refused_and_not_a_crash(tmp_path):
    source = Source("sub", "sub", (), "folder", 0, 0, "expected a folder that can be listed, found: Permission denied")
    record = prepare_file(Job(source, str(tmp_path / "out"), SMALL))
    assert (record.state, record.code, record.reason) == ("refused", "unreadable", source.problem)


def test_a_full_disk_stops_the_run_and_says_so(source, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("photon_data.prepare_file.write_store", full)
    with pytest.raises(NoSpace, match="no space left"):
        prepare_file(Job(find_scans(source).sources[0], str(tmp_path / "out"), SMALL))


def test_nothing_is_left_of_a_job_whose_address_space_ran_out_and_the_others_are_done(source, tmp_path):
    big = np.zeros((400, 700, 700), np.float32)
    big[:, :200], big[:, 200:400] = -1000, 40
    turned = np.array([[0.8, 0.1, 0, 0], [-0.1, 0.8, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    write_scan(source / "oblique.nii", array=big, affine=turned)
    whole = Recipe(spacing_mm=(10, 20, 20), shape_zyx=(40, 32, 32), model_shape_zyx=(14, 28, 28))  # all of it is held
    result = prepare(request(source, tmp_path / "out", recipe=whole), Workers(count=1, memory_gb=1))
    assert result.states["failed"] == 1
    assert result.states["prepared"] == 4
    assert len(list((tmp_path / "out" / "volumes").iterdir())) == 4


COMMAND = [sys.executable, "-m", "photon_cli.data", "prepare"]
SETTINGS = ["--set", "shape_zyx=40,32,32", "--set", "model_shape_zyx=14,28,28", "--workers", "2", "--pictures", "0"]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_a_run_that_is_ended_twice_goes_on_and_leaves_the_same_bytes(tmp_path, how):
    source, out, straight = tmp_path / "raw", tmp_path / "out", tmp_path / "straight"
    for seed in range(24):
        write_scan(source / f"s{seed}.nii.gz", seed, shape_zyx=(120, 160, 160))
    for _ in range(2):
        process = subprocess.Popen([*COMMAND, str(source), str(out), *SETTINGS], stdout=subprocess.DEVNULL)
        wanted = len(list(out.glob("volumes/[!.]*"))) + 3
        while len(list(out.glob("volumes/[!.]*"))) < wanted and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(how)
        assert process.wait(60) == (-signal.SIGKILL if how == signal.SIGKILL else 130)
        assert len(list(out.glob("volumes/[!.]*"))) < 24
    subprocess.run([*COMMAND, str(source), str(out), *SETTINGS], capture_output=True, check=True)
    subprocess.run([*COMMAND, str(source), str(straight), *SETTINGS], capture_output=True, check=True)
    assert list(states(out).values()).count("unchanged") >= 3
    found, expected = digests(out), digests(straight)
    assert {k: v for k, v in found.items() if k.startswith("volumes")} == {
        k: v for k, v in expected.items() if k.startswith("volumes")
    }
    assert not list(out.rglob("*.partial"))
    assert list(verify_output(Location(str(out)))) == []
