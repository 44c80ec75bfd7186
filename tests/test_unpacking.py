"""From the archives that AbdomenAtlas comes in to stores and manifests, with one command."""

import json
import tarfile

import pytest
from published import cli, declare, write_csv, write_v2

from photon_data.datasets.declare import read_data_manifest
from photon_pipelines.unpack import pending

A, B, C, D = (f"BDMAP_0000000{n}" for n in (1, 2, 3, 4))


def archive(folder, number, **cts):
    """part<number>.tar.gz with these CTs, {id: seed of its voxels}."""
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / f"part{number}.tar.gz", "w:gz") as tar:
        for name, seed in cts.items():
            tar.add(write_v2(folder.parent / "made" / f"{name}-{seed}.nii.gz", seed), f"image_only/{name}/ct.nii.gz")
    return folder / f"part{number}.tar.gz"


def reports(folder, *cts, name="atlas", **more):
    """An entry that asks for the reports of these CTs, out of archives in in/, unpacked into cts/."""
    rows = [{"BDMAP ID": ct, "structured report": f"Report of {ct}."} for ct in cts]
    write_csv(folder / f"{name}.csv", ("BDMAP ID", "structured report"), rows)
    return {
        "adapter": "abdomenatlas3",
        "root": "in",
        "annotations": {"reports": f"{name}.csv"},
        "questions": {"report": "structured report"},
        "splits": {"train": 1},
        "options": {"unpack": "cts"},
        **more,
    }


def tree(folder):
    return {
        path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()
    }


def prepared(folder):
    """Exit code, what was printed, and the ids in the manifest."""
    code, output = cli("prepare", "--manifest", folder / "data_manifest.yaml", "--workers", 1)
    manifest = folder / "out/manifests/train.jsonl"
    rows = [json.loads(line) for line in manifest.read_text().splitlines()] if manifest.exists() else []
    return code, output, [row["volume_id"] for row in rows]


def test_two_archives_become_stores_and_rows_and_the_second_run_changes_nothing(tmp_path):
    archive(tmp_path / "in", 1, **{A: 1, C: 3})
    archive(tmp_path / "in", 2, **{B: 2})
    declare(tmp_path, atlas=reports(tmp_path, A, B))
    code, output, ids = prepared(tmp_path)
    assert (code, ids) == (0, [A, B]), output
    assert sorted(path.name for path in (tmp_path / "cts").glob("BDMAP*")) == [A, B]  # nobody asked for C
    before = tree(tmp_path / "cts") | tree(tmp_path / "in")
    code, output, ids = prepared(tmp_path)
    assert (code, ids) == (0, [A, B])
    assert "2 of them done before" in output
    assert tree(tmp_path / "cts") | tree(tmp_path / "in") == before


def test_archives_are_read_again_for_ids_that_are_asked_for_later_and_files_that_are_there_stay(tmp_path):
    archive(tmp_path / "in", 1, **{A: 1, C: 3})
    declare(tmp_path, atlas=reports(tmp_path, A))
    assert prepared(tmp_path)[2] == [A]
    before = tree(tmp_path / "cts")[f"{A}/ct.nii.gz"]
    declare(tmp_path, atlas=reports(tmp_path, A, C))
    assert prepared(tmp_path)[2] == [A, C]
    assert tree(tmp_path / "cts")[f"{A}/ct.nii.gz"] == before


@pytest.mark.parametrize("command", [("prepare", "--dry-run"), ("inspect",)])
def test_looking_says_what_there_is_to_unpack_and_writes_nothing(tmp_path, command):
    archive(tmp_path / "in", 1, **{A: 1})
    path = declare(tmp_path, atlas=reports(tmp_path, A, B))
    before = tree(tmp_path)
    code, output = cli(*command, "--manifest", path)
    assert code == (0 if "--dry-run" in command else 1), output
    words = " ".join(output.replace("│", " ").split())  # a long path has the table's cells broken into lines
    for text in ("1 archives", "part1.tar.gz", "the 2 that", "up to about 0.1 GB"):
        assert text in words
    assert tree(tmp_path) == before
    assert not (tmp_path / "cts").exists()


def test_looking_counts_what_is_there_beside_what_is_archived(tmp_path):
    archive(tmp_path / "in", 1, **{B: 1})
    write_v2(tmp_path / "in" / A / "ct.nii.gz")
    path = declare(tmp_path, atlas=reports(tmp_path, A, B))
    code, output = cli("prepare", "--dry-run", "--manifest", path)
    assert code == 0, output
    assert "the 1 that" in output and "1 scans" in output


