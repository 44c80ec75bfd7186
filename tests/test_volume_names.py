"""Names of volumes in tables: in both Unicode forms, and of DICOM series by folder or UID; never guessed."""

import pytest
from dicom_files import write_series
from pydicom.uid import generate_uid
from raw import write_scan
from scans import ct_like

from photon_data.questions.question import by_name
from photon_data.readers.find import find_scans

COMPOSED, DECOMPOSED = "J\u00f6rg \u00c5", "Jo\u0308rg A\u030a"


@pytest.mark.parametrize("name", [COMPOSED, DECOMPOSED])
@pytest.mark.parametrize("path", [COMPOSED, DECOMPOSED])
def test_a_name_is_found_in_either_unicode_form_and_ids_stay_as_they_are(tmp_path, path, name):
    write_scan(tmp_path / path / f"{path}.nii.gz", shape_zyx=(4, 5, 6))
    (source,) = find_scans(tmp_path).sources
    find = by_name([(source.id, source.path)])
    assert source.path == f"{path}/{path}.nii.gz"
    for asked in (f"{name}/{name}.nii.gz", f"./{name}/{name}", f"{name}.nii.gz", name, source.id):
        assert find(asked).id == source.id, asked
    assert not find("Jorg A").id


def test_two_volumes_that_differ_only_in_unicode_form_are_ambiguous_and_told_apart():
    find = by_name([("J-1", f"{COMPOSED}.nii.gz"), ("J-2", f"{DECOMPOSED}.nii.gz"), ("x", "x.nii.gz")])
    for name in (COMPOSED, DECOMPOSED, f"{COMPOSED}.nii.gz"):
        match = find(name)
        assert match.is_ambiguous and "with id J-1" in match.reason and "with id J-2" in match.reason
    assert find("J-2").id == "J-2"


def test_a_dicom_volume_is_found_by_its_folder_or_its_series_uid(tmp_path):
    stored, (first, second, other) = ct_like((3, 8, 9)), (generate_uid() for _ in range(3))
    write_series(tmp_path / "p#1" / "21057", stored, uid=first)
    write_series(tmp_path / "p2" / "both", stored, uid=second)
    write_series(tmp_path / "p2" / "both", stored, uid=other, names=["a.dcm", "b.dcm", "c.dcm"])
    sources = find_scans(tmp_path).sources
    find = by_name((source.id, source.path) for source in sources)
    one = next(source for source in sources if source.path.startswith("p#1"))
    for name in ("p#1/21057", "p#1/21057/", "21057", one.path, one.path.rpartition("/")[2], first, one.id):
        assert find(name).id == one.id, name
    for name in ("p2/both", "both"):
        assert find(name).reason.startswith("ambiguous: 2 volumes have this name (p2/both#")
    ids = {find(second).id, find(other).id}
    assert ids == {source.id for source in sources} - {one.id}
    for name in ("p#1", "p", "p2", "1", generate_uid(), first[:-1]):
        assert find(name) == (None, "no such volume", False), name
