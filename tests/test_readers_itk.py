import gzip
import zlib
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from reading import AXIS_ORDERS, assert_equals_simpleitk, open_file, refusal, voxels

from photon_data.readers.find import find_scans

DTYPES = ("u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8")
IDENTITY = np.eye(3)
OBLIQUE = sitk.Euler3DTransform((0, 0, 0), 0.1, -0.2, 0.3).GetMatrix()


def image_of(axes=IDENTITY, dtype="i2", shape_zyx=(5, 6, 7)):
    image = sitk.GetImageFromArray(np.arange(np.prod(shape_zyx)).reshape(shape_zyx).astype(dtype))
    image.SetSpacing((0.7, 0.8, 2.5))
    image.SetOrigin((-120.5, 33.25, 410.0))
    image.SetDirection(axes.ravel().tolist())
    return image


def stored(dtype="<i2"):
    return np.arange(5 * 6 * 7).reshape(5, 6, 7).astype(dtype).tobytes()


def header(defaults: dict[str, str], separator: str, changes: dict[str, str | None]) -> bytes:
    """Header lines with some of them changed, added or (None) taken out."""
    lines = [f"{key}{separator}{value}\n" for key, value in (defaults | changes).items() if value is not None]
    return "".join(lines).encode("latin-1")


def nrrd(data: bytes | None = None, **changes: str | None) -> bytes:
    fields = {
        "type": "short",
        "dimension": "3",
        "space": "left-posterior-superior",
        "sizes": "7 6 5",
        "space directions": "(0.7,0,0) (0,0.8,0) (0,0,2.5)",
        "endian": "little",
        "encoding": "raw",
        "space origin": "(-120.5,33.25,410)",
    }
    spaced = {key.replace("_", " "): value for key, value in changes.items()}
    return b"NRRD0004\n# DOE^JANE\n" + header(fields, ": ", spaced) + b"\n" + (stored() if data is None else data)


def mha(data: bytes | None = None, **changes: str | None) -> bytes:
    fields = {
        "ObjectType": "Image",
        "NDims": "3",
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "CompressedData": "False",
        "TransformMatrix": "1 0 0 0 1 0 0 0 1",
        "Offset": "-120.5 33.25 410",
        "CenterOfRotation": "0 0 0",
        "ElementSpacing": "0.7 0.8 2.5",
        "DimSize": "7 6 5",
        "PatientName": "DOE^JANE",
        "ElementType": "MET_SHORT",
    }
    last = changes.pop("ElementDataFile", "LOCAL")
    text = header(fields, " = ", changes) + (f"ElementDataFile = {last}\n".encode() if last else b"")
    return text + (stored() if data is None else data)


