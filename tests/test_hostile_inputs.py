"""Inputs made to harm: bombs, names that lead elsewhere, control characters. Each costs itself and a sentence."""

import gzip
import io
import json
import logging
import os
import tarfile
import time
import tracemalloc
import zlib
from itertools import product
from pathlib import PureWindowsPath

import numpy as np
import pyarrow
import pytest
from dicom_files import header, save, set_pixels, stored_values
from pyarrow import parquet
from pydicom import dcmread
from pydicom.filewriter import write_file_meta_info
from raw import write_scan

from photon_cli import terminal
from photon_data import prepare_file as preparing
from photon_data.datasets import abdomenatlas
from photon_data.datasets.combine import read_dataset
from photon_data.datasets.declare import read_data_manifest
from photon_data.errors import Refused, UsageError
from photon_data.files import Location, is_safe
from photon_data.lock import exclusive
from photon_data.prepare_file import Job, prepare_file
from photon_data.questions import table as tables
from photon_data.questions.kept import file_of
from photon_data.questions.splits import check_split_names
from photon_data.questions.table import read_table
from photon_data.readers.dicom_header import read_planes
from photon_data.readers.find import find_scans
from photon_data.recipe import Recipe
from photon_data.records import read_records, store_name
from photon_data.store import open_volume, read_metadata
from photon_pipelines.verify import verify_output

SMALL = Recipe(shape_zyx=(40, 32, 32), model_shape_zyx=(14, 28, 28))
GOOD = ["a", "volumes/a.ome.zarr", "a..b", "é" * 127, "Müller 3", "-a", ".a", "con"]
BAD = [
    "",
    "..",
    "a/../b",
    "/a",
    "a//b",
    "a/",
    "./a",
    "a\\b",
    "a\0",
    "a\nb",
    "a\x85",
    "C:a",
    "c:/a",
    "a.",
    "a ",
    "é" * 128,
]


@pytest.fixture
def peak():
    """Call it for the most bytes that Python has held since the test began."""
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


@pytest.mark.parametrize("name", GOOD)
def test_a_name_below_a_folder_is_written_and_read_back(tmp_path, name):
    assert is_safe(name)
    Location(str(tmp_path)).write(name, b"x")
    assert Location(str(tmp_path)).read(name) == b"x"


@pytest.mark.parametrize("name", BAD)
def test_a_name_that_leads_out_or_is_none_on_some_system_is_no_file_and_cannot_be_written(tmp_path, name):
    out = Location(str(tmp_path / "out"))
    (tmp_path / "out").mkdir()
    assert out.read(name) is None and out.size(name) is None and not out.exists(name)
    for use in (lambda: out.write(name, b"x"), lambda: out.remove(name), lambda: file_of(name + "\\")):
        with pytest.raises(UsageError, match="expected "):
            use()
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]
    if name != "a.":  # a suffix follows
        with pytest.raises(UsageError):
            check_split_names([name])
        with pytest.raises(UsageError):
            store_name(name + "/")


def test_of_all_short_names_those_are_safe_whose_every_part_is_a_name_on_windows_and_here():
    for parts in product("aC1-_./: \\\n", repeat=4):
        name = "".join(parts)
        kept = "/".join(part.rstrip(". ") for part in PureWindowsPath(name).parts)  # as Windows makes the file
        has_drive = any(part[1:2] == ":" for part in name.split("/"))  # of any character, since Python 3.12
        assert is_safe(name) == (kept == name and not has_drive and not {*"\n\\"} & {*name}), name


def test_a_lock_that_is_a_link_empties_no_file_elsewhere(tmp_path):
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").symlink_to(tmp_path / "mine")
    with (
        pytest.raises(UsageError, match="expected a folder that can be written to"),
        exclusive(Location(str(tmp_path / "out"))),
    ):
        pass
    assert (tmp_path / "mine").read_text() == "precious"


