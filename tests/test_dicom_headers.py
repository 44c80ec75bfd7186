"""Headers of DICOM files: read here as pydicom reads them, and kept between a search, a reading and the next search."""

import os
import stat

import numpy as np
import pytest
from dicom_files import header, item, save, set_pixels, stored_values, write_series
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import DeflatedExplicitVRLittleEndian

from photon_data.errors import Refused
from photon_data.files import Location
from photon_data.readers import dicom_cache, dicom_header, open_scan
from photon_data.readers.dicom_file import FIRST_BYTES
from photon_data.readers.dicom_header import read_planes
from photon_data.readers.find import find_scans
from photon_data.recipe import Recipe
from photon_pipelines.plan import gather
from photon_pipelines.request import Request

SYNTAXES = ("explicit", "implicit", "deflated", "rle", "jpeg-lossless", "jpeg2000")


def rich_header(number: int) -> Dataset:
    """What real headers have: sequences with and without lengths, a vendor's own elements, padding, odd numbers."""
    ds = header("1.2.826.0.1.3", InstanceNumber=number, ImageType=["ORIGINAL", "PRIMARY", "AXIAL"], KVP="120.0")
    ds.ImagePositionPatient, ds.ImageOrientationPatient = ["-1.5", "2e1", "3.25"], [1, 0, 0, 0, 1, 0]
    ds.PixelSpacing, ds.RescaleSlope, ds.RescaleIntercept = [0.8, 0.7], "1.0 ", -1024
    ds.AcquisitionTime, ds.ContentTime, ds.AcquisitionNumber = "101112.5", "", None
    nested = item(CodeValue="x", ConceptNameCodeSequence=Sequence([item(CodeValue="y")]))
    ds.ReferencedStudySequence, ds.ProcedureCodeSequence = Sequence([nested, nested]), Sequence([])
    ds["ReferencedStudySequence"].is_undefined_length = bool(number % 2)
    nested.is_undefined_length_sequence_item = bool(number % 3)
    block = ds.private_block(0x0029, "VENDOR", create=True)
    for offset in range(5):
        block.add_new(offset, "OB", bytes(100 * number))
    if number % 2:
        ds.PixelPaddingValue = -2000
        ds["PixelPaddingValue"].VR = "SS"
    return ds


def write(path, syntax, number):
    ds = rich_header(number)
    set_pixels(ds, stored_values((8, 9), seed=number))
    if syntax == "deflated":
        ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        ds.save_as(path, enforce_file_format=True)
    else:
        save(ds, path, syntax)
    return path


def read(path, monkeypatch=None):
    """What a file is, or the sentence of its refusal; by pydicom alone with a monkeypatch."""
    try:
        if monkeypatch is None:
            return as_text(read_planes(path))
        with monkeypatch.context() as patched:
            patched.setattr(dicom_header, "plain_header", lambda *_: None)
            return as_text(read_planes(path))
    except Refused as refused:
        return refused.message


def as_text(content):
    planes = [
        {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in p._asdict().items()} for p in content.planes
    ]
    return repr((content.kind, planes))


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_a_plain_header_is_read_as_pydicom_reads_it(tmp_path, monkeypatch, syntax):
    for number in range(6):
        path = write(tmp_path / f"{number}.dcm", syntax, number)
        assert read_planes(path).head, "it was left to pydicom"
        assert read(path) == read(path, monkeypatch)


def test_pixels_that_begin_where_the_first_read_ends_are_found(tmp_path, monkeypatch):
    for syntax in ("explicit", "implicit"):
        begin = write(tmp_path / "short.dcm", syntax, 0) and read_planes(tmp_path / "short.dcm").planes[0].pixels.at
        for at in range(FIRST_BYTES - 4, FIRST_BYTES + 16, 2):
            ds, length = rich_header(0), at - begin - (8 if syntax == "implicit" else 12)
            ds.add_new((0x0029, 0x10F0), "OB", bytes(length))
            set_pixels(ds, stored_values((8, 9), seed=0))
            save(ds, tmp_path / "a.dcm", syntax)
            assert read_planes(tmp_path / "a.dcm").planes[0].pixels.at == at
            assert read(tmp_path / "a.dcm") == read(tmp_path / "a.dcm", monkeypatch)


@pytest.mark.parametrize("value", [0, 48, 63536])
def test_padding_of_a_header_that_does_not_say_whether_its_values_have_a_sign_is_read_as_pydicom_reads_it(
    tmp_path, monkeypatch, value
):
    ds = rich_header(0)
    set_pixels(ds, stored_values((8, 9)).astype(np.uint16))
    ds.PixelPaddingValue = value
    ds["PixelPaddingValue"].VR = "US"
    del ds.PixelRepresentation
    save(ds, tmp_path / "a.dcm", "implicit")
    assert read_planes(tmp_path / "a.dcm").planes[0].pixels.padding == (value, value)
    assert read(tmp_path / "a.dcm") == read(tmp_path / "a.dcm", monkeypatch)


# --- kept headers


def found(folder, cache):
    (source,) = find_scans(folder, headers=str(cache)).sources
    return source


