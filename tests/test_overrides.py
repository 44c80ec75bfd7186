"""A table of overrides: what a person says of single scans, applied to those alone and recorded with them."""

import json
from dataclasses import replace

import numpy as np
import pytest
from dicom_files import write_series
from raw import write_scan
from scans import ct_like
from test_cli import SMALL as OPTIONS
from test_cli import cli
from test_prepare_file import SMALL, conflicting, with_nan

from photon_data import open_volume
from photon_data.errors import UsageError
from photon_data.files import from_jsonl
from photon_data.override import read_overrides
from photon_data.prepare_file import Job, prepare_file
from photon_data.readers.find import find_scans

FINE = replace(SMALL, shape_zyx=(90, 80, 80))


def marked(path, at_zyx=(3, 5, 7), **more):
    """A scan with one very bright voxel."""
    array = ct_like((16, 24, 28))
    array[at_zyx] = 30000
    return write_scan(path, array=array, **more)


def table(path, *rows):
    """Write rows as jsonl, in a file beside `path`."""
    file = path / "overrides.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def prepared(tmp_path, scan, **cells):
    """Return the record of a scan with a row of the table, and its volume (None where it is refused)."""
    source = find_scans(scan).sources[0]
    row = read_overrides(table(tmp_path, {"volume": source.path, **cells}), [source])[source.id] if cells else None
    job = Job(source, str(tmp_path / "out"), FINE).adjusted(row, {"modality": "other"})
    record = prepare_file(Job.from_json(json.loads(json.dumps(job.to_json()))))
    return record, open_volume(tmp_path / "out" / record.store) if record.store else None


def brightest_lps(volume):
    """The world position of the brightest voxels' centre."""
    array = volume.numpy()
    return volume.geometry.world(np.argwhere(array == array.max())).mean(axis=0)


# Of a scan with the affine diag(-0.9, -1.1, 2.0) to RAS and its origin at (11, -7, 100), the voxel (z 3, y 5, x 7) lies
# at x -11 + 7 * 0.9, y 7 + 5 * 1.1, z 100 + 3 * 2.0 in LPS.
PLACES = {
    "nothing": ({}, (-4.7, 12.5, 106)),
    "an affine": ({"affine": [[0.9, 0, 0, 10], [0, 1.1, 0, 20], [0, 0, -2.5, 30], [0, 0, 0, 1]]}, (-16.3, -25.5, 22.5)),
    "a step along z": ({"spacing_mm": "2.5, -, -"}, (-4.7, 12.5, 107.5)),
    "all steps": ({"spacing_mm": "2.5 1 1.5"}, (-0.5, 12, 107.5)),
    "a crop": ({"crop": "2:9, :, 6:20"}, (-4.7, 12.5, 106)),
    "a centre": ({"centre_lps_mm": "0, 10, 110"}, (-4.7, 12.5, 106)),
}


@pytest.mark.parametrize("suffix", [".nii.gz", ".mha", ".nrrd"])
@pytest.mark.parametrize("case", PLACES)
def test_a_marked_voxel_lies_where_the_table_puts_it(tmp_path, case, suffix):
    cells, expected = PLACES[case]
    path = marked(tmp_path / "raw" / "a.nii.gz")
    if suffix != ".nii.gz":
        import SimpleITK as sitk

        image, path = sitk.ReadImage(str(path)), path.with_name(f"a{suffix}")
        sitk.WriteImage(image, str(path))
    record, volume = prepared(tmp_path, path, **cells)
    assert np.abs(brightest_lps(volume) - expected).max() <= 1
    assert ("override" in record.facts) == bool(cells)


def test_what_is_outside_of_a_crop_is_padding_and_the_grid_is_around_it(tmp_path):
    record, volume = prepared(tmp_path, marked(tmp_path / "a.nii.gz"), crop="2:9, 4:24, 6:20")
    assert record.facts["geometry"]["shape_zyx"] == [7, 20, 14]
    assert volume.geometry.centre_lps == pytest.approx((-11 + 12.5 * 0.9, 7 + 13.5 * 1.1, 100 + 5 * 2), abs=1e-5)
    lies = np.argwhere(volume.numpy() > -999)
    low, high = volume.geometry.world(lies.min(axis=0)), volume.geometry.world(lies.max(axis=0))
    # The edges of its outer voxels: half a voxel beyond their centres.
    assert np.all(low >= np.array((-11 + 5.5 * 0.9, 7 + 3.5 * 1.1, 100 + 1.5 * 2)) - 1e-6)
    assert np.all(high <= np.array((-11 + 19.5 * 0.9, 7 + 23.5 * 1.1, 100 + 8.5 * 2)) + 1e-6)


