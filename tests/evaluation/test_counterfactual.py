"""Questions on edited volumes: what each edit changes, by hand, and how many answers move."""

import json
import shutil

import numpy as np
import pytest
from answers import put, row
from askable import QUESTIONS, TOKENS, blocks, lively_model, store
from typer.testing import CliRunner

from photon_cli.photon import app
from photon_data.errors import UsageError
from photon_data.phantom import make_phantoms
from photon_data.prepare_file import Job, prepare_file
from photon_data.questions.table import read_values
from photon_data.readers.find import find_scans
from photon_data.readers.nifti import nifti_header, write_nifti
from photon_data.recipe import Recipe
from photon_data.store import open_volume
from photon_data.volume import Geometry
from photon_train.answering.predictor import recipe_of
from photon_train.evaluation.cases import rows_by_id
from photon_train.evaluation.counterfactual import (
    EditedVolume,
    asked_or_other,
    edited_rows,
    edits_of,
    mirrored,
    names_a_side,
    regions_of,
    summarise,
    surroundings,
)
from photon_train.evaluation.metric import draw_patients
from photon_train.kept_tokens import MaskFolder
from photon_train.rows import Prediction, pack_mask, question_digest

YES_NO, TOKENS_ZYX = ("Yes", "No"), (5, 5, 5)


def test_the_words_of_the_command_name_edits_and_blind_stands_beside_them():
    assert edits_of(["erase=asked,dropped flip=lr"], has_masks=True) == (
        *("erase=asked", "erase=dropped", "flip=lr", "blind"),
    )
    assert edits_of([], has_masks=False) == ()
    for words, said in ((["erase=liver"], "found 'erase=liver'"), (["erase=asked"], "expected --masks")):
        with pytest.raises(UsageError, match=said):
            edits_of(words, has_masks=False)


def test_left_and_right_are_exchanged_as_words_and_a_choice_between_both_names_none():
    assert mirrored("Left lung, RIGHT kidney; leftover") == "Right lung, LEFT kidney; leftover"
    named = [names_a_side(text) for text in ("in the left lung?", "Which side, left or right?", "Any nodule?")]
    assert named == [True, False, False]


def test_other_voxels_are_as_many_as_asked_ones_and_touch_none_of_them():
    line = np.zeros((4, 1, 12), bool)
    regions = {name: line.copy() for name in ("liver", "lesion", "lung", "spleen")}
    regions["liver"][0, 0, :4] = True
    regions["lesion"][0, 0, 2:5] = True  # a part of the liver: never erased as another organ
    regions["lung"][2, 0, :] = True
    regions["spleen"][1, 0, 5:8] = True
    assert asked_or_other(regions, ("liver",), "erase=asked").sum() == 4
    other = asked_or_other(regions, ("liver",), "erase=other")
    assert np.argwhere(other)[:, [0, 2]].tolist() == [[1, 5], [1, 6], [1, 7], [2, 5]]  # the spleen, then mid-lung
    assert asked_or_other(regions, ("lung",), "erase=other").sum() == 4 + 3 + 1


def test_what_is_erased_takes_values_of_the_voxels_up_to_two_away():
    hu = np.arange(20, dtype=np.int16).reshape(1, 1, 20)
    region = (hu >= 8) & (hu < 12)
    assert set(surroundings(hu, region, seed=1).tolist()) <= {6, 7, 12, 13}
    ends = hu < 3  # the other end of the grid is no neighbour
    assert set(surroundings(hu, ends, seed=1).tolist()) <= {3, 4}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return store(tmp_path_factory.mktemp("data"), "v0", 0)


def changed(place, **how) -> np.ndarray:
    """Return the voxels that an edit changed, but for the two that keep the range."""
    edited = EditedVolume(place, "v0", tokens_zyx=TOKENS_ZYX, **how).array_zyx
    before = blocks(0).array_zyx
    assert (edited.min(), edited.max()) == (before.min(), before.max())
    found = edited != before
    found.flat[:2] = False
    return found


