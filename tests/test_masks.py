"""`photon-data prepare --masks`: labels on the grid of their volume, against SimpleITK and by hand; what is refused."""

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from dicom_files import write_series
from raw import write_scan
from scans import AXIS_ORDERS, ct_like, frame, rotated, to_sitk

from photon_data import read
from photon_data.errors import UsageError
from photon_data.files import Location, from_jsonl
from photon_data.mask_store import Label, Layers, box_of, open_masks
from photon_data.prepare_masks import LabelMap, MaskJob, nearest, prepare_masks
from photon_data.readers.mask_pattern import read_label_names
from photon_data.recipe import Recipe
from photon_data.scan import MaskPattern
from photon_data.store import open_volume
from photon_data.volume import Geometry
from photon_pipelines.cluster import Workers
from photon_pipelines.collection import status
from photon_pipelines.mask_plan import find_masks, plan_masks
from photon_pipelines.plan import gather
from photon_pipelines.prepare import prepare, prune
from photon_pipelines.request import Request
from photon_pipelines.scan_job import prepare_job
from photon_pipelines.verify import verify_output

SMALL = Recipe(shape_zyx=(40, 32, 32), model_shape_zyx=(14, 28, 28))
SHAPE = (16, 24, 28)


@pytest.fixture(autouse=True)
def in_this_process(request, monkeypatch):
    """Do the work of a run here: a cluster and its processes take seconds to start."""
    if "in_processes" not in request.fixturenames:

        def execute(jobs, *_):
            for job in jobs:
                yield job, prepare_job(json.loads(json.dumps(job.to_json())))

        monkeypatch.setattr("photon_pipelines.cluster.execute", execute)


@pytest.fixture
def in_processes():
    """Work is done as users have it done."""


def request(tmp_path, pattern, **more):
    more = {"recipe": SMALL, "pictures": 1, **more}
    return Request(tmp_path / "raw", Location(str(tmp_path / "out")), masks=pattern and MaskPattern(pattern), **more)


def run(tmp_path, pattern="{name}_seg.nii.gz", **more):
    return prepare(request(tmp_path, pattern, **more), Workers(count=1, timeout_s=120))


def store(tmp_path, id="a"):
    return str(tmp_path / "out/volumes" / f"{id}.ome.zarr")


def problems(tmp_path):
    return list(verify_output(Location(str(tmp_path / "out"))))


