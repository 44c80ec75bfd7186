import gzip
import re
import struct
import time
import tracemalloc
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from isal import igzip
from nibabel.eulerangles import euler2mat
from reading import AXIS_ORDERS, assert_equals_simpleitk, open_file, refusal, voxels

from photon_data.readers import open_scan
from photon_data.readers.find import find_scans

SHAPE_XYZ = (5, 6, 7)
DTYPES = ("u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8")
IDENTITY = np.eye(3)


def affine_of(axes=IDENTITY, spacing=(0.7, 0.8, 2.5), origin=(-120.5, 33.25, 410.0)):
    affine = np.eye(4)
    affine[:3, :3] = axes * np.array(spacing)
    affine[:3, 3] = origin
    return affine


def ramp(dtype="i2", shape=SHAPE_XYZ):
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def image_of(array=None, affine=None, kind=nib.Nifti1Image, endian="<", sform=1, qform=1):
    """A NIfTI image whose header is written just as asked for."""
    array = ramp() if array is None else array
    header = kind.header_class(endianness=endian)
    header.set_data_dtype(array.dtype.newbyteorder(endian))
    image = kind(array, None, header)
    affine = affine_of() if affine is None else affine
    image.set_sform(affine if sform else None, sform)
    image.set_qform(affine if qform else None, qform)
    image.header.set_zooms((*np.linalg.norm(affine[:3, :3], axis=0), *[1] * (array.ndim - 3))[: array.ndim])
    image.header.set_xyzt_units("mm")
    return image


def file_bytes(image=None, **fields):
    """The bytes of a single-file NIfTI with header fields overwritten afterwards."""
    data = bytearray((image or image_of()).to_bytes())
    header = nib.Nifti1Header(bytes(data[:348]), check=False)
    for name, value in fields.items():
        header[name] = value
    data[:348] = header.binaryblock
    return bytes(data)


def write(folder: Path, data: bytes, name="scan.nii") -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(data, 6) if name.lower().endswith(".gz") else data)
    return path


# --- what is read is what nibabel and SimpleITK read


@pytest.mark.parametrize("form", ["both", "sform", "qform"])
@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz", "scan.img", "scan.img.gz", "nifti2.nii.gz", "nifti2.img"])
def test_all_48_axis_orders_lie_where_nibabel_and_simpleitk_say(tmp_path, name, form):
    pair, second = ".img" in name, name.startswith("nifti2")
    kind = {(0, 0): nib.Nifti1Image, (0, 1): nib.Nifti2Image, (1, 0): nib.Nifti1Pair, (1, 1): nib.Nifti2Pair}[
        pair, second
    ]
    path = tmp_path / name
    for number, axes in enumerate(AXIS_ORDERS):
        oblique = euler2mat(0.1, -0.2, 0.3) if number % 2 else np.eye(3)
        options = {"sform": form != "qform", "qform": form != "sform"}
        image = image_of(affine=affine_of(oblique @ axes), kind=kind, **options)
        nib.save(image, path)
        scan = open_file(path.parent, nifti_affine="auto")
        loaded = nib.load(path)
        np.testing.assert_array_equal(voxels(scan).transpose(2, 1, 0), np.asanyarray(loaded.dataobj))
        np.testing.assert_allclose(scan.geometry.affine_ras, loaded.affine, atol=1e-4)
        if not second:  # which SimpleITK does not read
            assert_equals_simpleitk(scan, path)


