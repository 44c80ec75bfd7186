"""The cache of fixed length: the same answers as transformers' own, in arrays that stay where they are."""

import pytest
import torch
from askable import QUESTIONS, blocks, predictor, row
from transformers import DynamicCache

from photon_train.answering.generation import FixedCache
from photon_train.answering.request import group_rows


@pytest.mark.parametrize("scheduler", ["its", "none"])
@pytest.mark.parametrize("questions", [1, 4])
def test_answers_are_those_of_a_growing_cache(model_dir, scheduler, questions):
    model = predictor(model_dir, scheduler=scheduler)
    volume = blocks(1)
    (group,), _ = group_rows([row(f"{i}", QUESTIONS[i], volume) for i in range(questions)], model.processor)
    prefix, suffixes = model.encode(group).prefix, [request.suffix_L for request in group.requests]
    config = model.model.config.text_config
    found = {}
    for cache in (DynamicCache(config=config), FixedCache(config, 12)):
        options = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 12, "min_new_tokens": 12}
        out = model.model.answer(prefix, suffixes, past_key_values=cache, **options)
        found[type(cache)] = (out.sequences, torch.stack(out.logits))
    (ids, logits), (fixed_ids, fixed_logits) = found.values()
    assert fixed_ids.equal(ids)
    torch.testing.assert_close(fixed_logits, logits, atol=2e-4, rtol=1e-4)


def test_from_the_first_step_on_nothing_grows_and_nothing_moves(model):
    (group,), _ = group_rows([row("a", QUESTIONS[0], blocks(1))], model.processor)
    cache, places = FixedCache(model.model.config.text_config, 9), []
    model.model.register_forward_hook(
        lambda *_: places.append([(layer.keys.data_ptr(), tuple(layer.keys.shape)) for layer in cache.layers])
    )
    prefix, suffixes = model.encode(group).prefix, [group.requests[0].suffix_L]
    model.model.answer(prefix, suffixes, past_key_values=cache, max_new_tokens=9, min_new_tokens=9)
    pruned, *steps = places
    assert len(steps) == 8 and all(step == steps[0] for step in steps)
    kept = pruned[0][1][2]
    assert [shape[2] for _, shape in steps[0]] == [kept + 9] * len(cache.layers)
    assert kept < prefix.length + len(suffixes[0])
    assert cache.get_seq_length() == kept + 8