def bytes_below(folder):
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def blobs(shape_zyx, values, seed=0):
    """Labels in patches of a few voxels."""
    coarse = np.random.default_rng(seed).choice([0, *values], [-(-n // 4) for n in shape_zyx])
    return np.kron(coarse, np.ones((4, 4, 4), int))[tuple(map(slice, shape_zyx))].astype(np.uint8)


def as_label_map(array, geometry):
    return LabelMap(array, geometry, np.bincount(array.ravel(), minlength=65536), box_of(array))


def nearest_by_itk(image, grid):
    """What ITK's nearest neighbour makes of an image on a grid."""
    size, spacing, identity = grid.shape_zyx[::-1], grid.spacing_zyx_mm[::-1], np.eye(3).ravel().tolist()
    out = sitk.Resample(image, size, sitk.Transform(), sitk.sitkNearestNeighbor, grid.origin_lps, spacing, identity)
    return sitk.GetArrayFromImage(out)


# The grid


@pytest.mark.parametrize("degrees", [(0, 0, 0), (7, -11, 23)])
@pytest.mark.parametrize("order", AXIS_ORDERS[::5])
def test_every_voxel_of_a_grid_gets_the_label_that_itk_gives_it(order, degrees):
    # a mask has spacings and an orientation of its own, and reaches beyond the grid on some sides only
    labels = blobs((21, 33, 27), [1, 2, 200])
    geometry = rotated(frame(labels.shape, order, (2.13, 0.91, 1.37), (3.1, -12.3, 8.7)), degrees)
    grid = Geometry.axis_aligned((25, 31, 37), (1.01, 1.31, 0.83), geometry.world(np.array(labels.shape) * 0.6))
    found = nearest(as_label_map(labels, geometry), grid)
    assert len(np.unique(found)) == 4
    assert np.array_equal(found, nearest_by_itk(to_sitk(labels, geometry), grid))


def test_a_marked_voxel_keeps_its_world_position_on_a_sheared_grid():
    steps = [(0, 0.9, 3.0), (0, 1.1, 0), (1.2, 0, 0)]  # a tilted gantry
    geometry = Geometry.from_arrays((18, 30, 26), (-10, 4, 50), steps)
    labels = np.zeros(geometry.shape_zyx, np.uint8)
    labels[11, 20, 7] = 9
    grid = Geometry.axis_aligned((80, 80, 80), (0.7, 0.7, 0.7), geometry.centre_lps)
    centre = grid.world(np.argwhere(nearest(as_label_map(labels, geometry), grid) == 9)).mean(axis=0)
    assert np.abs(centre - geometry.world((11, 20, 7))).max() < 0.35  # half a voxel of the grid


def test_labels_that_overlap_lie_in_layers_of_their_own_and_all_survive():
    grid = Geometry.axis_aligned((8, 10, 12), (1, 1, 1), (0, 0, 0))
    model = Geometry.axis_aligned((4, 5, 6), (2, 2, 2), (0, 0, 0))
    layers, masks = Layers(grid, model), {}
    rng = np.random.default_rng(3)
    for number in range(300):  # more than a layer has values; every tenth covers a block, the others a voxel or two
        mask = np.zeros(grid.shape_zyx, np.uint8)
        z, y, x = (int(rng.integers(0, n)) for n in grid.shape_zyx)
        mask[z, y, x : x + 2] = number % 250 + 1
        if number % 10 == 0:
            mask[: z + 1, : y + 1, : x + 1] = number % 250 + 1
        label = Label(f"m{number}", number % 250 + 1, 0, 0, int((mask > 0).sum()), int((mask > 0).sum()), 1.0)
        layers.add([label], [mask, mask[::2, ::2, ::2]])
        masks[label.name] = mask > 0
    for label in layers.labels:
        for array, expected in zip(
            layers.arrays[label.layer], (masks[label.name], masks[label.name][::2, ::2, ::2]), strict=True
        ):
            assert np.array_equal(array == label.value, expected)
        assert label.voxels == masks[label.name].sum()
    assert len({(label.layer, label.value) for label in layers.labels}) == 300


# The command


def test_masks_of_several_files_agree_with_itk_in_any_geometry_of_scan_and_mask(tmp_path):
    scan = rotated(frame(SHAPE, ((0, 1, 2), (1, -1, 1)), (2.0, 1.1, 0.9)), (4, 9, -13))
    write_scan(tmp_path / "raw/a/ct.nii.gz", array=ct_like(SHAPE), affine=scan.affine_ras)
    folder = tmp_path / "raw/a/segmentations"
    coarse = Geometry.axis_aligned((9, 8, 10), (3.1, 2.9, 2.7), scan.world((7.3, 11.1, 15.7)))
    turned = rotated(frame((20, 20, 22), ((2, 0, 1), (-1, 1, -1)), (1.0, 1.3, 1.2)), (0, 0, 1))
    origin = np.asarray(turned.origin_lps) + scan.world((8.1, 12.3, 14.2)) - turned.centre_lps
    own = {
        "liver": (blobs(SHAPE, [1], 1), scan),
        "tumour": (blobs(SHAPE, [1, 2, 3], 2), scan),  # within the others
        "coarse": (blobs(coarse.shape_zyx, [1], 3), coarse),
        "turned": (blobs(turned.shape_zyx, [255], 4), replace(turned, origin_lps=tuple(origin))),
    }
    for name, (array, geometry) in own.items():
        write_scan(folder / f"{name}.nii.gz", array=array, affine=geometry.affine_ras)
    write_scan(folder / "none.nii.gz", array=np.zeros(SHAPE, np.uint8), affine=scan.affine_ras)
    result = run(tmp_path, "{folder}/segmentations/*.nii.gz")
    assert [row.state for row in result.masks] == ["prepared"]
    assert result.masks[0].facts["refused"] == {}
    assert result.complete
    for grid in ("volume", "model"):
        masks = open_masks(store(tmp_path, "a__ct"), grid=grid)
        assert set(masks.names) == {*own, "none"}
        where = open_volume(store(tmp_path, "a__ct"), grid).geometry
        assert masks.geometry.shape_zyx == where.shape_zyx
        assert np.allclose(masks.geometry.corners_lps(), where.corners_lps())
        for name in own:
            image = sitk.ReadImage(folder / f"{name}.nii.gz")
            expected = nearest_by_itk(image, where) != 0
            found = masks.mask(name).numpy()
            # sform and qform in float32 move a centre by 1e-6 of a voxel: a few lie on a rim
            assert (found != expected).sum() <= 3, name
            assert found.sum() > 20
        assert not masks.mask("none").numpy().any()
    values = sorted(
        label.source_value for label in open_masks(store(tmp_path, "a__ct")).labels if label.name == "tumour"
    )
    assert values == [1, 2, 3]  # lesions stay apart within a mask
    assert problems(tmp_path) == []


def test_values_of_a_label_map_have_numbers_or_the_names_of_a_table(tmp_path):
    organs = blobs(SHAPE, [1, 2, 7])
    write_scan(tmp_path / "raw/imagesTr/case_0000.nii.gz")
    write_scan(tmp_path / "raw/labelsTr/case.nii.gz", array=organs)
    run(tmp_path, "labelsTr/{case}.nii.gz")
    id = "imagesTr__case_0000"
    assert set(open_masks(store(tmp_path, id)).names) == {"1", "2", "7"}
    (tmp_path / "dataset.json").write_text(
        json.dumps({"labels": {"background": 0, "liver": 1, "spleen": 2, "gall": 3}})
    )
    names = read_label_names(tmp_path / "dataset.json")
    pattern = MaskPattern("labelsTr/{case}.nii.gz", names)
    result = prepare(replace(request(tmp_path, None), masks=pattern), Workers(count=1))
    masks = open_masks(store(tmp_path, id))
    assert set(masks.names) == {"liver", "spleen", "7", "gall"}
    assert not masks.mask("gall").numpy().any()  # promised by the table, and not there
    assert result.masks[0].facts["empty"] == 1
    sizes = {name: masks.mask(name).numpy().sum() * 1.0 for name in ("liver", "spleen", "7")}
    for name, value in {"liver": 1, "spleen": 2, "7": 7}.items():
        cut = nearest_by_itk(sitk.ReadImage(tmp_path / "raw/labelsTr/case.nii.gz"), masks.geometry)
        assert sizes[name] == (cut == value).sum()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '{"labels": {"0": "background", "1": "liver", "2": "spleen"}}'),
        ("a.json", '{"liver": 1, "spleen": 2}'),
        ("a.yaml", "1: liver\n2: spleen\n"),
        ("a.csv", "name,value\nliver,1\nspleen,2\n"),
        ("a.tsv", "value\tname\n1\tliver\n2\tspleen\n"),
    ],
)
def test_tables_of_values_are_read_in_the_forms_that_data_sets_have(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read_label_names(tmp_path / name) == {1: "liver", 2: "spleen"}


@pytest.mark.parametrize(
    "text", ['{"labels": {"whole": [1, 2]}}', '{"1": "a", "2": "a"}', "{}", "[1]", '{"x": "y"}', "{"]
)
def test_a_table_that_names_no_values_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UsageError, match="--mask-labels"):
        read_label_names(tmp_path / "a.json")


