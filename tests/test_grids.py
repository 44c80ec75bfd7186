"""prepare --grids: the whole field of a scan, uncut, or the model grid alone."""

import json
from dataclasses import replace

import numpy as np
import pytest
import zarr
from raw import write_scan
from scans import as_scan, ct_like, frame, on_grid_by_itk, rotated
from typer.testing import CliRunner

from photon_cli.data import app
from photon_data import Geometry, open_volume
from photon_data.errors import Refused, UsageError
from photon_data.files import Location
from photon_data.prepare_file import prepare_volume
from photon_data.recipe import Recipe
from photon_data.resample import full_grid
from photon_data.store import verify_store, write_store

RECIPE = Recipe(shape_zyx=(16, 20, 20), model_shape_zyx=(8, 10, 10))
SETTINGS = ["--set", "shape_zyx=16,20,20", "--set", "model_shape_zyx=8,10,10", "--workers", "1"]
IDENTITY = {"id": "case", "key": "k", "fingerprint": "sha256:0", "recipe": RECIPE.to_json(), "digest": "d"}
NAME = "volumes/case.ome.zarr"


def prepared(array, geometry, grids):
    return prepare_volume(as_scan(array, geometry), RECIPE, grids=grids)


def run(*arguments):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    return result.exit_code, " ".join(result.output.split())


@pytest.mark.parametrize("turn", [(0, 0, 0), (5, -8, 12)])
def test_a_marked_voxel_outside_of_the_crop_is_found_in_the_whole_field_at_its_world_position(tmp_path, turn):
    geometry = rotated(frame((30, 60, 70)), turn)
    array = ct_like((30, 60, 70))
    array[20:23, 49:53, 5:9] = 900  # 3 x 4 x 4 voxels of bone, near a corner
    found = prepared(array, geometry, "full")
    write_store(found, Location(str(tmp_path)), NAME, IDENTITY, "full")
    place = geometry.world((21, 50.5, 6.5))
    index = found.volume.geometry.index(place)
    assert not ((index >= -0.5) & (index < np.array(RECIPE.shape_zyx) - 0.5)).all()
    full = open_volume(tmp_path / NAME, "full", id="case")
    assert full.geometry.spacing_zyx_mm == (1.5, 1.5, 1.5)
    near = tuple(np.rint(full.geometry.index(place)).astype(int))
    assert full.array_zyx[near] > 800
    bright = np.argwhere(full.numpy() > 750)
    assert np.abs(full.geometry.world(bright) - place).max(axis=1).min() < 1.5


def test_the_whole_field_holds_every_corner_and_no_more_than_a_voxel_beside_and_is_what_itk_makes_of_it():
    geometry = rotated(frame((11, 40, 33)), (3, 10, -4))
    array = ct_like((11, 40, 33)).clip(-1000, 1000)
    found = prepared(array, geometry, "full").full
    corners, box = geometry.corners_lps(), found.geometry.corners_lps()
    assert (box.min(0) <= corners.min(0) + 1e-6).all() and (box.max(0) >= corners.max(0) - 1e-6).all()
    assert (np.ptp(box, axis=0) - np.ptp(corners, axis=0) < 1.5 + 1e-6).all()
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(array)
    image.SetOrigin(geometry.origin_lps)
    image.SetSpacing(geometry.spacing_zyx_mm[::-1])
    image.SetDirection(geometry.direction_xyz.ravel().tolist())
    expected = on_grid_by_itk(image, found.geometry)
    assert np.abs(found.array_zyx - expected).max() <= 1.0
    assert (found.array_zyx == expected.round()).mean() > 0.99


def test_a_scan_of_a_whole_number_of_voxels_gets_just_as_many():
    native = Geometry.axis_aligned((30, 20, 10), (3.0, 1.5, 0.75), (10, 20, 30))
    assert full_grid(native).shape_zyx == (60, 20, 5)
    assert np.allclose(full_grid(native).corners_lps(), native.corners_lps())


def test_a_field_that_no_scanner_has_is_refused():
    with pytest.raises(Refused, match=r"at most 400,000,000 voxels of 1.5 mm, found 1334 x 1334 x 1334"):
        full_grid(Geometry.axis_aligned((100, 100, 100), (20.0, 20.0, 20.0), (0, 0, 0)))


def stores_of(tmp_path):
    array, geometry = ct_like((30, 60, 70)), frame((30, 60, 70))
    for grids in ("volume", "full", "model"):
        write_store(prepared(array, geometry, grids), Location(str(tmp_path / grids)), NAME, IDENTITY, grids)
    return {grids: tmp_path / grids / NAME for grids in ("volume", "full", "model")}


def test_the_grids_that_stores_share_have_the_same_bytes(tmp_path):
    stores = stores_of(tmp_path)
    for file in ("0/zarr.json", "0/c.0.0.0", "model/zarr.json", "model/0/zarr.json", "model/0/c.0.0.0"):
        assert (stores["full"] / file).read_bytes() == (stores["volume"] / file).read_bytes()
    names = {path.relative_to(stores["model"]).as_posix() for path in stores["model"].rglob("*") if path.is_file()}
    assert names == {"model/0/c.0.0.0", "model/0/zarr.json", "model/zarr.json", "zarr.json"}
    assert (stores["model"] / "model/0/c.0.0.0").read_bytes() == (stores["full"] / "model/0/c.0.0.0").read_bytes()
    for store in stores.values():
        assert list(verify_store(Location(str(store.parent)), store.name)) == []