@pytest.mark.parametrize("endian", ["<", ">"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
def test_every_type_in_either_byte_order_comes_out_native_with_its_scaling(tmp_path, name, dtype, endian):
    path = write(tmp_path, file_bytes(image_of(ramp(dtype), endian=endian), scl_slope=2, scl_inter=-1024), name)
    scan = open_file(path)
    stored = nib.load(path).dataobj.get_unscaled()
    assert scan.dtype == np.dtype(dtype) and scan.dtype.isnative
    assert (scan.slope, scan.intercept) == (2.0, -1024.0)
    np.testing.assert_array_equal(voxels(scan).transpose(2, 1, 0), stored)
    assert_equals_simpleitk(scan, path)


def test_planes_share_one_buffer_and_can_be_streamed_again(tmp_path):
    scan = open_file(write(tmp_path, file_bytes(), "scan.nii.gz"))
    assert len({plane.ctypes.data for plane in scan.planes()}) == 1
    np.testing.assert_array_equal(voxels(scan), voxels(scan))


def test_a_sheared_sform_is_kept_as_it_is(tmp_path):
    affine = affine_of()
    affine[1, 2] = 0.9
    scan = open_file(write(tmp_path, file_bytes(image_of(affine=affine, qform=0))))
    np.testing.assert_allclose(scan.geometry.affine_ras, affine, atol=1e-5)
    assert not scan.geometry.is_orthogonal()


@pytest.mark.parametrize(("unit", "mm"), [("meter", 1000.0), ("mm", 1.0), ("micron", 0.001), ("unknown", 1.0)])
@pytest.mark.parametrize("form", ["sform", "qform"])
def test_lengths_become_millimetres(tmp_path, unit, mm, form):
    affine = affine_of()
    affine[:3] /= mm
    image = image_of(affine=affine, sform=form == "sform", qform=form == "qform")
    image.header.set_xyzt_units(unit)
    scan = open_file(write(tmp_path, file_bytes(image)))
    np.testing.assert_allclose(scan.geometry.affine_ras, affine_of(), rtol=1e-5)


@pytest.mark.parametrize(
    ("slope", "intercept", "expected"),
    [
        (0.0, -1024, (1, 0)),
        (np.nan, -1024, (1, 0)),
        (np.inf, 5, (1, 0)),
        (np.nan, np.nan, (1, 0)),
        (0.5, -1000, (0.5, -1000)),
    ],
)
def test_a_slope_of_zero_or_none_means_not_scaled(tmp_path, slope, intercept, expected):
    scan = open_file(write(tmp_path, file_bytes(scl_slope=slope, scl_inter=intercept)))
    assert (scan.slope, scan.intercept) == expected


def test_a_4d_file_with_one_volume_is_a_scan(tmp_path):
    scan = open_file(write(tmp_path, file_bytes(image_of(ramp(shape=(*SHAPE_XYZ, 1))))))
    assert scan.geometry.shape_zyx == SHAPE_XYZ[::-1]


@pytest.mark.parametrize("extension", [b"", b"private" * 9])
def test_header_extensions_are_skipped(tmp_path, extension):
    image = image_of()
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", extension))
    scan = open_file(write(tmp_path, image.to_bytes(), "scan.nii.gz"))
    np.testing.assert_array_equal(voxels(scan), ramp().T)


def test_a_gzip_of_several_members_and_zero_padding_is_one_stream(tmp_path):
    data = file_bytes()
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(
        b"".join(gzip.compress(part) for part in (data[:100], b"", data[100:500], data[500:])) + bytes(700)
    )
    np.testing.assert_array_equal(voxels(open_file(path)), ramp().T)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=4, max_size=4).filter(lambda q: np.linalg.norm(q) > 0.1), st.booleans())
def test_sform_and_qform_of_one_affine_in_float32_never_conflict(tmp_path_factory, quaternion, nearly_half_a_turn):
    if nearly_half_a_turn:
        quaternion = [quaternion[0] * 1e-3, *quaternion[1:3], quaternion[3] + np.sign(quaternion[3] or 1)]
    axes = nib.quaternions.quat2mat(np.array(quaternion) / np.linalg.norm(quaternion))
    shape = (512, 512, 2)
    path = write(
        tmp_path_factory.mktemp("q"), file_bytes(image_of(np.zeros(shape, "u1"), affine_of(axes, (0.98, 0.98, 1.0))))
    )
    assert open_file(path).geometry.shape_zyx == shape[::-1]


# --- what is refused


def conflict():
    image = image_of()
    image.set_qform(affine_of(spacing=(0.7, 0.8, 3.0)), 1)
    return file_bytes(image)