def test_masks_come_later_and_change_nothing_of_the_volumes(tmp_path):
    write_scan(tmp_path / "raw/a.nii.gz")
    write_scan(tmp_path / "raw/b.nii.gz", seed=1)
    run(tmp_path, None)
    out = tmp_path / "out"
    before, lock = bytes_below(out / "volumes"), (out / "dataset.lock").read_bytes()
    for seed, name in enumerate("ab"):
        write_scan(tmp_path / f"raw/{name}_seg.nii.gz", seed, array=blobs(SHAPE, [1, 2], seed))
    result = run(tmp_path)
    assert result.states["unchanged"] == 2
    assert [row.state for row in result.masks] == ["prepared"] * 2
    assert (bytes_below(out / "volumes"), (out / "dataset.lock").read_bytes()) == (before, lock)
    masks = bytes_below(out / "masks")
    again = run(tmp_path)
    assert [row.state for row in again.masks] == ["unchanged"] * 2
    assert bytes_below(out / "masks") == masks
    write_scan(tmp_path / "raw/b_seg.nii.gz", 1, array=blobs(SHAPE, [1, 2], 7))
    os.utime(tmp_path / "raw/a_seg.nii.gz")  # touched, the same content
    changed = run(tmp_path)
    assert {row.id: row.state for row in changed.masks} == {"a": "unchanged", "b": "prepared"}
    new = bytes_below(out / "masks")
    assert {name.split("/")[0] for name in masks if new[name] != masks[name]} == {"b.ome.zarr"}
    assert bytes_below(out / "volumes") == before
    assert problems(tmp_path) == []


