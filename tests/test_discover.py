import gzip
import hashlib
import json
import os
import re
import stat
import tempfile
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from dicom_files import stored_values, write_series
from hypothesis import given
from hypothesis import strategies as st
from reading import voxels

from photon_data.errors import Refused, UsageError
from photon_data.prepare_file import fingerprint
from photon_data.readers import find, open_scan
from photon_data.readers.dicom_series import Series, Stack
from photon_data.readers.find import Grouped, Named, assign_ids, find_one_scan, find_scans
from photon_data.scan import Source, names_below

NOBODY = 65534
NIFTI = nib.Nifti1Image(np.zeros((2, 3, 4), "i2"), np.eye(4)).to_bytes()
DICOM = bytes(128) + b"DICM" + bytes(40)


def fill(root: Path, *names: str, data: bytes = NIFTI) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def paths(root: Path) -> list[str]:
    return [source.path for source in find_scans(root).sources]


def ids(root: Path, id_from: str = "path") -> dict[str, str]:
    return {source.path: source.id for source in find_scans(root, id_from=id_from).sources}


def hash_of(path: str, digits: int = 6) -> str:
    return hashlib.sha256(path.encode()).hexdigest()[:digits]


@pytest.fixture
def series(monkeypatch):
    """Series by the first letter of a file's name, as if the headers said so; files named bad* are unreadable."""

    def group(files, headers):
        bad = [path for path in files if path.name.startswith("bad")]
        keys = sorted({path.name[0] for path in files if path not in bad})
        series = []
        for key in keys:
            members = [path for path in files if path.name[0] == key and path not in bad]
            uid = f"{key} {files[0].parent}"
            series.append(
                Series(uid, members, [Stack(f"{key}123", members, "")], Counter({"(DICOM scout, no CT volume)": 1}))
            )
        unreadable = [(path, Refused("not-a-scan", f"{path.name}: no DICOM")) for path in bad]
        return Grouped(series, unreadable, Counter({"(DICOM Segmentation)": 1}))

    monkeypatch.setattr(find, "group_series", group)


def test_every_format_is_found_in_any_case_sorted_and_the_rest_is_counted(tmp_path):
    fill(
        tmp_path,
        "b/y.nii.gz",
        "b/x.NII",
        "a.Nii.GZ",
        "c.hdr",
        "c.img",
        "d.nrrd",
        "e.nhdr",
        "f.mha",
        "g.MHD",
        "h.hdr.gz",
        "h.img.gz",
    )
    fill(tmp_path, "report.pdf", "notes.TXT", "b/notes.txt", "stray.img", "LICENCE", "v.1.Jane Doe", "DICOMDIR")
    found = find_scans(tmp_path)
    expected = ["a.Nii.GZ", "b/x.NII", "b/y.nii.gz", "c.hdr", "d.nrrd", "e.nhdr", "f.mha", "g.MHD", "h.hdr.gz"]
    assert [source.path for source in found.sources] == expected
    assert found.ignored == {"(DICOMDIR)": 1, "(no suffix)": 1, "(other)": 1, ".img": 1, ".pdf": 1, ".txt": 2}
    assert {source.path: len(source.files) for source in found.sources}["c.hdr"] == 2
    assert all(file.is_absolute() for source in found.sources for file in source.files)


@pytest.mark.parametrize(
    ("root", "files", "names"),
    [
        ("/raw", ["/raw/a/b.nii", "/raw2/c.nii"], ("a/b.nii", "/raw2/c.nii")),
        ("/raw", ["/raw/a/../../d.raw"], ("a/../../d.raw",)),  # behind a link, ".." is not the folder before it
        ("/", ["/b.nii"], ("b.nii",)),
        ("", ["/raw/b.nii"], ("/raw/b.nii",)),
        ("s3://bucket/raw", ["a/b.nii"], ("a/b.nii",)),
        ("s3://bucket/raw", ["/tmp/fetched/a/b.nii"], ("/tmp/fetched/a/b.nii",)),
    ],
)
def test_files_are_held_as_names_and_found_again_also_outside_of_the_root(root, files, names):
    source = Source("id", "b.nii", names_below(root, map(Path, files)), "nifti", 1, 2, root=root)
    assert source.names == names
    assert source.files == tuple(map(Path, files))
    data = json.loads(json.dumps(source.to_json()))
    assert data["files"] == files and "names" not in data
    assert Source.from_json(data) == source


