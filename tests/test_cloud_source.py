"""SOURCE as an object store: a stand-in over a folder, which counts what is read of it, fails, and changes on demand.

The same tree is searched and prepared as a folder and as a URL.
"""

import json
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import SimpleITK as sitk
from dicom_files import stored_values, write_enhanced, write_series
from fsspec.implementations.local import LocalFileSystem
from raw import write_scan
from scans import ct_like, frame, to_sitk
from typer.testing import CliRunner

from photon_cli.data import app
from photon_data import bucket
from photon_data.errors import UsageError
from photon_data.files import Location
from photon_data.private import private_folder
from photon_data.readers.find import find_scans
from photon_data.readers.object_path import source_path
from photon_data.recipe import Recipe
from photon_data.records import read_records
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
    slices = stored_values((16, 24, 28), low=-200, high=200)
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
    return [(replace(source, files=(), **same), name) for source, name in zip(sources, names, strict=True)], ignored


@pytest.mark.parametrize("options", [{}, {"id_from": "hash"}, {"exclude": ["itk", "*.dcm"]}, {"label_maps": True}])
def test_a_bucket_has_the_scans_ids_and_refusals_of_a_folder(raw, options):
    assert found_in(source_path(url_of(raw)), **options) == found_in(raw, **options)


@pytest.mark.parametrize("name", ["one.nii.gz", "itk/six.mhd", "itk/seven.hdr", "enhanced.dcm"])
def test_one_object_is_one_scan_with_the_data_file_beside_it(raw, name):
    assert found_in(source_path(url_of(raw / name))) == found_in(raw / name)


def test_of_dicom_the_search_reads_first_bytes_alone_and_of_nifti_nothing(tmp_path):
    write_series(tmp_path / "raw" / "ct", stored_values((6, 128, 128)), names=[f"IM{z}" for z in range(6)])
    write_scan(tmp_path / "raw" / "one.nii.gz")
    found = find_scans(source_path(url_of(tmp_path / "raw")))
    assert len(found.sources) == 2
    assert sorted(Shop.ranges) == [(f"IM{z}", 0, 1 << 14) for z in range(6)]
