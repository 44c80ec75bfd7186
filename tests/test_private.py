"""Patients' names in headers, file names and folders: no output but the private file has them."""

import csv
import json
import re
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from dicom_files import write_series
from raw import write_scan
from scans import ct_like
from typer.testing import CliRunner

from photon_cli.data import app
from photon_data.files import from_jsonl
from photon_data.prepare_file import Job
from photon_data.private import without_names
from photon_data.readers.find import find_scans
from photon_data.recipe import Recipe
from photon_pipelines import child

NAME = "Mustermann"
SMALL = ["--set", "shape_zyx=40,32,32", "--set", "model_shape_zyx=14,28,28", "--workers", "1"]


def cli(*words):
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "300"})
    return result.exit_code, result.output


def write_patient(folder, patient, seed=0, **more):
    """Write a CT series whose header, files and folder are full of a name."""

    def edit(ds, z):
        ds.PatientName, ds.PatientID = f"{NAME}^{patient}", f"{NAME}-{patient}"
        ds.InstitutionName, ds.SeriesDescription = f"Clinic {NAME}", f"CT of {NAME}"

    stored = ct_like((16, 30, 24), seed) + 1024
    names = [f"{NAME}_{patient}_{z:03d}.dcm" for z in range(16)]
    return write_series(folder / f"{NAME}_{patient}", stored.astype(np.uint16), edit=edit, names=names, bits=12, **more)


@pytest.fixture
def raw(tmp_path):
    write_patient(tmp_path / "raw" / "first", "Erika", 1)
    write_patient(tmp_path / "raw" / "second", "Erika", 2)  # another series of the same patient
    write_patient(
        tmp_path / "raw" / "first", "Max", 3, slices=[*range(7), *range(9, 16)]
    )  # refused: slices are missing
    return tmp_path / "raw"


def rows_of(out, name):
    return from_jsonl((out / name).read_text())


def whoever_is_named(*places):
    """The files below the places whose path or content has the name."""
    files = [path for place in places for path in [place, *place.rglob("*")] if NAME.lower() in path.name.lower()]
    for path in (path for place in places for path in place.rglob("*") if path.is_file()):
        if NAME.lower().encode() in path.read_bytes().lower():
            files.append(path)
    return files


def test_no_output_but_the_private_file_has_a_patients_name(raw, tmp_path, monkeypatch):
    out, private = tmp_path / "out", tmp_path / "out.private"
    monkeypatch.chdir(tmp_path)
    table = tmp_path / "q.csv"
    with table.open("w", newline="") as file:
        rows = [("volume", "question", "answer"), (f"first/{NAME}_Erika", "Nodule?", "no")]
        rows += [(f"second/{NAME}_Erika", "?", "yes"), (f"{NAME}_Nobody", "Who?", "no")]
        csv.writer(file).writerows(rows)
    said = [
        cli("inspect", raw),
        cli("prepare", raw, out, "--questions", table, *SMALL),
        cli("prepare", raw, out, *SMALL),
    ]
    said += [
        cli("verify", out),
        cli("status", out),
        cli("export", out, "--format", "nifti", "--to", tmp_path / "nifti"),
    ]
    said += [cli("show", next((out / "volumes").iterdir())), cli("show", raw / "second")]
    assert [code for code, _ in said] == [1, 1, 1, 0, 0, 0, 0, 0]
    # what is refused of one scan, and what there is to choose from
    refused = [cli("show", raw / "first", "--series", name) for name in _keys_of(cli("show", raw / "first")[1])]
    assert sorted(code for code, _ in refused) == [0, 2]
    said += [*refused, cli("show", raw), cli("prepare", raw, out, "--dry-run", "--retry-failed", *SMALL)]
    assert NAME.lower() not in "".join(text for _, text in said).lower()
    assert "refused v" in said[1][1]
    shown = tmp_path / "shown"
    shown.mkdir()
    for path in tmp_path.glob("*.png"):
        shutil.move(path, shown)
    assert len(list(shown.iterdir())) == 3
    assert whoever_is_named(out, tmp_path / "nifti", shown) == []

    assert {row["source"].partition("#")[0] for row in rows_of(private, "names.jsonl")} == {
        f"first/{NAME}_Erika",
        f"second/{NAME}_Erika",
        f"first/{NAME}_Max",
    }
    assert [stat.S_IMODE((private / name).stat().st_mode) for name in ("key", "names.jsonl")] == [0o600, 0o600]

    # the patient's two series are in one split, whatever their names
    found = [row for path in (out / "manifests").iterdir() for row in from_jsonl(path.read_text())]
    assert len(found) == 2
    assert len({row["patient"] for row in found}) == len({row["split"] for row in found}) == 1
    assert found[0]["patient"].startswith("p")

    shutil.move(raw / "second", tmp_path / "elsewhere")
    gone = [cli("status", out), cli("prune", out, "--yes"), cli("verify", out)]
    assert [code for code, _ in gone] == [0, 0, 0]
    assert NAME.lower() not in "".join(text for _, text in gone).lower()