def test_blanking_kept_tokens_changes_their_voxels_and_no_others(place):
    keep_V = np.zeros(TOKENS, bool)
    keep_V[[7, 124]] = True  # foot, second row, third column from the patient's left; head, back, right
    expected = np.zeros((70, 140, 140), bool)
    expected[:14, 28:56, 140 - 84 : 140 - 56] = expected[56:, 112:, :28] = True
    kept = changed(place, edit="erase=kept", kept=pack_mask(keep_V))
    dropped = changed(place, edit="erase=dropped", kept=pack_mask(keep_V))
    assert (kept == expected).all()
    assert not (dropped & expected).any()
    assert dropped.sum() > 0.98 * (~expected).sum()


def test_a_mask_that_is_not_asked_about_is_not_read(place, tmp_path):
    (tmp_path / "v0").mkdir()
    small = Geometry.axis_aligned((14, 28, 28), (5.2, 2.6, 2.6), (0, -40, 0))
    write_nifti(tmp_path / "v0" / "liver.nii.gz", nifti_header(small, "<u1"), np.ones(small.shape_zyx, np.uint8))
    (tmp_path / "v0" / "spleen.nii.gz").write_bytes(b"no mask")
    home = MaskFolder(tmp_path)
    assert changed(place, edit="erase=asked", masks=home, asked=("liver",)).any()
    with pytest.raises(UsageError, match=r"expected masks of v0 \(lungs\)"):
        changed(place, edit="erase=asked", masks=home, asked=("lungs",))


def test_a_mirrored_volume_is_the_volume_from_right_to_left(place):
    assert (EditedVolume(place, "v0", "flip=lr").array_zyx == blocks(0).array_zyx[..., ::-1]).all()


def answers(**said: str) -> list[Prediction]:
    return [Prediction(id, response) for id, response in said.items()]


def test_moved_answers_are_counted_by_hand():
    sides = ("Left", "Right")
    rows = rows_by_id(
        [
            row("a", "Left", sides, question="Which side?"),
            row("b", "Right", sides, question="Which side?"),
            row("c", "Yes", YES_NO, question="In the left lung?"),
            row("d", "No", YES_NO),
        ]
    )
    base = answers(a="Left", b="B. Left", c="Yes", d="yes.")
    edited = {
        "erase=asked": answers(a="Right", b="left", c="No", d="Yes"),
        "erase=other": answers(a="Left", b="Left", d="No"),
        "flip=lr": answers(a="Right", b="Left", c="Yes", d="No"),
    }
    base[1] = Prediction("b", "Left")
    patients = draw_patients(["p-a", "p-b", "p-c", "p-d"], 100, seed=0)
    found = summarise(rows, {"its": base}, {"its": edited}, patients)
    lines = {(one.edit, one.questions_of): one for one in found.moved}
    asked = lines["erase=asked", "all"]
    assert (asked.questions, asked.moved.value, asked.right_before.value, asked.right_after.value) == (4, 50, 50, 0)
    assert lines["erase=other", "all"].moved.value == pytest.approx(100 / 3, abs=1e-3)
    side, none = lines["flip=lr", "a side"], lines["flip=lr", "no side"]
    # a moved as a mirror does, b stayed and should have moved; c stayed as it should, d moved and should not have.
    assert (side.questions, side.moved.value, side.expected.value) == (2, 50, 50)
    assert (none.questions, none.moved.value, none.expected.value) == (2, 50, 50)
    # Mirrored, the answers are right, left, yes, no: a and b are right, and of c and d both.
    assert (side.right_after.value, none.right_after.value) == (100, 100)
    (more,) = found.more
    assert (more.questions, more.difference.value) == (3, 0)  # a + 1, b 0, d - 1
    assert more.difference.low < 0 < more.difference.high
    assert found.responses["its"]["a"] == {"erase=asked": "Right", "erase=other": "Left", "flip=lr": "Right"}


