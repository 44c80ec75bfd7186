"""SOURCE as an object store: a stand-in over a folder, which counts what is read of it, fails, and changes on demand.

The same tree is searched and prepared as a folder and as a URL.
"""

import os
import resource
import shutil
import struct
import tempfile
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pytest
import SimpleITK as sitk
from dicom_files import stored_values, write_enhanced, write_series
from distributed import LocalCluster
from fsspec.implementations.local import LocalFileSystem
from raw import write_scan
from scans import ct_like, frame, to_sitk
from typer.testing import CliRunner

from photon_cli.data import app
from photon_data import bucket
from photon_data.errors import UsageError
from photon_data.files import Location
from photon_data.prepare_file import Job
from photon_data.private import private_folder
from photon_data.readers import object_path
from photon_data.readers.find import find_one_scan, find_scans
from photon_data.readers.object_path import source_path
from photon_data.recipe import Recipe
from photon_data.records import read_records
from photon_pipelines import child
from photon_pipelines.cluster import Needs, Workers, lacking_here
from photon_pipelines.collection import status
from photon_pipelines.inspect import inspect
from photon_pipelines.prepare import prepare
from photon_pipelines.request import Request
from photon_pipelines.verify import verify_output

SMALL = Recipe(shape_zyx=(40, 32, 32), model_shape_zyx=(14, 28, 28))


class Shop(LocalFileSystem):
    """An object store on the local disk: it lists its objects and gives ranges of them, and that is all."""

    protocol = "shop"
    ranges: list = []  # noqa: RUF012 - of the class, since fsspec makes the store: (name, first byte, bytes)
    failing: dict = {}  # noqa: RUF012 - {name: what it raises}
    before_read = staticmethod(lambda name: None)

    @classmethod
    def _strip_protocol(cls, path):
        return str(path).removeprefix("shop://").rstrip("/")

    def cat_file(self, path, start=None, end=None, **_):
        place = Path(self._strip_protocol(path))
        Shop.before_read(place.name)
        if place.name in Shop.failing:
            raise Shop.failing[place.name]
        data = place.read_bytes()[start:end]
        Shop.ranges.append((place.name, start, len(data)))
        return data

    def open(self, *_, **__):
        raise AssertionError("expected ranges alone")


fsspec.register_implementation("shop", Shop, clobber=True)