def test_pairs_are_told_apart_in_any_case(tmp_path):
    fill(tmp_path, "c.hdr", "c.img", "C.hdr", "C.img", "D.HDR", "D.IMG", "e.hdr.gz", "e.img.gz", "f.hdr")
    files = {source.path: [file.name for file in source.files] for source in find_scans(tmp_path).sources}
    pairs = {"C.hdr": "C.img", "D.HDR": "D.IMG", "c.hdr": "c.img", "e.hdr.gz": "e.img.gz"}
    assert files == {header: [header, data] for header, data in pairs.items()} | {"f.hdr": ["f.hdr"]}


def test_a_source_changes_with_the_name_size_and_time_of_each_of_its_files(tmp_path):
    fill(tmp_path, "c.hdr", "c.img", "one.nii")
    for name in ("c.hdr", "c.img", "one.nii"):
        os.utime(tmp_path / name, ns=(1, 2**60))

    def mark(number=0):
        return find_scans(tmp_path).sources[number].mtime_ns

    before = mark()
    assert find_scans(tmp_path).sources[0].bytes == 2 * len(NIFTI) and mark() == before
    assert mark(1) == 2**60  # of one file it is its time, as ever
    os.utime(tmp_path / "c.hdr", ns=(1, 2**59))  # an older file came back: size and latest time are the same
    assert 0 <= mark() < 2**63 and mark() != before


def test_hidden_files_are_passed_over(tmp_path):
    fill(tmp_path, "._scan.nii.gz", ".hidden.nii", ".git/scan.nii", "__MACOSX/scan.nii", "a/._b.nii", "scan.nii")
    assert paths(tmp_path) == ["scan.nii"] and find_scans(tmp_path).ignored == {}


def test_a_root_may_be_one_file_or_a_link_or_lie_in_a_hidden_folder(tmp_path):
    fill(tmp_path, ".cache/real/x.nii", ".cache/real/y.nii")
    (tmp_path / "link").symlink_to(tmp_path / ".cache/real")
    (tmp_path / "link.nii").symlink_to(tmp_path / ".cache/real/x.nii")
    assert paths(tmp_path / "link") == paths(tmp_path / ".cache/real") == ["x.nii", "y.nii"]
    assert paths(tmp_path / ".cache/real/x.nii") == ["x.nii"]
    assert paths(tmp_path / "link.nii") == ["link.nii"]


