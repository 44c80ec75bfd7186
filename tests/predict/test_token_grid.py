"""Which token a voxel belongs to, against arithmetic by hand and against the tokens that the model really makes.

By hand: the prepared grid is a cube of 364 mm, centred on the scan's field of view, along the axes of the world; ten
tokens a side, 36.4 mm each. Token = 100 * slab + 10 * row + column; slabs from the feet up, rows from the front to the
back, columns from the LEFT to the right.
"""

from dataclasses import replace

import nibabel
import numpy as np
import pytest
import torch
from PIL import ImageColor
from raw import write_scan
from scans import frame, rotated

from photon_data.picture import CONTOUR
from photon_data.recipe import Policy, Recipe
from photon_data.resample import model_grid, target_grid
from photon_data.volume import Geometry, Volume
from photon_train.answering.scan import open_input
from photon_train.kept_tokens import (
    OUTSIDE,
    CountedMask,
    count_mask,
    kept_voxels,
    token_boxes,
    token_centres,
    token_map,
    tokens_at,
)
from photon_train.overlay import Canvas, asked_masks, folders_of, picture, salient_point, window_of, write_overlay
from photon_train.processing_photon import patchify

TOKENS = (10, 10, 10)
# The published cube, at 4 mm: the same 364 mm a side, prepared in a tenth of the time.
COARSE = Recipe(shape_zyx=(91, 91, 91), spacing_mm=(4.0, 4.0, 4.0))