def write(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


# --- what is read is what SimpleITK reads


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", ["scan.nrrd", "scan.nhdr", "scan.mha", "scan.mhd"])
def test_all_48_axis_orders_lie_where_simpleitk_says(tmp_path, name, compressed):
    path = tmp_path / name
    for number, axes in enumerate(AXIS_ORDERS):
        turned = np.reshape(OBLIQUE, (3, 3)) @ axes if number % 2 else axes
        sitk.WriteImage(image_of(turned), str(path), useCompression=compressed)
        assert_equals_simpleitk(open_file(tmp_path), path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["scan.nrrd", "scan.mha"])
def test_every_type_comes_out_as_simpleitk_has_it(tmp_path, name, dtype):
    path = tmp_path / name
    sitk.WriteImage(image_of(dtype=dtype), str(path), useCompression=True)
    scan = open_file(path)
    assert scan.dtype == np.dtype(dtype) and (scan.slope, scan.intercept) == (1, 0)
    assert_equals_simpleitk(scan, path)


@pytest.mark.parametrize("endian", ["little", "big"])
@pytest.mark.parametrize("dtype", ["i2", "u4", "f8"])
def test_either_byte_order_comes_out_native(tmp_path, endian, dtype):
    data = stored(("<" if endian == "little" else ">") + dtype)
    names = {"i2": ("short", "MET_SHORT"), "u4": ("unsigned int", "MET_UINT"), "f8": ("double", "MET_DOUBLE")}[dtype]
    msb = str(endian == "big")
    for path in (
        write(tmp_path, "a.nrrd", nrrd(data, type=names[0], endian=endian)),
        write(tmp_path, "b.mha", mha(data, ElementType=names[1], BinaryDataByteOrderMSB=msb)),
        write(tmp_path, "c.mha", mha(data, ElementType=names[1], BinaryDataByteOrderMSB=None, ElementByteOrderMSB=msb)),
    ):
        scan = open_file(path)
        assert scan.dtype == np.dtype(dtype) and scan.dtype.isnative
        assert_equals_simpleitk(scan, path)


@pytest.mark.parametrize(
    "space", ["left-posterior-superior", "LPS", "right-anterior-superior", "RAS", "left-anterior-superior", "LAS"]
)
def test_the_named_spaces_of_nrrd_lie_where_simpleitk_says(tmp_path, space):
    path = write(tmp_path, "scan.nrrd", nrrd(space=space))
    assert_equals_simpleitk(open_file(path), path)


@pytest.mark.parametrize(
    "changes",
    [
        {"Offset": None, "Position": "-120.5 33.25 410"},
        {"Offset": None, "Origin": "-120.5 33.25 410"},
        {"TransformMatrix": None, "Rotation": "0 1 0 -1 0 0 0 0 1"},
        {"TransformMatrix": None, "Orientation": "0 1 0 -1 0 0 0 0 1"},
        {"ElementSpacing": None, "ElementSize": "0.7 0.8 2.5"},
        {"AnatomicalOrientation": "RAI"},
    ],
)
def test_the_synonyms_of_metaimage_lie_where_simpleitk_says(tmp_path, changes):
    path = write(tmp_path, "scan.mha", mha(**changes))
    assert_equals_simpleitk(open_file(path), path)


@pytest.mark.parametrize(
    "changes",
    [
        {"space_directions": "( 0.7 , 0 , 0 )  (0, 0.8, 0)\t(0, 0 ,2.5)", "space_origin": "( -120.5, 33.25, 410 )"},
        {"space_directions": "(0.7,0,0)(0,0.8,0)(0,0,2.5)", "measurement_frame": "( 1, 0, 0 ) (0, 1, 0) (0, 0, 1)"},
        {"sizes": "7, 6,  5"},
        {"kinds": "domain  domain  domain", "space_units": '"mm"  "mm" "mm"', "content": "a: (b) := c"},
    ],
)
def test_nrrd_written_by_hand_is_read_as_simpleitk_reads_it(tmp_path, changes):
    data = nrrd(**changes)
    title = data.replace(b"sizes:", b"Sizes:").replace(b"space o", b"Space O")
    for name, text in (("a.nrrd", data), ("b.nrrd", title)):
        path = write(tmp_path, name, text)
        assert_equals_simpleitk(open_file(path), path)


@pytest.mark.parametrize(("unit", "mm"), [("m", 1000), ("cm", 10), ("mm", 1), ("um", 0.001), ("microns", 0.001)])
def test_lengths_in_another_unit_become_millimetres(tmp_path, unit, mm):
    sides, origin = np.array([0.7, 0.8, 2.5]) / mm, np.array([-120.5, 33.25, 410]) / mm
    directions = " ".join(f"({x:.8g},{y:.8g},{z:.8g})" for x, y, z in np.diag(sides))
    place = f"({origin[0]:.8g}, {origin[1]:.8g}, {origin[2]:.8g})"
    files = {"a.nrrd": nrrd(space_units=f'"{unit}" ' * 3, space_directions=directions, space_origin=place)}
    numbers = {"ElementSpacing": "{:.8g} {:.8g} {:.8g}".format(*sides), "Offset": place.strip("()").replace(",", "")}
    files["b.mha"] = mha(DistanceUnits=unit, **numbers)
    for name, data in files.items():
        geometry = open_file(write(tmp_path, name, data)).geometry
        assert geometry.spacing_zyx_mm == pytest.approx((2.5, 0.8, 0.7))
        assert geometry.origin_lps == pytest.approx((-120.5, 33.25, 410))


def test_metaimages_own_slope_and_offset_are_its_rescaling(tmp_path):
    path = write(
        tmp_path, "a.mha", mha(ElementToIntensityFunctionSlope="0.5", ElementToIntensityFunctionOffset="-1024")
    )
    scan = open_file(path)
    assert (scan.slope, scan.intercept) == (0.5, -1024)
    assert scan.volume().array_zyx[0, 0, 2] == 2 * 0.5 - 1024
    only = open_file(write(tmp_path, "b.mha", mha(ElementToIntensityFunctionOffset="-1000")))
    assert (only.slope, only.intercept) == (1, -1000)


def test_one_volume_in_four_dimensions_is_a_scan(tmp_path):
    four = {"DimSize": "7 6 5 1", "NDims": "4", "Offset": "-120.5 33.25 410 0", "ElementSpacing": "0.7 0.8 2.5 1"}
    four["TransformMatrix"] = " ".join(str(int(n)) for n in np.eye(4).ravel())
    leading = {"sizes": "1 7 6 5", "dimension": "4", "space_directions": "none (0.7,0,0) (0,0.8,0) (0,0,2.5)"}
    trailing = {"sizes": "7 6 5 1", "dimension": "4", "space_directions": "(0.7,0,0) (0,0.8,0) (0,0,2.5) none"}
    files = [mha(**four), nrrd(**leading), nrrd(**trailing, kinds="domain domain domain list")]
    for data, name in zip(files, ("a.mha", "b.nrrd", "c.nrrd"), strict=True):
        scan = open_file(write(tmp_path, name, data))
        assert scan.geometry.spacing_zyx_mm == pytest.approx((2.5, 0.8, 0.7))
        assert voxels(scan).astype("<i2").tobytes() == stored()


@pytest.mark.parametrize("skip", ["16", "-1"])
def test_bytes_before_the_voxels_of_a_data_file_are_skipped(tmp_path, skip):
    (tmp_path / "voxels.raw").write_bytes(b"sixteen bytes of" + stored())
    for path in (
        write(tmp_path, "a.nhdr", nrrd(b"", data_file="voxels.raw", byte_skip=skip)),
        write(tmp_path, "b.mhd", mha(b"", ElementDataFile="voxels.raw", HeaderSize=skip)),
    ):
        assert voxels(open_file(path)).astype("<i2").tobytes() == stored()


def test_a_header_and_its_data_file_are_one_source(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "voxels of a.raw").write_bytes(stored())
    header_path = write(tmp_path, "a.mhd", mha(b"", ElementDataFile="deep/voxels of a.raw"))
    found = find_scans(tmp_path)
    assert found.sources[0].files == (header_path, tmp_path / "deep" / "voxels of a.raw") and found.ignored == {}
    assert voxels(open_file(tmp_path)).astype("<i2").tobytes() == stored()


# --- what is refused

NRRD_CASES = [
    ("empty", b""),
    ("not-a-scan", b"PK\x03\x04" + bytes(300)),
    ("bad-header", nrrd().replace(b"NRRD0004", b"NRRD0099")),
    ("bad-header", nrrd(type=None)),
    ("bad-header", nrrd(sizes="7 6 x")),
    ("bad-header", nrrd(dimension="4")),
    ("bad-header", nrrd(endian=None)),
    ("bad-header", nrrd(byte_skip="-7")),
    ("bad-header", b"NRRD0004\n" + b"# DOE^JANE\n" * 100_000),
    ("truncated", nrrd()[:-1]),
    ("surplus", nrrd() + b"\0"),
    ("truncated", nrrd(gzip.compress(stored())[:-1], encoding="gzip")),
    ("damaged", nrrd(gzip.compress(stored())[:-8] + bytes(8), encoding="gz")),
    ("surplus", nrrd(gzip.compress(stored() + b"\0"), encoding="gzip")),
    ("encoding", nrrd(encoding="ascii")),
    ("encoding", nrrd(encoding="bzip2")),
    ("encoding", nrrd(line_skip="1")),
    ("no-geometry", nrrd(space=None)),
    ("no-geometry", nrrd(space="scanner-xyz")),
    ("no-geometry", nrrd(space_origin=None)),
    ("no-geometry", nrrd(space_directions=None, space=None, space_origin=None, spacings="1 1 1")),
    ("bad-geometry", nrrd(space_directions="(0.7,0,0) (0,0,0) (0,0,2.5)")),
    ("bad-geometry", nrrd(space_origin="(nan,0,0)")),
    ("bad-geometry", nrrd(space_directions="(0.7,0) (0,0.8) (1,1)")),
    ("bad-geometry", nrrd(space_units='"m" "m" "m"')),
    ("bad-geometry", nrrd(space_units='"mm" "mm" "cm"')),
    ("bad-geometry", nrrd(space_units='"inch" "inch" "inch"')),
    ("bad-header", nrrd(space_directions="(0.7 0 0) (0 0.8 0) (0 0 2.5)")),
    ("data-file", nrrd(b"voxels.raw\n", **{"data_file": "LIST"})),
    ("data-file", nrrd(b"voxels.raw\n", **{"Data_File": "LIST 2"})),
    ("rgb", nrrd(dimension="4", sizes="3 7 6 5", kinds="RGB-color domain domain domain")),
    ("complex", nrrd(dimension="4", sizes="2 7 6 5", kinds="complex domain domain domain")),
    ("several-volumes", nrrd(dimension="4", sizes="2 7 6 5", space_directions="none (1,0,0) (0,1,0) (0,0,1)")),
    ("several-volumes", nrrd(dimension="4", sizes="7 6 5 2", space_directions=None)),
    ("two-d", nrrd(dimension="2", sizes="7 6", space_directions="(1,0,0) (0,1,0)")),
    ("two-d", nrrd(sizes="7 6 1")),
    ("dtype", nrrd(type="block")),
    ("too-large", nrrd(sizes="2000 2000 2000")),
    ("data-file", nrrd(data_file="LIST")),
    ("data-file", nrrd(data_file="slice%03d.raw 1 5 1")),
    ("data-file", nrrd(data_file="missing.raw")),
]
META_CASES = [
    ("bad-scaling", mha(ElementToIntensityFunctionSlope="0")),
    ("bad-scaling", mha(ElementToIntensityFunctionOffset="nan")),
    ("bad-header", mha(ElementToIntensityFunctionSlope="1 2")),
    ("bad-geometry", mha(DistanceUnits="inch")),
    ("data-file", mha(b"voxels.raw\n", ElementDataFile="LIST")),
    ("empty", b""),
    ("not-a-scan", b"\x89PNG" + bytes(300)),
    ("not-a-scan", b"key = value\n" * 40),
    ("bad-header", mha(NDims="three")),
    ("bad-header", mha(DimSize="7 6")),
    ("bad-header", mha(DimSize="7 6 nan")),
    ("bad-header", mha(Offset="a b c")),
    ("bad-header", mha(BinaryDataByteOrderMSB=None)),
    ("bad-header", mha(HeaderSize="3")),
    ("truncated", mha()[:-1]),
    ("surplus", mha() + b"\0"),
    ("truncated", mha(zlib.compress(stored())[:-1], CompressedData="True")),
    (
        "truncated",
        mha(zlib.compress(stored())[:-1], CompressedData="True", CompressedDataSize=str(len(zlib.compress(stored())))),
    ),
    ("damaged", mha(zlib.compress(stored())[:-1] + b"\0", CompressedData="True")),
    ("surplus", mha(zlib.compress(stored() + b"\0"), CompressedData="True")),
    ("surplus", mha(zlib.compress(stored()) + b"junk", CompressedData="True")),
    ("encoding", mha(BinaryData="False")),
    ("no-geometry", mha(Offset=None)),
    ("no-geometry", mha(TransformMatrix=None)),
    ("no-geometry", mha(ElementSpacing=None)),
    ("bad-geometry", mha(ElementSpacing="0.7 0 2.5")),
    ("bad-geometry", mha(TransformMatrix="1 0 0 1 0 0 0 0 1")),
    ("bad-geometry", mha(TransformMatrix="nan 0 0 0 1 0 0 0 1")),
    ("rgb", mha(ElementNumberOfChannels="3")),
    ("several-volumes", mha(ElementNumberOfChannels="2")),
    ("several-volumes", mha(NDims="4", DimSize="7 6 5 2")),
    ("two-d", mha(NDims="2", DimSize="7 6")),
    ("two-d", mha(DimSize="7 6 1")),
    ("dtype", mha(ElementType="MET_FLOAT_ARRAY")),
    ("too-large", mha(DimSize="2000 2000 2000")),
    ("data-file", mha(ElementDataFile="LIST")),
    ("data-file", mha(ElementDataFile="slice%03d.raw 1 5 1")),
    ("data-file", mha(ElementDataFile="missing.raw")),
]


@pytest.mark.parametrize(
    ("name", "code", "data"),
    [("scan.nrrd", *case) for case in NRRD_CASES] + [("scan.mha", *case) for case in META_CASES],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_broken_file_is_refused_with_its_code_and_without_its_text(tmp_path, name, code, data):
    refused = refusal(write(tmp_path, name, data))
    assert refused.code == code
    assert "DOE" not in refused.message and "missing.raw" not in refused.message


@pytest.mark.parametrize("reference", ["../secret.raw", "/etc/hostname", "{outside}", "way/secret.raw", "a" * 300])
def test_a_header_cannot_reach_out_of_its_folder(tmp_path, reference):
    folder, outside = tmp_path / "scans", tmp_path / "secret.raw"
    folder.mkdir()
    outside.write_bytes(stored())
    (folder / "way").symlink_to(tmp_path)
    reference = reference.format(outside=outside)
    for path in (
        write(folder, "a.mhd", mha(b"", ElementDataFile=reference)),
        write(folder, "b.nhdr", nrrd(b"", data_file=reference)),
    ):
        assert refusal(path).code == "data-file"
        assert find_scans(path).sources[0].files == (path,)


def test_header_lines_of_arbitrary_bytes_are_refused_not_a_crash(tmp_path):
    rng = np.random.default_rng(0)
    for good, name in ((nrrd(), "scan.nrrd"), (mha(), "scan.mha")):
        for _ in range(200):
            data = bytearray(good)
            for at in rng.integers(8, len(good) - len(stored()), 4):
                data[at] = rng.integers(256)
            path = write(tmp_path, name, bytes(data))
            try:
                voxels(open_file(path))
            except ValueError as error:
                assert hasattr(error, "code"), error