def test_choices_of_a_question_about_one_side_are_mirrored_with_it(place):
    lobes = ("left upper lobe", "left lower lobe")
    asked = "In which lobe of the left lung is it?\nA. left upper lobe\nB. left lower lobe"
    rows = [
        row("a", "B", lobes, question=asked, volume_id="v0", videos=[place]),
        row("b", "left lower lobe", lobes, question=asked, volume_id="v0", videos=[place]),
        row("c", "A", ("Left", "Right"), question="Left or right?\nA. Left\nB. Right", volume_id="v0", videos=[place]),
    ]
    first, second, third = edited_rows(rows, "flip=lr", {}, None, TOKENS_ZYX)
    mirrored_lobes = ["right upper lobe", "right lower lobe"]
    assert first["messages"][0]["content"].endswith("right lung is it?\nA. right upper lobe\nB. right lower lobe")
    assert (first["choices"], second["choices"], second["answer"]) == (
        mirrored_lobes,
        mirrored_lobes,
        "right lower lobe",
    )
    assert (third["choices"], third["messages"]) == (["Left", "Right"], rows[2]["messages"])  # it names both
    base, after = answers(a="B", b="left lower lobe", c="A"), answers(a="B", b="right lower lobe", c="B")
    found = summarise(
        rows_by_id(rows), {"m": base}, {"m": {"flip=lr": after}}, draw_patients(["p-a", "p-b", "p-c"], 5, 0)
    )
    (side,) = found.moved
    assert (side.questions_of, side.expected.value, side.right_before.value, side.right_after.value) == (
        *("a side", 100, 100, 100),
    )


def test_an_edited_volume_of_other_content_is_another_question(tmp_path):
    places = [store(tmp_path, f"v{number}", number) for number in range(2)]
    rows = [row(str(n), "Yes", YES_NO, volume_id=f"v{n}", videos=[place]) for n, place in enumerate(places)]

    def asked(edit, rows, kept="80" + 15 * "00", home=None) -> str:
        of_tokens = {"visual_tokens": TOKENS, "kept_tokens": 1, "kept": kept}
        first = edited_rows(rows, edit, {"0": Prediction("0", "Yes", **of_tokens)}, home, TOKENS_ZYX)[0]
        assert recipe_of(first["videos"]) == Recipe().digest  # prepared again by another, it is asked again
        return question_digest(first)

    for volume in ("v0", "v1"):
        (tmp_path / "masks" / volume).mkdir(parents=True)
    with_mask = [{**one, "extra": {"organ_masks": '["liver"]'}} for one in rows]
    home = MaskFolder(tmp_path / "masks")
    each = [
        *(asked("blind", rows), asked("blind", rows[:1]), asked("flip=lr", rows)),  # the mean of two is not one's
        *(asked("erase=kept", rows), asked("erase=kept", rows, "40" + 15 * "00"), asked("erase=dropped", rows)),
        *(asked("erase=asked", with_mask, home=home), asked("erase=other", with_mask, home=home)),
        question_digest(rows[0]),
    ]
    assert len(set(each)) == len(each)
    assert asked("blind", rows[::-1]) == each[0]


def test_a_folder_without_masks_is_named(place, tmp_path):
    (tmp_path / "v0").mkdir()
    with pytest.raises(UsageError, match="expected masks of v0"):
        regions_of(MaskFolder(tmp_path), place, "v0", blocks(0).geometry)


RECIPE = Recipe(spacing_mm=(3.0, 3.0, 3.0), shape_zyx=(120, 120, 120), model_shape_zyx=(70, 140, 140))


def test_whoever_looks_at_the_asked_organ_is_moved_by_erasing_it_and_not_by_erasing_another(tmp_path):
    """The looker says yes where the organ that is asked about is brighter than a healthy one."""
    make_phantoms(tmp_path, 4, seed=3, size=96, easy=True)
    for source in find_scans(tmp_path / "scans").sources:
        prepare_file(Job(source, str(tmp_path / "out"), RECIPE))
    home, rows, limit = MaskFolder(tmp_path / "masks"), [], {"lungs": -300, "liver": 400}
    for line in read_values(tmp_path / "questions.jsonl"):
        if line["kind"] == "existence":
            place = str(tmp_path / "out" / "volumes" / f"{line['volume']}.ome.zarr")
            extra = {"organ_masks": json.dumps(line["organ_masks"])}
            rows.append(
                row(line["id"], line["answer"], ("yes", "no"), volume_id=line["volume"], videos=[place], extra=extra)
                | {"organ": line["organ"]}
            )

    def look(one) -> str:
        place, asked = rows_by_id(rows)[one["id"]]["videos"][0], json.loads(one["extra"]["organ_masks"])
        volume, video = open_volume(place, "model"), one["videos"][0]
        region = asked_or_other(regions_of(home, place, one["volume_id"], volume.geometry), asked, "erase=asked")
        hu = volume.numpy() if isinstance(video, str) else video.array_zyx
        return "yes" if hu[region].mean() > limit[one["organ"]] else "no"

    base = answers(**{one["id"]: look(one) for one in rows})
    assert [one.response for one in base] == [one["answer"] for one in rows]
    edited = {}
    for edit in ("erase=asked", "erase=other"):
        on_edited = edited_rows(rows, edit, {one.id: one for one in base}, home, TOKENS_ZYX)
        edited[edit] = answers(**{one["id"]: look(one) for one in on_edited})
        assert len(edited[edit]) == len(rows) == 8
    patients = draw_patients([one["patient"] for one in rows], 20, seed=0)
    found = summarise(rows_by_id(rows), {"m": base}, {"m": edited}, patients)
    moved = {one.edit: one.moved.value for one in found.moved}
    assert moved["erase=asked"] >= 50
    assert moved["erase=other"] == 0