def test_links_are_followed_once_and_never_in_circles(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    fill(root, "a/scan.nii")
    fill(outside, "other.nii", "folder/deep.nii", "folder/deeper/x.nii", ".hidden.nii")
    (root / "again.nii").symlink_to(root / "a/scan.nii")
    (root / "b").symlink_to(root / "a")
    (root / "circle").symlink_to(root)
    assert paths(root) == ["a/scan.nii"] and find_scans(root).ignored == {}
    (root / "z.nii").symlink_to(outside / "other.nii")
    (root / "a/up.nii").symlink_to("../../outside/other.nii")
    (root / "out").symlink_to(outside)
    (root / "same").symlink_to(outside / "folder")
    (outside / "folder/back").symlink_to(root)
    (outside / "folder/above").symlink_to(tmp_path)
    (root / "broken.nii").symlink_to(root / "nowhere.nii")
    (root / "self.nii").symlink_to(root / "self.nii")
    found = find_scans(root)
    assert paths(root) == ["a/scan.nii", "a/up.nii", "out/folder/deep.nii", "out/folder/deeper/x.nii"]
    assert found.ignored == {"(link to a file that is not there)": 2, "(link)": 1} and found == find_scans(root)
    without = find_scans(root, follow_links=False)
    assert [source.path for source in without.sources] == ["a/scan.nii"] and without.ignored == {"(link)": 9}


def test_a_hub_cache_is_read_through_its_links_from_the_snapshot_and_from_above(tmp_path):
    cache = tmp_path / "datasets--o--CT"
    fill(cache, "blobs/aa11", "blobs/bb22", "refs/main")
    for revision, names in {"r1": ("x.nii", "y.hdr", "y.img"), "r2": ("x.nii",)}.items():
        for name in names:
            link = cache / "snapshots" / revision / "valid" / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(f"../../../blobs/{'bb22' if name == 'y.img' else 'aa11'}")
    (cache / "snapshots/r1/valid/y.hdr").unlink()
    (cache / "snapshots/r1/valid/y.img").unlink()
    assert paths(cache / "snapshots/r2") == ["valid/x.nii"]
    found = find_scans(cache)
    assert [source.path for source in found.sources] == ["snapshots/r1/valid/x.nii"]
    assert found.ignored == {"(no suffix)": 2}  # refs/main and the other blob; the scan's blob is the scan
    assert open_scan(found.sources[0]).geometry.shape_zyx == (4, 3, 2)


def test_a_header_and_its_data_file_may_both_be_links(tmp_path):
    image = nib.Nifti1Pair(np.arange(24, dtype="i2").reshape(2, 3, 4), np.eye(4))
    image.to_filename(tmp_path / "blobs.hdr")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.hdr").symlink_to(tmp_path / "blobs.hdr")
    (tmp_path / "in/a.img").symlink_to(tmp_path / "blobs.img")
    found = find_scans(tmp_path / "in")
    assert found.ignored == {} and voxels(open_scan(found.sources[0])).ravel().sum() == 276


def test_a_link_to_a_hidden_file_of_the_root_is_the_scan(tmp_path):
    fill(tmp_path, ".git/annex/objects/MD5-1.nii")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/scan.nii").symlink_to("../.git/annex/objects/MD5-1.nii")
    (tmp_path / "hidden").symlink_to(".git")
    found = find_scans(tmp_path)
    assert [source.path for source in found.sources] == ["sub/scan.nii"] and found.ignored == {}
    assert open_scan(found.sources[0]).geometry.shape_zyx == (4, 3, 2)


def test_a_pipe_with_the_name_of_a_scan_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "scan.nii.gz")
    assert find_scans(tmp_path) == ([], {"(special file)": 1})


def test_what_cannot_be_read_is_a_source_with_a_problem(tmp_path, monkeypatch):
    fill(tmp_path, "good.nii", "locked.nii", "IM0001", "sub/inner.nii")
    locked = {str(tmp_path / "locked.nii"), str(tmp_path / "IM0001")}
    scandir, access = os.scandir, os.access

    def closed_folder(path):
        if Path(path).name == "sub":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    def closed_file(path, mode):
        return str(path) not in locked and access(path, mode)

    monkeypatch.setattr(os, "scandir", closed_folder)
    monkeypatch.setattr(os, "access", closed_file)
    no = PermissionError(13, "no")
    monkeypatch.setattr("photon_data.readers.dicom_header.is_dicom", lambda _: (_ for _ in ()).throw(no))
    sources = {source.path: source for source in find_scans(tmp_path).sources}
    assert sorted(sources) == ["IM0001", "good.nii", "locked.nii", "sub"]
    assert {path for path, source in sources.items() if source.problem} == {"IM0001", "locked.nii", "sub"}
    with pytest.raises(Refused, match="readable") as caught:
        open_scan(sources["locked.nii"])
    assert caught.value.code == "unreadable"


@pytest.fixture
def forbidding(tmp_path):
    """A folder whose permissions count: nothing is forbidden to root, so a test as root runs as nobody for a while."""
    if os.getuid() != 0:
        yield tmp_path
        return
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, 0)
        try:
            yield Path(folder)
        finally:
            os.setresuid(0, 0, 0)


def test_permissions_of_the_real_file_system_are_problems(forbidding):
    fill(forbidding, "locked.nii", "sub/inner.nii", "open/inner.nii")
    (forbidding / "locked.nii").chmod(0)
    (forbidding / "sub").chmod(0)
    (forbidding / "open").chmod(stat.S_IRUSR)
    problems = {source.path: bool(source.problem) for source in find_scans(forbidding).sources}
    (forbidding / "sub").chmod(stat.S_IRWXU)
    (forbidding / "open").chmod(stat.S_IRWXU)
    assert problems == {"locked.nii": True, "sub": True, "open/inner.nii": True}


