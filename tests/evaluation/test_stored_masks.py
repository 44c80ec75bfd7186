"""Masks of a prepared folder, counted on the tokens: against the files they are made of, and by hand."""

import json

import numpy as np
import pytest
import SimpleITK as sitk

from photon_data.errors import UsageError
from photon_data.files import Location
from photon_data.mask_store import Label, Masks, open_masks
from photon_data.phantom import make_phantoms
from photon_data.prepare_file import Job, prepare_file
from photon_data.prepare_masks import MaskJob, prepare_masks
from photon_data.readers.find import find_scans
from photon_data.recipe import Recipe
from photon_data.resample import model_grid
from photon_data.scan import MaskPattern
from photon_data.volume import Geometry
from photon_pipelines.mask_plan import find_masks, plan_masks
from photon_pipelines.request import Request
from photon_train.kept_tokens import MaskFolder, counted_by_volume, counted_masks, counted_stored_masks
from photon_train.rows import TrainRow
from photon_train.training.grounding import mask_shares

RECIPE = Recipe(spacing_mm=(3.0, 3.0, 3.0), shape_zyx=(120, 120, 120), model_shape_zyx=(14, 28, 28))
TOKENS_ZYX = (5, 5, 5)


def test_voxels_of_a_layer_are_counted_in_their_tokens_and_those_beyond_the_grid_in_none():
    grid = Geometry.axis_aligned((4, 4, 4), (2, 1, 1), (0, 0, 0))
    layers = np.zeros((2, 4, 4, 4), np.uint8)
    layers[0, 0, 0, 3] = 1  # foot, front, the patient's left: token 0
    layers[0, 3, 3, :] = 2  # head, back, both sides: 2 in token 6 (left), 2 in token 7 (right)
    layers[1, :, 1:3, 0] = 1  # right; front and back, below and above: tokens 1, 3, 5, 7
    labels = (
        Label("left", 1, 0, 1, 1, 1, 0.002, 1),
        Label("both", 1, 0, 2, 12, 4, 0.004, 4),  # 8 of 12 voxels of 4 mm^3 lie beyond: 16 of the grid's 2 mm^3
        Label("right", 1, 1, 1, 8, 8, 0.002, 8),
        Label("both", 2, 0, 0, 0, 0, 0.004, 0),
        Label("nothing", 0, 0, 0, 0, 0, 0.002, 0),
    )
    found = {
        mask.name: mask for mask in counted_stored_masks(Masks(labels, layers, grid, {}), model_grid(grid, (2, 2, 2)))
    }
    assert {name: mask.counts_V.tolist() for name, mask in found.items()} == {
        "left": [1, 0, 0, 0, 0, 0, 0, 0],
        "both": [0, 0, 0, 0, 0, 0, 2, 2],
        "right": [0, 2, 0, 2, 0, 2, 0, 2],
        "nothing": [0] * 8,
    }
    assert {name: mask.voxels for name, mask in found.items()} == {"left": 1, "both": 20, "right": 8, "nothing": 0}
    assert found["both"].ml == pytest.approx(12 * 0.004)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Three phantoms, prepared with their masks on a grid that cuts them."""
    root = tmp_path_factory.mktemp("phantoms")
    make_phantoms(root, 3, seed=0, size=96)
    out = root / "out"
    request = Request(
        root / "scans", Location(str(out)), RECIPE, masks=MaskPattern("{folder}/../masks/{name}/*.nii.gz")
    )
    jobs = [Job(source, str(out), RECIPE) for source in find_scans(root / "scans").sources]
    records = [prepare_file(job) for job in jobs]
    todo = plan_masks(find_masks(request, jobs), request, records)
    assert all(prepare_masks(MaskJob.from_json(json.loads(json.dumps(job.to_json())))).is_there for job in todo.jobs)
    (out / "volumes.jsonl").write_text("")
    return root, out, {record.id: str(out / record.store) for record in records}


def test_stored_masks_agree_with_their_files(prepared):
    root, _, stores = prepared
    for id, store in stores.items():
        masks = open_masks(store)
        cells = model_grid(masks.geometry, TOKENS_ZYX)
        stored = {mask.name: mask for mask in counted_stored_masks(masks, cells)}
        files = {mask.name: mask for mask in counted_masks(root / "masks" / id, cells)}
        assert set(stored) == set(files)
        for name, of_file in files.items():
            found = stored[name]
            assert found.ml == pytest.approx(of_file.ml)
            voxels = of_file.ml * 1000 / 27  # of 3 mm
            assert found.voxels == pytest.approx(voxels, rel=0.1, abs=3 * np.sqrt(voxels))
            if of_file.voxels > 3000:  # shares of large organs in the tokens
                shares = [mask.counts_V / mask.voxels for mask in (found, of_file)]
                assert np.abs(shares[0] - shares[1]).max() < 0.02
            grid, itk = masks.geometry, sitk.ReadImage(root / "masks" / id / f"{name}.nii.gz")
            itk = sitk.Resample(
                itk, grid.shape_zyx[::-1], sitk.Transform(), sitk.sitkNearestNeighbor, grid.origin_lps,
                grid.spacing_zyx_mm[::-1], np.eye(3).ravel().tolist(),
            )  # fmt: skip
            by_itk = sitk.GetArrayFromImage(itk) != 0
            assert (masks.mask(name).numpy() != by_itk).sum() <= 1e-3 * by_itk.sum() + 2


def test_a_prepared_folder_stands_in_for_a_folder_of_files(prepared):
    root, out, stores = prepared
    files, store = MaskFolder(root / "masks"), MaskFolder(out)
    assert (files.is_prepared, store.is_prepared) == (False, True)
    assert all(home.has(id) for home in (files, store) for id in stores)
    assert not store.has("stranger")
    found = [counted_by_volume(home, stores, TOKENS_ZYX, names={"liver"}) for home in (files, store)]
    assert [len(one.masks) for one in found] == [3, 3]
    assert [one.unread for one in found] == [{}, {}]
    rows = [TrainRow(id, (place,), [], (), id, ("liver",)) for id, place in stores.items()]
    shares = [mask_shares(rows, folder, TOKENS_ZYX) for folder in (root / "masks", out)]
    assert shares[0].keys() == shares[1].keys() == stores.keys()
    for id in stores:
        assert np.abs(shares[0][id] - shares[1][id]).max() < 0.02


def test_masks_of_another_volume_are_not_read_for_this_one(prepared, tmp_path):
    _, out, stores = prepared
    other = Recipe(spacing_mm=(3.5, 3.0, 3.0), shape_zyx=(120, 120, 120), model_shape_zyx=(14, 28, 28))
    id = next(iter(stores))
    scan = next(source for source in find_scans(out.parent / "scans").sources if source.id == id)
    record = prepare_file(Job(scan, str(tmp_path), other))
    elsewhere = {id: str(tmp_path / record.store)}
    found = counted_by_volume(MaskFolder(out), elsewhere, TOKENS_ZYX)
    assert found.masks == {}
    assert "as it is in" in found.unread[id]
    with pytest.raises(UsageError, match="as it is in"):
        mask_shares([TrainRow(id, (elsewhere[id],), [], (), id, ("liver",))], out, TOKENS_ZYX)
    with pytest.raises(UsageError, match="expected a store, found a raw scan"):
        MaskFolder(out).stored("", TOKENS_ZYX)
