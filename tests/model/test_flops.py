"""The cost model of photon_train/costs.py and benchmarks/model_flops.py against torch's own counter."""

import pytest
import torch
from golden import Golden
from torch.utils.flop_counter import FlopCounterMode

from photon_train import costs
from photon_train.pruners import SCHEDULERS
from photon_train.scheduling import question_mask
from photon_train.tiny import byte_tokenizer, tiny_config


def counted(call) -> tuple[int, object]:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out = call()
    return counter.get_total_flops(), out


def prompt_of(model, x):
    ids = x["input_ids"][0]
    start, end = (
        (ids == t).nonzero()[0].item() for t in (model.config.vision_start_token_id, model.config.vision_end_token_id)
    )
    asked = int(question_mask(x["input_ids"], model.config).sum())
    return costs.PromptSize(before=start + 1, visual=end - start - 1, after=len(ids) - end, question=asked)


@pytest.mark.parametrize("name", ["b1", "text_first"])
def test_flops_are_those_that_torch_counts(golden: Golden, name: str) -> None:
    x = golden.batch(name, "labels")
    grid = tuple(x["video_grid_thw"][0].tolist())
    for scheduler in ("none", "its"):
        model = golden.model("s2", scheduler=scheduler, attn_implementation="eager")
        prompt = prompt_of(model, x)
        flops, out = counted(lambda model=model: model(**x, logits_to_keep=1))
        if scheduler == "none":
            expected = costs.without_scheduling(model.config, prompt, grid)
        else:
            kept = out.scheduled.kept.mask_BM.shape[1] - (prompt.length - prompt.visual)
            expected = costs.with_its(model.config, prompt, grid, kept)
        assert expected.total() == pytest.approx(flops, rel=1e-3)


def test_flops_of_a_window_at_the_edge_count(golden: Golden) -> None:
    model, x = golden.model("s1", attn_implementation="eager"), golden.inputs("vision_windows")
    flops, _ = counted(lambda: model.model.visual(x["pixel_values_videos"], grid_thw=x["video_grid_thw"]))
    expected = sum(costs.vision(model.config, tuple(grid)) for grid in x["video_grid_thw"].tolist())
    assert expected == pytest.approx(flops, rel=1e-3)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_flops_on_a_prefix_are_those_that_torch_counts(golden: Golden, scheduler: str) -> None:
    settings = {"scheduler": scheduler, "attn_implementation": "eager", "keep_ratio": 0.4, "nucleus_mass": 0.5}
    model, x = golden.model("s2", **settings), golden.batch("b1_prompt", "labels")
    prompt, grid = prompt_of(model, x), tuple(x["video_grid_thw"][0].tolist())
    question = x["input_ids"][0, prompt.before + prompt.visual + 1 :]

    def ask():
        prefix = model.encode_prefix(x)
        return model(**prefix.followed_by([question] * 3), logits_to_keep=1)

    flops, out = counted(ask)
    kept = out.scheduled.kept.mask_BM.shape[1] - (prompt.length - prompt.visual)
    expected = costs.on_a_prefix(model.config, scheduler, prompt, grid, kept, questions=3)
    assert expected.total() == pytest.approx(flops, rel=1e-3)
    flops, _ = counted(lambda: model(**x, logits_to_keep=1))
    assert costs.prefill(model.config, scheduler, prompt, grid, kept).total() == pytest.approx(flops, rel=1e-3)


def test_flops_of_choosing_are_those_of_hand_arithmetic() -> None:
    """The tiny model, 5 x 10 x 10 patches: 500 of 32 features, 125 tokens of 64 features, 16 to a head."""
    config = tiny_config(byte_tokenizer(), stage=2, model_shape_zyx=(70, 140, 140))
    received = 2 * 500 * 3 * 32 * 32 + 2 * 5 * 100 * 100 * 32  # q, k, v again; 5 slabs of 100 x 100 pairs
    expected = {
        "none": 0,
        "divprune": 2 * 125 * 125 * 64,
        "nucleus": received,
        "visionzip": received + 2 * 8 * (125 - 49) * 16,  # of 49 kept 8 are targets, and 76 are added to them
    }
    assert {name: costs.choosing(config, name, (5, 10, 10), 49) for name in expected} == expected
    size = costs.prompt_size(text=40, visual=125)
    saved = costs.prefill(config, "random", size, (5, 10, 10), 49).below
    layer = 64 * (2 * 64 + 2 * 64 + 3 * 128)  # matrix weights of a decoder layer
    assert saved == 2 * (2 * 165 * layer + 4 * 165 * 165 * 64)
    assert costs.prefill(config, "nucleus", size, (5, 10, 10), 49).below == 2 * (2 * 89 * layer + 4 * 89 * 89 * 64)