def test_no_root_and_unknown_ids_are_usage_errors(tmp_path):
    with pytest.raises(UsageError, match="there is no"):
        find_scans(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="path, name or hash"):
        find_scans(tmp_path, id_from="patient")


def test_files_are_counted_while_they_are_looked_at(tmp_path):
    fill(tmp_path, "a.nii", "b.txt", "sub/c.nii", ".hidden")
    seen = []
    find_scans(tmp_path, on_file=seen.append)
    assert seen == [1, 2, 3]


def test_globs_choose_by_name_or_by_path_and_what_they_leave_out_is_counted(tmp_path):
    fill(tmp_path, "a/ct.nii", "a/pet.nii", "b/old/ct.nii", "b/ct.hdr", "b/ct.img", "b/notes.txt", "ct.nii")

    def left(**globs):
        found = find_scans(tmp_path, **globs)
        return [source.path for source in found.sources], found.ignored

    everything = ["a/ct.nii", "a/pet.nii", "b/ct.hdr", "b/old/ct.nii", "ct.nii"]
    assert left() == (everything, {".txt": 1})
    assert left(include=["ct.*"]) == (["a/ct.nii", "b/ct.hdr", "b/old/ct.nii", "ct.nii"], {"(not in --include)": 2})
    assert left(include=["a/*", "b/ct.hdr"])[0] == ["a/ct.nii", "a/pet.nii", "b/ct.hdr"]
    assert left(include=["a/"])[0] == left(include=["./a"])[0] == ["a/ct.nii", "a/pet.nii"]
    assert left(include=["**/ct.nii"])[0] == ["a/ct.nii", "b/old/ct.nii", "ct.nii"]
    assert left(exclude=["old", "pet*"]) == (["a/ct.nii", "b/ct.hdr", "ct.nii"], {".txt": 1, "(in --exclude)": 2})
    assert left(exclude=["b/old"])[0] == ["a/ct.nii", "a/pet.nii", "b/ct.hdr", "ct.nii"]
    assert left(include=["b"], exclude=["*/old/*", "*.img"]) == (
        ["b/ct.hdr"],
        {".txt": 1, "(in --exclude)": 1, "(not in --include)": 3},
    )


PLACEHOLDERS = {
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d4d\nsize 12345\n": "Git LFS pointer; run git lfs pull",
    b"/annex/objects/SHA256E-s1--00.nii.gz\n": "git-annex pointer; run git annex get",
    b"\n<!DOCTYPE html><html><body>Entry not found</body></html>": "web page; the download failed",
    b"<!DOCTYPE html><title>Acc\xe8s refus\xe9</title>": "web page; the download failed",
    b"<?xml version='1.0'?>\n<!DOCTYPE html PUBLIC>\n<html>": "web page; the download failed",
    gzip.compress(b"<html><body>404</body></html>"): "gzip data of a web page; the download failed",
    b"\xef\xbb\xbf<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>": "XML text.*the download failed",
    b'{"error": "Repository not found \xe2\x80\x94 sign in"}': "JSON text.*the download failed",
    b"PK\x03\x04\x14\0\0\0 Doe": "a ZIP archive; unpack it",
    b"BZh91AY&SY Doe": "bzip2 data; unpack it",
    b"Access denied. Doe": "short text, perhaps an error message; look into it",
    b"": "file without bytes; copy or download it again",
}


@pytest.mark.parametrize(("content", "words"), PLACEHOLDERS.items(), ids=range(len(PLACEHOLDERS)))
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.nrrd", "a.mha", "a.dcm", "a.img", "a.raw"])
def test_what_lies_in_place_of_a_scan_is_named_with_the_remedy_in_every_format(tmp_path, name, content, words):
    if name == "a.img":
        nib.Nifti1Pair(np.zeros((2, 3, 4), "i2"), np.eye(4)).to_filename(tmp_path / "a.hdr")
    if name == "a.raw":
        sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 3, 2), "i2")), tmp_path / "a.mhd")
    (tmp_path / name).write_bytes(content)
    (source,) = find_scans(tmp_path).sources
    with pytest.raises(Refused) as caught:
        open_scan(source)
    is_named = not re.search("perhaps|unpack", words) or name not in ("a.img", "a.raw")  # where all may be voxels
    assert caught.value.code == (("not-a-scan" if content else "empty") if is_named else "truncated")
    assert not is_named or re.search(words, caught.value.message)
    assert "Doe" not in caught.value.message and "take .gz off" not in caught.value.message