@pytest.mark.slow
def test_the_command_asks_again_on_edited_volumes_and_goes_on_after_a_stop(tmp_path):
    model = lively_model(tmp_path / "model")
    rows = []
    for number in range(2):
        place = store(tmp_path, f"v{number}", number)
        small = Geometry.axis_aligned((14, 28, 28), (5.2, 2.6, 2.6), (0, -40, 0))
        for name, y in (("liver", -40), ("lungs", 60)):
            path = tmp_path / "masks" / f"v{number}" / f"{name}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            small = Geometry.axis_aligned((14, 28, 28), (5.2, 2.6, 2.6), (0, y, 0))
            write_nifti(path, nifti_header(small, "<u1"), np.ones(small.shape_zyx, np.uint8))
        for k, question in enumerate(QUESTIONS[:2]):
            extra = {"organ_masks": '["liver"]'} if k == 0 else {}
            more = {"question": question, "volume_id": f"v{number}", "patient": f"p{number}", "extra": extra}
            rows.append(row(f"{number}-{k}", YES_NO[k % 2], YES_NO, videos=[place], **more))
    put(tmp_path / "rows.jsonl", rows)
    words = ["eval", "vqa", "--model", model, "--data", tmp_path / "rows.jsonl", "--output", tmp_path / "out"]
    words += ["--bootstrap", 20, "--device", "cpu", "--overlays", 0, "--choices", "--masks", tmp_path / "masks"]
    words += ["--schedulers", "its,divprune", "--counterfactual", "erase=asked,other,kept,dropped flip=lr"]
    for again in (False, True):
        result = CliRunner().invoke(app, [*map(str, words)])
        assert result.exit_code == 0, result.output
        assert ("4 answered, 0 before" in result.output) == (not again)
    written = json.loads((tmp_path / "out" / "scores.json").read_text())["counterfactuals"]
    numbers = {(one["predictions"], one["edit"]): one["questions"] for one in written["moved"]}
    for name in ("its", "divprune"):
        assert [numbers[name, edit] for edit in ("erase=asked", "erase=other", "blind", "flip=lr")] == [2, 2, 4, 4]
        assert numbers[name, "erase=kept"] == numbers[name, "erase=dropped"] == 4
    line = json.loads((tmp_path / "out" / "per_question.jsonl").read_text().splitlines()[0])
    assert set(line["counterfactual"]) == {
        *("erase=asked", "erase=other", "erase=kept", "erase=dropped", "flip=lr", "blind")
    }
    shutil.rmtree(tmp_path / "masks" / "v1")  # whose questions have nothing to erase now: old answers do not count
    assert CliRunner().invoke(app, [*map(str, words)]).exit_code == 0
    written = json.loads((tmp_path / "out" / "scores.json").read_text())["counterfactuals"]
    assert {one["questions"] for one in written["moved"] if one["edit"] == "erase=asked"} == {1}
    assert "Answers on edited volumes" in (tmp_path / "out" / "report.html").read_text()
    result = CliRunner().invoke(app, [*map(str, [*words[:-6], "--counterfactual", "erase=asked"])])
    assert (result.exit_code, "expected --masks" in result.output) == (2, True)
