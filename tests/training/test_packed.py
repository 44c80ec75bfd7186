"""Rows that keep other numbers of tokens go on one behind the other, by torch's kernel for such rows or padded for it.

The CPU has no such kernel. One that follows torch's documentation, in float64, is given to it here.
"""

import logging

import pytest
import torch
from test_forwards import CURRICULUM, SHARED, assert_same, read, trained_on
from torch.nn.attention import varlen
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig

from photon_train import PhotonForConditionalGeneration, attention
from photon_train.rows import read_train_rows
from photon_train.training.batches import together
from photon_train.training.compiling import compile_layers

DROPS, FLIPS = 25, 35  # steps of CURRICULUM
calls = []


def rows_of(q, k, v, begins_q, begins_k, scale):
    """Yield float64 q, k, v [H, n, d] and softmax(scale q k') of each row; the last query sees all of its keys."""
    for row in range(len(begins_q) - 1):
        own = ((x, begins[row : row + 2]) for x, begins in ((q, begins_q), (k, begins_k), (v, begins_k)))
        one = [x[begin:end].double().transpose(0, 1) for x, (begin, end) in own]
        one[1:] = (x.repeat_interleave(len(one[0]) // len(x), 0) for x in one[1:])
        score = scale * one[0] @ one[1].mT
        hidden = torch.ones_like(score[0]).triu(score.shape[2] - score.shape[1] + 1).bool()
        yield *one, score.masked_fill(hidden, -torch.inf).softmax(-1)


def forward(q, k, v, begins_q, begins_k, max_q, max_k, is_causal=False, scale=None, window_size=None, *_):
    assert is_causal and tuple(window_size) == (-1, 0)
    assert begins_q.dtype == begins_k.dtype == torch.int32
    assert (max_q, max_k) == tuple(int(begins.diff().max()) for begins in (begins_q, begins_k))
    calls.append(len(q))
    out = [(p @ value).transpose(0, 1) for _, _, value, p in rows_of(q, k, v, begins_q, begins_k, scale)]
    return torch.cat(out).to(q.dtype), torch.zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)


def backward(g, q, k, v, out, lse, begins_q, begins_k, max_q, max_k, is_causal, rng, scale=None, window_size=None):
    found = []
    for row, (query, key, value, p) in enumerate(rows_of(q, k, v, begins_q, begins_k, scale)):
        g_row = g[begins_q[row] : begins_q[row + 1]].double().transpose(0, 1)
        g_p = g_row @ value.mT
        g_score = scale * p * (g_p - (g_p * p).sum(-1, keepdim=True))
        of_keys = [x.unflatten(0, (k.shape[1], -1)).sum(1) for x in (g_score.mT @ query, p.mT @ g_row)]
        found.append([x.transpose(0, 1) for x in (g_score @ key, *of_keys)])
    return tuple(torch.cat(parts).to(q.dtype) for parts in zip(*found, strict=True))


def blind(q, k, v, *_, **__):
    """A kernel that does not see where rows end."""
    ends = torch.tensor([0, len(q)], dtype=torch.int32)
    return forward(q, k, v, ends, ends, len(q), len(q), True, 0.25, (-1, 0))


def half_of_backward(*arguments):
    """A kernel that has no gradient of the keys."""
    g_query, g_key, g_value = backward(*arguments)
    return g_query, torch.zeros_like(g_key), g_value


@pytest.fixture
def on_cpu():
    """Give the CPU a kernel, for one test."""
    ops = {varlen._varlen_attn: varlen._varlen_attn._init_fn}
    ops[varlen._varlen_attn_backward] = varlen._varlen_attn_backward._init_fn

    def give(*kernels):
        for op, kernel in zip(ops, kernels, strict=True):
            op.register_kernel("cpu", kernel)
        attention.attends_to_packed.cache_clear()
        calls.clear()

    yield give
    give(*ops.values())


@pytest.fixture
def group(models, manifest):
    """Rows on three volumes in one forward, a model for them, and what goes through its last layer and stays."""
    alone, processor = read(models, read_train_rows([manifest]), SHARED, flip_probability=0.4)
    (batch,) = together(alone, processor)
    shapes, masks = [], []

    def model(**settings):
        found = PhotonForConditionalGeneration.from_pretrained(models / "s2", **CURRICULUM, **settings).train()
        last = found.model.language_model.layers[-1]
        last.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape[:2]))
        found.register_forward_hook(lambda *outputs: masks.append(outputs[-1].scheduled.kept.mask_BM))
        return found

    return alone, batch, processor, model, shapes, masks


