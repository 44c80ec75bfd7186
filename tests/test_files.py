import pytest

from photon_data.files import Location, replace_folder, write_whole


def test_a_file_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path):
    place = Location(str(tmp_path))
    place.write("sub/name.txt", b"old")
    place.write("sub/name.txt", b"new")
    assert place.read("sub/name.txt") == b"new"
    assert place.names("sub") == ["name.txt"]
    assert place.read("sub/other.txt") is None


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    place = Location(str(tmp_path))
    place.write("name.txt", b"old")

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("photon_data.files.sync", full)
    with pytest.raises(OSError, match="No space"):
        place.write("name.txt", b"new")
    assert place.read("name.txt") == b"old"
    assert place.names("") == ["name.txt"]


def test_a_folder_is_written_whole_or_stays_as_it_was(tmp_path):
    for text in ("0", "1"):
        with write_whole(tmp_path / "there") as temporary:
            temporary.mkdir()
            (temporary / "file").write_text(text)
    with pytest.raises(ZeroDivisionError), write_whole(tmp_path / "there") as temporary:
        temporary.mkdir()
        (temporary / "file").write_text(str(1 // 0))
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there" / "file").read_text() == "1"


def test_what_a_killed_run_left_at_a_given_temporary_path_is_replaced(tmp_path):
    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial" / "half").write_bytes(b"half")
    with write_whole(tmp_path / "new" / "name.txt", tmp_path / ".partial") as temporary:
        temporary.write_bytes(b"whole")
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["new", "new/name.txt"]


def test_a_folder_takes_the_place_of_another(tmp_path):
    for name, text in (("new", "1"), ("there", "0")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(text)
    replace_folder(tmp_path / "new", tmp_path / "there")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there" / "file").read_text() == "1"


def test_local_places_are_absolute_and_without_dots(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    assert Location("../out").at("x") == str(tmp_path / "out" / "x")
    assert Location("s3://bucket/out/").at("x") == "s3://bucket/out/x"