@pytest.mark.parametrize("prefix", ["../../pwned/x-", "/abs/x-", "sub/x-", "a\\\\b", "x" * 60, ".x"])
def test_a_prefix_of_a_data_manifest_that_is_no_start_of_a_name_is_refused_with_its_line(tmp_path, prefix):
    write_scan(tmp_path / "src" / "a.nii")
    entry = f'datasets:\n  a: {{adapter: folder, root: src, options: {{id_prefix: "{prefix}"}}}}\n'
    (tmp_path / "m.yaml").write_text(entry)
    (entry,) = read_data_manifest(tmp_path / "m.yaml").datasets
    with pytest.raises(UsageError, match=r"m\.yaml, line 2, data set a: id_prefix: expected letters"):
        read_dataset(entry, instruction="?", seed=0)


NINE = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
YAMLS = {
    "tag": ("out: !tag x\n", "line 1: expected plain values, found the tag"),
    "object": ("out: !!python/object/apply:os.system [ls]\n", "the tag"),
    "list as key": ("out: a\n? [a, b]\n: c\n", "line 2: expected a text as key"),
    "itself": ("out: &a [*a]\n", "expected at most 30 levels"),
    "nested aliases": (NINE, "expected at most 30 levels and 100,000 values"),
    "depth": ("out: " + "[" * 5000 + "]" * 5000, "expected at most 30 levels"),
    "no date": ("out: 2024-13-45\n", "line 1: expected YAML, found: a date or number that is none"),
    "digits": (f"seed: {'9' * 5000}\n", "a date or number that is none"),
    "half a letter": ('out: "\\ud800"\n', "line 1: expected text without control characters"),
    "NUL": ('out: "a\\0b"\n', "line 1: expected text without control characters"),
    "twice": ("out: a\nout: b\n", "line 2: expected every key once, found 'out' again"),
    "empty": ("", "found an empty file"),
    "two documents": ("out: a\n---\nout: b\n", "line 2: expected YAML"),
    "infinite": ("datasets: {a: {adapter: folder, root: s, mix: {train: {weight: .inf}}}}\n", "a number above 0"),
    "large": ("# " + "x" * (1 << 20) + "\n", "expected at most 1,048,576 bytes"),
    "latin-1": ("out: Gr\xf6\xdfe\n".encode("latin-1"), "expected UTF-8, found byte 0xf6 on line 1"),
}


