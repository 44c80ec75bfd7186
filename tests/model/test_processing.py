"""From a volume and a conversation to model inputs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from photon_train.processing_photon import PhotonProcessor
from photon_train.tiny import byte_tokenizer, tiny_config

SMALL = {"model_shape_zyx": (28, 56, 56), "stored_shape_zyx": (42, 84, 84)}
TOKENS = 2 * 2 * 2


@pytest.fixture(scope="module")
def processor() -> PhotonProcessor:
    tokenizer = byte_tokenizer()
    return PhotonProcessor(tokenizer, tiny_config(tokenizer, stage=2, **SMALL))


def volume(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1000, 1000, (28, 56, 56), dtype=np.int16)


def text_of(processor: PhotonProcessor, ids: Tensor) -> str:
    return processor.tokenizer.decode(ids)


def test_the_prompt_is_qwens_with_the_volume_where_the_tag_stands(processor: PhotonProcessor) -> None:
    x = processor(volume(), [{"role": "user", "content": "<video>Is there a nodule?"}])
    assert text_of(processor, x["input_ids"][0]) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|>" + "<|video_pad|>" * TOKENS + "<|vision_end|>Is there a nodule?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert text_of(processor, x["input_ids"][0][x["question_mask"][0]]) == "Is there a nodule?"
    assert x["mm_token_type_ids"].sum() == 2 * TOKENS
    assert x["video_grid_thw"].tolist() == [[2, 4, 4]]
    assert x["second_per_grid_ts"].tolist() == [14.0]


@pytest.mark.parametrize(
    "content",
    [
        "<video>Where?",
        [{"type": "video"}, {"type": "text", "text": "Where?"}],
        [{"type": "video", "video": volume()}, {"type": "text", "text": "Where?"}],
    ],
)
def test_strings_parts_rows_and_plain_questions_say_the_same(processor: PhotonProcessor, content: Any) -> None:
    carried = isinstance(content, list) and "video" in content[0]
    plain = processor(volume(), "Where?")
    chat = processor(None if carried else volume(), [{"role": "user", "content": content}])
    row = processor({"messages": [{"role": "user", "content": "<video>Where?"}], "videos": [volume()], "channel": "x"})
    for other in (chat, row):
        assert other.keys() == plain.keys()
        assert all(other[name].equal(plain[name]) for name in plain)


def test_text_before_the_volume_is_the_question_too(processor: PhotonProcessor) -> None:
    x = processor(volume(), [{"role": "user", "content": "Look at this:<video>what is it?"}])
    assert text_of(processor, x["input_ids"][0][x["question_mask"][0]]) == "Look at this:what is it?"


def test_labels_are_the_answers_with_their_end_markers(processor: PhotonProcessor) -> None:
    messages = [
        {"role": "user", "content": "<video>One?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "No idea.", "loss": False},
        {"role": "user", "content": "Three?"},
        {"role": "assistant", "content": "No."},
    ]
    x = processor(volume(), messages, for_training=True)
    learnt = x["labels"][0] != -100
    assert text_of(processor, x["input_ids"][0][learnt]) == "Yes.<|im_end|>No.<|im_end|>"
    assert x["labels"][0][learnt].equal(x["input_ids"][0][learnt])
    assert text_of(processor, x["input_ids"][0][x["question_mask"][0]]) == "One?"


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_holds_two_volumes_one_and_none(processor: PhotonProcessor, side: str) -> None:
    messages = [
        [{"role": "user", "content": "<video><video>What changed?"}],
        [{"role": "user", "content": "How large is a kidney?"}],
        [{"role": "user", "content": "<video>Old or new?"}],
    ]
    volumes = [[volume(1), volume(2)], None, volume(3)]
    x = processor(volumes, messages, padding_side=side)
    assert x["video_grid_thw"].shape == (3, 3)
    start = 0
    for i, (own, said) in enumerate(zip(volumes, messages, strict=True)):
        alone, real = processor(own, said), x["attention_mask"][i].bool()
        for name in ("input_ids", "mm_token_type_ids", "question_mask"):
            assert x[name][i, real].equal(alone[name][0])
        if own is not None:
            patches = alone["pixel_values_videos"]
            assert x["pixel_values_videos"][start : start + len(patches)].equal(patches)
            start += len(patches)
    assert not x["question_mask"][1].any()
    assert not x["question_mask"][~x["attention_mask"].bool()].any()


def test_a_marked_voxel_is_found_in_the_patch_where_the_flip_puts_it(processor: PhotonProcessor) -> None:
    hu = np.full((28, 56, 56), -1000, dtype=np.int16)
    hu[20, 3, 50] = 1000
    patches, grid = processor.patches(hu)
    assert grid.tolist() == [2, 4, 4]
    # x = 50 of 56 is 5 after the flip: column patch 0; row patch 0; slab 1. The first patch of slab 1 is row 16.
    row, place = (patches == 1).nonzero()[0].tolist()
    assert (patches == 1).sum() == 1
    assert row == 16
    assert place == ((20 - 14) * 14 + 3) * 14 + 5


def test_min_max_and_the_window_are_the_same_on_air_and_bone_and_differ_elsewhere(processor: PhotonProcessor) -> None:
    windowed = PhotonProcessor(processor.tokenizer, tiny_config(processor.tokenizer, 2, intensity="window", **SMALL))
    hu = np.full((28, 56, 56), 0, dtype=np.int16)
    hu[0, 0, 0], hu[0, 0, 1] = -1000, 1000
    assert processor.scaled(hu).equal(windowed.scaled(hu))
    assert processor.scaled(hu)[5, 5, 5] == 0.5
    hu[0, 0, 1] = 0
    assert windowed.scaled(hu)[5, 5, 5] == 0.5
    assert processor.scaled(hu)[5, 5, 5] == 1.0
    assert processor.scaled(np.zeros_like(hu)).equal(torch.zeros(28, 56, 56))


@pytest.mark.parametrize("intensity", ["minmax", "window"])
def test_int16_on_the_model_grid_travels_as_it_is_and_is_scaled_to_the_same_bits_as_by_numpy(processor, intensity):
    settings = {"intensity": intensity, "window_hu": (-160.3, 240.9)}
    processor = PhotonProcessor(processor.tokenizer, tiny_config(processor.tokenizer, 2, **settings, **SMALL))
    hu = np.random.default_rng(3).integers(-1007, 1533, (28, 56, 56), dtype=np.int16)
    low, high = (hu.min(), hu.max()) if intensity == "minmax" else settings["window_hu"]
    expected = ((hu.astype(np.float32) - np.float32(low)) / np.float32(high - low)).clip(0, 1)
    travels = processor.stored(hu)
    assert travels.dtype == torch.int16 and travels.numpy().tobytes() == hu.tobytes()
    assert processor.scaled(travels).numpy().tobytes() == expected.tobytes()
    patches = processor.patches(hu.astype(np.float32))[0]  # of what travels as patches
    assert processor.stored(hu.astype(np.float32)).equal(patches)
    assert processor.patches_of(travels).equal(patches) and processor.patches_of(patches).equal(patches)
    row = {"messages": [{"role": "user", "content": "<video>Where?"}], "videos": [hu]}
    assert processor(rows=[row], as_stored=True)["pixel_values_videos"][0].equal(travels)
    assert processor(rows=[row])["pixel_values_videos"].equal(patches)


def test_the_stored_cube_is_resized_trilinearly(processor: PhotonProcessor) -> None:
    ramp = np.broadcast_to(np.arange(84, dtype=np.float32), (42, 84, 84)).copy()
    # Factor 1.5: output voxel i is centred on input (i + 0.5) * 1.5 - 0.5; ends at 0.25 and 82.75.
    inner = processor.scaled(ramp)[10, 10]
    expected = (torch.arange(56) + 0.5) * 1.5 - 0.5
    assert_close(inner, (expected - 0.25) / 82.5, rtol=0, atol=1e-5)


def test_a_nifti_of_the_stored_grid_reads_like_its_array_and_other_axes_are_refused(processor, tmp_path: Path) -> None:
    import nibabel

    hu = np.random.default_rng(0).integers(-1000, 1000, (42, 84, 84)).astype(np.int16)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0])
    nibabel.Nifti1Image(hu.transpose(2, 1, 0), lps).to_filename(tmp_path / "a.nii.gz")
    assert processor.patches(tmp_path / "a.nii.gz")[0].equal(processor.patches(hu)[0])
    nibabel.Nifti1Image(hu.transpose(2, 1, 0), np.eye(4)).to_filename(tmp_path / "ras.nii.gz")
    with pytest.raises(ValueError, match=r"expected axes L, P, S .*, found R, A, S"):
        processor.patches(tmp_path / "ras.nii.gz")


def test_a_volume_object_and_a_store_read_like_their_array(processor: PhotonProcessor, tmp_path: Path) -> None:
    from photon_data.files import Location
    from photon_data.recipe import Recipe
    from photon_data.store import write_store
    from photon_data.volume import Geometry, Prepared, Volume

    hu = {shape: np.random.default_rng(1).integers(-1000, 1000, shape, dtype=np.int16) for shape in SMALL.values()}
    grids = [Volume(array, Geometry.axis_aligned(shape, (1, 1, 1), (0, 0, 0))) for shape, array in hu.items()]
    model_grid, stored = grids
    assert processor.patches(model_grid)[0].equal(processor.patches(hu[SMALL["model_shape_zyx"]])[0])
    prepared = Prepared(stored, model_grid, {})
    recipe = Recipe(shape_zyx=SMALL["stored_shape_zyx"], model_shape_zyx=SMALL["model_shape_zyx"], spacing_mm=(1, 1, 1))
    write_store(
        prepared,
        Location(str(tmp_path)),
        "a.ome.zarr",
        {"id": "a", "key": "k", "fingerprint": "f", "recipe": recipe.to_json(), "digest": "d"},
    )
    assert processor.patches(tmp_path / "a.ome.zarr")[0].equal(processor.patches(model_grid)[0])


USER = {"role": "user", "content": "<video>Where?"}


def with_one_voxel(value):
    array = np.zeros((28, 56, 56), np.float32)
    array[20, 30, 40] = value
    return array


@pytest.mark.parametrize(
    ("volumes", "messages", "message"),
    [
        (np.zeros((28, 56, 57)), "Where?", r"shape \(28, 56, 56\) or \(42, 84, 84\) .*, found \(28, 56, 57\)"),
        (with_one_voxel(np.nan), "Where?", "expected finite voxels"),
        (with_one_voxel(-np.inf), "Where?", "expected finite voxels"),
        (volume(), [{"role": "user", "content": "<video><video>Where?"}], "found 1 volumes for 2 tags"),
        (None, [USER], "found 0 volumes for 1 tags"),
        ([volume(), volume()], [USER], "found 2 volumes for 1 tags"),
        (volume(), [{"role": "user", "content": "<video>  "}], "expected a question, found an empty one"),
        (volume(), "", "expected a question, found an empty one"),
        (volume(), [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}], "found 'image'"),
        (volume(), [USER, {"role": "assistant", "content": "<video>"}], "expected <video> in user turns only"),
        (volume(), [{"role": "user", "content": "<video>A?<|im_end|>"}], r"found <\|im_end\|>"),
        (volume(), [], "expected at least one message"),
        (
            {"messages": [USER], "videos": [volume()], "images": ["a.png"], "id": "r7"},
            None,
            r"r7: expected a CT volume, found images",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_with_expected_found_and_remedy(processor, volumes, messages, message) -> None:
    with pytest.raises(ValueError, match=message):
        processor(volumes, messages)


def test_a_row_that_is_too_long_is_refused_by_its_id_not_cut(processor: PhotonProcessor) -> None:
    row = {"id": "scan_9/3", "messages": [USER], "videos": [volume()]}
    with pytest.raises(ValueError, match=r"scan_9/3: expected at most 40 tokens, found \d+"):
        processor(rows=[row], max_length=40)


def test_a_tokenizer_of_another_model_is_refused(processor: PhotonProcessor) -> None:
    config = tiny_config(processor.tokenizer, stage=1, **SMALL)
    config.video_token_id = 5
    with pytest.raises(ValueError, match=r"<\|video_pad\|>: expected id 5, as in the configuration"):
        PhotonProcessor(processor.tokenizer, config)


def test_questions_for_a_prefix_are_what_follows_the_volume_in_a_whole_prompt(processor: PhotonProcessor) -> None:
    whole = processor(volume(), "Where is it?")["input_ids"][0]
    (question,) = processor.questions(["Where is it?"])
    assert whole[-len(question) :].equal(question)
    assert whole[-len(question) - 1] == processor.config.vision_end_token_id