@pytest.mark.parametrize("step", [DROPS, FLIPS])
@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "padded"])
def test_packed_rows_have_the_losses_and_gradients_of_padded_ones_and_of_each_group_alone(group, on_cpu, step, kernel):
    alone, batch, processor, model, shapes, masks = group
    if kernel:
        on_cpu(forward, backward)
    found = trained_on(model(), [batch], batch.groups, step, processor)
    assert len(calls) == (1 + 2 if kernel else 0)  # the trial; two layers behind the one that drops
    padded = model(attn_implementation="eager")
    assert_same(found, trained_on(padded, [batch], batch.groups, step, processor))
    assert_same(found, trained_on(padded, alone, batch.groups, step, processor))
    assert shapes[0] == (1, masks[0].sum()), "each token that stays, once"
    assert shapes[1] == masks[1].shape == masks[0].shape and not masks[0].all(), "and padding"


def test_rows_are_packed_one_behind_the_other_and_parted_again():
    rows = attention.packed(torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]]).bool(), 5)
    assert rows.bounds.tolist() == [0, 2, 2, 5]
    padded = torch.tensor([[1.0, 2, -1, -1], [-1, -1, -1, -1], [3, 4, 5, -1]])[..., None]
    joined = rows.join(padded)
    assert joined[..., 0].tolist() == [[1, 2, 3, 4, 5]]
    assert rows.part(joined)[[0, 0, 2, 2, 2], [0, 1, 0, 1, 2], 0].tolist() == [1, 2, 3, 4, 5]
    assert rows.join(padded.permute(2, 0, 1), 1).tolist() == [[[1, 2, 3, 4, 5]]]


@pytest.mark.parametrize(("tokens", "settings"), [(122, {}), (100, {"attention_dropout": 0.1})])
def test_rows_with_little_padding_or_with_dropout_stay_padded(tokens, settings):
    config = Qwen2_5_VLTextConfig(hidden_size=8, num_attention_heads=2, num_key_value_heads=1, **settings)
    config._attn_implementation = "sdpa"
    mask = torch.ones(2, 64).bool()
    mask[1, tokens - 64 :] = False
    assert attention.pack(torch.zeros(2, 64, 8), mask, tokens, config) is None
    mask[1, 56:] = False  # 8 of 128 is a sixteenth
    assert settings or attention.pack(torch.zeros(2, 64, 8), mask, 120, config) is not None


@pytest.mark.parametrize("kernels", [(blind, backward), (forward, half_of_backward)])
def test_a_kernel_that_is_wrong_is_not_used_and_told(group, on_cpu, caplog, kernels):
    _, batch, processor, model, *_ = group
    expected = trained_on(model(), [batch], batch.groups, DROPS, processor)
    on_cpu(*kernels)
    with caplog.at_level(logging.WARNING):
        assert_same(trained_on(model(), [batch], batch.groups, DROPS, processor), expected)
    assert "attention pads rows: expected torch's kernel to be off by less than 0.02, found" in caplog.text


@pytest.mark.slow
def test_compiled_layers_call_the_kernel_too(group, on_cpu):
    _, batch, processor, model, *_ = group
    expected = trained_on(model(), [batch], batch.groups, DROPS, processor)
    on_cpu(forward, backward)
    compiled = model()
    compile_layers(compiled, torch.device("cpu"))
    assert_same(trained_on(compiled, [batch], batch.groups, DROPS, processor), expected)
    assert len(calls) == 3
