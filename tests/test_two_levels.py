"""From many volumes on, stores lie in 256 folders: nothing that uses them minds, and what was there stays there."""

import json
import shutil

import pytest
from raw import write_scan
from typer.testing import CliRunner

from photon_cli.data import app
from photon_data import open_volume
from photon_data.files import Location, from_jsonl
from photon_data.mask_store import open_masks
from photon_data.records import read_records
from photon_pipelines.cluster import Workers
from photon_pipelines.verify import verify_output

SMALL = ["--set", "shape_zyx=16,20,20", "--set", "model_shape_zyx=8,10,10", "--workers", "1", "--pictures", "1"]
MASKS = ["--masks", "../masks/{name}.nii.gz"]
# By hand: `printf s2 | sha256sum` begins with ad, s3 with 41.
SHELVES = {"s0": "", "s1": "", "s2": "ad/", "s3": "41/"}


def run(*words):
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "300"})
    return result.exit_code, result.output


@pytest.fixture
def raw(tmp_path):
    return tmp_path / "raw"


def add(raw, *seeds):
    for seed in seeds:
        write_scan(raw / f"s{seed}.nii.gz", seed)
        mask = write_scan(raw.parent / "masks" / f"s{seed}.nii.gz", seed)
        import nibabel
        import numpy as np

        image = nibabel.load(mask)
        marked = (np.asarray(image.dataobj) > 0).astype(np.uint8)
        nibabel.save(nibabel.Nifti1Image(marked, image.affine), mask)


def places(out, folder):
    return {path.relative_to(out / folder).as_posix() for path in (out / folder).rglob("*.ome.zarr")}


def test_a_folder_that_grows_past_the_limit_keeps_its_stores_and_lays_new_ones_deeper(raw, tmp_path, monkeypatch):
    out = tmp_path / "out"
    add(raw, 0, 1)
    code, text = run("prepare", raw, out, *SMALL, *MASKS)
    assert code == 0, text
    monkeypatch.setattr("photon_pipelines.collection.MANY", 4)
    add(raw, 2, 3)
    code, text = run("prepare", raw, out, *SMALL, *MASKS)
    assert code == 0, text
    expected = {f"{shelf}{id}.ome.zarr" for id, shelf in SHELVES.items()}
    assert places(out, "volumes") == expected
    assert places(out, "masks") == expected
    assert list(verify_output(Location(str(out)))) == []
    rows = from_jsonl((out / "manifests" / "all.jsonl").read_text())
    assert {row["volume_id"]: row["videos"] for row in rows} == {
        id: [f"{out}/volumes/{shelf}{id}.ome.zarr"] for id, shelf in SHELVES.items()
    }
    for row in rows:
        assert open_masks(row["videos"][0]).geometry == open_volume(row["videos"][0]).geometry
    assert "4 scans found, 4 of them done before" in run("prepare", raw, out, *SMALL, *MASKS)[1]
    monkeypatch.undo()  # as when fewer are left
    assert "4 scans found, 4 of them done before" in run("prepare", raw, out, *SMALL, *MASKS)[1]
    code, text = run("export", out, "--format", "nifti", "--to", tmp_path / "nifti")
    assert code == 0, text
    exported = from_jsonl((tmp_path / "nifti" / "manifests" / "all.jsonl").read_text())
    assert [row["videos"] for row in exported] == [
        [f"{tmp_path}/nifti/volumes/{SHELVES[row['volume_id']]}{row['volume_id']}.nii.gz"] for row in exported
    ]
    # A store and its masks go with their scan, and one without a row is named.
    (raw / "s2.nii.gz").unlink()
    shutil.copytree(out / "volumes" / "41" / "s3.ome.zarr", out / "volumes" / "00" / "stray.ome.zarr")
    assert [problem.partition(":")[0] for problem in verify_output(Location(str(out)))] == ["volumes/00/stray.ome.zarr"]
    code, text = run("prune", out, "--yes")
    assert code == 0, text
    assert places(out, "volumes") == places(out, "masks") == expected - {"ad/s2.ome.zarr"}
    assert list(verify_output(Location(str(out)))) == []
    assert json.loads((out / "dataset.json").read_text())["counts"]["kept"] == 3


def test_a_scan_that_was_refused_for_a_while_gets_no_second_store(raw, tmp_path, monkeypatch):
    out = tmp_path / "out"
    add(raw, 0, 2)
    whole = (raw / "s2.nii.gz").read_bytes()
    run("prepare", raw, out, *SMALL)
    (raw / "s2.nii.gz").write_bytes(whole[:900])
    assert "refused" in run("prepare", raw, out, *SMALL)[1]
    (raw / "s2.nii.gz").write_bytes(whole)
    monkeypatch.setattr("photon_pipelines.collection.MANY", 2)
    assert run("prepare", raw, out, *SMALL)[0] == 0
    assert places(out, "volumes") == {"s0.ome.zarr", "s2.ome.zarr"}


def test_verify_and_export_say_with_workers_what_they_say_without(raw, tmp_path, monkeypatch):
    out = tmp_path / "out"
    add(raw, 0, 1, 2)
    assert run("prepare", raw, out, *SMALL)[0] == 0
    assert run("export", out, "--format", "nifti", "--to", tmp_path / "here")[0] == 0
    monkeypatch.setattr("photon_pipelines.cluster.FEW", 1)
    code, text = run("export", out, "--format", "nifti", "--to", tmp_path / "there", "--workers", 2)
    assert code == 0, text
    for id in ("s0", "s1", "s2"):
        here, there = (tmp_path / name / "volumes" / f"{id}.nii.gz" for name in ("here", "there"))
        assert here.read_bytes() == there.read_bytes()
    shard = out / "volumes" / "s1.ome.zarr" / "0" / "c.0.0.0"
    content = bytearray(shard.read_bytes())
    content[9] ^= 1
    shard.write_bytes(content)
    location, seen = Location(str(out)), []
    here = sorted(verify_output(location))
    assert [problem.partition(":")[0] for problem in here] == ["volumes/s1.ome.zarr/0/c.0.0.0"]
    found = sorted(verify_output(location, lambda done, total: seen.append((done, total)), workers=Workers(2)))
    assert found == here
    assert seen == [(1, 3), (2, 3), (3, 3)]
    code, text = run("export", out, "--format", "nifti", "--to", tmp_path / "there", "--overwrite", "--workers", 2)
    assert code == 2, text
    assert "s1.ome.zarr" in text
    assert len(read_records(location)) == 3
