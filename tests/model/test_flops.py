"""The cost model of photon_train/flops.py and photon_train/measuring.py against torch's own counter."""

import pytest
import torch
from golden import Golden
from torch.utils.flop_counter import FlopCounterMode

from photon_train import flops as costs
from photon_train.measuring import on_a_prefix
from photon_train.scheduling import question_mask


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


@pytest.mark.parametrize("scheduler", ["its", "none"])
def test_flops_on_a_prefix_are_those_that_torch_counts(golden: Golden, scheduler: str) -> None:
    model = golden.model("s2", scheduler=scheduler, attn_implementation="eager")
    x = golden.batch("b1_prompt", "labels")
    prompt = prompt_of(model, x)
    question = x["input_ids"][0, prompt.before + prompt.visual + 1 :]

    def ask():
        prefix = model.encode_prefix(x)
        return model(**prefix.followed_by([question] * 3), logits_to_keep=1)

    flops, out = counted(ask)
    kept = out.scheduled.kept.mask_BM.shape[1] - (prompt.length - prompt.visual)
    grid = tuple(x["video_grid_thw"][0].tolist())
    expected = on_a_prefix(model.config, prompt, grid, kept, questions=3, drops=scheduler == "its")
    c, p = model.config.text_config, prompt.before + prompt.visual + 1
    # A prefix has q and k of layer its again, which only ITS needs.
    needless = 0 if scheduler == "its" else 2 * p * c.hidden_size * (c.hidden_size + costs.key_width(model.config))
    assert expected.total() == pytest.approx(flops - needless, rel=1e-3)