def test_a_centre_is_the_centre_of_the_grid(tmp_path):
    record, volume = prepared(tmp_path, marked(tmp_path / "a.nii.gz"), centre_lps_mm="0, 10, 110")
    assert volume.geometry.centre_lps == pytest.approx((0, 10, 110))
    assert record.facts["changes"][-1]["after"] == "centre of the grid at (0.0, 10.0, 110.0)"


def test_slope_and_intercept_are_those_of_the_table(tmp_path):
    array = ct_like((16, 24, 28))
    raw = write_scan(tmp_path / "raw.nii.gz", array=(array + 1024).astype(np.int16))
    record, volume = prepared(tmp_path, raw, slope=1, intercept=-1024)
    right = prepared(tmp_path, write_scan(tmp_path / "right.nii.gz", array=array))[1]
    assert np.abs(volume.numpy().astype(int) - right.numpy()).max() <= 1  # halves may round the other way
    assert record.facts["override"] == {"slope": "1", "intercept": "-1024"}
    [change] = record.facts["changes"]
    assert (change["before"], change["after"]) == ("HU = 1 x stored +0", "HU = 1 x stored -1024")


def test_an_affine_makes_a_scan_without_orientation_readable(tmp_path):
    path = marked(tmp_path / "a.nii")
    data = bytearray(path.read_bytes())
    data[252:256] = bytes(4)  # qform_code and sform_code
    path.write_bytes(data)
    assert prepared(tmp_path, path)[0].code == "no-geometry"
    affine = "0.9 0 0 10; 0 1.1 0 20; 0 0 -2.5 30; 0 0 0 1"
    record, volume = prepared(tmp_path, path, affine=affine)
    assert np.abs(brightest_lps(volume) - (-16.3, -25.5, 22.5)).max() <= 1
    assert [change["code"] for change in record.facts["changes"]] == ["no-geometry", "override"]


def test_a_conflict_ends_where_the_row_picks_one_and_a_sound_scan_stays_as_it_is(tmp_path):
    conflict, sound = conflicting(tmp_path / "c.nii.gz"), write_scan(tmp_path / "s.nii.gz")
    assert prepared(tmp_path, conflict)[0].accept == "affine-conflict=?"
    lowest = {form: prepared(tmp_path, conflict, affine=form)[1].geometry.origin_lps[2] for form in ("sform", "qform")}
    assert lowest["qform"] - lowest["sform"] == pytest.approx(30)
    record, _ = prepared(tmp_path, sound)
    again, _ = prepared(tmp_path, sound, affine="qform", accept="non-finite")
    assert (again.state, again.key) == ("unchanged", record.key)


def test_a_changed_row_makes_only_its_scan_anew(tmp_path):
    for name in ("a", "b"):
        marked(tmp_path / "raw" / f"{name}.nii.gz")
    out = tmp_path / "out"

    def run(*rows):
        file = tmp_path / "overrides.csv"
        file.write_text("\n".join(["volume;crop;skip", *rows]) + "\n")
        code, _ = cli("prepare", tmp_path / "raw", out, *OPTIONS, "--modality", "other", "--overrides", file)
        return code, {row["id"]: row for row in from_jsonl((out / "volumes.jsonl").read_text())}

    def states(rows):
        return {id: row["state"] for id, row in rows.items()}

    code, first = run("a;2:9, :, :;")
    assert (code, states(first)) == (0, {"a": "prepared", "b": "prepared"})
    assert states(run("a.nii.gz;2:9, :, :;")[1]) == {"a": "unchanged", "b": "unchanged"}
    code, second = run("a;2:10, :, :;")
    assert states(second) == {"a": "prepared", "b": "unchanged"}
    assert second["a"]["key"] != first["a"]["key"]
    assert second["a"]["facts"]["override"] == {"crop": "2:10, :, :"}
    assert "2 x 24 x 28 voxels" not in (out / "report.html").read_text()
    assert "8 x 24 x 28 voxels (z, y, x) of 2 x" in (out / "report.html").read_text()
    code, third = run("b;;metal everywhere")
    assert (code, states(third)) == (0, {"a": "prepared", "b": "refused"})
    assert (third["b"]["code"], third["b"]["reason"]) == ("skipped", "a person left it out: metal everywhere")
    assert "crop" not in json.dumps(third["a"]["facts"])
    rows = [from_jsonl(manifest.read_text()) for manifest in (out / "manifests").iterdir()]
    assert [row["volume_id"] for part in rows for row in part] == ["a"]