def test_bytes_of_masks_do_not_depend_on_where_they_are_made(tmp_path, in_processes):
    write_scan(tmp_path / "raw/a.nii.gz")
    write_scan(tmp_path / "raw/a_seg.nii.gz", array=blobs(SHAPE, [1, 2]))
    result = run(tmp_path)
    asked = request(tmp_path, "{name}_seg.nii.gz", overwrite=True)
    found = find_masks(asked, gather(asked).jobs)
    (job,) = plan_masks(found, asked, result.records).jobs
    there = MaskJob.from_json(json.loads(json.dumps(replace(job, out=str(tmp_path / "bare")).to_json())))
    assert prepare_masks(there).state == "prepared"
    assert bytes_below(tmp_path / "bare/masks") == bytes_below(tmp_path / "out/masks")


def test_a_volume_that_is_made_again_makes_its_masks_stale_until_the_next_run(tmp_path):
    write_scan(tmp_path / "raw/a.nii.gz")
    write_scan(tmp_path / "raw/a_seg.nii.gz", array=blobs(SHAPE, [1, 2]))
    run(tmp_path)
    other = replace(SMALL, spacing_mm=(1.1, 1.0, 1.0))
    run(tmp_path, None, recipe=other)
    with pytest.raises(UsageError, match=r"as it is in .* prepare --masks again"):
        open_masks(store(tmp_path))
    assert any("made for another content or recipe of a" in problem for problem in problems(tmp_path))
    result = run(tmp_path, recipe=other)
    assert [row.state for row in result.masks] == ["prepared"]
    assert open_masks(store(tmp_path)).geometry == open_volume(store(tmp_path)).geometry
    assert problems(tmp_path) == []
    write_scan(tmp_path / "raw/a.nii.gz", seed=5)  # another scan at its place, on the same grid
    run(tmp_path, None, recipe=other)
    with pytest.raises(UsageError, match="as it was when they were made"):
        open_masks(store(tmp_path))


def test_masks_stay_those_of_their_volume_whatever_other_grids_it_gets(tmp_path):
    write_scan(tmp_path / "raw/a.nii.gz")
    write_scan(tmp_path / "raw/a_seg.nii.gz", array=blobs(SHAPE, [1, 2]))
    run(tmp_path, grids="model")
    masks = bytes_below(tmp_path / "out/masks")
    for grids in ("full", "model"):
        result = run(tmp_path, None, grids=grids, overwrite=True)
        assert result.states["prepared"] == 1
        assert open_masks(store(tmp_path), grid="model").mask("2").array_zyx.any()
        assert problems(tmp_path) == []
    assert [row.state for row in run(tmp_path).masks] == ["unchanged"]
    assert bytes_below(tmp_path / "out/masks") == masks


