"""The whole model: full-size shapes, bad input, memory, the command line."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import Golden, published_name
from typer.testing import CliRunner

from photon_cli.photon import app
from photon_train.configuration_photon import PhotonConfig
from photon_train.modeling_photon import PhotonForConditionalGeneration
from photon_train.processing_photon import PhotonProcessor

# Qwen2.5-VL-3B-Instruct's published config.json, as far as it sets shapes; one channel, 14 slices a patch.
VISION_3B = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "in_chans": 1,
    "out_hidden_size": 2048, "patch_size": 14, "spatial_merge_size": 2, "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "temporal_patch_size": 14,
}  # fmt: skip
TEXT_3B = {
    "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
    "num_attention_heads": 16, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "tie_word_embeddings": True,
}  # fmt: skip


def test_the_full_size_model_has_the_published_keys_shapes_and_parameters() -> None:
    with torch.device("meta"):
        model = PhotonForConditionalGeneration(PhotonConfig(**TEXT_3B, vision_config=VISION_3B, stage=2))
    assert model.config.its_layer == 8
    shapes = {published_name(name): tuple(p.shape) for name, p in model.named_parameters()}
    expected = published_shapes()
    assert shapes == expected
    language = sum(np.prod(s) for k, s in expected.items() if k.startswith("model.") and ".atp." not in k)
    assert language == 3_085_938_688  # Qwen2.5-3B's own count
    assert sum(np.prod(s) for k, s in expected.items() if ".atp." in k) == 12 * 256 + 256 + 256 + 1 + 2048


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Every key of a stage-2 checkpoint and its shape, written out from the sizes."""
    d, mlp, kv, v, vm = 2048, 11008, 256, 1280, 3420
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (151936, d), "model.norm.weight": (d,)}
    for i in range(36):
        layer = f"model.layers.{i}"
        for name, rows in (("q", d), ("k", kv), ("v", kv)):
            shapes |= {
                f"{layer}.self_attn.{name}_proj.weight": (rows, d),
                f"{layer}.self_attn.{name}_proj.bias": (rows,),
            }
        shapes |= {f"{layer}.self_attn.o_proj.weight": (d, d), f"{layer}.mlp.down_proj.weight": (d, mlp)}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (mlp, d) for name in ("gate", "up")}
        shapes |= {f"{layer}.{name}_layernorm.weight": (d,) for name in ("input", "post_attention")}
    atp = "model.layers.8.atp"
    shapes |= {f"{atp}.predictor.mlp.0.weight": (256, 12), f"{atp}.predictor.mlp.0.bias": (256,)}
    shapes |= {
        f"{atp}.predictor.mlp.2.weight": (1, 256),
        f"{atp}.predictor.mlp.2.bias": (1,),
        f"{atp}.pos_proj.weight": (d, 1),
    }
    for i in range(32):
        block = f"visual.blocks.{i}"
        sizes = {"attn.qkv": (3 * v, v), "attn.proj": (v, v)}
        sizes |= {"mlp.gate_proj": (vm, v), "mlp.up_proj": (vm, v), "mlp.down_proj": (v, vm)}
        for name, shape in sizes.items():
            shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
        shapes |= {f"{block}.norm1.weight": (v,), f"{block}.norm2.weight": (v,)}
    shapes |= {"visual.merger.ln_q.weight": (v,), "visual.vision_patch_embed.proj.weight": (v, 1, 14, 14, 14)}
    for name, shape in {"0": (4 * v, 4 * v), "2": (d, 4 * v)}.items():
        shapes |= {f"visual.merger.mlp.{name}.weight": shape, f"visual.merger.mlp.{name}.bias": shape[:1]}
    return shapes


def test_training_computes_logits_at_answer_tokens_only(golden: Golden) -> None:
    model, x = golden.model("s2").train(), golden.batch("b1")
    seen = []
    model.lm_head.register_forward_hook(lambda _m, _i, out: seen.append(tuple(out.shape)))
    out = model(**x)
    answers = int((x["labels"] != -100).sum())
    assert seen == [(answers, model.config.text_config.vocab_size)]
    assert out.answer_labels_N.equal(x["labels"][x["labels"] != -100])


def test_a_row_without_answers_trains_to_a_loss_of_zero(golden: Golden) -> None:
    model, x = golden.model("s2").train(), golden.batch("b1")
    out = model(**x | {"labels": torch.full_like(x["labels"], -100)})
    out.loss.backward()
    assert out.loss == 0