@pytest.mark.parametrize(
    ("code", "data"),
    [
        ("empty", lambda: b""),
        ("not-a-scan", lambda: b"\xff\xd8\xff\xe0" + bytes(500)),
        ("not-a-scan", lambda: b"patient list\n" * 40),
        ("not-a-scan", lambda: bytes(1000)),
        ("truncated", lambda: file_bytes()[:200]),
        ("truncated", lambda: file_bytes()[:352]),
        ("truncated", lambda: file_bytes()[:-1]),
        ("surplus", lambda: file_bytes() + b"\0"),
        ("no-geometry", lambda: file_bytes(sform_code=0, qform_code=0)),
        ("no-geometry", lambda: file_bytes(magic=b"")),
        ("bad-header", lambda: file_bytes(magic=b"ni1")),
        ("bad-header", lambda: file_bytes(dim=[0, 5, 6, 7, 1, 1, 1, 1])),
        ("bad-header", lambda: file_bytes(dim=[3, 5, -6, 7, 1, 1, 1, 1])),
        ("bad-header", lambda: file_bytes(vox_offset=100)),
        ("bad-header", lambda: file_bytes(vox_offset=np.nan)),
        ("bad-header", lambda: file_bytes(vox_offset=1e12)),
        ("bad-header", lambda: file_bytes(xyzt_units=5)),
        ("bad-scaling", lambda: file_bytes(scl_slope=1.0, scl_inter=np.nan)),
        ("affine-conflict", conflict),
        ("bad-geometry", lambda: file_bytes(srow_x=[np.nan] * 4)),
        ("bad-geometry", lambda: file_bytes(srow_x=[0] * 4)),
        ("bad-geometry", lambda: file_bytes(srow_x=[1e30, 0, 0, 0], qform_code=0)),
        ("bad-geometry", lambda: file_bytes(sform_code=0, quatern_b=np.nan)),
        ("bad-geometry", lambda: file_bytes(sform_code=0, quatern_b=0.9, quatern_c=0.9)),
        ("bad-geometry", lambda: file_bytes(sform_code=0, pixdim=[1, 0.7, 0, 2, 1, 1, 1, 1])),
        ("two-d", lambda: file_bytes(image_of(ramp(shape=(5, 6))))),
        ("two-d", lambda: file_bytes(image_of(ramp(shape=(5, 6, 1))))),
        ("two-d", lambda: file_bytes(image_of(ramp(shape=(1, 6, 7))))),
        ("several-volumes", lambda: file_bytes(image_of(ramp(shape=(5, 6, 7, 3))))),
        ("several-volumes", lambda: file_bytes(image_of(ramp(shape=(5, 6, 1, 3))))),
        ("several-volumes", lambda: file_bytes(image_of(ramp(shape=(5, 6, 7, 1, 3))))),
        ("complex", lambda: file_bytes(image_of(ramp("c8")))),
        ("rgb", lambda: file_bytes(datatype=128)),
        ("rgb", lambda: file_bytes(datatype=2304)),
        ("dtype", lambda: file_bytes(datatype=1)),
        ("dtype", lambda: file_bytes(datatype=1536)),
        ("dtype", lambda: file_bytes(datatype=7)),
        ("too-large", lambda: file_bytes(dim=[3, 2000, 2000, 2000, 1, 1, 1, 1])),
        ("too-large", lambda: file_bytes(dim=[3, 5000, 2, 2, 1, 1, 1, 1])),
    ],
)
@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz", "SCAN.NII.GZ"])
def test_a_broken_file_is_refused_with_its_code(tmp_path, code, data, name):
    path = write(tmp_path, data(), name)
    if code == "empty":
        path.write_bytes(b"")
    if code == "not-a-scan":
        path.write_bytes(data())
    assert refusal(path).code == code


def test_a_conflict_shows_both_and_ends_when_a_person_picks_one(tmp_path):
    path = write(tmp_path, conflict())
    message = refusal(path).message
    assert "2.5 mm" in message and "3 mm" in message and "nifti_affine=sform" in message
    assert open_file(path, nifti_affine="sform").geometry.spacing_zyx_mm[0] == pytest.approx(2.5)
    assert open_file(path, nifti_affine="qform").geometry.spacing_zyx_mm[0] == pytest.approx(3.0)


@pytest.mark.parametrize("asked", ["sform", "qform"])
def test_an_affine_that_is_asked_for_gives_way_to_the_only_one_there_is_as_if_nothing_were_asked(tmp_path, asked):
    for options in ({"qform": 0}, {"sform": 0}):
        path = write(tmp_path, file_bytes(image_of(affine=affine_of(euler2mat(0.1, 0.2, 0.3)), **options)))
        scan = open_file(path, nifti_affine=asked)
        assert scan.geometry == open_file(path).geometry
        assert scan.choices == {}
    path = write(tmp_path, file_bytes(sform_code=0, qform_code=0))
    assert refusal(path, nifti_affine=asked).code == "no-geometry"


def sheared():
    affine = affine_of()
    affine[1, 2] = 0.75
    return affine