def test_a_second_search_and_the_reading_parse_no_header_again(tmp_path, monkeypatch):
    values = stored_values()
    write_series(tmp_path / "in", values, names=[f"IM{n}" for n in range(7)])  # no suffix tells what they are
    first = found(tmp_path / "in", tmp_path / "private/headers")
    monkeypatch.setattr("photon_data.readers.dicom_header.plain_header", lambda *_: pytest.fail("it was parsed"))
    monkeypatch.setattr("photon_data.readers.dicom_header._read", lambda *_: pytest.fail("it was parsed"))
    monkeypatch.setattr("photon_data.readers.find.may_be_dicom", lambda *_: pytest.fail("it was opened"))
    assert found(tmp_path / "in", tmp_path / "private/headers") == first
    np.testing.assert_array_equal(np.stack(list(open_scan(first).planes())), values)


@pytest.mark.parametrize("is_told_by_time", [True, False])
def test_a_file_that_changed_after_the_search_is_read_as_it_is_now(tmp_path, monkeypatch, is_told_by_time):
    paths = write_series(tmp_path / "in", stored_values(), uid="1.2.3")
    if not is_told_by_time:  # a file system without the time of a change
        monkeypatch.setattr(dicom_cache, "_facts", lambda path: (path.stat().st_size, path.stat().st_mtime_ns))
    source = found(tmp_path / "in", tmp_path / "private/headers")
    times = [path.stat() for path in paths]
    other = stored_values(seed=1)
    for path, was in zip(write_series(tmp_path / "other", other, uid="1.2.3", rescale=(2, -1024)), times, strict=True):
        (tmp_path / "in" / path.name).write_bytes(path.read_bytes())  # of the same size
        os.utime(tmp_path / "in" / path.name, ns=(was.st_atime_ns, was.st_mtime_ns))
    scan = open_scan(source)
    assert scan.slope == 2
    np.testing.assert_array_equal(np.stack(list(scan.planes())), other)


def test_kept_headers_that_are_damaged_or_gone_cost_time_alone(tmp_path):
    write_series(tmp_path / "in", stored_values())
    cache = tmp_path / "private/headers"
    source = found(tmp_path / "in", cache)
    (kept,) = (path for path in cache.rglob("*") if path.is_file())
    content = kept.read_bytes()
    for damaged in (b"", content[:-9], content[:50] + b"\0" + content[51:], b"x" * 99):
        kept.write_bytes(damaged)
        assert found(tmp_path / "in", cache) == source
        open_scan(source)
    kept.unlink()
    assert found(tmp_path / "in", cache) == source and kept.read_bytes() == content


def test_kept_headers_are_their_owners_alone_and_have_no_text_of_a_patient(tmp_path):
    write_series(tmp_path / "in", stored_values())
    cache = tmp_path / "private/headers"
    found(tmp_path / "in", cache)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in [cache.parent, *cache.parent.rglob("*")]}
    assert modes == {0o700, 0o600}
    rows = dicom_cache._read(str(cache), tmp_path / "in")
    assert len(rows) == 7 and "secret" not in repr(rows).lower()


def test_what_is_another_file_now_is_no_slice_because_it_was_one(tmp_path):
    paths = write_series(tmp_path / "in", stored_values(), names=[f"IM{n}" for n in range(7)])
    cache = tmp_path / "private/headers"
    found(tmp_path / "in", cache)
    paths[-1].write_bytes(b"notes" * 200)
    assert len(found(tmp_path / "in", cache).files) == 6
    assert find_scans(tmp_path / "in", headers=str(cache)).ignored == {"(no suffix)": 1}


def test_a_slice_that_is_added_or_taken_away_is_seen_by_the_next_search(tmp_path):
    paths = write_series(tmp_path / "in", stored_values())
    cache = tmp_path / "private/headers"
    found(tmp_path / "in", cache)
    paths[-1].rename(tmp_path / "last.dcm")
    assert len(found(tmp_path / "in", cache).files) == 6
    (tmp_path / "last.dcm").rename(paths[-1])
    assert len(found(tmp_path / "in", cache).files) == 7


def test_a_part_of_the_kept_headers_never_has_more_folders_than_its_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(dicom_cache, "MOST_PER_PART", 3)
    monkeypatch.setattr(dicom_cache, "_place", lambda cache, folder: tmp_path / "cache/00" / folder.name)
    for n in range(6):
        write_series(tmp_path / f"in/{n}", stored_values((2, 4, 4)))
    find_scans(tmp_path / "in", headers=str(tmp_path / "cache"))
    assert len(list((tmp_path / "cache/00").iterdir())) <= 3


def test_inspecting_a_folder_keeps_no_headers(tmp_path, monkeypatch):
    write_series(tmp_path / "in", stored_values())
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in ("memory://inspected", str(tmp_path / "out")):
        gather(Request(tmp_path / "in", Location(out), Recipe()))
    assert not list((tmp_path / "here").iterdir())
    assert (tmp_path / "out.private/dicom-headers").is_dir()
