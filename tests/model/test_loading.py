"""The four layouts load, what does not fit is listed, and what is saved has the published names."""

import json
import re
from pathlib import Path

import pytest
import torch
from golden import Golden, published_name
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from photon_train import PhotonConfig, vision
from photon_train.modeling_photon import PhotonForConditionalGeneration

PATCH_EMBEDDING = "visual.vision_patch_embed.proj.weight"


def published(golden: Golden, stage: str) -> tuple[dict, dict[str, Tensor]]:
    directory = golden.directory / "models" / stage
    return json.loads((directory / "config.json").read_text()), load_file(directory / "model.safetensors")


def write(directory: Path, config: dict, weights: dict[str, Tensor]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture
def stock(golden: Golden, tmp_path: Path) -> Path:
    """A small Qwen2.5-VL checkpoint under pre-v5 names, with an RGB patch embedding."""
    config, weights = published(golden, "s1")
    config["vision_config"] |= {"in_chans": 3, "temporal_patch_size": 2}
    width = len(weights.pop(PATCH_EMBEDDING))
    weights["visual.patch_embed.proj.weight"] = torch.randn(width, 3, 2, 14, 14)
    return write(tmp_path / "stock", config, weights)


def test_stock_qwen_becomes_stage_1_with_a_fresh_patch_embedding(golden: Golden, stock: Path) -> None:
    model, (_, weights) = PhotonForConditionalGeneration.from_pretrained(stock), published(golden, "s1")
    assert model.config.stage == 1
    assert model.config.scheduler == "none"
    fresh = model.model.visual.patch_embed.proj.weight
    assert tuple(fresh.shape[1:]) == (1, 14, 14, 14)
    assert 0 < fresh.std() < 0.1
    for name, p in model.named_parameters():
        if not name.endswith("patch_embed.proj.weight"):
            assert_close(p, weights[published_name(name)], rtol=0, atol=0)


def test_stage_1_becomes_stage_2_with_a_predictor_that_keeps_nearly_everything(golden: Golden) -> None:
    model = golden.model("s1", stage=2, im_start_token_id=golden.tokens["im_start"])
    out = model(**golden.batch("b1"))
    visual = golden.inputs("b1")["vision_mask"]
    assert model.config.scheduler == "its"
    assert_close(out.scheduled.selection.threshold_B, torch.tensor([0.9 / (1 + 2.718281828459045**5)]))
    assert out.scheduled.keep_BL[visual].float().mean() > 0.95


def test_the_authors_effective_start_is_a_setting_away(golden: Golden) -> None:
    model = golden.model("s1", stage=2, initial_threshold=0.45)
    assert_close(model(**golden.batch("b1")).scheduled.selection.threshold_B, torch.tensor([0.45]))


@pytest.mark.parametrize("stage", ["s1", "s2"])
def test_what_is_saved_has_the_published_keys_values_and_config(golden: Golden, stage: str, tmp_path: Path) -> None:
    golden.model(stage).save_pretrained(tmp_path)
    config, weights = published(golden, stage)
    saved = load_file(tmp_path / "model.safetensors")
    saved.pop("lm_head.weight", None)
    assert saved.keys() == weights.keys()
    assert all(saved[key].equal(weights[key]) for key in weights)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == config["architectures"]
    assert written["vision_config"]["in_chans"] == 1
    for key in ("hidden_size", "num_hidden_layers", "rope_theta", "rope_scaling", "vocab_size", "tie_word_embeddings"):
        assert written[key] == config[key], key


def test_a_saved_model_loads_to_the_same_logits(golden: Golden, tmp_path: Path) -> None:
    model, x = golden.model("s2", band_low=0.2), golden.batch("b1")
    model.save_pretrained(tmp_path)
    again = PhotonForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert again.config.band_low == 0.2
    assert again.config.im_start_token_id == golden.tokens["im_start"]
    assert again(**x).logits.equal(model(**x).logits)


def test_shards_and_bfloat16_load(golden: Golden, tmp_path: Path) -> None:
    model = golden.model("s2").to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again = PhotonForConditionalGeneration.from_pretrained(tmp_path)
    of_threshold = {name for name, p in again.named_parameters() if p.dtype == torch.float32}
    assert of_threshold and all(".atp." in name for name in of_threshold)
    assert {p.dtype for name, p in again.named_parameters() if name not in of_threshold} == {torch.bfloat16}
    for (name, p), q in zip(again.named_parameters(), model.parameters(), strict=True):
        assert p.equal(q), name
    out = again.eval()(**golden.batch("b1"))
    assert out.logits.isfinite().all()


def test_a_hub_id_loads_at_the_revision_asked_for(golden: Golden, tmp_path: Path) -> None:
    """From a cache laid out as the hub's client does; no network."""
    folder = tmp_path / "models--someone--photon"
    (folder / "refs").mkdir(parents=True)
    (folder / "snapshots").mkdir()
    config, weights = published(golden, "s1")
    for i, revision in enumerate(("main", "v1")):
        commit = str(i) * 40
        (folder / "refs" / revision).write_text(commit)
        scaled = weights | {"model.norm.weight": weights["model.norm.weight"] * (i + 1)}
        write(folder / "snapshots" / commit, config, scaled)
    where = {"cache_dir": tmp_path, "local_files_only": True}
    for i, revision in enumerate((None, "v1")):
        model = PhotonForConditionalGeneration.from_pretrained("someone/photon", revision=revision, **where)
        assert model.model.language_model.norm.weight.equal(weights["model.norm.weight"] * (i + 1))


def test_the_stale_in_channels_of_a_resaved_config_loses_to_in_chans(golden: Golden, tmp_path: Path) -> None:
    _, weights = published(golden, "s1")
    config = json.loads((golden.directory / "models" / "s1" / "config_as_saved_by_hf.json").read_text())
    assert config["vision_config"]["in_channels"] == 3
    model = PhotonForConditionalGeneration.from_pretrained(write(tmp_path / "again", config, weights))
    assert model.model.visual.patch_embed.proj.weight.equal(weights[PATCH_EMBEDDING])


@pytest.mark.parametrize(
    ("drop", "add", "message"),
    [
        ("model.norm.weight", None, "missing model.language_model.norm.weight"),
        ("visual.merger.mlp.0.bias", None, "missing model.visual.merger.mlp.0.bias"),
        (None, "model.layers.0.extra.weight", "unexpected .*layers.0.extra.weight"),
        ("model.layers.1.atp.predictor.mlp.0.bias", None, "missing .*atp.predictor.mlp.0.bias"),
    ],
)
def test_a_key_too_few_or_too_many_is_an_error_that_lists_it(golden, tmp_path, drop, add, message) -> None:
    config, weights = published(golden, "s2")
    weights.pop(drop, None)
    weights |= {add: torch.zeros(3)} if add else {}
    with pytest.raises(ValueError, match=message):
        PhotonForConditionalGeneration.from_pretrained(write(tmp_path / "m", config, weights))


def test_a_weight_of_another_shape_is_an_error_that_lists_it(golden: Golden, tmp_path: Path) -> None:
    config, weights = published(golden, "s1")
    weights["model.norm.weight"] = weights["model.norm.weight"][:-1].clone()
    with pytest.raises(
        ValueError, match=re.escape("model.language_model.norm.weight: expected shape (64,), found (63,)")
    ):
        PhotonForConditionalGeneration.from_pretrained(write(tmp_path / "m", config, weights))


def test_a_stage_2_checkpoint_is_not_loaded_for_stage_1(golden: Golden) -> None:
    with pytest.raises(ValueError, match="expected stage 2, found 1"):
        golden.model("s2", stage=1)


def test_pickled_weights_are_refused_unopened(golden: Golden, tmp_path: Path) -> None:
    config, weights = published(golden, "s1")
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled weights"):
        PhotonForConditionalGeneration.from_pretrained(tmp_path)


def test_a_file_cut_off_and_a_path_that_is_not_there_say_what_to_do(golden: Golden, tmp_path: Path) -> None:
    path = write(tmp_path / "m", *published(golden, "s1"))
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"expected a complete safetensors file, .* fetch it again"):
        PhotonForConditionalGeneration.from_pretrained(path)
    with pytest.raises(ValueError, match="check the path"):
        PhotonForConditionalGeneration.from_pretrained(tmp_path / "elsewhere")


