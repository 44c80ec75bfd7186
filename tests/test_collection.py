"""A prepared folder over a year: more sources, more data sets, scans that go, a folder that moves."""

import csv
import hashlib
import json
import os
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
from raw import write_scan

from photon_data.dataset_lock import read_lock
from photon_data.errors import UsageError
from photon_data.files import Location, from_jsonl
from photon_data.recipe import Recipe
from photon_pipelines import collection
from photon_pipelines.cluster import Workers
from photon_pipelines.prepare import prepare, prune
from photon_pipelines.request import Request, request_of_manifest
from photon_pipelines.verify import verify_output
from photon_train.rows import read_rows

SMALL = Recipe(shape_zyx=(40, 32, 32), model_shape_zyx=(14, 28, 28))


def run(source, out, **more):
    found = {"source": source, "out": Location(str(out)), "recipe": SMALL, "pictures": 0, **more}
    return prepare(Request(**found), Workers(count=1, timeout_s=120))


def table(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("id", "volume", "question", "answer", "patient", "split"), *rows])
    return path


def rows_of(out):
    """{id of a row: id of its volume} of all manifests."""
    files = sorted((Path(out) / "manifests").glob("*.jsonl"))
    return {row["id"]: row["volume_id"] for file in files for row in from_jsonl(file.read_text())}


def volumes_of(out):
    return {row["id"]: row for row in from_jsonl((Path(out) / "volumes.jsonl").read_text())}


