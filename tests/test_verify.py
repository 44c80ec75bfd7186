"""photon-data verify: every byte of OUT, past what cannot be read, and what was not checked."""

import json
import os
import shutil
from pathlib import Path

import pytest
from raw import write_scan
from typer.testing import CliRunner

from photon_cli.data import app
from photon_data.files import Location, digest_of
from photon_pipelines.verify import verify_output

SETTINGS = ["--set", "shape_zyx=16,20,20", "--set", "model_shape_zyx=8,10,10", "--workers", "1"]


def run(*arguments):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    for seed in range(3):
        write_scan(folder / "raw" / f"s{seed}.nii.gz", seed)
    (folder / "raw" / "torn.nii.gz").write_bytes((folder / "raw" / "s0.nii.gz").read_bytes()[:900])
    (folder / "t.csv").write_text("id,volume,question,answer,split\nq,s0,Where?,left,train\np,s1,Who?,x,test\n")
    code, text = run("prepare", folder / "raw", folder / "out", *SETTINGS, "--questions", folder / "t.csv")
    assert code == 1, text  # the torn one
    return folder


@pytest.fixture
def out(made, tmp_path):
    """A copy, for each test to harm."""
    shutil.copytree(made / "out", tmp_path / "out")
    shutil.copytree(made / "raw", tmp_path / "raw", copy_function=shutil.copy2)
    return tmp_path / "out"


def problems(out: Path) -> list[str]:
    return list(verify_output(Location(str(out))))


def test_what_prepare_left_has_no_problem_and_all_of_it_is_checked(out):
    unchecked = []
    assert list(verify_output(Location(str(out)), unchecked=unchecked.append)) == []
    assert unchecked == []


def test_a_flipped_bit_is_found_in_every_file_of_out_wherever_it_is(out):
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and path.name != ".lock"]
    names = {path.relative_to(out).as_posix() for path in files}
    assert {"volumes.jsonl", "dataset.json", "dataset.lock", "report.html", "questions.json"} < names
    assert {"manifests/train.jsonl", "manifests/test.jsonl", "questions/t.jsonl"} < names
    for path in files:
        content = path.read_bytes()
        places = (
            [*range(0, len(content), 97)] if path.parent == out and path.suffix != ".html" else [3, len(content) // 2]
        )
        places += [content.rindex(b"sha256") + 5] if b"sha256" in content else []  # the name of a digest
        for at in places:
            flipped = bytearray(content)
            flipped[at] ^= 1
            path.write_bytes(flipped)
            assert problems(out), (path, at, flipped[max(at - 20, 0) : at + 20])
        path.write_bytes(content)
    assert problems(out) == []


@pytest.mark.parametrize("name", ["report.html", "questions.json", "dataset.lock", "questions/t.jsonl"])
def test_a_file_that_is_gone_is_named(out, name):
    (out / name).unlink()
    assert problems(out) == [f"{name}: missing"]


def test_a_row_that_is_gone_and_a_row_that_says_another_thing_than_its_store_are_named(out):
    path = out / "volumes.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    refused = [row["id"] for row in rows if row["state"] == "refused"]
    assert refused == ["torn"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["id"] != "torn"))
    assert problems(out) == ["volumes.jsonl: 3 rows, where dataset.json counts 4; run prepare again"]
    rows[1]["facts"]["cut_mm"]["x"] = [99.0, 0.0]
    rows[1]["row_sha256"] = digest_of(rows[1], "row_sha256")  # a row that is sound in itself
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = "s1: its row in volumes.jsonl has another facts than volumes/s1.ome.zarr; run prepare again"
    assert problems(out) == [said]


def folder_in_place(path: Path):
    path.unlink()
    path.mkdir()


def deep_json(path: Path):
    path.write_text("[" * 100_000)


@pytest.mark.parametrize(
    ("harm", "name"),
    [
        (folder_in_place, "volumes/s0.ome.zarr/0/c.0.0.0"),
        (deep_json, "volumes/s0.ome.zarr/zarr.json"),
        (folder_in_place, "volumes/s0.ome.zarr/zarr.json"),
        (shutil.rmtree, "volumes/s0.ome.zarr"),
        (deep_json, "dataset.json"),
        (folder_in_place, "dataset.json"),
        (deep_json, "volumes.jsonl"),
        (folder_in_place, "report.html"),
        (deep_json, "manifests/train.jsonl"),
    ],
)
def test_what_cannot_be_read_is_named_and_what_follows_is_checked(out, harm, name):
    harm(out / name)
    with (out / "volumes/s2.ome.zarr/model/zarr.json").open("a") as file:
        file.write(" ")
    (out / "manifests/test.jsonl").unlink()
    found = problems(out)
    assert any(name.split("/zarr.json")[0] in problem for problem in found)
    assert any(problem.startswith("volumes/s2.ome.zarr/model/zarr.json: of ") for problem in found)
    assert any("manifests/test.jsonl: missing" in problem for problem in found) or name == "dataset.json"
    code, text = run("verify", out)
    assert (code, f"3 stores checked, {len(found)} problems" in text) == (1, True)


def test_an_error_of_the_disk_costs_one_file(out, monkeypatch):
    open_ = Path.open

    def failing(path, *more, **options):
        if path.match("s1.ome.zarr/0/c.0.0.0"):
            raise OSError(5, "Input/output error")
        return open_(path, *more, **options)

    monkeypatch.setattr(Path, "open", failing)
    assert problems(out) == ["volumes/s1.ome.zarr/0/c.0.0.0: cannot be read (Input/output error)"]


def test_what_was_not_checked_is_said(out):
    (out / "nifti").mkdir()
    rows = [json.loads(line) for line in (out / "volumes.jsonl").read_text().splitlines()]
    for row in rows:
        del row["row_sha256"]
    (out / "volumes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, text = run("verify", out)
    assert (code, "volumes.jsonl, row 1: expected its own digest, found none" in text) == (1, True)
    dataset = json.loads((out / "dataset.json").read_text())
    del dataset["sha256"], dataset["files"]
    (out / "dataset.json").write_text(json.dumps(dataset))
    code, text = run("verify", out)
    assert code == 0
    assert "not checked: dataset.json (of an earlier version" in text
    assert "not checked: 4 rows of volumes.jsonl (of an earlier version" in text
    assert "not checked: nifti (not a part of what prepare writes)" in text
    assert "3 stores checked, 0 problems" in text


def test_a_scan_of_the_same_size_and_time_is_made_again_where_its_content_is_checked(out):
    source = out.with_name("raw")
    scan = write_scan(source / "plain.nii", 7)

    def prepare(*more):
        code, text = run("prepare", source, out, *SETTINGS, "--include", "plain.nii", *more)
        assert code == 0, text
        counts = json.loads((out / "dataset.json").read_text())["counts"]
        return counts["prepared"], counts["unchanged"], (out / "volumes/plain.ome.zarr/0/c.0.0.0").read_bytes()

    first = prepare()
    state, content = scan.stat(), bytearray(scan.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 4000] = bytes(4000)
    scan.write_bytes(content)
    os.utime(scan, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert prepare() == (0, 1, first[2])
    made, unchanged, voxels = prepare("--check", "content")
    assert (made, unchanged) == (1, 0)
    assert voxels != first[2]
    assert prepare("--check", "content") == (0, 1, voxels)
    assert run("prepare", source, out, *SETTINGS, "--check", "bytes")[0] == 2