@pytest.fixture(autouse=True)
def scratch(monkeypatch, tmp_path):
    """The folder of fetched scans, of which nothing stays. Nothing is counted yet, and nothing fails."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(bucket, "PAUSES_S", (0.0, 0.0))
    for name, value in (("ranges", []), ("failing", {}), ("before_read", staticmethod(lambda name: None))):
        monkeypatch.setattr(Shop, name, value)
    yield folder
    assert [path.name for path in folder.iterdir() if path.name.startswith(bucket.SCRATCH)] == []


def tree(folder):
    """Write scans of all formats, label maps, files that are none, and what is refused; return the folder."""
    write_scan(folder / "one.nii.gz", 1)
    write_scan(folder / "site A" / "deep" / "two.nii", 2)
    image = to_sitk(ct_like((16, 24, 28), 3), frame((16, 24, 28)))
    for name in ("three.nrrd", "four.nhdr", "five.mha", "six.mhd", "seven.hdr"):
        sitk.WriteImage(image, str(folder / "itk" / name)) if (folder / "itk").mkdir(exist_ok=True) is None else None
    series = folder / "Doe^Jane" / "ct"
    slices = ct_like((16, 24, 28), 5)
    write_series(series, slices, uid="1.2.3.4", names=[f"IM{z:04d}" for z in range(16)])
    shutil.copy(series / "IM0003", series / "IM0003copy")
    write_series(folder / "Roe" / "a", slices, uid="1.2.3.5", slices=range(8), syntax="implicit")
    write_series(folder / "Roe" / "b", slices, uid="1.2.3.5", slices=range(8, 16), syntax="implicit")
    write_series(folder / "odd", slices, uid="1.2.3.6", syntax="big-endian")
    write_enhanced(folder / "enhanced.dcm", slices)
    mask = np.zeros((16, 24, 28), np.uint8)
    mask[4:9, 5:9, 6:12] = 1
    write_scan(folder / "segmentations" / "liver.nii.gz", array=mask)
    write_scan(folder / "segmentations" / "spleen.nii.gz", array=mask.astype(np.int16) * 3)
    write_scan(folder / "masks" / "no mask.nii.gz", 4)
    sitk.WriteImage(to_sitk(mask, frame((16, 24, 28))), str(folder / "x.seg.nrrd"))
    junk = {
        "README": b"read me",
        "notes.txt": b"n" * 9000,
        "a.json": b"{}",
        ".hidden.nii": b"",
        "__MACOSX/one.nii.gz": b"x",
        "DICOMDIR": b"d" * 200,
        "empty.nii.gz": b"",
        "page.nii.gz": b"<html>no access</html>",
        "lone.mhd": b"NDims = 3\nElementDataFile = gone.raw\n",
        "outside.nhdr": b"NRRD0004\ndata file: ../one.nii.gz\n",
        "long.nrrd": b"NRRD0004\n" + b"#" * (1 << 20),
        "cut.dcm": (series / "IM0001").read_bytes()[:700],
        "photo.dcm": b"\xff\xd8\xff" + bytes(500),
        "prepared/dataset.json": b"{}",
        "prepared/volumes.jsonl": b"",
        "prepared/old.nii.gz": b"x",
    }
    for name, content in junk.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def raw(tmp_path):
    return tree(tmp_path / "raw")


def url_of(folder):
    return f"shop://{folder}"


def found_in(root, **options):
    """What a search says, without what tells a URL from a folder."""
    sources, ignored = find_scans(root, **options)
    folder = sources[0].root.removeprefix("shop://")
    same = {"root": "", "mtime_ns": 0, "headers": ""}
    names = [tuple(os.path.relpath(folder / file, folder) for file in source.files) for source in sources]
    return [(replace(source, names=(), **same), name) for source, name in zip(sources, names, strict=True)], ignored


@pytest.mark.parametrize("options", [{}, {"id_from": "hash"}, {"exclude": ["itk", "*.dcm"]}, {"label_maps": True}])
def test_a_bucket_has_the_scans_ids_and_refusals_of_a_folder(raw, options):
    assert found_in(source_path(url_of(raw)), **options) == found_in(raw, **options)


@pytest.mark.parametrize("name", ["one.nii.gz", "itk/six.mhd", "itk/seven.hdr", "enhanced.dcm"])
def test_one_object_is_one_scan_with_the_data_file_beside_it(raw, name):
    assert found_in(source_path(url_of(raw / name))) == found_in(raw / name)


def test_of_dicom_the_search_reads_first_bytes_alone_and_of_nifti_nothing(tmp_path):
    def comment(ds, z):
        ds.ImageComments = "long " * 1000

    names = [f"IM{z}" for z in range(6)]
    write_series(tmp_path / "raw" / "ct", stored_values((6, 128, 128)), names=names, edit=comment)
    write_scan(tmp_path / "raw" / "one.nii.gz")
    found = find_scans(source_path(url_of(tmp_path / "raw")))
    assert len(found.sources) == 2
    assert sorted(Shop.ranges) == [(f"IM{z}", 0, 1 << 14) for z in range(6)]


def test_the_first_bytes_of_a_large_folder_are_in_memory_when_it_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(object_path, "MOST_HEADS", 16)
    monkeypatch.setattr(object_path, "PART", 8)
    monkeypatch.delattr(bucket.Bucket, "read")  # of one object
    names = [f"IM{z:03d}" for z in range(60)]
    write_series(tmp_path / "raw", stored_values((60, 128, 128)), names=names)
    (source,) = find_scans(source_path(url_of(tmp_path / "raw"))).sources
    assert len(source.files) == 60
    # Once to see that it is DICOM, once for its header.
    assert set(Counter(name for name, *_ in Shop.ranges).values()) <= {1, 2}


def test_a_series_is_named_by_its_folder_and_key(few):
    (series,) = (source for source in find_scans(few).sources if source.format == "dicom")
    named = source_path(f"{url_of(few)}/{series.path}")
    assert find_one_scan(named).bytes == series.bytes
    write_scan(few / "two#2.nii.gz", 2)
    assert find_one_scan(source_path(f"{url_of(few)}/two#2.nii.gz")).path == "two#2.nii.gz"
    with pytest.raises(UsageError, match=f"found 6 in {url_of(few)},"):
        find_one_scan(source_path(url_of(few)))


def test_what_is_kept_of_a_pair_holds_while_both_files_are_the_same(few, tmp_path):
    mask = to_sitk(np.zeros((16, 24, 28), np.uint8), frame((16, 24, 28)))
    sitk.WriteImage(mask, str(few / "masks" / "spleen.hdr"))
    search = partial(find_scans, source_path(url_of(few)), headers=str(tmp_path / "private" / "dicom-headers"))
    assert search().ignored["(label map)"] == 2
    Shop.ranges.clear()
    assert search().ignored["(label map)"] == 2
    assert Shop.ranges == []
    header = bytearray((few / "masks" / "spleen.hdr").read_bytes())
    header[112:120] = struct.pack("<ff", 1, -5)  # scl_slope, scl_inter: negative values are no labels
    (few / "masks" / "spleen.hdr").write_bytes(header)
    assert search().ignored["(label map)"] == 1


# --- runs


@pytest.fixture
def few(tmp_path):
    """A NIfTI file, two headers with data files of their own, a DICOM series without suffixes, a label map, junk."""
    folder = tmp_path / "raw"
    write_scan(folder / "one.nii.gz", 1)
    image = to_sitk(ct_like((16, 24, 28), 3), frame((16, 24, 28)))
    for name in ("four.nhdr", "six.mhd"):
        sitk.WriteImage(image, str(folder / name))
    slices = ct_like((16, 24, 28), 5)
    write_series(
        folder / "Doe^Jane" / "ct", slices, uid="1.2.3.4", rescale=(1, 0), names=[f"IM{z:04d}" for z in range(16)]
    )
    write_scan(folder / "masks" / "liver.nii.gz", array=np.full((16, 24, 28), 1, np.uint8))
    (folder / "README").write_bytes(b"read me")
    (folder / "page.nii.gz").write_bytes(b"<html>no access</html>")
    return folder


def go(source, out, timeout_s=1800, **options):
    return prepare(
        Request(source_path(source), Location(str(out)), SMALL, pictures=0, **options), Workers(1, timeout_s=timeout_s)
    )


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def rows_of(out):
    there = sorted(read_records(Location(str(out))), key=lambda row: row.id)
    return [replace(row, root=None, mtime_ns=0, seconds=None) for row in there]


def test_a_url_gives_the_stores_ids_records_and_manifests_of_the_folder(few, tmp_path):
    local, remote = tmp_path / "local" / "out", tmp_path / "remote" / "out"
    key = private_folder(Location(str(remote))) / "key"
    states = go(few, local, paths="relative").states
    key.parent.mkdir(parents=True)
    shutil.copy(private_folder(Location(str(local))) / "key", key)  # else ids of DICOM are others
    assert (
        go(url_of(few), remote, paths="relative").states
        == states
        == {
            "prepared": 4,
            "unchanged": 0,
            "refused": 1,
            "failed": 0,
        }
    )
    assert rows_of(remote) == rows_of(local)
    for part in ("volumes", "manifests"):
        assert contents(remote / part) == contents(local / part)
    assert list(verify_output(Location(str(remote)))) == []


def test_nothing_is_read_twice_and_nothing_at_all_by_a_run_with_nothing_to_do(few, tmp_path):
    go(url_of(few), tmp_path / "out")
    sizes = {path.name: path.stat().st_size for path in few.rglob("*") if path.is_file()}
    for name, size in sizes.items():  # its beginning by the search, and all of it by a worker
        assert sum(count for of, _, count in Shop.ranges if of == name) <= size + min(size, 1 << 14)
    Shop.ranges.clear()
    assert go(url_of(few), tmp_path / "out").states == {"prepared": 0, "unchanged": 4, "refused": 1, "failed": 0}
    assert Shop.ranges == []
    (found,) = status(Location(str(tmp_path / "out")))
    assert (found.root, found.there, found.unchanged, found.changed, found.new) == (url_of(few), 4, 5, 0, 0)
    assert Shop.ranges == []


def test_what_was_kept_of_objects_is_private_and_read_again_where_it_is_damaged(few, tmp_path):
    go(url_of(few), tmp_path / "out")
    (kept,) = (private_folder(Location(str(tmp_path / "out"))) / "objects").iterdir()
    assert [path.stat().st_mode & 0o077 for path in (kept, kept.parent, kept.parent.parent)] == [0, 0, 0]
    kept.write_bytes(b"damaged")
    assert go(url_of(few), tmp_path / "out").states["unchanged"] == 4


def test_two_buckets_are_both_remembered_and_each_is_listed_anew(few, tmp_path):
    write_scan(tmp_path / "more" / "eight.nii.gz", 8)
    (tmp_path / "more" / "README").write_bytes(b"more")
    requests = [
        Request(source_path(url_of(folder)), Location(str(tmp_path / "out")), SMALL, pictures=0, id_prefix=prefix)
        for folder, prefix in ((few, ""), (tmp_path / "more", "m_"))
    ]
    assert [prepare(request, Workers(1)).states["prepared"] for request in requests] == [4, 1]
    Shop.ranges.clear()
    write_scan(tmp_path / "more" / "nine.nii.gz", 9)
    assert [prepare(request, Workers(1)).states["prepared"] for request in requests] == [0, 1]
    assert {name for name, *_ in Shop.ranges} == {"nine.nii.gz"}


def test_workers_of_a_cluster_fetch_what_they_read(few, tmp_path):
    place = {"processes": False, "protocol": "tcp", "dashboard_address": None}
    with LocalCluster(n_workers=1, threads_per_worker=1, memory_limit="5GiB", **place) as cluster:
        out, workers = Location(str(tmp_path / "out")), Workers(scheduler=cluster.scheduler_address)
        request = Request(source_path(url_of(few)), out, SMALL, pictures=0)
        assert prepare(request, workers).states == {"prepared": 4, "unchanged": 0, "refused": 1, "failed": 0}


def test_an_object_that_fails_costs_itself_and_is_tried_again(few, tmp_path):
    asked = []
    Shop.before_read = asked.append
    Shop.failing["one.nii.gz"] = ConnectionError("https://key:secret@host/one.nii.gz?signature=secret")
    assert go(url_of(few), tmp_path / "out").states == {"prepared": 3, "unchanged": 0, "refused": 1, "failed": 1}
    assert asked.count("one.nii.gz") == 3  # one request and two more
    (row,) = (row for row in read_records(Location(str(tmp_path / "out"))) if row.state == "failed")
    assert (row.id, row.code) == ("one", "fetch")
    assert "ConnectionError" in row.reason
    assert "run the same command again" in row.reason
    assert not [name for name, content in contents(tmp_path / "out").items() if b"secret" in content]
    Shop.failing.clear()
    Shop.ranges.clear()
    assert go(url_of(few), tmp_path / "out").states["prepared"] == 1
    assert {name for name, *_ in Shop.ranges} == {"one.nii.gz"}


def test_a_request_that_fails_twice_is_made_again(few, tmp_path):
    failures = [TimeoutError(), OSError("reset")]

    def fail_twice(name):
        if name == "IM0007" and failures:
            raise failures.pop()

    found = find_scans(source_path(url_of(few))).sources
    Shop.before_read = fail_twice
    (series,) = (source for source in found if source.format == "dicom")
    with bucket.source_at_hand(series) as at_hand:
        assert [file.name for file in at_hand.files] == [f"IM{z:04d}" for z in range(16)]
        assert [file.read_bytes() for file in at_hand.files] == [
            (few / "Doe^Jane" / "ct" / f"IM{z:04d}").read_bytes() for z in range(16)
        ]
    assert not failures


def test_what_the_store_denies_is_not_asked_for_again(few):
    asked = []
    (one,) = find_scans(source_path(url_of(few / "one.nii.gz"))).sources
    Shop.before_read, Shop.failing["one.nii.gz"] = asked.append, PermissionError("Forbidden")
    with pytest.raises(bucket.NotFetched, match="Permission denied"), bucket.source_at_hand(one):
        pass
    assert asked == ["one.nii.gz"]


def test_what_a_store_says_of_its_errors_is_not_repeated(few, monkeypatch):
    def fail(*_, **__):
        raise OSError(5, "https://key:secret@host/one.nii.gz?signature=secret")

    (one,) = find_scans(source_path(url_of(few / "one.nii.gz"))).sources
    for name, refusal in (("info", bucket.NotFetched), ("find", UsageError)):
        with monkeypatch.context() as patch:
            patch.setattr(Shop, name, fail)
            with pytest.raises(refusal, match="OSError") as refused, bucket.source_at_hand(one):
                find_scans(source_path(url_of(few)))
        assert "secret" not in str(refused.value)


def test_an_id_that_another_scan_may_have_is_told_without_what_the_store_says(few, monkeypatch):
    def fail(*_, **__):
        raise ValueError("https://key:secret@host/one.nii.gz?signature=secret")

    assert [object_path.is_there(url_of(few), name) for name in ("one.nii.gz", "masks", "gone")] == [True, True, False]
    monkeypatch.setattr(Shop, "exists", fail)
    with pytest.raises(OSError, match=r"did not give it \(ValueError\)") as refused:
        object_path.is_there(url_of(few), "one.nii.gz")
    assert "secret" not in str(refused.value)


def again(path):
    """Write a file again: the store has another version of it, of the same size."""
    os.utime(path, (1, path.stat().st_mtime + 60))


@pytest.mark.parametrize("change", [again, Path.unlink, lambda path: path.write_bytes(b"shorter")])
@pytest.mark.parametrize("name", ["one.nii.gz", "Doe^Jane/ct/IM0007"])
def test_an_object_that_changed_since_the_search_is_not_read(few, name, change):
    found = find_scans(source_path(url_of(few))).sources
    (source,) = (source for source in found if few / name in [few / file for file in source.files])
    change(few / name)
    Shop.ranges.clear()
    with pytest.raises(bucket.NotFetched, match="as they were listed") as refused, bucket.source_at_hand(source):
        pass
    assert refused.value.code == "changed"
    assert Shop.ranges == []


def test_an_object_that_changes_between_its_pieces_is_not_read(few, monkeypatch):
    monkeypatch.setattr(bucket, "PIECE_BYTES", 5000)
    (one,) = find_scans(source_path(url_of(few / "one.nii.gz"))).sources
    with bucket.source_at_hand(one) as at_hand:
        assert at_hand.files[0].read_bytes() == (few / "one.nii.gz").read_bytes()
    assert max(count for *_, count in Shop.ranges) == 5000
    Shop.before_read = lambda name: len(Shop.ranges) % 2 and again(few / name)
    with pytest.raises(bucket.NotFetched, match="as they were listed"), bucket.source_at_hand(one):
        pass


def test_a_changed_object_is_a_failed_record_and_prepared_by_the_next_run(few, tmp_path, monkeypatch):
    fetched = bucket.fetched

    def changed_before(root, names, *more):
        if "one.nii.gz" in names and Path(names[0]).name == "one.nii.gz" and not done:
            done.append(again(few / "one.nii.gz"))
        return fetched(root, names, *more)

    done = []
    monkeypatch.setattr(bucket, "fetched", changed_before)
    assert go(url_of(few), tmp_path / "out").states == {"prepared": 3, "unchanged": 0, "refused": 1, "failed": 1}
    assert go(url_of(few), tmp_path / "out").states == {"prepared": 1, "unchanged": 3, "refused": 1, "failed": 0}


# --- the disk of the worker


def test_fetched_files_are_their_owners_and_go_with_the_block(few, scratch):
    (one,) = find_scans(source_path(url_of(few / "one.nii.gz"))).sources
    with pytest.raises(KeyError), bucket.source_at_hand(one) as at_hand:
        (folder,) = scratch.iterdir()
        assert folder.stat().st_mode & 0o077 == 0
        assert at_hand.files == (folder / "one.nii.gz",)
        raise KeyError
    assert list(scratch.iterdir()) == []


def test_a_scratch_disk_that_is_too_small_fails_the_scan_with_a_sentence(few, tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(100, 90, 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    # The label map too, since nobody can look at it.
    assert go(url_of(few), tmp_path / "out").states == {"prepared": 0, "unchanged": 0, "refused": 0, "failed": 6}
    rows = read_records(Location(str(tmp_path / "out")))
    assert {row.code for row in rows} == {"scratch-full"}
    assert all("10 bytes free" in row.reason and "TMPDIR" in row.reason for row in rows)


def test_a_write_that_ends_early_fails_the_scan(few):
    (one,) = find_scans(source_path(url_of(few / "one.nii.gz"))).sources
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(bucket.NotFetched, match="File too large"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (one.bytes - 1, limits[1]))
        try:
            with bucket.source_at_hand(one):
                pass
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_child_that_is_killed_leaves_no_copy(few, tmp_path):
    result = go(url_of(few), tmp_path / "out", timeout_s=0.01, include=["one.nii.gz"])
    assert [row.code for row in result.records] == ["timeout"]  # the fixture looks for copies


def test_a_run_that_ends_stops_what_is_fetched_for_it(few, monkeypatch):
    monkeypatch.setattr(bucket, "PIECE_BYTES", 5000)
    (one,) = find_scans(source_path(url_of(few / "one.nii.gz"))).sources
    Shop.before_read = lambda name: child.end_children("a run")
    job = Job(one, str(few / "out"), SMALL).to_json()
    assert child.run_isolated(job, 60, 0, "a run", module="nothing") == {"unable": "the run has ended"}
    assert len(Shop.ranges) == 1 < one.bytes / 5000


def test_what_fails_when_a_run_has_ended_is_not_asked_for_again(few):
    (one,) = find_scans(source_path(url_of(few / "one.nii.gz"))).sources
    asked = []

    def end(name):
        asked.append(name)
        child.end_children("another run")

    Shop.before_read, Shop.failing["one.nii.gz"] = end, TimeoutError()
    child.run_isolated(Job(one, str(few / "out"), SMALL).to_json(), 60, 0, "another run", module="nothing")
    assert asked == ["one.nii.gz"]


def test_a_folder_that_another_process_takes_for_abandoned_is_made_again(scratch, monkeypatch):
    def taken(*_, **__):
        folder = make(prefix=bucket.SCRATCH)
        if len(made) < 1:
            Path(folder).rmdir()
        made.append(folder)
        return folder

    made, make = [], tempfile.mkdtemp
    monkeypatch.setattr(tempfile, "mkdtemp", taken)
    with bucket.scratch_folder() as folder:
        assert str(folder) == made[1]


def test_a_request_that_failed_after_long_is_not_made_again(few, monkeypatch):
    asked = []
    (one,) = find_scans(source_path(url_of(few / "one.nii.gz"))).sources
    Shop.before_read, Shop.failing["one.nii.gz"] = asked.append, TimeoutError()
    monkeypatch.setattr(bucket, "LONG_S", -1.0)
    with pytest.raises(bucket.NotFetched, match="TimeoutError"), bucket.source_at_hand(one):
        pass
    assert asked == ["one.nii.gz"]


def test_what_a_killed_process_left_goes_and_what_another_uses_stays(scratch):
    bucket._remove_abandoned.cache_clear()
    (scratch / f"{bucket.SCRATCH}dead").mkdir()
    (scratch / f"{bucket.SCRATCH}dead" / "Doe.nii").write_bytes(b"x")
    with bucket.scratch_folder() as first:
        assert [path.name for path in scratch.iterdir()] == [first.name]
        bucket._remove_abandoned.cache_clear()
        with bucket.scratch_folder() as second:
            assert {path.name for path in scratch.iterdir()} == {first.name, second.name}


# --- what may be a source, and what is told


@pytest.mark.parametrize("url", ["s3://key:secret@bucket/x", "https://host/x?signature=secret", "zip::s3://secret/x"])
def test_a_url_with_more_than_a_place_is_refused_without_repeating_it(url):
    with pytest.raises(UsageError, match="expected a URL like s3://bucket/folder") as refused:
        source_path(url)
    assert "secret" not in str(refused.value)


def test_a_local_path_may_look_like_a_url_behind_its_first_folder(tmp_path):
    write_scan(tmp_path / "s3:" / "bucket" / "one.nii.gz")
    for place in (f"{tmp_path}/s3://bucket", f"file://{tmp_path}/s3:/bucket"):
        (one,) = find_scans(source_path(place)).sources
        assert one.root == f"{tmp_path}/s3:/bucket"


def test_names_that_are_no_paths_are_left_alone_and_counted(few, monkeypatch):
    info = {"type": "file", "size": 5, "ETag": "x"}
    names = ["a//one.nii", "../two.nii", "b/../three.nii", "n" * 256, "four.nii", "five/", ".six.nii"]
    monkeypatch.setattr(Shop, "find", lambda self, path, **_: {f"{few}/{name}": info for name in names})
    sources, ignored = find_scans(source_path(url_of(few)))
    assert [source.path for source in sources] == ["four.nii"]
    assert ignored == {"(name that is no path)": 4}


def test_a_version_is_the_hash_where_the_store_has_one(few, monkeypatch):
    info = {"type": "file", "size": 5, "ETag": "x", "LastModified": 1}
    found = []
    for change in ({}, {"LastModified": 2}, {"ETag": "y"}):
        monkeypatch.setattr(Shop, "find", lambda self, path, change=change, **_: {f"{few}/a.nii": {**info, **change}})
        found.append(find_scans(source_path(url_of(few))).sources[0].mtime_ns)
    assert found[0] == found[1] != found[2]


def run(*arguments):
    done = CliRunner().invoke(app, [*map(str, arguments)])
    return done.exit_code, " ".join(done.output.split())


def test_commands_read_a_url_and_say_what_they_do_not_read(few, tmp_path):
    options = ("--workers", "1", "--set", "shape_zyx=40,32,32", "--set", "model_shape_zyx=14,28,28")
    url, out = url_of(few), tmp_path / "out"
    code, said = run("inspect", url, out, *options)
    assert (code, "5 scans" in said, url in said or "page.nii.gz" in said) == (1, True, False), said
    assert run("prepare", url, out, *options, "--include", "one.nii.gz")[0] == 0
    code, said = run("status", out)
    assert (code, url in said) == (0, True)
    assert run("show", f"{url}/one.nii.gz", "-o", tmp_path / "one.png")[0] == 0
    assert (tmp_path / "one.png").read_bytes()[:4] == b"\x89PNG"
    code, said = run("prepare", url, out, "--masks", "masks/{name}.nii.gz")
    assert (code, "--masks: expected a local folder as SOURCE" in said) == (2, True)
    code, said = run("prepare", f"{url}/nothing", out)
    assert (code, "expected objects below" in said) == (2, True)
    manifest = tmp_path / "data_manifest.yaml"
    manifest.write_text(f"datasets:\n  a: {{adapter: folder, root: {url}}}\n")
    code, said = run("prepare", "--manifest", manifest, out)
    assert (code, "expected local paths" in said) == (2, True), said


def test_what_was_not_fetched_is_not_told_as_known(few, tmp_path):
    options = ("--workers", "1", "--set", "shape_zyx=40,32,32", "--set", "model_shape_zyx=14,28,28")
    Shop.failing["one.nii.gz"] = TimeoutError()
    code, said = run("prepare", url_of(few), tmp_path / "out", *options, "--include", "one.nii.gz")
    assert (code, "1 x fetch" in said, "not read again" in said) == (1, True, False), said


def test_a_store_whose_library_is_missing_is_told_with_the_extra(tmp_path, monkeypatch):
    def missing(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "url_to_fs", missing)
    code, said = run("prepare", "s3://bucket/scans", tmp_path / "out")
    assert (code, "s3 and gs need the extra cloud" in said) == (2, True)


def test_a_worker_that_cannot_read_source_says_so(few):
    place, size = f"{url_of(few)}/one.nii.gz", (few / "one.nii.gz").stat().st_size
    assert lacking_here(Needs(((place, size, place),))) == ""
    assert "sees another file as a file of SOURCE" in lacking_here(Needs(((place, size + 1, "a file of SOURCE"),)))
    lacking = lacking_here(Needs(((f"{url_of(few)}/gone.nii", 1, "a file of SOURCE"),)))
    assert "cannot read a file of SOURCE (FileNotFoundError); it needs the extra cloud" in lacking


def test_scans_that_were_copied_to_a_bucket_keep_their_ids_and_stores(few, tmp_path):
    go(few, tmp_path / "out")
    ids = [row.id for row in rows_of(tmp_path / "out")]
    assert go(url_of(few), tmp_path / "out").states == {"prepared": 0, "unchanged": 4, "refused": 1, "failed": 0}
    assert [row.id for row in rows_of(tmp_path / "out")] == ids


def test_an_inspection_of_a_url_finds_what_that_of_the_folder_does(few, tmp_path):
    found = []
    for source in (few, url_of(few)):
        request = Request(source_path(source), Location(str(tmp_path / "out")), SMALL, id_from="path")
        records, ignored, _ = inspect(request, Workers(1))
        found.append(([replace(row, root=None, mtime_ns=0, seconds=None) for row in records], ignored))
    assert found[0] == found[1]
