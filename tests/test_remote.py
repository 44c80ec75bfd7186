"""OUT as an object store: fsspec's in-memory one, with the jobs run in this process (children would not share its
memory).
"""

import json

import numpy as np
import pytest
from raw import write_scan

from photon_data import open_volume
from photon_data.errors import UsageError
from photon_data.files import Location
from photon_data.lock import exclusive
from photon_data.prepare_file import prepare_file
from photon_data.recipe import Recipe
from photon_pipelines.cluster import Workers
from photon_pipelines.prepare import prepare
from photon_pipelines.request import Request
from photon_pipelines.verify import verify_output

SMALL = Recipe(shape_zyx=(40, 32, 32), model_shape_zyx=(14, 28, 28))


@pytest.fixture
def out(tmp_path, monkeypatch):
    for name, seconds in (("REFRESH_S", 0.1), ("VOID_S", 1), ("SETTLE_S", 0)):
        monkeypatch.setattr(f"photon_data.lock.{name}", seconds)
    in_process = lambda jobs, *_: ((job, prepare_file(job).to_json()) for job in jobs)  # noqa: E731
    monkeypatch.setattr("photon_pipelines.cluster.execute", in_process)
    out = Location(f"memory://bucket/{tmp_path.name}")
    yield out
    out.remove("")


@pytest.fixture
def source(tmp_path):
    for seed in range(3):
        write_scan(tmp_path / "raw" / f"s{seed}.nii.gz", seed)
    (tmp_path / "raw" / "bad.nii.gz").write_bytes(b"bad")
    return tmp_path / "raw"


def go(source, out):
    return prepare(Request(source=source, out=out, recipe=SMALL), Workers())


def test_an_object_store_holds_what_a_folder_does_and_is_gone_on_with(source, out, tmp_path):
    assert go(source, out).states == {"prepared": 3, "unchanged": 0, "refused": 1, "failed": 0}
    folder = Location(str(tmp_path / "folder"))
    go(source, folder)
    for seed in range(3):
        name = f"volumes/s{seed}.ome.zarr"
        assert out.read(f"{name}/0/c.0.0.0") == folder.read(f"{name}/0/c.0.0.0")
        assert np.array_equal(open_volume(out.at(name), "model").numpy(), open_volume(folder.at(name), "model").numpy())
    assert list(verify_output(out)) == []
    manifest = [json.loads(line) for line in (out.read("manifests/all.jsonl") or b"").decode().splitlines()]
    assert [row["videos"] for row in manifest] == [[out.at(f"volumes/s{seed}.ome.zarr")] for seed in range(3)]
    assert b"<html" in (out.read("report.html") or b"")
    out.remove("volumes/s1.ome.zarr/zarr.json")
    assert go(source, out).states == {"prepared": 1, "unchanged": 2, "refused": 1, "failed": 0}
    assert not out.exists(".lock")


def test_a_second_run_into_an_object_store_is_refused_while_the_first_lives(source, out):
    with exclusive(out), pytest.raises(UsageError, match="another run"):
        go(source, out)