def test_masks_and_overrides_tell_no_name(raw, tmp_path):
    for patient in ("Erika", "Max"):
        for name in ("liver", f"{NAME}_lesion"):
            write_scan(raw / f"first/{NAME}_{patient}_m" / f"{name}.nii.gz", array=np.ones((4, 4, 4), np.uint8))
    unreadable = raw / f"first/{NAME}_Max_m/broken.nii.gz"
    unreadable.write_bytes(b"<html>")
    table, wrong = tmp_path / "o.csv", tmp_path / "w.csv"
    table.write_text(f"volume,skip\nsecond/{NAME}_Erika,{NAME} withdrew\n")
    wrong.write_text(f"volume,skip\nsecond/{NAME}_Nobody,gone\nsecond/{NAME}_Erika,a\nsecond/{NAME}_Erika,b\n")
    rescales = tmp_path / "r.csv"
    rescales.write_text(f"volume,slope,intercept\n{NAME}_Nobody,1,0\n")
    masks = ["--masks", "{folder}_m"]
    out = tmp_path / "out"
    said = [
        cli("prepare", raw, out, *SMALL, "--hu-source", rescales),
        cli("prepare", raw, out, *SMALL, "--overrides", wrong),
        cli("prepare", raw, out, *SMALL, "--overrides", table, "--repair", "slices", *masks),
        cli("status", out),
        cli("verify", out),
    ]
    assert [code for code, _ in said] == [2, 2, 1, 0, 0]
    assert "a person left it out: (name) withdrew" in said[2][1]
    assert NAME.lower() not in "".join(text for _, text in said).lower()
    assert whoever_is_named(out) == []


def test_dicom_of_a_declared_data_set_tells_no_name_and_keeps_the_series_of_a_patient_together(raw, tmp_path):
    shutil.rmtree(raw / "first" / f"{NAME}_Max")
    asked = [f"{site}/{NAME}_Erika" for site in ("first", "second")]
    rows = "".join(f"{volume},Nodule {n}?,no\n" for volume in (*asked, f"{NAME}_Nobody") for n in range(3))
    (tmp_path / "q.csv").write_text(f"volume,question,answer\n{rows}")
    manifest, out = tmp_path / "data.yaml", tmp_path / "out"

    def prepare(out, options="{}"):
        recipe = "recipe: {name: chest_ct, shape_zyx: [40, 32, 32], model_shape_zyx: [14, 28, 28]}"
        entry = f"one: {{adapter: table, root: raw, annotations: {{questions: q.csv}}, options: {options}}}"
        manifest.write_text(f"{recipe}\ndatasets:\n  {entry}\n")
        return cli("prepare", "--manifest", manifest, out, "--workers", "1")

    said = [prepare(out), cli("verify", out), prepare(out)]
    assert [code for code, _ in said] == [1, 0, 1]  # three questions name nobody
    assert "2 scans found, 2 of them done before" in said[2][1]
    assert NAME.lower() not in "".join(text for _, text in said).lower()
    assert whoever_is_named(out) == []
    found = [row for path in (out / "manifests").iterdir() for row in from_jsonl(path.read_text())]
    assert len(found) == 6
    assert len({row["patient"] for row in found}) == len({row["split"] for row in found}) == 1

    prepare(tmp_path / "shown", "{id_from: path}")  # as earlier versions did without being asked
    assert all(NAME in row["id"] for row in rows_of(tmp_path / "shown", "volumes.jsonl"))
    _, text = prepare(tmp_path / "shown")
    assert "2 scans keep ids that were made from names" in text and "2 of them done before" in text


def _keys_of(text):
    return re.findall("#[0-9a-f]{8}", text)