def test_a_tied_checkpoint_needs_no_lm_head_and_saves_none_and_an_untied_one_does(
    golden: Golden, tmp_path: Path
) -> None:
    """Qwen2.5-VL-3B and the published Photon tie the head to the embeddings, larger Qwens do not."""
    config, weights = published(golden, "s1")
    embedded = weights["model.embed_tokens.weight"]
    weights.pop("lm_head.weight", None)
    tied = PhotonForConditionalGeneration.from_pretrained(
        write(tmp_path / "tied", {**config, "tie_word_embeddings": True}, weights)
    )
    assert tied.lm_head.weight is tied.model.language_model.embed_tokens.weight
    tied.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == weights.keys()
    untied = {**config, "tie_word_embeddings": False}
    with pytest.raises(ValueError, match=r"missing lm_head\.weight"):
        PhotonForConditionalGeneration.from_pretrained(write(tmp_path / "untied", untied, weights))
    whole = weights | {"lm_head.weight": embedded * 2}
    model = PhotonForConditionalGeneration.from_pretrained(write(tmp_path / "whole", untied, whole))
    assert model.lm_head.weight.equal(embedded * 2)
    model.save_pretrained(tmp_path / "whole_again")
    assert load_file(tmp_path / "whole_again" / "model.safetensors").keys() == whole.keys()