def bytes_of(out):
    files = [path for path in Path(out).rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(out): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def problems(out):
    return list(verify_output(Location(str(out))))


@pytest.fixture
def site_a(tmp_path):
    for seed, name in enumerate(["one.nii.gz", "deep/two.nii"]):
        write_scan(tmp_path / "a" / name, seed)
    return tmp_path / "a"


@pytest.fixture
def site_b(tmp_path):
    for seed, name in enumerate(["one.nii.gz", "three.nii"], 10):
        write_scan(tmp_path / "b" / name, seed)
    return tmp_path / "b"


def test_a_year_of_a_folder_loses_no_row_and_mixes_up_no_scan(site_a, site_b, tmp_path):
    out = tmp_path / "out"
    questions_a = table(
        tmp_path / "a.csv",
        ("a1", "one", "Nodule?", "no", "p1", "train"),
        ("a2", "deep/two", "Fluid?", "yes", "p2", "test"),
    )
    assert run(site_a, out, questions=questions_a, paths="relative").complete
    assert rows_of(out) == {"a1": "one", "a2": "deep__two"}

    # another hospital has a scan of the same name: nothing is written until its ids are told apart
    before = bytes_of(out)
    questions_b = table(
        tmp_path / "b.csv", ("b1", "three", "Nodule?", "yes", "p3", "train"), ("b2", "one", "?", "no", "p4", "train")
    )
    with pytest.raises(UsageError, match=r"one is one.nii.gz of .*/a, not one.nii.gz of .*/b; give .* --id-prefix"):
        run(site_b, out, questions=questions_b)
    assert bytes_of(out) == before
    assert run(site_b, out, questions=questions_b, id_prefix="B_").complete
    assert rows_of(out) == {"a1": "one", "a2": "deep__two", "b1": "B_three", "b2": "B_one"}
    assert problems(out) == []

    # a scan that cannot be read: it is known, and stays known when the other source is prepared
    (site_a / "bad.nii").write_text("not a scan")
    assert run(site_a, out).states["refused"] == 1

    # each source again, without its table or with it: all rows stay, nothing is read again
    for source, more in (
        (site_a, {}),
        (site_b, {"questions": questions_b, "id_prefix": "B_"}),
        (site_a, {"questions": questions_a}),
    ):
        again = run(source, out, **more)
        assert again.states["unchanged"] == 2
        assert again.left == []
        assert len(rows_of(out)) == 4
        assert volumes_of(out)["bad"]["code"] == "not-a-scan"
    (site_a / "bad.nii").unlink()

    # a scan arrives whose name another one has: ids stay
    write_scan(site_a / "later" / "one.nii.gz", 5)
    found = run(site_a, out, id_from="name")
    assert found.states == {"prepared": 1, "unchanged": 2, "refused": 0, "failed": 0}
    (new,) = volumes_of(out).keys() - {"one", "deep__two", "B_one", "B_three"}
    assert new.startswith("one-")
    assert volumes_of(out)[new]["source"] == "later/one.nii.gz"

    # a question leaves its table: its row is named; the folder moves, and its rows with it
    table(questions_a, ("a2", "deep/two", "Fluid?", "yes", "p2", "test"))
    assert run(site_a, out, questions=questions_a).left == ["a1"]
    moved = shutil.move(out, tmp_path / "elsewhere")
    assert problems(moved) == []
    for row in read_rows(Path(moved, "manifests", "train.jsonl")):
        assert Path(row["videos"][0]).is_relative_to(moved)
        assert Path(row["videos"][0], "zarr.json").exists()

    # a scan goes, and a patient withdraws consent
    (site_a / "deep" / "two.nii").unlink()
    place = Location(str(moved))
    assert [(part.root, len(part.gone)) for part in collection.status(place)] == [(str(site_a), 1), (str(site_b), 0)]
    assert collection.to_prune(place) == {"deep__two": "its scan is gone"}
    assert prune(place, ["deep__two"], for_good=False).left == ["a2"]
    assert prune(place, ["B_one"], for_good=True).left == ["b2"]
    assert rows_of(moved) == {"b1": "B_three"}
    assert not list(Path(moved).rglob("*two*"))
    assert problems(moved) == []
    assert run(site_b, moved, id_prefix="B_").states == {"prepared": 0, "unchanged": 1, "refused": 1, "failed": 0}
    assert "B_one" not in rows_of(moved).values()
    assert not (Path(moved) / "volumes" / "B_one.ome.zarr").exists()


def test_what_was_refused_is_not_read_again_until_it_changes_or_is_asked_for(site_a, tmp_path, monkeypatch):
    out = tmp_path / "out"
    (site_a / "bad.nii").write_text("not a scan")
    first = run(site_a, out)
    assert first.states == {"prepared": 2, "unchanged": 0, "refused": 1, "failed": 0}
    read = []

    def execute(jobs, *_):
        read.extend(jobs)
        yield from ()

    monkeypatch.setattr("photon_pipelines.cluster.execute", execute)
    again = run(site_a, out)
    assert (again.states["refused"], read) == (1, [])
    assert not again.complete
    run(site_a, out, retry_failed=True)
    assert [job.source.id for job in read] == ["bad"]


def test_a_source_that_moved_is_the_same_source(site_a, tmp_path):
    out = tmp_path / "out"
    run(site_a, out)
    shutil.copytree(site_a, tmp_path / "copy", copy_function=shutil.copy)  # with new times
    shutil.rmtree(site_a)
    assert run(tmp_path / "copy", out).states["unchanged"] == 2
    assert {row["root"] for row in volumes_of(out).values()} == {str(tmp_path / "copy")}


def test_two_sources_whose_tables_have_one_name_do_not_replace_each_other(site_a, site_b, tmp_path):
    out = tmp_path / "out"
    (site_b / "one.nii.gz").unlink()
    run(site_a, out, questions=table(tmp_path / "x" / "q.csv", ("1", "one", "?", "no", "p1", "train")))
    with pytest.raises(UsageError, match=r"expected that .*questions/q\.jsonl is of this source"):
        run(site_b, out, questions=table(tmp_path / "y" / "q.csv", ("2", "three", "?", "no", "p2", "train")))
    with pytest.raises(UsageError, match="question ids that no other data set has, found 1 of q in z"):
        run(site_b, out, questions=table(tmp_path / "y" / "z.csv", ("1", "three", "?", "no", "p2", "train")))


def test_a_lock_makes_the_same_bytes_from_the_same_files_elsewhere_and_names_what_differs(site_a, site_b, tmp_path):
    questions = table(tmp_path / "q.csv", ("1", "one", "Nodule?", "no", "p1", "train"))
    run(site_a, tmp_path / "out", questions=questions)
    lock_file = tmp_path / "out" / "dataset.lock"
    assert not any(word in lock_file.read_text() for word in ("one", "two", "deep", "Nodule", str(tmp_path)))
    lock = read_lock(lock_file)
    copy = tmp_path / "elsewhere" / "raw"
    for name in ("deep/two.nii", "one.nii.gz"):  # in another order, with other times
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(site_a / name, copy / name)
    again = run(copy, tmp_path / "again", questions=questions, lock=lock)
    assert (again.differences, again.complete) == ([], True)
    assert (tmp_path / "again" / "dataset.lock").read_bytes() == lock_file.read_bytes()

    image = nibabel.load(copy / "one.nii.gz")
    array = np.asarray(image.dataobj).copy()
    array[5, 5, 5] += 1
    nibabel.save(nibabel.Nifti1Image(array, image.affine, image.header), copy / "one.nii.gz")
    (copy / "deep" / "two.nii").unlink()
    write_scan(copy / "more.nii", 3)
    other = run(copy, tmp_path / "other", lock=lock)
    assert not other.complete
    assert other.differences == [
        "one: its source has another content than the lock's",
        "more: not in the lock",
        "1 volumes of the lock are not here: their scans are missing or refused",
        "the questions are not those of the lock",
    ]
    settings = run(site_a, tmp_path / "stored", questions=questions, hu_source="stored", lock=lock)
    assert settings.differences == [
        f"{id}: made with other settings (recipe, rescaling, policy, overrides, grids) from the same content"
        for id in ("deep__two", "one")
    ]


def test_a_lock_of_another_algorithm_or_another_file_is_refused(tmp_path):
    other = tmp_path / "dataset.lock"
    other.write_text('{"algorithm": 99, "salt": "", "volumes": [], "versions": {"photon-ct": "9.9"}}')
    with pytest.raises(UsageError, match=r"found 99 .*; install photon-ct 9\.9"):
        read_lock(other)
    other.write_text("[]")
    with pytest.raises(UsageError, match=r"expected a dataset\.lock"):
        read_lock(other)


def test_an_output_and_an_export_within_the_source_are_no_raw_data(site_a, tmp_path):
    out = site_a / "prepared"
    run(site_a, out)
    (site_a / "export" / "volumes").mkdir(parents=True)
    shutil.copy(site_a / "one.nii.gz", site_a / "export" / "volumes" / "one.nii.gz")
    (site_a / "export" / "export.json").write_text("{}")
    again = run(site_a, out)
    assert again.states == {"prepared": 0, "unchanged": 2, "refused": 0, "failed": 0}


def test_data_sets_that_are_prepared_one_by_one_stand_beside_each_other(site_a, site_b, tmp_path):
    table(tmp_path / "a.csv", ("1", "one", "Nodule?", "no", "p1", "train"), ("2", "deep/two", "?", "yes", "p2", "test"))
    table(tmp_path / "b.csv", ("1", "three", "Nodule?", "yes", "p1", "train"))
    manifest = tmp_path / "data_manifest.yaml"
    manifest.write_text(
        f"recipe: {{name: chest_ct, shape_zyx: [40, 32, 32], model_shape_zyx: [14, 28, 28]}}\ndatasets:\n"
        f"  A: {{adapter: table, root: {site_a}, annotations: {{questions: {tmp_path}/a.csv}}}}\n"
        f"  B: {{adapter: table, root: {site_b}, annotations: {{questions: {tmp_path}/b.csv}},"
        f" options: {{id_prefix: B_}}}}\n"
    )

    def prepare_only(*names):
        asked = request_of_manifest(manifest, names, str(tmp_path / "out"), pictures=0)
        return prepare(asked, Workers(count=1, timeout_s=120))

    first = prepare_only("A")
    assert set(rows_of(tmp_path / "out").values()) == {"one", "deep__two"}
    second = prepare_only("B")
    assert (first.states["prepared"], second.states["prepared"], second.left) == (2, 1, [])
    rows = rows_of(tmp_path / "out")
    assert sorted(rows.values()) == ["B_three", "deep__two", "one"]
    assert {id.partition("/")[0] for id in rows} == {"A", "B"}
    both = prepare_only()
    assert (both.states["unchanged"], both.left, rows_of(tmp_path / "out")) == (3, [], rows)
    (tmp_path / "a.csv").write_text((tmp_path / "a.csv").read_text().replace("train", "val"))
    assert prepare_only("A").left == []
    split_of = {path.stem: path.read_text().count("\n") for path in (tmp_path / "out" / "manifests").iterdir()}
    assert split_of == {"train": 1, "val": 1, "test": 1}
    assert problems(tmp_path / "out") == []


def test_a_run_needs_nothing_that_only_linux_has_to_count_cores(site_a, tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "process_cpu_count", os.cpu_count, raising=False)  # Python 3.13's own asks for affinity
    assert Workers().local_count() >= 1
    assert (
        prepare(Request(site_a, Location(str(tmp_path / "out")), SMALL, pictures=0), Workers()).states["prepared"] == 2
    )


def test_a_question_about_a_scan_that_is_not_there_never_goes_to_one_of_another_source(site_a, site_b, tmp_path):
    out = tmp_path / "out"
    lost = table(tmp_path / "a.csv", ("1", "one", "?", "no", "p1", "train"), ("2", "three", "?", "no", "p2", "train"))
    assert [one.id for one in run(site_a, out, questions=lost).manifests.unmatched] == ["2"]
    run(site_b, out, id_prefix="B_")
    assert rows_of(out) == {"1": "one"}
    (site_a / "one.nii.gz").unlink()
    prune(Location(str(out)), ["one"], for_good=False)
    run(site_a, out)
    assert rows_of(out) == {}
    # names that were mistyped can be corrected
    run(site_b, out, id_prefix="B_", questions=table(tmp_path / "b.csv", ("3", "onne", "?", "no", "p3", "train")))
    corrected = table(tmp_path / "b.csv", ("3", "one", "?", "no", "p3", "train"))
    assert run(site_b, out, id_prefix="B_", questions=corrected).complete
    assert rows_of(out) == {"3": "B_one"}


def as_an_earlier_version_left(out):
    """Take away what earlier versions did not write: source folders in rows, and the questions' files."""
    rows = [{**row, "root": None} for row in volumes_of(out).values()]
    (out / "volumes.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    shutil.rmtree(out / "questions", ignore_errors=True)


def test_questions_that_changed_in_the_folder_never_reach_a_manifest(site_a, tmp_path, monkeypatch):
    out, asked = tmp_path / "out", table(tmp_path / "t.csv", ("q1", "one", "Where?", "left", "p1", "train"))
    run(site_a, out, questions=asked)
    kept = out / "questions" / "t.jsonl"
    whole = kept.read_text()
    kept.write_text(whole.replace("left", "lefu"))
    for use in (lambda: run(site_a, out), lambda: prune(Location(str(out)), ["deep__two"], for_good=False)):
        with pytest.raises(UsageError, match=r"t\.jsonl is damaged: it differs from what dataset\.json records"):
            use()
    assert "left" in (out / "manifests" / "train.jsonl").read_text()
    assert run(site_a, out, questions=asked).complete  # the table itself makes the file anew
    assert kept.read_text() == whole

    with monkeypatch.context() as killed:  # while prune has written questions, and not yet what it says of them
        killed.setattr("photon_pipelines.prepare.finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prune(Location(str(out)), ["one"], for_good=False)
    assert kept.read_text() == ""
    run(site_a, out)
    assert problems(out) == []


def test_a_folder_of_an_earlier_version_keeps_its_rows_and_its_scans(site_a, site_b, tmp_path):
    out = tmp_path / "out"
    rows = [("1", "one", "Nodule?", "A", "p1", "train"), ("2", "deep/two", "Fluid?", "", "p2", "test")]
    run(site_a, out, questions=table(tmp_path / "a.csv", *rows))
    before = {path.name: path.read_bytes() for path in (out / "manifests").iterdir()}
    as_an_earlier_version_left(out)
    with pytest.raises(
        UsageError, match=r"one is one\.nii\.gz of a source that is not recorded, not one\.nii\.gz of .*/b"
    ):
        run(site_b, out)
    assert run(site_b, out, id_prefix="B_").left == []
    assert {path.name: path.read_bytes() for path in (out / "manifests").iterdir()} == before
    assert run(site_a, out).states["unchanged"] == 2


def test_a_volume_that_was_withdrawn_does_not_come_back_in_part_by_another_name_or_time(site_a, tmp_path):
    out = tmp_path / "out"
    run(site_a, out)
    prune(Location(str(out)), ["deep__two"], for_good=True)
    run(site_a, out, limit=1)
    shutil.copy(site_a / "deep" / "two.nii", site_a / "again.nii")
    (site_a / "deep" / "two.nii").unlink()
    assert collection.to_prune(Location(str(out))) == {}
    result = run(site_a, out)
    assert result.states == {"prepared": 0, "unchanged": 1, "refused": 1, "failed": 0}
    assert {path.name for path in (out / "volumes").iterdir()} == {"one.ome.zarr"}
    assert {volumes_of(out)[id]["code"] for id in ("deep__two", "again")} == {"pruned"}


def test_nothing_is_gone_from_a_source_that_is_empty_or_not_there(site_a, tmp_path):
    out = tmp_path / "out"
    run(site_a, out)
    for path in [*site_a.rglob("*.nii*")]:
        path.unlink()
    assert collection.to_prune(Location(str(out))) == {}
    shutil.rmtree(site_a)
    assert collection.to_prune(Location(str(out))) == {}
    (out / "dataset.json").unlink()
    with pytest.raises(UsageError, match=r"expected a dataset\.json with the recipe"):
        prune(Location(str(out)), ["one"], for_good=True)
    assert (out / "volumes" / "one.ome.zarr").exists()


def test_ids_stay_where_a_source_moved_and_a_store_without_a_row_is_not_taken_for_a_namesake(site_a, site_b, tmp_path):
    out = tmp_path / "out"
    run(site_a, out)
    write_scan(site_a / "x" / "one.nii.gz", 7)
    run(site_a, out, id_from="name")
    ids = volumes_of(out).keys()
    site_a.rename(tmp_path / "moved")
    assert run(tmp_path / "moved", out, id_from="name").states["unchanged"] == 3
    assert volumes_of(out).keys() == ids
    with pytest.raises(UsageError, match=r"moved/one\.nii\.gz of .* is one, not moved__one"):
        run(tmp_path, out, include=["moved"])
    (out / "volumes.jsonl").unlink()
    with pytest.raises(UsageError, match=r"one is a store without a row in volumes\.jsonl, and of another scan"):
        run(site_b, out)
    assert run(tmp_path / "moved", out).states["unchanged"] >= 2


@pytest.mark.parametrize("prefix", ["a/b", "../x", ".hidden", "a b"])
def test_a_prefix_that_is_no_part_of_a_file_name_is_misuse(site_a, tmp_path, prefix):
    with pytest.raises(UsageError, match="--id-prefix: expected letters"):
        run(site_a, tmp_path / "out", id_prefix=prefix)
    assert not (tmp_path / "out").exists()