def test_with_check_content_a_mask_counts_as_unchanged_only_where_its_bytes_are(tmp_path):
    write_scan(tmp_path / "raw/a.nii.gz")
    file = write_scan(tmp_path / "raw/a_seg.nii", array=blobs(SHAPE, [1, 2]))
    run(tmp_path, "{name}_seg.nii")
    status = file.stat()
    write_scan(file, array=blobs(SHAPE, [1, 2], seed=1))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    states = [run(tmp_path, "{name}_seg.nii", check=check).masks[0].state for check in ("time", "content", "content")]
    assert states == ["unchanged", "prepared", "unchanged"]


def test_a_crop_leaves_masks_beyond_it_empty_and_still_refuses_those_of_another_scan(tmp_path):
    low, high = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    low[2:4, 4:8, 4:8], high[12:14, 4:8, 4:8] = 1, 1
    write_scan(tmp_path / "raw/p/ct.nii.gz")
    for name, array in (("low", low), ("high", high)):
        write_scan(tmp_path / f"raw/p/m/{name}.nii.gz", array=array)
    write_scan(tmp_path / "raw/p/m/other.nii.gz", seed=40, array=low)  # 40 mm higher
    (tmp_path / "crop.csv").write_text('volume,crop\np/ct,"0:8, :, :"\n')
    (row,) = run(tmp_path, "{folder}/m", overrides=tmp_path / "crop.csv").masks
    assert [*row.facts["refused"]] == ["other"]
    found = {label.name: label for label in open_masks(store(tmp_path, "p__ct")).labels}
    assert found["low"].voxels and found["high"].source_voxels == 32


def test_a_mask_of_a_repaired_series_lies_on_its_true_slices_or_is_refused(tmp_path):
    there = [z for z in range(16) if z != 6]
    stored = (ct_like(SHAPE) + 1024).astype(np.uint16)
    write_series(tmp_path / "raw/s", stored, spacing_mm=(1.1, 0.9), slices=there, bits=12)
    write_series(tmp_path / "whole", stored, spacing_mm=(1.1, 0.9), bits=12)
    of_dicom = read(tmp_path / "whole").geometry
    marked = blobs(SHAPE, [1])
    for name, array in (("whole", marked), ("beside", marked[there])):
        sitk.WriteImage(to_sitk(array, replace(of_dicom, shape_zyx=array.shape)), tmp_path / f"raw/{name}.nii.gz")
    more = {"accept": {"repair_slices": 3}, "id_from": "path"}
    (row,) = run(tmp_path, "{folder}/../*.nii.gz", **more).masks
    assert "planes where the slices of the repaired series lie" in row.facts["refused"]["beside"]
    assert open_masks(store(tmp_path, row.id)).names == ["whole"]


def test_masks_that_are_swapped_emptied_or_without_a_volume_are_noticed(tmp_path):
    for seed, name in enumerate("ab"):
        write_scan(tmp_path / f"raw/{name}.nii.gz", seed)
        write_scan(tmp_path / f"raw/{name}_seg.nii.gz", seed, array=blobs(SHAPE, [1, 2], seed))
    run(tmp_path)
    masks = tmp_path / "out/masks"
    whole = shutil.copytree(masks, tmp_path / "whole")
    shutil.rmtree(masks / "a.ome.zarr")
    shutil.copytree(masks / "b.ome.zarr", masks / "a.ome.zarr")
    with pytest.raises(UsageError, match="expected masks of a as it is"):
        open_masks(store(tmp_path))
    assert any("differs" in problem for problem in problems(tmp_path))
    shutil.rmtree(masks / "a.ome.zarr")
    with pytest.raises(UsageError, match="expected masks of a, found none"):
        open_masks(store(tmp_path))
    assert problems(tmp_path) != []
    assert {row.id: row.state for row in run(tmp_path).masks} == {"a": "prepared", "b": "unchanged"}
    assert bytes_below(masks) == bytes_below(whole)
    (masks / "a.ome.zarr/0/c.0.0.0.0").write_bytes(b"")
    with pytest.raises(UsageError, match="expected a whole store"):
        open_masks(store(tmp_path))
    assert problems(tmp_path) != []
    assert {row.id: row.state for row in run(tmp_path).masks} == {"a": "prepared", "b": "unchanged"}
    shutil.copytree(masks / "a.ome.zarr", masks / "stranger.ome.zarr")
    assert problems(tmp_path) == ["masks/stranger.ome.zarr: masks without a volume: prune takes them away"]