def test_one_of_several_scans_is_taken_by_any_of_its_names(tmp_path):
    for seed in range(2):
        names = [f"{seed}{z}.dcm" for z in range(7)]
        write_series(tmp_path / "dicom", stored_values(seed=seed), names=names)
    fill(tmp_path, "b/x.nii")
    first, second = (source for source in find_scans(tmp_path).sources if source.format == "dicom")
    key = first.path.partition("#")[2]
    for wanted in (key, f"#{key}", first.path, first.id):
        assert find_one_scan(tmp_path, wanted).files == first.files
    for path in (f"{tmp_path}/dicom#{key}", f"{tmp_path}#{key}"):
        assert find_one_scan(Path(path)).files == first.files
    assert find_one_scan(tmp_path, "b/x.nii").format == "nifti"
    for wanted in (None, "s0", "#00000000"):
        keys = [one.path.partition("#")[2] for one in (first, second)]  # no folder: its name may be a patient's
        with pytest.raises(UsageError, match=f", #{keys[0]}, #{keys[1]}.*--series"):
            find_one_scan(tmp_path, wanted)


# --- ids


def test_ids_are_paths_without_suffix_where_that_is_plain_and_free(tmp_path):
    fill(tmp_path, "top.nii.gz", "a/b/deep.nii", "A_1.2-x.mha")
    assert ids(tmp_path) == {"top.nii.gz": "top", "a/b/deep.nii": "a__b__deep", "A_1.2-x.mha": "A_1.2-x"}


def test_ids_that_had_to_be_changed_or_are_shared_carry_a_hash_of_the_path(tmp_path):
    fill(tmp_path, "x.nii", "x.nii.gz", "X.mha", "Doe, Jane.nii", "患者.nii", "-rf.nii", "a/b.nii", "a__b.nrrd")
    assert ids(tmp_path) == {
        path: f"{name}-{hash_of(path)}"
        for path, name in {
            "x.nii": "x",
            "x.nii.gz": "x",
            "X.mha": "X",
            "Doe, Jane.nii": "Doe--Jane",
            "患者.nii": "v",
            "-rf.nii": "rf",
            "a/b.nii": "a__b",
            "a__b.nrrd": "a__b",
        }.items()
    }


def test_ids_by_name_and_by_hash(tmp_path):
    fill(tmp_path, "Doe/ct.nii", "Roe/ct.nii", "Roe/other.nii")
    by_name = ids(tmp_path, "name")
    assert by_name["Roe/other.nii"] == "other" and by_name["Doe/ct.nii"] == f"ct-{hash_of('Doe/ct.nii')}"
    assert ids(tmp_path, "hash") == {path: f"v{hash_of(path, 12)}" for path in by_name}


def test_an_id_does_not_change_when_unrelated_scans_come(tmp_path):
    fill(tmp_path, "Doe, Jane/ct.nii", "b.nii")
    before = ids(tmp_path)
    fill(tmp_path, "Doe, Jane/ct2.nii", "a.nii")
    assert before.items() <= ids(tmp_path).items()


NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=200)


@given(
    st.lists(st.lists(NAMES | st.sampled_from(["a", "A", "a__a", "-"]), min_size=1, max_size=3), max_size=8),
    st.sampled_from(["path", "name"]),
)
def test_ids_are_always_safe_and_never_alike(places, id_from):
    scans = list({"/".join(words): Named("/".join(words), "/".join(words)) for words in places}.values())
    names = assign_ids(scans, id_from)
    assert len({name.casefold() for name in names}) == len(scans)
    assert all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,149}", name) for name in names)


def test_an_id_made_to_look_like_another_ones_hash_is_told_apart():
    mimic = f"x-{hash_of('x.nii')}"
    scans = [Named("x.nii", "x"), Named("x.mha", "x"), Named(f"{mimic}.nii", mimic)]
    assert len(set(assign_ids(scans, "path"))) == 3