@pytest.mark.parametrize("case", YAMLS)
def test_malformed_yaml_is_refused_in_a_sentence(tmp_path, case):
    text, expected = YAMLS[case]
    (tmp_path / "m.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    start = time.monotonic()
    with pytest.raises(UsageError) as caught:
        read_data_manifest(tmp_path / "m.yaml")
    assert expected in str(caught.value)
    assert time.monotonic() - start < 20


def test_the_search_inflates_no_more_of_a_deflated_dicom_than_a_header(tmp_path, peak):
    ds = header("1.2.3", ImagePositionPatient=[0, 0, 0])
    set_pixels(ds, stored_values((8, 8)))
    save(ds, tmp_path / "a.dcm")
    content = (tmp_path / "a.dcm").read_bytes()
    start = dcmread(tmp_path / "a.dcm").file_meta.FileMetaInformationGroupLength + 144
    deflate, zeros = zlib.compressobj(9, zlib.DEFLATED, -15), bytes(1 << 20)
    packed = [deflate.compress(content[start:]), *(deflate.compress(zeros) for _ in range(300)), deflate.flush()]
    meta = dcmread(tmp_path / "a.dcm").file_meta
    meta.TransferSyntaxUID = "1.2.840.10008.1.2.1.99"
    file = io.BytesIO(bytes(128) + b"DICM")
    file.seek(132)
    write_file_meta_info(file, meta)
    (tmp_path / "a.dcm").write_bytes(file.getvalue() + b"".join(packed))
    assert (tmp_path / "a.dcm").stat().st_size < 400_000
    planes = read_planes(tmp_path / "a.dcm").planes
    assert [plane.rows for plane in planes] == [8]
    assert peak() < 150e6


def test_a_header_of_dicom_that_goes_on_and_on_is_refused(tmp_path):
    (tmp_path / "a.dcm").write_bytes(bytes(128) + b"DICM")
    os.truncate(tmp_path / "a.dcm", 50 << 30)  # nearly all of it a hole, as 10^9 empty elements
    with pytest.raises(Refused, match="TooLong"):
        read_planes(tmp_path / "a.dcm")


def test_a_jpeg_larger_than_its_header_says_is_not_decoded(tmp_path):
    for z, plane in enumerate(stored_values((2, 32, 40))):
        position = {"ImagePositionPatient": [0, 0, z], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
        ds = header("1.2.3", PixelSpacing=[1, 1], **position)
        set_pixels(ds, plane)
        save(ds, tmp_path / f"{z}.dcm", "jpeg-lossless")
        content = (tmp_path / f"{z}.dcm").read_bytes()
        sof = content.index(b"\xff\xc3")
        size = b"\xff\xff\xff\xff"  # 65,535 rows and columns: 8 GB
        (tmp_path / f"{z}.dcm").write_bytes(content[: sof + 5] + size + content[sof + 9 :])
    (source,) = find_scans(tmp_path).sources
    record = prepare_file(Job(source, str(tmp_path / "out"), SMALL))
    assert (record.state, record.code) == ("refused", "dicom-undecodable")


def _tar(member: tarfile.TarInfo, path, tail=b""):
    path.write_bytes(gzip.compress(member.tobuf(tarfile.GNU_FORMAT) + tail))


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_long_name_or_attributes_of_a_tar_are_not_read(tmp_path, kind, peak):
    member = tarfile.TarInfo("././@LongLink")
    member.type, member.size = kind, 2 << 30
    _tar(member, tmp_path / "a.tar.gz", bytes(100 << 20))
    tracemalloc.reset_peak()
    found = abdomenatlas.unpack(tmp_path / "a.tar.gz", tmp_path / "out", ["BDMAP_00000001"], lambda count: None)
    assert "a name or attributes of 2,147,483,648 bytes" in found.problems[0]
    assert peak() < 50e6


def test_a_tar_of_more_members_than_any_data_set_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(abdomenatlas, "MAX_MEMBERS", 10)
    _tar(tarfile.TarInfo("a"), tmp_path / "a.tar.gz", tarfile.TarInfo("b").tobuf() * 20 + bytes(1024))
    found = abdomenatlas.unpack(tmp_path / "a.tar.gz", tmp_path / "out", ["BDMAP_00000001"], lambda count: None)
    assert "more than 10 members" in found.problems[0]


def test_a_huge_file_of_holes_is_refused_by_its_header_before_its_bytes_are_read(tmp_path):
    write_scan(tmp_path / "a.nii")
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress((tmp_path / "a.nii").read_bytes()))
    for name in ("a.nii", "b.nii.gz"):
        os.truncate(tmp_path / name, 200 << 30)
    start = time.monotonic()
    records = [prepare_file(Job(source, str(tmp_path / "out"), SMALL)) for source in find_scans(tmp_path).sources]
    assert [(record.state, record.code) for record in records] == [("refused", "surplus")] * 2
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("itk: std::bad_alloc"), OSError(12, "out of memory")])
def test_a_scan_that_memory_does_not_suffice_for_says_so_and_what_to_do(tmp_path, monkeypatch, error):
    def no_room(*_):
        raise error

    write_scan(tmp_path / "a.nii")
    monkeypatch.setattr(preparing, "prepare_volume", no_room)
    (source,) = find_scans(tmp_path).sources
    record = prepare_file(Job(source, str(tmp_path / "out"), SMALL))
    assert (record.state, record.code) == ("failed", "memory")
    assert "--memory" in record.reason


def test_a_mask_of_constant_planes_without_end_does_not_hold_up_the_search(tmp_path):
    content = bytearray(write_scan(tmp_path / "a.nii", shape_zyx=(4, 200, 200)).read_bytes()[:352])
    content[108:112] = np.float32(2**31 - 128).tobytes()  # extensions of 2 GB
    packed = gzip.compress(bytes(content), 1) + gzip.compress(bytes(1 << 20), 1) * 20
    (tmp_path / "lung_mask.nii.gz").write_bytes(packed)
    assert "lung_mask.nii.gz" in [source.path for source in find_scans(tmp_path).sources]