def test_prune_takes_masks_away_with_their_volume(tmp_path):
    for seed, name in enumerate("ab"):
        write_scan(tmp_path / f"raw/{name}.nii.gz", seed)
        write_scan(tmp_path / f"raw/{name}_seg.nii.gz", seed, array=blobs(SHAPE, [1], seed))
    run(tmp_path)
    out = Location(str(tmp_path / "out"))
    prune(out, ["a"], for_good=True)
    assert out.names("masks") == ["b.ome.zarr"]
    assert [row["id"] for row in from_jsonl((tmp_path / "out/masks.jsonl").read_text())] == ["b"]
    assert problems(tmp_path) == []


# What is refused


def test_what_is_no_mask_of_its_scan_is_refused_and_costs_only_itself(tmp_path):
    scan = write_scan(tmp_path / "raw/ct.nii.gz")
    affine = nibabel.load(scan).affine
    folder, ones = tmp_path / "raw/segmentations", blobs(SHAPE, [1])
    away = affine.copy()
    away[:3, 3] += 500
    shifted = affine.copy()
    shifted[2, 3] += 2.0  # one slice
    write_scan(folder / "good.nii.gz", array=ones)
    write_scan(folder / "probability.nii.gz", array=ones * np.float32(0.7))
    write_scan(folder / "ct_again.nii.gz", array=ct_like(SHAPE))
    write_scan(folder / "many.nii.gz", array=np.arange(np.prod(SHAPE)).reshape(SHAPE).astype(np.uint16))
    write_scan(folder / "away.nii.gz", array=ones[:-1], affine=away)
    write_scan(folder / "identity.nii.gz", array=ones, affine=np.eye(4))
    write_scan(folder / "shifted.nii.gz", array=ones, affine=shifted)
    (folder / "cut.nii.gz").write_bytes((folder / "good.nii.gz").read_bytes()[:200])
    result = run(tmp_path, "{folder}/segmentations")
    (row,) = result.masks
    assert row.state == "prepared"
    assert not result.complete
    refused = row.facts["refused"]
    assert set(refused) == {"probability", "ct_again", "many", "away", "identity", "shifted", "cut"}
    for name, words in {
        "probability": "whole numbers",
        "ct_again": "whole numbers",
        "many": "different ones",
        "away": "marked voxels outside",
        "identity": "corners",
        "shifted": "corners 2 mm apart",
    }.items():
        assert words in refused[name]
    masks = open_masks(store(tmp_path, "ct"))
    assert masks.names == ["good"]
    with pytest.raises(UsageError, match="whole numbers"):
        masks.mask("probability")
    assert "probability" in (tmp_path / "out/report.html").read_text()


def test_a_scan_without_its_mask_is_named_and_one_whose_mask_is_refused_keeps_no_old_one(tmp_path):
    for seed, name in enumerate(["a", "b", "c"]):
        write_scan(tmp_path / f"raw/{name}.nii.gz", seed)
        write_scan(tmp_path / f"raw/{name}_seg.nii.gz", seed, array=blobs(SHAPE, [1], seed))
    assert run(tmp_path).complete
    (tmp_path / "raw/a_seg.nii.gz").unlink()
    write_scan(tmp_path / "raw/b_seg.nii.gz", array=blobs(SHAPE, [1]) * np.float32(0.5))
    result = run(tmp_path)
    assert {row.id: (row.state, row.code) for row in result.masks} == {
        "a": ("refused", "no-mask"),
        "b": ("refused", "mask-values"),
        "c": ("unchanged", None),
    }
    assert not result.complete
    assert result.states["unchanged"] == 3
    assert Location(str(tmp_path / "out")).names("masks") == ["c.ome.zarr"]
    assert problems(tmp_path) == []
    for id in "ab":
        with pytest.raises(UsageError, match="found none"):
            open_masks(store(tmp_path, id))
    again = {row.id: row.seconds for row in run(tmp_path).masks}
    assert again["b"] is None  # known to be refused