# --- DICOM


def test_a_series_is_a_source_with_the_key_in_its_id_and_path(tmp_path, series):
    fill(
        tmp_path,
        "p/s/a1.dcm",
        "p/s/a2.IMA",
        "p/s/b1.dicom",
        "p/s/a3",
        "p/s/bad.dcm",
        "p/s/a4.1.2.840",
        "c1.dcm",
        data=DICOM,
    )
    fill(tmp_path, "p/s/readme", "p/s/DICOMDIR", "p/s/scan.nii")
    found = find_scans(tmp_path)
    named = {source.path: (source.id, [file.name for file in source.files]) for source in found.sources}
    assert named == {
        "#c123": ("sc123", ["c1.dcm"]),
        "p/s#a123": ("p__s__sa123", ["a1.dcm", "a2.IMA", "a3", "a4.1.2.840"]),
        "p/s#b123": ("p__s__sb123", ["b1.dicom"]),
        "p/s/bad.dcm": ("p__s__bad.dcm", ["bad.dcm"]),
        "p/s/scan.nii": ("p__s__scan", ["scan.nii"]),
    }
    assert found.ignored == {
        "(DICOM Segmentation)": 2,
        "(DICOM scout, no CT volume)": 3,
        "(DICOMDIR)": 1,
        "(no suffix)": 1,
    }
    assert [source.code for source in found.sources if source.problem] == ["not-a-scan"]
    assert ids(tmp_path, "name")["p/s#a123"] == "s__sa123"


def test_two_series_in_one_folder_are_found_and_opened(tmp_path):
    for number in range(2):
        (tmp_path / f"{number}").mkdir()
        write_series(tmp_path / f"{number}", stored_values(seed=number))
    folder = tmp_path / "patient"
    folder.mkdir()
    for file in sorted(tmp_path.glob("[01]/*")):
        file.rename(folder / f"{file.parent.name}{file.name}")
    fill(folder, "broken.dcm", "._1.dcm", data=b"\xff\xd8\xff")
    *broken, first, second = sorted(find_scans(folder).sources, key=lambda source: bool(source.files[1:]))
    assert len(broken) == 1 and broken[0].problem and broken[0].path == "broken.dcm"
    for source in (first, second):
        assert source.id == f"s{source.path[1:]}" and re.fullmatch(r"s[0-9a-f]{8}", source.id)
        seed = int(source.files[0].name[0])
        np.testing.assert_array_equal(voxels(open_scan(source)), stored_values(seed=seed))


def test_without_pydicom_a_folder_of_slices_is_one_source_that_says_what_to_install(tmp_path, monkeypatch):
    def missing(files, headers):
        raise Refused("dicom-extra-missing", "expected pydicom, found none; pip install 'photon-ct[dicom]'")

    monkeypatch.setattr(find, "group_series", missing)
    fill(tmp_path, *(f"p/{n}.dcm" for n in range(3)), data=DICOM)
    (source,) = find_scans(tmp_path).sources
    assert source.path == "p#" and len(source.files) == 3 and "photon-ct[dicom]" in source.problem


# --- fingerprints


def test_a_fingerprint_is_of_the_content_alone(tmp_path):
    fill(tmp_path, "a", "b", data=b"voxels")
    one = fingerprint([tmp_path / "a"])
    assert one == fingerprint([tmp_path / "b"]) == "sha256:" + hashlib.sha256(b"voxels").hexdigest()
    fill(tmp_path, "b", data=b"voxelt")
    assert fingerprint([tmp_path / "b"]) != one


def test_a_fingerprint_of_several_files_depends_on_their_order_and_boundaries(tmp_path):
    contents = ([b"ab", b"c"], [b"a", b"bc"], [b"c", b"ab"], [b"abc"], [b"abc", b""])
    prints = set()
    for number, parts in enumerate(contents):
        files = [tmp_path / f"{number}-{index}" for index in range(len(parts))]
        for file, part in zip(files, parts, strict=True):
            file.write_bytes(part)
        prints.add(fingerprint(files))
    assert len(prints) == len(contents)