WRONG = {
    "no such scan": ({"volume": "c", "skip": "x"}, "expected the name of one scan, found 'c'"),
    "a scan twice": ({"volume": "a.nii.gz", "skip": "x"}, "expected one row per scan, found a second one"),
    "nothing": ({"volume": "b"}, "found nothing; leave the row out"),
    "undecided": ({"volume": "b", "accept": "affine-conflict=?"}, "expected a decision in place of '?'"),
    "half a scaling": ({"volume": "b", "slope": "2"}, "expected slope and intercept, found one"),
    "slope 0": ({"volume": "b", "slope": "0", "intercept": "0"}, "expected a slope other than 0"),
    "12 numbers": ({"volume": "b", "affine": "1 0 0 0 0 1 0 0 0 0 1 0"}, "expected 16 numbers, found 12"),
    "a singular affine": ({"volume": "b", "affine": "1 0 0 0 2 0 0 0 0 0 1 0 0 0 0 1"}, "independent axes"),
    "a backward crop": ({"volume": "b", "crop": "9:2, :, :"}, "expected 2 voxels or more a side"),
    "a crop of two axes": ({"volume": "b", "crop": "2:9, :"}, "expected first:end along z, y, x"),
    "one spacing": ({"volume": "b", "spacing_mm": "2"}, "expected three numbers"),
    "skip and more": ({"volume": "b", "skip": "bad", "crop": "2:9, :, :"}, "expected `skip` alone"),
    "an unknown code": ({"volume": "b", "accept": "truncated"}, "expected a code that can be accepted"),
    "a decimal comma": ({"volume": "b", "slope": "1,024", "intercept": "0"}, "expected a number"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_row_that_cannot_be_followed_is_an_error_with_its_line_before_any_scan_is_read(tmp_path, case):
    row, said = WRONG[case]
    for name in ("a", "b"):
        (tmp_path / f"{name}.nii.gz").write_bytes(b"never read")
    sources = find_scans(tmp_path).sources
    file = table(tmp_path, {"volume": "a", "skip": "fine"}, row)
    with pytest.raises(UsageError) as caught:
        read_overrides(file, sources)
    assert "line 2: " in str(caught.value) and said in str(caught.value)


def test_a_column_that_nobody_knows_is_an_error(tmp_path):
    write_scan(tmp_path / "a.nii.gz")
    file = table(tmp_path, {"volume": "a", "spacing": "1, 1, 1"})
    with pytest.raises(UsageError, match="did you mean 'spacing_mm'"):
        read_overrides(file, find_scans(tmp_path).sources)


def test_a_crop_beyond_the_scan_is_refused(tmp_path):
    record, _ = prepared(tmp_path, marked(tmp_path / "a.nii.gz"), crop="2:17, :, :")
    assert (record.code, "2:17 of 16 x 24 x 28" in record.reason) == ("bad-override", True)


def faulty(folder):
    """Scans with a fault each, and a sound one; a DICOM series has a patient's name in its path."""
    write_scan(folder / "sound.nii.gz")
    with_nan(folder / "nan.nii.gz")
    conflicting(folder / "conflict.nii.gz")
    there = [z for z in range(16) if z not in (4, 5)]
    values = (ct_like((16, 24, 28)) + 1024).astype(np.int16)
    write_series(folder / "Doe^Jane", values, step_lps=(0, 0, 2.0), slices=there)
    (folder / "broken.nii.gz").write_bytes(b"broken")


def test_inspect_proposes_what_prepare_accepts_and_the_rest_stays_refused(tmp_path):
    raw, out, file = tmp_path / "raw", tmp_path / "out", tmp_path / "proposed.csv"
    faulty(raw)
    code, text = cli("inspect", raw, "--workers", "1", "--propose", file)
    assert code == 1
    for line in (
        "1 x affine-conflict: accept affine-conflict=?",
        "1 x non-finite: accept non-finite",
        "1 x dicom-missing-slices: accept dicom-missing-slices",
    ):
        assert line in text
    assert file.stat().st_mode & 0o077 == 0  # it names the folder Doe^Jane
    code, text = cli("prepare", raw, out, *OPTIONS, "--overrides", file)
    assert code == 2 and "expected a decision in place of '?'" in text and not (out / "volumes").exists()
    file.write_text(file.read_text().replace("affine-conflict=?", "affine-conflict=qform"))
    code, _ = cli("prepare", raw, out, *OPTIONS, "--overrides", file)
    rows = from_jsonl((out / "volumes.jsonl").read_text())
    codes = sorted((row["state"], row["code"] or "") for row in rows)
    assert (code, codes) == (1, [*[("prepared", "")] * 4, ("refused", "not-a-scan")])
    report = (out / "report.html").read_text()
    for row in rows:
        for change in (row["facts"] or {}).get("changes", ()):
            assert row["id"] in report and change["after"] in report
    assert "Jane" not in report + (out / "volumes.jsonl").read_text()
    assert sum("changes" in (row["facts"] or {}) for row in rows) == 3


def test_refusals_are_read_again_where_a_code_is_accepted_and_the_same_codes_make_nothing_anew(tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "out"
    faulty(raw)
    flags = ("--repair", "slices=2", "--accept", "affine-conflict=sform", "--accept", "non-finite")

    def run(*more):
        _, text = cli("prepare", raw, out, *OPTIONS, *more)
        rows = from_jsonl((out / "volumes.jsonl").read_text())
        return sorted(row["state"] for row in rows), text

    states, text = run()
    assert states == ["prepared", *["refused"] * 4]
    assert "1 x non-finite (--accept non-finite would let them pass)" in text
    states, text = run()
    assert states == [*["refused"] * 4, "unchanged"] and "4 of them were not read again" in text
    assert run(*flags)[0] == [*["prepared"] * 3, "refused", "unchanged"]
    assert run(*flags)[0] == ["refused", *["unchanged"] * 4]
    assert run()[0] == [*["refused"] * 4, "unchanged"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--repair", "tilt"], "--repair: expected slices, found 'tilt'"),
        (["--accept", "affine-conflict"], "a person has to choose"),
        (["--overrides", "nowhere.csv"], "nowhere.csv: expected a readable file"),
    ],
)
def test_options_that_cannot_be_followed_are_misuse(tmp_path, words, said):
    write_scan(tmp_path / "raw" / "a.nii.gz")
    code, text = cli("prepare", tmp_path / "raw", tmp_path / "out", *OPTIONS, *words)
    assert code == 2 and said in text


def test_data_sets_of_a_manifest_take_codes_and_overrides_too(tmp_path):
    with_nan(tmp_path / "raw" / "a.nii.gz")
    marked(tmp_path / "raw" / "b.nii.gz")
    recipe = "{name: chest_ct, shape_zyx: [40, 32, 32], model_shape_zyx: [14, 28, 28]}"
    manifest, out = tmp_path / "data_manifest.yaml", tmp_path / "out"
    manifest.write_text(f"recipe: {recipe}\ndatasets:\n  own: {{adapter: folder, root: raw}}\n")
    words = ("prepare", "--manifest", manifest, out, "--workers", "1")
    file = table(tmp_path, {"volume": "b", "crop": "2:9, :, :"})
    assert cli(*words)[0] == 1
    code, text = cli(*words, "--accept", "non-finite", "--overrides", file)
    rows = {row["source"]: row for row in from_jsonl((out / "volumes.jsonl").read_text())}
    assert code == 0, text
    assert rows["a.nii.gz"]["facts"]["policy"] == {"non_finite": "fill"}
    assert rows["b.nii.gz"]["facts"]["geometry"]["shape_zyx"] == [7, 24, 28]


def test_what_inspect_would_do_with_an_override_is_in_its_findings(tmp_path):
    with_nan(tmp_path / "raw" / "a.nii.gz")
    _, text = cli("inspect", tmp_path / "raw", "--workers", "1")
    assert "[--accept non-finite]" in " ".join(text.split())
    code, text = cli("inspect", tmp_path / "raw", "--workers", "1", "--accept", "non-finite")
    assert code == 0 and "made -1000 HU" in " ".join(text.replace("│", " ").split())
