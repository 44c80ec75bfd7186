"""`inspect SOURCE OUT`: what was found is known to the next inspection, and to prepare, until it changes."""

import os

import pytest
from raw import write_scan
from typer.testing import CliRunner

from photon_cli.data import app
from photon_data.files import from_jsonl
from photon_pipelines.scan_job import prepare_job

SMALL = ["--set", "shape_zyx=16,20,20", "--set", "model_shape_zyx=8,10,10"]


@pytest.fixture
def read(monkeypatch):
    """The ids of the scans that are read, in this process."""
    read = []

    def execute(jobs, *_):
        for job in jobs:
            read.append(job.source.id)
            yield job, prepare_job(job.to_json())

    monkeypatch.setattr("photon_pipelines.cluster.execute", execute)
    return read


def run(*words):
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "300"})
    return result.exit_code, result.output


def test_nothing_is_inspected_twice_and_prepare_reads_no_scan_that_was_found_to_be_refused(tmp_path, read):
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_scan(raw / "a.nii.gz", 1)
    torn = write_scan(raw / "torn.nii.gz", 2)
    torn.write_bytes(torn.read_bytes()[:900])
    for expected in (["a", "torn"], []):
        read.clear()
        code, text = run("inspect", raw, out, *SMALL)
        assert (code, sorted(read)) == (1, expected)
        assert "refused (truncated)" in text
    assert not (out / "volumes").exists()
    read.clear()
    code, text = run("prepare", raw, out, *SMALL, "--pictures", 0)
    assert (code, read) == (1, ["a"])
    assert "1 x truncated" in text
    rows = {row["id"]: row["state"] for row in from_jsonl((out / "volumes.jsonl").read_text())}
    assert rows == {"a": "prepared", "torn": "refused"}
    assert run("verify", out)[0] == 0
    inspected = (out / "inspected.jsonl").read_text()
    (out / "inspected.jsonl").write_text(inspected.replace('"truncated"', '"non-finite"', 1))
    assert "inspected.jsonl, row 2 (torn): differs from its own digest; remove the file" in run("verify", out)[1]
    (out / "inspected.jsonl").write_text(inspected)
    # Another recipe, or another file, is looked at.
    read.clear()
    run("inspect", raw, out, *SMALL, "--set", "spacing_mm=3,2,2")
    assert sorted(read) == ["a", "torn"]
    read.clear()
    write_scan(raw / "torn.nii.gz", 2)
    os.utime(raw / "torn.nii.gz", (1, 1))
    code, _ = run("inspect", raw, out, *SMALL, "--set", "spacing_mm=3,2,2")
    assert (code, read) == (0, ["torn"])
    read.clear()
    assert run("prepare", raw, out, *SMALL, "--pictures", 0)[0] == 0
    assert read == ["torn"]


def test_what_is_too_large_as_a_whole_field_is_prepared_without_it(tmp_path, read, monkeypatch):
    monkeypatch.setattr("photon_data.resample.FULL_VOXELS", 10)
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_scan(raw / "a.nii.gz", 1)
    assert run("inspect", raw, out, *SMALL)[0] == 0
    for expected in (["a"], []):
        read.clear()
        code, text = run("prepare", raw, out, *SMALL, "--pictures", 0, "--grids", "full")
        assert (code, read) == (1, expected)
        assert "1 x too-large" in text
    assert run("prepare", raw, out, *SMALL, "--pictures", 0, "--grids", "volume")[0] == 0
    assert read == ["a"]


def test_of_a_scan_that_was_withdrawn_nothing_is_read_or_kept(tmp_path, read):
    raw, out = tmp_path / "raw", tmp_path / "out"
    for seed, name in enumerate(("a", "b")):
        write_scan(raw / f"{name}.nii.gz", seed)
    run("inspect", raw, out, *SMALL)
    assert run("prepare", raw, out, *SMALL, "--pictures", 0)[0] == 0
    (tmp_path / "ids.txt").write_text("b")
    assert run("prune", out, "--ids", tmp_path / "ids.txt", "--yes")[0] == 0
    assert {row["id"] for row in from_jsonl((out / "inspected.jsonl").read_text())} == {"a"}
    read.clear()
    code, text = run("inspect", raw, out, *SMALL, "--set", "spacing_mm=3,2,2")
    assert (code, read) == (1, ["a"])
    assert "taken away by prune" in text
    assert {row["id"] for row in from_jsonl((out / "inspected.jsonl").read_text())} == {"a"}