@pytest.mark.parametrize(
    ("sform", "said", "unsaid"),
    [
        (sheared(), ("sform sheared by 16.7 degrees", "z step 2.61 mm in the sform, 2.5 in qform and pixdim"), "first"),
        (affine_of(spacing=(0.7, 0.8, 5.0)), ("z step 5 mm in the sform, 2.5 in qform and pixdim",), "turned"),
        (affine_of(origin=(-120.5, 33.25, 413)), ("only first voxels 3 mm apart, pixdim agrees with both",), "sheared"),
        (affine_of(euler2mat(0.5, 0, 0)), ("axes turned by 28.6 degrees, pixdim agrees with both",), "sheared"),
    ],
    ids=["sheared", "z step", "shift", "turn"],
)
def test_a_conflict_says_what_differs_and_whether_pixdim_agrees(tmp_path, sform, said, unsaid):
    image = image_of()
    image.set_sform(sform, 1)
    path = write(tmp_path, image.to_bytes())
    message = refusal(path).message
    assert all(words in message for words in said), message
    assert unsaid not in message


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((1, 5, 6, 7), r"its first is one voxel long.*\(array\[0\] in"),
        ((1, 5, 6, 7, 1), "its first is"),
        ((1, 1, 5, 6, 7), "its first is"),
        ((5, 1, 6, 7), r"its second is one voxel long.*\(array\[:, 0\] in"),
        ((5, 6, 1, 7), r"its third is one voxel long.*\(array\[:, :, 0\] in"),
    ],
)
def test_an_axis_of_one_voxel_before_others_is_named_as_that_and_not_as_several_volumes(tmp_path, sizes, words):
    path = write(tmp_path, nib.Nifti1Image(np.zeros(sizes, np.int16), affine_of()).to_bytes())
    found = refusal(path)
    assert found.code == ("channel-first" if sizes[0] == 1 else "several-volumes")
    assert re.search(words, found.message) and "one file per volume" not in found.message


def test_a_broken_affine_beside_a_good_one_names_the_way_out(tmp_path):
    path = write(tmp_path, file_bytes(srow_y=[np.nan] * 4))
    assert "nifti_affine=qform" in refusal(path).message
    assert open_file(path, nifti_affine="qform").geometry.orientation == "SAR"


def test_no_free_text_of_a_header_reaches_a_message(tmp_path):
    private = {"descrip": b"DOE^JANE", "aux_file": b"DOE^JANE", "intent_name": b"DOE^JANE", "db_name": b"DOE^JANE"}
    for change in ({"datatype": 7}, {"dim": [3, 5, -6, 7, 1, 1, 1, 1]}, {"srow_x": [0] * 4}, {"magic": b""}):
        assert "DOE" not in refusal(write(tmp_path, file_bytes(**private, **change))).message


@pytest.mark.parametrize("keep", [2, 9, 12, 0.1, 0.5, 0.9, -9, -8, -4, -1])
def test_a_truncated_gzip_is_refused_wherever_it_is_cut(tmp_path, keep):
    packed = gzip.compress(file_bytes(image_of(noise())))
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(packed[: int(keep * len(packed)) if isinstance(keep, float) else keep])
    assert refusal(path).code == "truncated"


def noise():
    return np.random.default_rng(0).integers(-1000, 1000, (40, 40, 40)).astype("i2")