def test_generation_settings_travel_with_the_weights(golden: Golden, tmp_path: Path) -> None:
    path = write(tmp_path / "m", *published(golden, "s1"))
    settings = {"eos_token_id": [golden.tokens["im_end"], golden.tokens["pad"]], "repetition_penalty": 1.05}
    (path / "generation_config.json").write_text(json.dumps(settings))
    PhotonForConditionalGeneration.from_pretrained(path).save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert {name: written[name] for name in settings} == settings


def test_a_directory_that_is_no_photon_says_what_it_found(golden: Golden, tmp_path: Path) -> None:
    config, _ = published(golden, "s1")
    with pytest.raises(ValueError, match="neither patch_embed nor vision_patch_embed"):
        PhotonForConditionalGeneration.from_pretrained(write(tmp_path / "m", config, {"w": torch.zeros(2)}))


@torch.no_grad()
def test_without_scheduling_it_is_stock_qwen(golden: Golden, tmp_path: Path) -> None:
    """Given the same positions, which transformers v5 counts by another rule: that difference is asserted too."""
    photon, x = golden.model("s1"), golden.batch("b2_left", "labels")
    config = Qwen2_5_VLConfig(**json.loads((golden.directory / "models" / "s1" / "config.json").read_text()))
    config.vision_config.in_channels = 1
    stock = Qwen2_5_VLForConditionalGeneration(config).eval()
    stock.load_state_dict(photon.state_dict())
    kinds = 2 * golden.inputs("b2_left")["vision_mask"].long()
    ours_3BL, _ = photon.model.get_rope_index(**x, mm_token_type_ids=kinds)
    theirs_3BL, _ = stock.model.get_rope_index(**x, mm_token_type_ids=kinds)
    assert not ours_3BL.equal(theirs_3BL)
    assert_close(photon(**x).logits, stock(**x, position_ids=ours_3BL).logits, rtol=0, atol=5e-5)
    x |= {"position_ids": theirs_3BL}
    assert_close(photon(**x).logits, stock(**x).logits, rtol=0, atol=5e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_the_vision_tower_gives_what_the_stock_one_gives(golden: Golden, attention: str) -> None:
    photon, x = golden.model("s1", attn_implementation=attention), golden.inputs("vision_windows")
    config = photon.config.vision_config
    stock = Qwen2_5_VisionTransformerPretrainedModel._from_config(config, attn_implementation=attention).eval()
    stock.load_state_dict(photon.model.visual.state_dict())
    ours, theirs = (
        tower(x["pixel_values_videos"], grid_thw=x["video_grid_thw"]).pooler_output
        for tower in (photon.model.visual, stock)
    )
    assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_one_call_per_window_length_is_made(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    photon, x = golden.model("s1", attn_implementation="eager"), golden.inputs("vision_windows")
    calls = []
    stock = vision.eager_attention_forward
    monkeypatch.setattr(
        vision, "eager_attention_forward", lambda *a, **k: calls.append(a[1].shape[2]) or stock(*a, **k)
    )
    photon.model.visual(x["pixel_values_videos"], grid_thw=x["video_grid_thw"])
    # Windows of 8 x 8 patches on slabs of 12 x 10 and (twice) 4 x 8: lengths 64, 32, 16 and 8; whole slabs: 120 and 32.
    full = len(photon.config.vision_config.fullatt_block_indexes)
    assert sorted(set(calls)) == [8, 16, 32, 64, 120]
    assert len(calls) == 4 * (photon.config.vision_config.depth - full) + 2 * full


def test_what_is_saved_is_photon_to_the_auto_classes_and_an_error_to_the_stock_class(
    golden: Golden, tmp_path: Path
) -> None:
    golden.model("s2").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "photon"  # unknown without this package
    assert type(AutoConfig.from_pretrained(tmp_path)) is PhotonConfig
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    assert type(model) is PhotonForConditionalGeneration
    assert (model.dtype, model.config._attn_implementation) == (torch.bfloat16, "eager")
    with pytest.raises(StrictDataclassFieldValidationError, match="in_channels"):
        Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path)


def test_keywords_of_transformers_are_taken(golden: Golden, tmp_path: Path) -> None:
    golden.model("s1").to(torch.bfloat16).save_pretrained(tmp_path)
    where: dict = {"pretrained_model_name_or_path": tmp_path, "device_map": "cpu", "revision": "main"}
    model, info = PhotonForConditionalGeneration.from_pretrained(**where, dtype="auto", output_loading_info=True)
    assert (model.dtype, info["missing_keys"]) == (torch.bfloat16, set())
    assert PhotonForConditionalGeneration.from_pretrained(tmp_path, torch_dtype=torch.float32).dtype == torch.float32


def test_a_conversation_is_not_continued_on_a_pruned_cache(golden: Golden) -> None:
    model, x = golden.model("s2"), golden.batch("b1")
    said = model.generate(**x, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    assert said.past_key_values.get_seq_length() < x["input_ids"].shape[1]
    longer = torch.cat([said.sequences, said.sequences[:, -3:]], dim=1)
    with pytest.raises(ValueError, match="pass the whole conversation alone"):
        model.generate(input_ids=longer, past_key_values=said.past_key_values, max_new_tokens=2)


def test_a_run_or_an_adapter_in_the_place_of_a_model_says_which_folder_is_the_model(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoint-20").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-20" / "adapter.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"say .*/run/checkpoint-20"):
        PhotonForConditionalGeneration.from_pretrained(tmp_path / "run")
    with pytest.raises(ValueError, match=r"/run/merged is the whole model"):
        PhotonForConditionalGeneration.from_pretrained(tmp_path / "run" / "checkpoint-20")
    with pytest.raises(ValueError, match=r"found neither at runs/no/checkpoint-9"):
        PhotonForConditionalGeneration.from_pretrained("runs/no/checkpoint-9")


@pytest.mark.parametrize(
    "field", [{"keep_ratio": "0.5"}, {"soft_start": "early"}, {"window_hu": 3}, {"its_layer": 1.5}]
)
def test_a_value_of_another_type_is_named(golden: Golden, tmp_path: Path, field: dict) -> None:
    config, weights = published(golden, "s2")
    with pytest.raises(ValueError, match=f"{next(iter(field))}: expected"):
        PhotonForConditionalGeneration.from_pretrained(write(tmp_path / "m", config, weights), **field)


@pytest.mark.parametrize("name", ["num_hidden_layers", "depth"])
def test_a_config_of_layers_without_end_is_refused_before_they_are_made(golden: Golden, tmp_path: Path, name) -> None:
    config, weights = published(golden, "s1")
    if name == "depth":
        config = {**config, "vision_config": {**config["vision_config"], name: 10**5}}
    else:
        config = {**config, name: 10**5, "layer_types": ["full_attention"] * 10**5}
    with pytest.raises(ValueError, match=f"{name}: expected at most 1,000 layers, found 100,000"):
        PhotonForConditionalGeneration.from_pretrained(write(tmp_path / "m", config, weights))


def test_weights_without_a_config_are_no_model(golden: Golden, tmp_path: Path) -> None:
    path = write(tmp_path / "m", *published(golden, "s1"))
    (path / "config.json").unlink()
    with pytest.raises((ValueError, OSError), match=r"config\.json"):
        PhotonForConditionalGeneration.from_pretrained(path)