def test_every_image_group_is_valid_ome_zarr_and_lies_where_its_voxels_do(tmp_path):
    ome = pytest.importorskip("ome_zarr_models.v05")
    for grids, groups in (("full", ("", "/model", "/full")), ("model", ("", "/model"))):
        store = stores_of(tmp_path)[grids]
        for group in groups:
            image = ome.Image.from_zarr(zarr.open_group(f"{store}{group}", mode="r"))
            dataset = image.attributes.ome.multiscales[0].datasets[0]
            array = zarr.open_array(f"{store}{group}/{dataset.path}", mode="r")
            grid = group[1:] or {"full": "volume", "model": "model"}[grids]
            volume = open_volume(store, grid)
            scale, translation = dataset.coordinateTransformations
            assert array.shape == volume.array_zyx.shape
            assert np.allclose(scale.scale, volume.geometry.spacing_zyx_mm)
            assert np.allclose(translation.translation, volume.geometry.origin_lps[::-1])


def test_a_grid_that_is_not_there_is_named_with_what_to_do(tmp_path):
    stores = stores_of(tmp_path)
    with pytest.raises(UsageError, match=r"the grid full, found volume and model in .*; prepare with --grids full"):
        open_volume(stores["volume"], "full")
    with pytest.raises(UsageError, match=r"the grid volume, found model in .*; prepare with --grids volume"):
        open_volume(stores["model"])
    assert open_volume(stores["model"], None).geometry.shape_zyx == (8, 10, 10)
    assert open_volume(stores["full"], None).geometry.shape_zyx == (16, 20, 20)


def test_a_changed_grids_adds_what_is_missing_and_says_so_and_the_next_run_goes_on_with_it(tmp_path):
    source, out = tmp_path / "raw", tmp_path / "out"
    for seed in range(2):
        write_scan(source / f"s{seed}.nii.gz", seed, (16, 40, 44))

    def prepare(*more):
        code, text = run("prepare", source, out, *SETTINGS, *more)
        assert code == 0, text
        return text

    def bytes_of(file):
        return [(out / "volumes" / f"s{n}.ome.zarr" / file).read_bytes() for n in range(2)]

    prepare()
    before = bytes_of("0/c.0.0.0")
    dry = run("prepare", source, out, *SETTINGS, "--grids", "full", "--dry-run")
    assert "2 stores lack a grid of --grids full" in dry[1]
    assert "2 stores lack a grid of --grids full and are made again, s0 first" in prepare("--grids", "full")
    assert bytes_of("0/c.0.0.0") == before
    assert open_volume(out / "volumes/s0.ome.zarr", "full", id="s0").geometry.shape_zyx == (22, 30, 27)
    write_scan(source / "s2.nii.gz", 2, (16, 40, 44))
    assert "lack a grid" not in prepare()
    assert open_volume(out / "volumes/s2.ome.zarr", "full").numpy().any()
    assert "3 stores have more grids than --grids model writes" in prepare("--grids", "model")
    assert run("verify", out)[0] == 0
    assert json.loads((out / "dataset.json").read_text())["grids"] == "model"
    prepare("--overwrite")
    assert not (out / "volumes/s0.ome.zarr/0").exists()
    assert run("verify", out)[0] == 0
    code, text = run("prepare", source, tmp_path / "again", "--lock", out / "dataset.lock")  # with the lock's grids
    assert (code, "every volume and question is as in the lock" in text) == (0, True), text
    code, text = run("prepare", source, out, *SETTINGS, "--grids", "all")
    assert (code, "--grids: expected volume, full, model, found 'all'" in text) == (2, True)


def test_show_and_export_take_the_grid_that_is_named_and_say_what_is_missing(tmp_path):
    source, out = tmp_path / "raw", tmp_path / "out"
    write_scan(source / "s0.nii.gz", 0, (16, 40, 44))
    assert run("prepare", source, out, *SETTINGS, "--grids", "model")[0] == 0
    store = out / "volumes/s0.ome.zarr"
    assert run("show", store, "-o", tmp_path / "a.png")[0] == 0
    code, text = run("show", store, "--grid", "full", "-o", tmp_path / "b.png")
    assert (code, "expected the grid full, found model" in text) == (2, True)
    assert run("show", source / "s0.nii.gz", "--grid", "full")[0] == 2
    code, text = run("export", out, "--format", "nifti", "--to", tmp_path / "e")
    assert (code, "prepare with --grids volume" in text) == (2, True)
    assert run("export", out, "--format", "nifti", "--to", tmp_path / "e", "--grid", "model")[0] == 0
    assert run("prepare", source, out, *SETTINGS, "--grids", "full")[0] == 0
    assert run("export", out, "--format", "nifti", "--to", tmp_path / "e", "--grid", "full")[0] == 0
    import nibabel

    image = nibabel.load(tmp_path / "e/volumes/s0.nii.gz")
    assert image.shape == (27, 30, 22)
    assert image.header.get_zooms() == pytest.approx((1.5, 1.5, 1.5))


def test_the_whole_field_of_a_scan_in_memory(tmp_path):
    import photon_data

    path = write_scan(tmp_path / "s.nii.gz", 0, (16, 40, 44))
    whole = photon_data.prepare(path, RECIPE, grids="full")
    assert whole.full.geometry.shape_zyx == (22, 30, 27)
    usual = photon_data.prepare(path, RECIPE)
    assert usual.full is None
    assert np.array_equal(usual.volume.array_zyx, whole.volume.array_zyx)
    body = photon_data.prepare(path, replace(RECIPE, centre="body"), grids="full")
    assert np.array_equal(body.full.array_zyx, whole.full.array_zyx)