@settings(max_examples=40, deadline=None)
@given(bit=st.floats(0, 1))
def test_one_flipped_bit_in_compressed_voxels_never_passes(tmp_path_factory, bit):
    packed = bytearray(gzip.compress(file_bytes(image_of(noise()))))
    first, count = 10 * 8, (len(packed) - 10) * 8 - 1
    at = first + int(bit * count)
    packed[at // 8] ^= 1 << at % 8
    path = tmp_path_factory.mktemp("flip") / "scan.nii.gz"
    path.write_bytes(packed)
    assert refusal(path).code in (
        "damaged",
        "truncated",
        "surplus",
        "not-a-scan",
        "bad-header",
        "bad-geometry",
        "two-d",
    )


@pytest.mark.parametrize("at", [-8, -5, -4, -1])
def test_a_wrong_checksum_or_length_in_the_trailer_is_damage(tmp_path, at):
    packed = bytearray(gzip.compress(file_bytes()))
    packed[at] ^= 1
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(packed)
    assert refusal(path).code == "damaged"


def test_a_damaged_second_member_is_damage(tmp_path):
    data = file_bytes()
    second = bytearray(gzip.compress(data[500:]))
    second[-8] ^= 1
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(gzip.compress(data[:500]) + second)
    assert refusal(path).code == "damaged"


@pytest.mark.parametrize(
    "tail", [b"\x1f", b"junk", gzip.compress(b"more")], ids=["half a magic number", "junk", "a member"]
)
def test_anything_after_the_voxels_is_surplus_or_damage(tmp_path, tail):
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(gzip.compress(file_bytes()) + tail)
    assert refusal(path).code == "surplus"


def test_damage_shows_before_the_last_plane_is_handed_out(tmp_path):
    packed = bytearray(gzip.compress(file_bytes()))
    packed[-6] ^= 1
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(packed)
    planes, seen = open_file(path).planes(), 0
    with pytest.raises(ValueError, match="checksum"):
        for _ in planes:
            seen += 1
    assert seen == SHAPE_XYZ[2] - 1


def test_a_bomb_of_two_gigabytes_costs_neither_time_nor_memory(tmp_path):
    path = tmp_path / "scan.nii.gz"
    zeros = igzip.compress(bytes(1 << 24))
    path.write_bytes(igzip.compress(file_bytes()) + zeros * 128)
    start = time.perf_counter()
    tracemalloc.start()
    assert refusal(path).code == "surplus"
    assert tracemalloc.get_traced_memory()[1] < 4 << 20 and time.perf_counter() - start < 1
    tracemalloc.stop()


def test_a_header_that_promises_more_than_deflate_can_hold_is_truncated_before_anything_is_allocated(tmp_path):
    path = write(tmp_path, file_bytes(dim=[3, 1000, 1000, 900, 1, 1, 1, 1]), "scan.nii.gz")
    assert refusal(path).code == "truncated"
    with pytest.raises(ValueError, match="at most 1,000 voxels"):
        open_file(write(tmp_path, file_bytes(dim=[3, 20, 20, 20, 1, 1, 1, 1])), max_voxels=1000)


@pytest.mark.parametrize("name", ["scan.nii.gz", "scan.img.gz"])
def test_gz_in_a_name_means_gzip_inside(tmp_path, name):
    image = image_of(kind=nib.Nifti1Pair if "img" in name else nib.Nifti1Image)
    nib.save(image, tmp_path / name)
    (tmp_path / name).write_bytes(gzip.decompress((tmp_path / name).read_bytes()))
    refused = refusal(tmp_path / name.replace("img", "hdr"))
    assert refused.code == "not-a-scan" and "gzip" in refused.message


def test_a_gzipped_file_named_nii_is_refused_with_the_right_name(tmp_path):
    path = tmp_path / "scan.nii"
    path.write_bytes(gzip.compress(file_bytes()))
    refused = refusal(path)
    assert refused.code == "not-a-scan" and "gzip" in refused.message


def test_a_header_needs_just_one_data_file_of_the_right_length(tmp_path):
    image = image_of(kind=nib.Nifti1Pair)
    nib.save(image, tmp_path / "scan.img")
    header, data = tmp_path / "scan.hdr", tmp_path / "scan.img"
    stored = data.read_bytes()
    for content, code in ((stored[:-1], "truncated"), (stored + b"\0", "surplus"), (b"", "empty")):
        data.write_bytes(content)
        assert refusal(header).code == code
    (tmp_path / "scan.img.gz").write_bytes(zlib.compress(stored))
    assert refusal(header).code == "data-file"
    data.unlink()
    (tmp_path / "scan.img.gz").unlink()
    assert refusal(header).code == "data-file"


def test_an_analyze_header_has_no_orientation(tmp_path):
    nib.save(nib.AnalyzeImage(ramp(), np.eye(4)), tmp_path / "scan.img")
    refused = refusal(tmp_path / "scan.hdr")
    assert refused.code == "no-geometry" and "Analyze" in refused.message


def test_a_file_that_went_away_is_unreadable(tmp_path):
    path = write(tmp_path, file_bytes())
    (source,) = find_scans(tmp_path).sources
    path.unlink()
    with pytest.raises(ValueError, match="No such file"):
        open_scan(source)


def test_a_header_of_arbitrary_bytes_is_refused_not_a_crash(tmp_path):
    rng = np.random.default_rng(0)
    good = file_bytes()
    for _ in range(300):
        data = bytearray(good)
        for at in rng.integers(4, 348, 6):
            data[at] = rng.integers(256)
        path = write(tmp_path, bytes(data))
        try:
            voxels(open_file(path))
        except ValueError as error:
            assert hasattr(error, "code"), error
    assert struct.unpack("<i", good[:4]) == (348,)