def test_a_cell_of_200000_characters_is_read_and_one_of_20_million_refused(tmp_path):
    long = "x" * 200_000
    (tmp_path / "a.csv").write_text(f"volume,question\ns0,{long}\n")
    assert read_table(tmp_path / "a.csv").rows[0].values["question"] == long
    (tmp_path / "a.csv").write_text(f"volume,question\ns0,{long * 100}\n")
    assert [problem.kind for problem in read_table(tmp_path / "a.csv").problems] == ["long cell"]


@pytest.mark.parametrize("is_dictionary", [True, False])
def test_a_parquet_that_repeats_one_text_beyond_all_memory_is_refused(tmp_path, monkeypatch, is_dictionary):
    monkeypatch.setattr(tables, "MAX_BYTES", 10_000_000)
    text = pyarrow.DictionaryArray.from_arrays(np.zeros(1_000, np.int32), pyarrow.array(["x" * 100_000]))
    text = text if is_dictionary else text.cast(pyarrow.string())
    parquet.write_table(pyarrow.table({"volume": text, "question": text}), tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 1e6
    with pytest.raises(UsageError, match="more than 10,000,000 bytes of values"):
        read_table(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("[" * 100_000, "nested too deep"),
        ('{"a": ' + "9" * 5000 + "}", "a number of more than"),
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": 1, "a": 2}', "the key 'a' twice"),
        ('{"a": "\\ud800"}', "surrogates not allowed"),
    ],
)
def test_odd_json_lines_are_problems_of_their_line(tmp_path, line, expected):
    (tmp_path / "a.jsonl").write_text(f'{{"a": 1}}\n{line}\n')
    (problem,) = read_table(tmp_path / "a.jsonl").problems
    assert problem.place == "line 2" and expected in problem.text


def test_a_row_and_metadata_without_an_end_are_refused_before_they_are_read(tmp_path, peak):
    (tmp_path / "volumes").mkdir()
    for name in ("volumes.jsonl", "volumes/a.ome.zarr/zarr.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        with (tmp_path / name).open("wb") as file:
            file.truncate(1 << 36)  # of holes
    out = Location(str(tmp_path))
    with pytest.raises(UsageError, match="expected at most 67,108,864 bytes on line 1, found more"):
        read_records(out)
    assert read_metadata(out, "volumes/a.ome.zarr") is None
    with pytest.raises(UsageError, match="expected a store of photon-data"):
        open_volume(tmp_path / "volumes" / "a.ome.zarr")
    assert any("volumes.jsonl" in problem for problem in verify_output(out))
    assert peak() < 300e6


EVIL = "a\x1b]0;title\x07\x1b[31m\x9b2J\u202e\r"


def test_control_characters_reach_a_terminal_as_escapes_whoever_prints(monkeypatch, capsys):
    for is_terminal in (False, True):
        file = io.StringIO()
        console = terminal._SafeConsole(markup=False, highlight=False, file=file, force_terminal=is_terminal, width=200)
        monkeypatch.setattr(terminal, "console", console)
        terminal.print_lines([EVIL])
        terminal.print_table(EVIL, [EVIL], [[EVIL]])
        console.print(EVIL, style="red")
        console.print_json(data={EVIL: EVIL})
        with terminal.ProgressBar(EVIL, total=2) as bar:
            bar.update(detail=f"[{EVIL}]")
        said = file.getvalue()
        assert said.count("\\u001b]0;title\\u0007") >= 5
        assert not {"\x07", "\x9b", "\u202e"} & set(said) and "\x1b]" not in said and "2J\x1b" not in said
    record = terminal._PlainRecord("a", logging.WARNING, "a.py", 1, "%s", (EVIL,), None)
    assert record.getMessage() == "a\\u001b]0;title\\u0007\\u001b[31m\\u009b2J\\u202e\\u000d"
    assert json.loads(json.dumps(terminal.plain("é ü \t\n"))) == "é ü \t\n"