def test_a_damaged_archive_costs_its_rest_and_the_run_says_so(tmp_path):
    path = archive(tmp_path / "in", 1, **{A: 1, B: 2})
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    declare(tmp_path, atlas=reports(tmp_path, A, B))
    code, output, ids = prepared(tmp_path)
    assert (code, ids) == (1, [A]), output
    assert f"part1.tar.gz: expected a whole tar archive, found damage in or after {B}:" in output
    assert f"atlas/report/{B} (volume {B}): no such volume" in output
    archive(tmp_path / "in", 1, **{A: 1, B: 2})
    assert prepared(tmp_path)[0::2] == (0, [A, B])


def test_a_damaged_archive_is_partial_success_also_where_another_holds_its_cts(tmp_path):
    archive(tmp_path / "in", 1, **{A: 1}).write_bytes(b"no archive")
    archive(tmp_path / "in", 2, **{A: 1})
    declare(tmp_path, atlas=reports(tmp_path, A))
    assert prepared(tmp_path)[0::2] == (1, [A])
    assert prepared(tmp_path)[0::2] == (0, [A])


def test_a_ct_in_two_archives_is_taken_of_the_first_by_name(tmp_path):
    archive(tmp_path / "in", 2, **{A: 7})
    archive(tmp_path / "in", 1, **{A: 1, B: 2})
    archive(tmp_path / "in", 3, **{B: 2, C: 3})
    declare(tmp_path, atlas=reports(tmp_path, A, C))
    _, output, ids = prepared(tmp_path)
    assert ids == [A, C]
    assert (tmp_path / "cts" / A / "ct.nii.gz").read_bytes() == (tmp_path / f"made/{A}-1.nii.gz").read_bytes()
    assert f"2 CTs are archived more than once, {A} in part1.tar.gz, part2.tar.gz: the first" in output


def test_an_extracted_folder_goes_before_an_unpacked_copy(tmp_path):
    archive(tmp_path / "in", 1, **{A: 1, B: 2})
    declare(tmp_path, atlas=reports(tmp_path, A, B))
    prepared(tmp_path)
    ours = write_v2(tmp_path / "in" / A / "ct.nii.gz", 9)
    assert prepared(tmp_path)[0::2] == (0, [A, B])
    rows = [json.loads(line) for line in (tmp_path / "out/volumes.jsonl").read_text().splitlines()]
    sizes = {row["id"]: row["bytes_in"] for row in rows}
    assert sizes[A] == ours.stat().st_size != (tmp_path / "cts" / A / "ct.nii.gz").stat().st_size


def test_unpacking_into_the_root_itself_finds_every_ct_once(tmp_path):
    archive(tmp_path / "in", 1, **{A: 1, B: 2})
    declare(tmp_path, atlas=reports(tmp_path, A, B, options={"unpack": "in"}))
    assert prepared(tmp_path)[0::2] == (0, [A, B])
    assert prepared(tmp_path)[0::2] == (0, [A, B])


def test_data_sets_that_share_a_folder_share_one_reading(tmp_path):
    archive(tmp_path / "in", 1, **{A: 1, B: 2})
    two = {"first": reports(tmp_path, A, name="first"), "second": reports(tmp_path, B, name="second")}
    (one,) = pending(read_data_manifest(declare(tmp_path, **two)).datasets)
    assert (len(one.archives), one.missing, one.folder) == (1, {A, B}, tmp_path / "cts")


def test_only_ids_of_declared_splits_outside_of_the_benchmark_and_within_the_limit_are_unpacked(tmp_path):
    archive(tmp_path / "in", 1, **{A: 1})
    for name, cts in {"IID_train": [A, B, C], "IID_test": [D]}.items():
        write_csv(tmp_path / f"{name}.csv", ("BDMAP ID",), [{"BDMAP ID": ct} for ct in cts])
    (tmp_path / "benchmark.txt").write_text(B)
    entry = reports(tmp_path, A, B, C, D, splits=["train"])
    entry["annotations"] |= {"splits": ["IID_train.csv", "IID_test.csv"], "benchmark": "benchmark.txt"}
    datasets = read_data_manifest(declare(tmp_path, atlas=entry)).datasets
    assert pending(datasets)[0].missing == {A, C}
    assert pending(datasets, limit=1)[0].missing == {A}


def test_unpacking_into_the_output_folder_is_refused(tmp_path):
    archive(tmp_path / "in", 1, **{A: 1})
    declare(tmp_path, atlas=reports(tmp_path, A, options={"unpack": "out"}))
    code, output, _ = prepared(tmp_path)
    assert (code, "expected a folder of its own to unpack into" in output) == (2, True)
