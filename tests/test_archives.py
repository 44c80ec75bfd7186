"""CTs out of tar archives: what is taken, what never is, and what a damaged archive costs."""

import gzip
import io
import os
import tarfile

import pytest

from photon_data.datasets.abdomenatlas import Contents, find_archives, known_ids, unpack

A, B, C = (f"BDMAP_0000000{n}" for n in (1, 2, 3))
EVERYTHING = {A, B, C}


def member(name, kind=tarfile.REGTYPE, link="", content=b""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(content)
    return info, content


def ct(name, content=None):
    return member(f"{name}/ct.nii.gz", content=content or name.encode())


def write_tar(path, *members, mode="w:gz"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return path


def unpacked(tmp_path, ids=EVERYTHING, root="in"):
    """Everything below in/ unpacked into out/: what came of each archive."""
    (tmp_path / "out").mkdir(exist_ok=True)
    archives = find_archives([tmp_path / root])
    return [unpack(archive, tmp_path / "out", ids, lambda count: None) for archive in archives]


def files(folder):
    """{path: content} of all files but markers."""
    found = (path for path in folder.rglob("*") if path.is_file() and ".archives" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


@pytest.mark.parametrize(("suffix", "mode"), [("tar.gz", "w:gz"), ("tgz", "w:gz"), ("tar", "w")])
@pytest.mark.parametrize("leading", ["", "./", "image_only/part 1/"])
def test_only_requested_cts_are_taken_wherever_they_lie_in_an_archive(tmp_path, suffix, mode, leading):
    mask = member(f"{leading}{A}/segmentations/liver.nii.gz", content=b"mask")
    odd = [
        member(f"{leading}{name}/ct.nii.gz", content=b"x")
        for name in ("BDMAP_1", f"{A}1", "bdmap_00000001", "BDMAP_١٢٣٤٥٦٧٨")
    ]
    cts = [member(f"{leading}{name}/ct.nii.gz", content=name.encode() * 99) for name in (A, B)]
    write_tar(tmp_path / f"in/part.{suffix}", member(f"{leading}{A}", tarfile.DIRTYPE), mask, *odd, *cts, mode=mode)
    assert unpacked(tmp_path, {B}) == [Contents([A, B], [B], [])]
    assert files(tmp_path / "out") == {f"{B}/ct.nii.gz": B.encode() * 99}


@pytest.mark.parametrize("start", ["../", "../../", "/", "//tmp/", "a/../../../"])
def test_a_name_that_leads_elsewhere_is_written_below_the_folder_under_its_id(tmp_path, start):
    write_tar(tmp_path / "deep/in/part.tar.gz", member(f"{start}{A}/ct.nii.gz", content=b"a"))
    before = set(tmp_path.rglob("*"))
    unpacked(tmp_path, root="deep/in")
    assert files(tmp_path / "out") == {f"{A}/ct.nii.gz": b"a"}
    assert {path for path in tmp_path.rglob("*") if tmp_path / "out" not in (path, *path.parents)} == before


@pytest.mark.parametrize(
    ("kind", "link"),
    [
        (tarfile.SYMTYPE, "/etc/passwd"),
        (tarfile.LNKTYPE, "../secret"),
        (tarfile.CHRTYPE, ""),
        (tarfile.BLKTYPE, ""),
        (tarfile.FIFOTYPE, ""),
        (tarfile.DIRTYPE, ""),
    ],
)
def test_links_and_devices_are_named_and_not_taken(tmp_path, kind, link):
    (tmp_path / "secret").write_bytes(b"secret")
    write_tar(tmp_path / "in/part.tar.gz", member(f"{A}/ct.nii.gz", kind, link), ct(B))
    (found,) = unpacked(tmp_path)
    assert (found.taken, len(found.problems)) == ([B], 1)
    assert found.problems[0].startswith(f"{A}/ct.nii.gz is a link, a device or sparse")
    assert files(tmp_path / "out") == {f"{B}/ct.nii.gz": B.encode()}


def test_a_folder_that_is_a_link_leads_nowhere(tmp_path):
    """A link in the archive, then a CT 'through' it; and a link that lies in the output folder."""
    (tmp_path / "elsewhere").mkdir()
    write_tar(tmp_path / "in/part.tar.gz", member(A, tarfile.SYMTYPE, str(tmp_path / "elsewhere")), ct(A))
    unpacked(tmp_path)
    assert files(tmp_path / "out") == {f"{A}/ct.nii.gz": A.encode()}
    (tmp_path / "out" / B).symlink_to(tmp_path / "elsewhere")
    write_tar(tmp_path / "in/part.tar.gz", ct(B))
    with pytest.raises(FileExistsError, match="found a link"):
        unpacked(tmp_path)
    assert files(tmp_path / "elsewhere") == {}


def noise(name):
    return member(f"{name}/ct.nii.gz", content=os.urandom(300_000))


def cut(path):
    """Without the last third of its bytes."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def flip(path):
    """With damaged compressed data in its last third."""
    data = bytearray(path.read_bytes())
    data[-200_000:-199_000] = bytes(1000)
    path.write_bytes(data)


def cut_between_members(path):
    """A sound gzip of a tar that stops after two members, where tarfile sees the end."""
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[: 2 * (512 + 300_032)]))


def spoil_header(path):
    """A sound gzip of a tar whose third header is nonsense, where tarfile sees the end too."""
    tar = bytearray(gzip.decompress(path.read_bytes()))
    tar[2 * (512 + 300_032) + 100] ^= 0xFF
    path.write_bytes(gzip.compress(tar))


@pytest.mark.parametrize("damage", [cut, flip, cut_between_members, spoil_header])
def test_a_damaged_archive_costs_only_what_stands_behind_the_damage(tmp_path, damage):
    path = write_tar(tmp_path / "in/part.tar.gz", noise(A), noise(B), noise(C))
    damage(path)
    (found,) = unpacked(tmp_path)
    assert found.taken in ([A], [A, B])
    assert "expected a whole tar archive" in found.problems[0]
    assert sorted(files(tmp_path / "out")) == [f"{name}/ct.nii.gz" for name in found.taken]
    assert all(len(content) == 300_000 for content in files(tmp_path / "out").values())
    assert known_ids(find_archives([tmp_path / "in"])[0], tmp_path / "out") is None


@pytest.mark.parametrize("content", [b"", b"no archive at all", b"\x1f\x8b", b"\x1f\x8bno gzip either"])
def test_what_is_no_archive_is_a_problem_and_no_error(tmp_path, content):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/part.tar.gz").write_bytes(content)
    (found,) = unpacked(tmp_path)
    assert (found.ids, len(found.problems)) == ([], 1)


def test_a_marker_knows_the_ids_until_the_archive_changes(tmp_path):
    path = write_tar(tmp_path / "in/part.tar.gz", ct(A), ct(B))
    unpacked(tmp_path, {A})
    assert known_ids(find_archives([tmp_path / "in"])[0], tmp_path / "out") == [A, B]
    os.utime(path, ns=(1, 1))
    assert known_ids(find_archives([tmp_path / "in"])[0], tmp_path / "out") is None


def test_ctrl_c_in_the_middle_of_a_ct_leaves_nothing_half(tmp_path):
    write_tar(tmp_path / "in/part.tar", member(f"{A}/ct.nii.gz", content=bytes(5_000_000)), mode="w")
    calls = []

    def interrupt(count):
        calls.append(count)
        if len(calls) == 3:  # the header, two chunks
            raise KeyboardInterrupt

    (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt):
        unpack(find_archives([tmp_path / "in"])[0], tmp_path / "out", {A}, interrupt)
    assert files(tmp_path / "out") == {}
    assert [found.taken for found in unpacked(tmp_path)] == [[A]]