def test_a_mask_of_which_the_grid_leaves_nothing_is_named(tmp_path):
    write_scan(tmp_path / "raw/ct.nii.gz", shape_zyx=(60, 24, 28))  # 120 mm, of which the grid has 40
    for name, z in {"kept": 30, "cut": 58}.items():
        array = np.zeros((60, 24, 28), np.uint8)
        array[z : z + 2, 10:14, 10:14] = 1
        write_scan(tmp_path / f"raw/masks/{name}.nii.gz", array=array)
    result = run(tmp_path, "{folder}/masks/*.nii.gz")
    assert result.masks[0].facts["lost"] == ["cut"]
    labels = {label.name: label for label in open_masks(store(tmp_path, "ct")).labels}
    assert (labels["cut"].source_voxels, labels["cut"].inside_voxels, labels["cut"].voxels) == (32, 0, 0)
    assert labels["kept"].inside_voxels == 32
    assert "nothing is left of it" in (tmp_path / "out/report.html").read_text()


def test_hidden_names_stay_out_of_all_that_is_written_about_masks(tmp_path):
    ones = blobs(SHAPE, [1])
    for seed, name in enumerate(["Smith", "Jones"]):
        write_scan(tmp_path / f"raw/{name}/ct.nii.gz", seed)
        write_scan(tmp_path / f"raw/{name}/m/{name}_liver.nii.gz", seed, array=ones)
        write_scan(tmp_path / f"raw/{name}/m/{name}_bad.nii.gz", seed, array=ones * np.float32(0.5))
    write_scan(tmp_path / "raw/Miller/ct.nii.gz", 2)
    write_scan(tmp_path / "raw/Miller/m/Miller_bad.nii.gz", 2, array=ones * np.float32(0.5))
    result = run(tmp_path, "{folder}/m/{parent}_*.nii.gz", id_from="key")
    assert sorted(row.code or "" for row in result.masks) == ["", "", "mask-values"]
    assert [list(row.facts["refused"]) for row in result.masks if row.is_there] == [["bad"], ["bad"]]
    for path in (tmp_path / "out").rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        found = [name for name in (b"Smith", b"Jones", b"Miller") if name in content]
        assert not found, (path, found)
    again = run(tmp_path, "{folder}/m/{parent}_*.nii.gz", id_from="key")
    assert [row.state for row in again.masks if row.is_there] == ["unchanged"] * 2


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", "a: &a [x, x]\n" + "".join(f"b{n}: &b{n} [*a, *a]\n" for n in range(40_000)) + "labels: *b1\n"),
        ("a.yaml", "1: 2024-13-45\n"),
        ("a.yaml", "1: !!python/name:os.system x\n"),
        ("a.json", "[" * 100_000),
        ("a.json", '{"1": ' + "9" * 5000 + "}"),
        ("a.json", '{"' + "9" * 5000 + '": "liver"}'),
        ("a.json", '{"1": "liver", "1": "spleen"}'),
    ],
)
def test_a_table_of_labels_that_is_no_table_is_refused_in_a_sentence(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match="expected"):
        read_label_names(tmp_path / name)


def test_status_takes_mask_files_that_are_named_like_scans_for_no_new_scans(tmp_path):
    write_scan(tmp_path / "raw/p/ct.nii.gz")
    write_scan(tmp_path / "raw/p/organs/liver.nii.gz", array=blobs(SHAPE, [1]))
    write_scan(tmp_path / "raw/p/organs/spleen.nii.gz", array=blobs(SHAPE, [1], 3))
    assert run(tmp_path, "{folder}/organs/*.nii.gz").states["prepared"] == 1
    (found,) = status(Location(str(tmp_path / "out")))
    assert (found.there, found.unchanged, found.new) == (1, 1, 0)
    write_scan(tmp_path / "raw/p/organs.nii.gz", seed=2)
    write_scan(tmp_path / "raw/q/liver.nii.gz", seed=3)
    (found,) = status(Location(str(tmp_path / "out")))
    assert found.new == 2
