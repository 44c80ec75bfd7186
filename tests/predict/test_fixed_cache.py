"""The cache of fixed length: the same answers as transformers' own, in arrays that stay where they are."""

import pytest
import torch
from askable import QUESTIONS, blocks, lively_model, predictor, row
from torch._dynamo.utils import counters
from transformers import DynamicCache

from photon_data.errors import UsageError
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


@pytest.mark.slow
def test_compiled_decoding_gives_the_same_answers_in_as_many_graphs_for_any_layers_rows_and_lengths(tmp_path):
    graphs = []
    for layers in (4, 7):
        place = lively_model(tmp_path / f"{layers}", num_hidden_layers=layers)
        torch._dynamo.reset()
        counters.clear()
        plain, compiled = predictor(place), predictor(place, compile=True)
        for count in (1, 2, 5, 1, 3):
            volume = blocks(count)
            rows = [row(f"{i}", f"{QUESTIONS[i % 4]} {i}", volume) for i in range(count)]
            (group,), _ = group_rows(rows, plain.processor)
            expected, found = (model.answer(model.encode(group), group.requests) for model in (plain, compiled))
            for one, other in zip([r.prediction for r in found], [r.prediction for r in expected], strict=True):
                assert (one.response, one.kept) == (other.response, other.kept)
                assert one.token_logprobs == pytest.approx(other.token_logprobs, abs=1e-4)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [5, 5]  # the trial; two kinds of layers, each for one row and for several


def test_where_torch_cannot_compile_a_model_is_refused(model_dir, without_compiler):
    with pytest.raises(
        UsageError, match=r"expected a compiler that torch can use, found \w+: \w.*; leave compile out$"
    ):
        predictor(model_dir, compile=True)
