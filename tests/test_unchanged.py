"""What a run with nothing to do looks at: rows, root metadata and sizes tell that a store is there, and as it was."""

import hashlib
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from raw import write_scan

from photon_data.files import Location
from photon_data.prepare_file import prepare_file
from photon_data.recipe import Recipe
from photon_data.records import UNCHANGED, read_records, write_records
from photon_pipelines.plan import _mapped, gather, plan
from photon_pipelines.prepare import finish
from photon_pipelines.request import Request

SMALL = Recipe(shape_zyx=(40, 32, 32), model_shape_zyx=(14, 28, 28))


@pytest.fixture
def request_done(tmp_path):
    """A request whose three scans are prepared; their rows are those that a second run leaves."""
    for seed in range(3):
        write_scan(tmp_path / "raw" / f"s{seed}.nii.gz", seed)
    request = Request(tmp_path / "raw", Location(str(tmp_path / "out")), SMALL, pictures=0)
    records = [replace(prepare_file(job), state=UNCHANGED, seconds=None) for job in gather(request).jobs]
    write_records(request.out, records)
    return request


def ids_to_do(request):
    return [job.source.id for job in plan(gather(request).jobs, request).jobs]


FILES = ["zarr.json", "0/zarr.json", "0/c.0.0.0", "model/zarr.json", "model/0/zarr.json", "model/0/c.0.0.0"]


@pytest.mark.parametrize("harm", ["longer", "gone", "a folder"])
@pytest.mark.parametrize("file", FILES)
def test_a_store_is_made_again_if_any_of_its_files_is_gone_or_of_another_size(request_done, file, harm):
    assert ids_to_do(request_done) == []
    path = request_done.out.path / "volumes/s1.ome.zarr" / file
    if harm == "longer":
        path.write_bytes(path.read_bytes() + b"x")
    else:
        path.unlink()
        if harm == "a folder":
            path.mkdir()
    assert ids_to_do(request_done) == ["s1"]


def test_a_scan_of_another_size_or_time_and_one_whose_recipe_changed_are_made_again(request_done):
    scan = request_done.source / "s1.nii.gz"
    facts = scan.stat()
    os.utime(scan, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    assert ids_to_do(request_done) == ["s1"]
    scan.write_bytes(scan.read_bytes() + b"\0")
    os.utime(scan, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert ids_to_do(request_done) == ["s1"]
    other = replace(request_done, recipe=replace(SMALL, window_hu=(-1000, 500)))
    assert ids_to_do(other) == ["s0", "s1", "s2"]
    assert ids_to_do(replace(request_done, overwrite=True)) == ["s0", "s1", "s2"]


WRONG = {
    "key": "0" * 64,
    "store_bytes": 1,
    "store_sha256": "0" * 64,
    "arrays_sha256": "0" * 64,
    "model_sha256": None,
    "facts": {"format": "dicom"},
    "patient": "p",
    "reason": "none",
}


@pytest.mark.parametrize("field", WRONG)
def test_a_row_that_says_another_thing_than_its_store_is_made_anew_from_it(request_done, field):
    rows = read_records(request_done.out)
    write_records(request_done.out, [rows[0], replace(rows[1], **{field: WRONG[field]}), rows[2]])
    todo = plan(gather(request_done).jobs, request_done)
    assert not todo.jobs and todo.done == rows


def test_a_row_takes_no_second_record_where_nothing_changed(request_done):
    gathered = gather(request_done)
    todo = plan(gathered.jobs, request_done, gathered.rows)
    assert [id(record) for record in todo.done] == [id(record) for record in gathered.rows.records]


def test_a_store_whose_recorded_metadata_are_no_metadata_is_made_again(request_done):
    rows = read_records(request_done.out)
    for content in (b"", b"[]", b'{"attributes": {"photon": {"facts": 1}}}'):
        root = request_done.out.path / "volumes/s0.ome.zarr/zarr.json"
        root.write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        write_records(request_done.out, [replace(rows[0], store_sha256=digest), *rows[1:]])
        assert ids_to_do(request_done) == ["s0"]


def test_nothing_that_a_run_with_nothing_to_do_writes_is_another(request_done):
    def end():
        todo = plan(gather(request_done).jobs, request_done)
        write_records(request_done.out, todo.done)
        finish(request_done, todo.done, todo.kept, {})
        files = [path for path in Path(request_done.out.path).rglob("*") if path.is_file()]
        return {path: path.read_bytes() for path in files}

    first = end()
    assert end() == first
    assert json.loads(first[request_done.out.path / "dataset.json"])["counts"]["unchanged"] == 3


@pytest.mark.parametrize("count", [0, 1, 64, 65, 300])
@pytest.mark.parametrize("wait_s", [0, 0.001])
def test_items_keep_their_order_whether_threads_take_them_or_not(count, wait_s):
    def double(number):
        time.sleep(wait_s)
        return 2 * number

    assert _mapped(double, range(count)) == list(range(0, 2 * count, 2))