def test_autocast_runs_and_keeps_the_threshold_in_float32(golden: Golden) -> None:
    model, x = golden.model("s2").train(), golden.batch("b1")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(**x)
    out.loss.backward()
    assert out.scheduled.selection.threshold_B.dtype == out.scheduled.selection.probability_BL.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_beams_answer_as_greedy_when_there_is_one_and_run_when_there_are_more(golden: Golden) -> None:
    model, x = golden.model("s2"), golden.batch("b1_prompt", "labels")
    model.config.eos_token_id = golden.tokens["im_end"]
    how = {"max_new_tokens": 4, "eos_token_id": golden.tokens["im_end"]}
    sampled = model.generate(**x, num_return_sequences=2, do_sample=True, top_k=1, **how)
    greedy = model.generate(**x, do_sample=False, **how)
    assert sampled[0].tolist() == sampled[1].tolist() == greedy[0].tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values": torch.zeros(4, 2744)}, "expected a CT volume .*, found an image"),
        ({"input_ids": None}, "expected input_ids, found None"),
    ],
)
def test_images_and_missing_ids_are_refused(golden: Golden, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        golden.model("s2")(**golden.batch("b1") | change)


def test_a_prompt_cut_off_inside_the_volume_is_refused(golden: Golden) -> None:
    x = golden.batch("b1", "labels")
    cut = int((x["input_ids"][0] == golden.tokens["video"]).nonzero()[10])
    cut_off = x | {"input_ids": x["input_ids"][:, :cut], "attention_mask": x["attention_mask"][:, :cut]}
    with pytest.raises(ValueError, match=r"expected \d+ visual tokens for a volume, found 10: was the prompt cut off"):
        golden.model("s2")(**cut_off)


def test_more_volumes_than_the_text_names_are_refused(golden: Golden) -> None:
    x, other = golden.batch("b1", "labels"), golden.batch("text_first", "labels")
    both = {
        name: torch.cat([x[name], other[name]])
        for name in ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
    }
    with pytest.raises(
        ValueError, match=r"expected \d+ visual tokens in the text, as many as the volumes give, found \d+"
    ):
        golden.model("s2")(**x | both)


def test_a_cache_of_fixed_length_is_refused(golden: Golden) -> None:
    with pytest.raises(ValueError, match="DynamicCache"):
        golden.model("s2").generate(
            **golden.batch("b1_prompt", "labels"), max_new_tokens=2, cache_implementation="static"
        )


def test_a_tiny_model_made_by_the_command_answers_on_a_published_grid(tmp_path: Path) -> None:
    made = CliRunner().invoke(app, ["init", "--tiny", str(tmp_path / "tiny"), "--stage", "2"])
    assert made.exit_code == 0, made.output
    processor = PhotonProcessor.from_pretrained(tmp_path / "tiny")
    model = PhotonForConditionalGeneration.from_pretrained(tmp_path / "tiny").eval()
    hu = np.random.default_rng(0).integers(-1000, 1000, (140, 280, 280), dtype=np.int16)
    x = processor(hu, "Is there a nodule?")
    assert (x["mm_token_type_ids"] == 2).sum() == 1000
    out = model.generate(**x, max_new_tokens=3, do_sample=False)
    prefix = model.encode_prefix(x)
    shared = model.answer(prefix, processor.questions(["Is there a nodule?", "Where?"]), max_new_tokens=3)
    assert shared.shape == (2, 3)
    assert shared[0].tolist() == out[0, -3:].tolist()
    assert len(processor.decode(shared)) == 2


def test_the_same_seed_makes_the_same_tiny_model(tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert CliRunner().invoke(app, ["init", "--tiny", str(tmp_path / name), "--seed", "7"]).exit_code == 0
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert a == b


def test_init_from_a_stock_checkpoint_writes_a_stage_1_start(tmp_path: Path) -> None:
    from photon_train.tiny import tiny

    tiny(tmp_path / "source")
    made = CliRunner().invoke(app, ["init", "--from", str(tmp_path / "source"), "--output", str(tmp_path / "start")])
    assert made.exit_code == 0, made.output
    assert "stage 1" in made.output
    assert PhotonProcessor.from_pretrained(tmp_path / "start").visual_tokens() == 1000


@pytest.mark.parametrize(
    "arguments", [["init"], ["init", "--from", "x"], ["train", "s3"], ["eval"], ["predict", "--model", "m", "a.zarr"]]
)
def test_commands_that_cannot_be_followed_exit_with_2_and_say_why(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert any(word in result.output for word in ("expected", "Missing argument"))


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, photon_cli.photon; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    start = time.perf_counter()
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert time.perf_counter() - start < 3  # 0.1 s on an idle machine


def test_inputs_that_do_not_belong_together_say_what_is_expected(golden: Golden) -> None:
    model, x = golden.model("s2"), golden.batch("b1_prompt", "labels")
    with pytest.raises(ValueError, match="expected a volume for every run of visual tokens, found 0"):
        model(input_ids=x["input_ids"])
    width = x["pixel_values_videos"].shape[1]
    with pytest.raises(
        ValueError, match=f"expected patches of shape .*, {width}. for the grids .* found .*, {width - 1}."
    ):
        model(**{**x, "pixel_values_videos": x["pixel_values_videos"][:, 1:]})
    with pytest.raises(ValueError, match="patches of shape"):
        model(**{**x, "pixel_values_videos": x["pixel_values_videos"][1:]})
    with pytest.raises(ValueError, match="expected use_cache=True"):
        model.generate(**x, use_cache=False)


def test_a_stage_2_model_is_no_stage_1_start(tmp_path: Path) -> None:
    CliRunner().invoke(app, ["init", "--tiny", str(tmp_path / "two"), "--stage", "2"])
    done = CliRunner().invoke(app, ["init", "--from", str(tmp_path / "two"), "--output", str(tmp_path / "start")])
    assert done.exit_code == 2
    assert "stage-1 checkpoint" in " ".join(done.output.split())
    assert not (tmp_path / "start").exists()