def by_hand(affine_ras, shape_xyz, index_xyz):
    """The token of a voxel of a NIfTI file, from nibabel's affine alone; -1 outside of the cube."""
    point_ras = affine_ras[:3, :3] @ np.asarray(index_xyz, float) + affine_ras[:3, 3]
    centre_ras = affine_ras[:3, :3] @ ((np.asarray(shape_xyz) - 1) / 2) + affine_ras[:3, 3]
    to_left, to_back, up = (point_ras - centre_ras) * (-1, -1, 1) + 182.0
    slab, row, from_right = (int(mm // 36.4) for mm in (up, to_back, to_left))
    if not all(0 <= n < 10 for n in (slab, row, from_right)):
        return -1
    return 100 * slab + 10 * row + (9 - from_right)


SCANS = {
    "plain": frame((30, 40, 44), spacing_mm=(9.0, 7.0, 6.5)),
    "flipped": frame((30, 40, 44), ((2, 0, 1), (-1, 1, -1)), (9.0, 7.0, 6.5)),
    "anisotropic and cut off": frame((12, 90, 70), ((1, 0, 2), (-1, -1, 1)), (36.0, 5.3, 4.1)),
    "oblique": rotated(frame((30, 40, 44), spacing_mm=(9.0, 7.0, 6.5)), (25, -14, 40)),
    "oblique and flipped": rotated(frame((30, 40, 44), ((0, 2, 1), (-1, -1, 1)), (11.0, 6.0, 5.5)), (-8, 33, 12)),
}


def nifti_of(path, geometry, seed=0):
    """Write a CT-like scan on that grid with nibabel alone; return the affine and shape (x, y, z) of the file."""
    write_scan(path, seed=seed, shape_zyx=geometry.shape_zyx, affine=geometry.affine_ras)
    image = nibabel.load(path)
    return image.affine, image.shape


@pytest.mark.parametrize("name", SCANS)
def test_every_voxel_has_the_token_that_hand_arithmetic_gives_it(name):
    native = SCANS[name]
    tokens = token_map(native, model_grid(target_grid(native, COARSE), TOKENS))
    picks = np.random.default_rng(1).integers(0, native.shape_zyx, (400, 3))
    expected = [by_hand(native.affine_ras, native.shape_zyx[::-1], zyx[::-1]) for zyx in picks]
    assert tokens[tuple(picks.T)].tolist() == expected
    assert len(set(expected)) > 100
    assert (-1 in expected) == (name not in ("plain", "flipped"))


@pytest.mark.parametrize("name", SCANS)
def test_an_overlay_lies_on_its_scan_and_a_kept_token_contains_the_marked_voxel(tmp_path, name):
    sitk = pytest.importorskip("SimpleITK")
    path = tmp_path / "scan.nii.gz"
    affine, shape = nifti_of(path, SCANS[name])
    scan = open_input(str(path), COARSE)
    canvas = Canvas(scan.volume, scan.native, TOKENS)
    rng = np.random.default_rng(2)
    inside = [i for i in rng.integers(0, shape, (60, 3)) if by_hand(affine, shape, i) >= 0]
    for number, marked in enumerate(inside[:3]):
        token = by_hand(affine, shape, marked)
        keep, saliency = np.zeros(1000, bool), np.linspace(0.1, 0.9, 1000, dtype=np.float32)
        keep[token] = True
        write_overlay(tmp_path / str(number), canvas, keep, saliency, "Where?")
        kept, rho = (nibabel.load(tmp_path / str(number) / f) for f in ("kept.nii.gz", "saliency.nii.gz"))
        assert (kept.get_data_dtype(), rho.get_data_dtype()) == (np.uint8, np.float32)
        for image in (kept, rho):
            assert image.shape == shape
            np.testing.assert_allclose(image.affine, affine, atol=1e-4)
            np.testing.assert_allclose(image.get_qform(), affine, atol=1e-3)
            assert int(image.header["sform_code"]) == int(image.header["qform_code"]) == 1
        values, salient = np.asarray(kept.dataobj), np.asarray(rho.dataobj)
        assert values[tuple(marked)] == 1
        for index in rng.integers(0, shape, (100, 3)):
            expected = by_hand(affine, shape, index)
            assert values[tuple(index)] == (expected == token)
            assert salient[tuple(index)] == (0 if expected < 0 else saliency[expected])
        itk, raw = sitk.ReadImage(tmp_path / str(number) / "kept.nii.gz"), sitk.ReadImage(path)
        assert itk.GetSize() == raw.GetSize()
        np.testing.assert_allclose(itk.GetOrigin(), raw.GetOrigin(), atol=1e-3)
        np.testing.assert_allclose(itk.GetDirection(), raw.GetDirection(), atol=1e-5)
        point = raw.TransformIndexToPhysicalPoint([int(i) for i in marked])
        assert itk.GetPixel(itk.TransformPhysicalPointToIndex(point)) == 1


def test_a_picture_goes_through_the_most_salient_kept_token_of_equals_the_middle_one():
    cells = model_grid(Geometry.axis_aligned((364,) * 3, (1, 1, 1), (5, -3, 80)), TOKENS)
    saliency = np.zeros(1000, np.float32)
    saliency[[7, 850]] = 0.9, 0.8
    keep = np.ones(1000, bool)
    assert salient_point(cells, keep, saliency) == token_centres(cells)[7].tolist()
    keep[7] = False
    assert salient_point(cells, keep, saliency) == token_centres(cells)[850].tolist()
    middle = salient_point(cells, keep, np.ones(1000, np.float32))
    np.testing.assert_allclose(np.abs(np.subtract(middle, cells.centre_lps)), 18.2)
    assert salient_point(cells, keep & False, saliency) is None


def test_the_files_name_nobody_and_say_nothing_but_the_grid(tmp_path):
    nifti_of(tmp_path / "Doe^Jane.nii.gz", SCANS["oblique"])
    scan = open_input(str(tmp_path / "Doe^Jane.nii.gz"), COARSE)
    write_overlay(
        tmp_path / "o", Canvas(scan.volume, scan.native, TOKENS), np.ones(1000, bool), np.ones(1000, np.float32), "?"
    )
    for name in ("kept.nii.gz", "saliency.nii.gz"):
        header = nibabel.load(tmp_path / "o" / name).header
        assert all(not bytes(header[field]).strip(b"\0") for field in ("descrip", "aux_file", "intent_name", "db_name"))
        assert not list(header.extensions)


def masks_named(*names):
    return [CountedMask(name, np.zeros(1000, int), 0, 0.0, None) for name in names]


@pytest.mark.parametrize(
    ("question", "names"),
    [
        ("Any liver calcification?", ["liver"]),
        ("Are the lungs clear?", ["lung_left", "lung_upper_lobe_right"]),
        ("Is there a nodule in the left lung?", ["lung_left"]),
        ("Compare the left kidney with the right one.", ["kidney_left", "kidney_right"]),
        ("How large is the gallbladder?", []),
        ("Is the heart enlarged?", ["heart"]),
    ],
)
def test_the_masks_that_a_question_names_are_outlined_and_no_others(question, names):
    known = masks_named("liver", "lung_left", "lung_upper_lobe_right", "kidney_left", "kidney_right", "heart")
    assert [mask.name for mask in asked_masks(question, known)] == names


@pytest.mark.parametrize(
    ("question", "window"),
    [
        ("Is there a pulmonary nodule?", "lung"),
        ("Any rib fractures?", "bone"),
        ("Is the aorta dilated?", "mediastinum"),
        ("Coronary artery calcification?", "mediastinum"),
        ("Renal cysts?", "soft"),
        ("What is shown?", "full"),
    ],
)
def test_the_window_is_that_of_what_is_asked(question, window):
    assert window_of(question) == window


def test_the_outline_of_an_asked_organ_lies_on_its_voxels_whatever_grid_its_mask_has():
    """A box of 60 x 80 x 100 mm (z, y, x) in the middle; each panel's own lines show the same millimetres."""
    grid = Geometry.axis_aligned((100, 100, 100), (2, 2, 2), (0, 0, 0))
    fine = Geometry.axis_aligned((80, 100, 120), (1, 1, 1), (0, 0, 0))
    box = np.zeros((80, 100, 120), bool)
    box[10:70, 10:90, 10:110] = True
    flipped = Volume(box[:, :, ::-1], fine)
    canvas = Canvas(Volume(np.zeros((100, 100, 100), np.int16), grid), grid, (10, 10, 10))
    liver = count_mask("liver", lambda: flipped, canvas.cells)
    canvas = replace(canvas, masks=[liver])
    drawn = picture(canvas, np.ones(1000, bool), np.ones(1000, np.float32), "Liver?", "yes")
    pixels = np.asarray(drawn)
    green = (pixels == ImageColor.getrgb(CONTOUR)).all(-1)
    panel = 480  # px; three of them with a gap of 7 px, and each slice is 200 mm wide within gutters of 34 px
    px_per_mm = (panel - 2 * 34) / 200
    for number, (down_mm, right_mm) in enumerate([(80, 100), (60, 100), (60, 80)]):
        rows, columns = np.nonzero(green[:panel, number * (panel + 7) : number * (panel + 7) + panel])
        assert rows.max() - rows.min() + 1 == pytest.approx(down_mm * px_per_mm, abs=2 * px_per_mm + 1)
        assert columns.max() - columns.min() + 1 == pytest.approx(right_mm * px_per_mm, abs=2 * px_per_mm + 1)
    unasked = picture(canvas, np.ones(1000, bool), np.ones(1000, np.float32), "Spleen?")
    assert not (np.asarray(unasked) == ImageColor.getrgb(CONTOUR)).all(-1).any()


@pytest.mark.parametrize("name", ["flipped", "oblique"])
def test_a_bright_spot_in_the_raw_scan_lights_up_its_token_in_the_models_patches(tmp_path, published_shape, name):
    native = SCANS[name]
    affine, shape = native.affine_ras, native.shape_zyx[::-1]
    cells = model_grid(target_grid(native, COARSE), TOKENS)
    for token in (443, 358, 646):
        marked = np.rint(native.index(token_centres(cells)[token])).astype(int)
        assert by_hand(affine, shape, marked[::-1]) == token
        array = np.full(native.shape_zyx, -1000, np.int16)
        array[tuple(slice(i - 1, i + 2) for i in marked)] = 1000
        path = write_scan(tmp_path / f"{token}.nii", array=array, affine=affine)
        patches, _ = published_shape.processor.patches(open_input(str(path), COARSE, Policy(modality="other")).model)
        assert int(patches.reshape(1000, -1).mean(1).argmax()) == token


def test_a_voxel_of_the_model_grid_changes_the_features_of_its_token_and_of_no_other(published_shape):
    model = published_shape
    tower = model.model.model.visual
    for block in tower.blocks:  # tokens that do not look at each other show which is which
        block.attn.proj.weight.data.zero_()
        block.attn.proj.bias.data.zero_()
    grid = model_grid(Geometry.axis_aligned((364,) * 3, (1, 1, 1), (5, -3, 80)), (140, 280, 280))
    cells = model_grid(Geometry.axis_aligned((364,) * 3, (1, 1, 1), (5, -3, 80)), TOKENS)
    volume = np.zeros((140, 280, 280), np.float32)
    volume[0, 0, 0], volume[-1, -1, -1] = -1000, 1000

    def features():
        patches, thw = model.processor.patches(Volume(volume, grid))
        with torch.no_grad():
            return torch.cat(
                list(model.model.model.get_video_features(patches, thw[None], return_dict=True).pooler_output)
            )

    before = features()
    for z, y, x in ((3, 17, 41), (70, 140, 140), (139, 0, 279), (69, 139, 27), (0, 279, 251)):
        volume[z, y, x] += 500
        changed = (features() - before).abs().amax(1).nonzero().flatten().tolist()
        volume[z, y, x] -= 500
        expected = 100 * (z // 14) + 10 * (y // 28) + 9 - x // 28
        assert changed == [expected] == [int(tokens_at(grid.world((z, y, x)), cells))]


def test_patch_rows_come_four_to_a_token_and_slab_by_slab():
    volume = torch.zeros(140, 280, 280)
    volume[50, 90, 200] = 1
    rows, _ = patchify(volume.flip(-1), 14, 14, 2)
    assert {int(row) // 4 for row in rows.amax(1).nonzero()} == {100 * 3 + 10 * 3 + (279 - 200) // 28}


def test_centres_and_boxes_are_the_tokens_they_are_called_by():
    cells = model_grid(Geometry.axis_aligned((364,) * 3, (1, 1, 1), (5, -3, 80)), TOKENS)
    assert tokens_at(token_centres(cells), cells).tolist() == list(range(1000))
    assert token_boxes(cells)[0, 0].tolist() == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    corners = cells.corners_lps()
    assert tokens_at(corners.mean(0) + (corners - corners.mean(0)) * 1.001, cells).tolist() == [OUTSIDE] * 8
    assert (tokens_at(corners.mean(0) + (corners - corners.mean(0)) * 0.999, cells) != OUTSIDE).all()


def test_kept_voxels_of_the_prepared_grid_are_those_the_token_map_gives():
    keep = np.random.default_rng(0).random(1000) < 0.3
    for n in (91, 364 // 4 + 6):
        grid = Geometry.axis_aligned((n, n + 1, n - 3), (3.5, 4, 4.2), (1, 2, 3))
        cells = model_grid(grid, TOKENS)
        assert (kept_voxels(keep, grid, cells) == keep[token_map(grid, cells)]).all()


def test_the_recall_of_a_mask_counts_its_voxels_and_chance_is_the_share_of_tokens_kept():
    grid = Geometry.axis_aligned((364,) * 3, (1, 1, 1), (0, 0, 0))
    cells = model_grid(grid, TOKENS)
    fine = Geometry.axis_aligned((40, 40, 40), (18.2, 18.2, 18.2), (0, 0, 0))  # twice the cube: an eighth lies inside
    keep = np.zeros(1000, bool)
    keep[tokens_at(np.array([-20.0, -20.0, -20.0]), cells)] = keep[0] = True
    mask = np.zeros((40, 40, 40), np.uint8)
    mask[18:20, 18:20, 18:20] = 3  # the token at (-20, -20, -20): eight voxels
    mask[20:22, 18:20, 18:20] = 1  # its neighbour, not kept
    mask[0, 0, :4] = 1  # outside of the cube
    found = count_mask("mask", lambda: Volume(mask, fine), cells).recall(keep)
    assert found == (20, 16, 8, pytest.approx(0.4), pytest.approx(0.8 * 0.002))
    everything = count_mask("mask", lambda: Volume(np.ones((40, 40, 40), bool), fine), cells).recall(
        np.ones(1000, bool)
    )
    assert everything.recall == pytest.approx(1 / 8) == everything.chance
    assert np.isnan(count_mask("mask", lambda: Volume(mask * 0, fine), cells).recall(keep).recall)


def test_chance_is_what_random_tokens_reach_on_average():
    rng = np.random.default_rng(0)
    cells = model_grid(Geometry.axis_aligned((364,) * 3, (1, 1, 1), (0, 0, 0)), TOKENS)
    mask = Volume(rng.random((30, 30, 30)) < 0.2, Geometry.axis_aligned((30, 30, 30), (14, 13, 12.5), (9, 0, 30)))
    drawn = [count_mask("mask", lambda: mask, cells).recall(rng.permutation(1000) < 390) for _ in range(40)]
    assert np.mean([d.recall for d in drawn]) == pytest.approx(drawn[0].chance, abs=0.01)


def test_ids_that_are_no_file_names_get_folders_of_their_own(tmp_path):
    names = ["a/b", "a b", "../x", "q1", ".hidden", "a" * 300, "ü"]
    folders = [folders_of(tmp_path, name, 1)[0] for name in names]
    assert len(set(folders)) == len(names) and all(folder.parent == tmp_path for folder in folders)
    assert folders[3].name == "q1" and all(len(folder.name) < 100 for folder in folders)
    assert [folder.name for folder in folders_of(tmp_path, "q", 2)] == ["volume-1", "volume-2"]