@pytest.mark.parametrize("how", ["key", "hash"])
def test_hidden_names_of_nifti_are_in_no_output_also_where_scans_are_refused(tmp_path, how):
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_scan(raw / f"{NAME}_Erika.nii.gz", 1)
    (raw / f"{NAME}_Max.nii.gz").write_bytes((raw / f"{NAME}_Erika.nii.gz").read_bytes()[:500])
    (raw / f"{NAME}_Moritz.nii").write_text("no scan")
    table = tmp_path / "q.csv"
    table.write_text(f"volume,question,answer\n{NAME}_Erika,Nodule?,no\n{NAME}_Nobody,?,no\n{NAME}_Max,?,yes\n")
    options = ["--id-from", how, *SMALL]
    said = [cli("inspect", raw, "--id-from", how, "--workers", "1", "--json", tmp_path / "found.jsonl")]
    said += [cli("prepare", raw, out, "--dry-run", *options), cli("prepare", raw, out, "--questions", table, *options)]
    ids = {row["id"] for row in rows_of(out, "volumes.jsonl")}
    said += [cli("prepare", raw, out, "--retry-failed", *options), cli("status", out), cli("verify", out)]
    (raw / f"{NAME}_Max.nii.gz").unlink()
    said += [cli("status", out), cli("prepare", raw, out, *options), cli("prune", out, "--yes")]
    assert [code for code, _ in said] == [1, 0, 1, 1, 0, 0, 0, 1, 0]
    assert [text for _, text in said if NAME.lower() in text.lower()] == []
    shown = tmp_path / "shown"
    shown.mkdir()
    shutil.move(tmp_path / "found.jsonl", shown)
    assert whoever_is_named(out, shown) == []
    assert ids >= {row["id"] for row in rows_of(out, "volumes.jsonl")}
    assert {row["source"] for row in rows_of(tmp_path / "out.private", "names.jsonl")} == {
        f"{NAME}_Erika.nii.gz",
        f"{NAME}_Moritz.nii",
    }
    assert (tmp_path / "out.private" / "key").exists() == (how == "key")


def test_a_worker_of_a_cluster_logs_no_name(raw, tmp_path):
    """Dask logs the arguments of a task that raises; ours never does."""
    (source,) = [s for s in find_scans(raw).sources if "Max" in s.path]
    job = Job(replace(source, hidden=True), str(tmp_path / "out"), Recipe())
    no_room = 1  # an address space in which nothing can start
    reply = child.run_isolated(job.to_json(), 60, no_room, "run", module="photon_pipelines.scan_job")
    child.end_children("run")
    assert reply.keys() & {"died", "unable"}
    assert NAME not in json.dumps(reply)


def test_ids_from_a_key_stay_and_tell_nothing_without_it(raw, tmp_path):
    ids = []
    for out in (tmp_path / "a", tmp_path / "a", tmp_path / "b"):
        cli("prepare", raw, out, *SMALL)
        ids.append({row["id"]: row["state"] for row in rows_of(out, "volumes.jsonl")})
    assert ids[0].keys() == ids[1].keys()
    assert sorted(ids[1].values()) == ["refused", "unchanged", "unchanged"]
    assert not ids[0].keys() & ids[2].keys()
    shutil.rmtree(tmp_path / "a.private")
    code, text = cli("prepare", raw, tmp_path / "a", *SMALL)
    assert code == 2
    assert "a.private with the key and the names" in text
    assert cli("verify", tmp_path / "a")[0] == 0


def test_names_of_nifti_are_hidden_on_request_and_those_of_dicom_are_shown_on_request(raw, tmp_path):
    scan = write_scan(tmp_path / "nifti" / f"{NAME}_Erika.nii.gz")
    image = nibabel.load(scan)
    image.header["descrip"] = NAME.encode()
    nibabel.save(image, scan)
    code, text = cli("prepare", tmp_path / "nifti", tmp_path / "out", "--id-from", "key", *SMALL)
    assert (code, NAME in text, whoever_is_named(tmp_path / "out")) == (0, False, [])
    cli("prepare", raw, tmp_path / "shown", "--id-from", "path", *SMALL)
    assert any(NAME in row["id"] for row in rows_of(tmp_path / "shown", "volumes.jsonl"))
    assert not (tmp_path / "shown.private").exists()


def test_a_pruned_patient_leaves_the_private_file_too(raw, tmp_path):
    out = tmp_path / "out"
    cli("prepare", raw, out, *SMALL)
    shutil.rmtree(raw / "second")
    (gone,) = [
        row["id"] for row in rows_of(tmp_path / "out.private", "names.jsonl") if row["source"].startswith("second")
    ]
    code, text = cli("prune", out, "--yes")
    assert (code, f"{gone}: its scan is gone" in text) == (0, True)
    assert gone not in (tmp_path / "out.private" / "names.jsonl").read_text()
    shutil.rmtree(raw / "first")
    write_scan(raw / "other.nii")  # a folder without any scan is taken for one that is not mounted
    cli("prune", out, "--yes")
    assert (tmp_path / "out.private" / "names.jsonl").read_text() == ""
    assert json.loads((out / "dataset.json").read_text())["source"] is None
    assert Path(out, "volumes", f"{gone}.ome.zarr").exists() is False


def test_sentences_lose_the_names_of_files_and_no_other_word():
    files = [Path("/data/in/Doe John/every"), Path("/data/in/Doe John/IM_1.dcm"), Path("/data/in/Doe John/12")]
    text = "expected one in every slice, found 12 without in /data/in/Doe John/IM_1.dcm and IM_1.dcm, not IM_1.dcm.old"
    expected = (
        "expected one in (name) slice, found 12 without in /(name)/(name)/(name)/(name) and (name), not (name).old"
    )
    assert without_names(text, files) == expected
