"""The package's face: the first names a user meets, each with an example in its documentation that runs."""

import doctest

import numpy as np
import pytest
from raw import write_scan

import photon_data
from photon_data.prepare_file import Job, prepare_file
from photon_data.prepare_masks import MaskJob, prepare_masks
from photon_data.readers.find import find_one_scan
from photon_data.scan import MaskFile, Source, names_below

RECIPE = photon_data.Recipe(shape_zyx=(40, 32, 32), model_shape_zyx=(14, 28, 28))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the scan a.nii.gz, the store that is made of it, and its masks."""
    write_scan(tmp_path / "a.nii.gz", spacing_mm=(2.0, 1.125, 0.875))
    record = prepare_file(Job(find_one_scan(tmp_path), str(tmp_path), RECIPE))
    ones = np.ones((16, 24, 28), np.uint8)
    liver = MaskFile("liver", (write_scan(tmp_path / "liver.nii.gz", spacing_mm=(2.0, 1.125, 0.875), array=ones),))
    files = Source("a", "liver.nii.gz", names_below("", liver.files), "masks", 0, 0)
    assert prepare_masks(MaskJob(files, (liver,), {}, record, str(tmp_path), RECIPE)).is_there
    (tmp_path / record.store).rename(tmp_path / "a.ome.zarr")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", photon_data.__all__)
def test_the_example_of_a_public_name_runs(name, folder):
    thing = getattr(photon_data, name)
    found = doctest.DocTestFinder(recurse=False).find(thing, name, globs={"photon_data": photon_data, "np": np})
    assert found[0].examples, f"{name} has no example"
    assert doctest.DocTestRunner().run(found[0]).failed == 0


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nothing"):
        _ = photon_data.nothing
