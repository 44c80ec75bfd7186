"""Whole layers of a training step as compiled graphs: one for all layers of a kind, for any number of tokens.

What is compiled is a function of tensors and of a module whose number it does not look at: the keys of a prefix go in,
and a layer's own come out where they will be shared. The checkpoint of activations is compiled with it, so that
forward is one call, and computing again and backward are one more.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer, Qwen2_5_VLVisionBlock

from photon_train.attention import LayerKeys, Pair, SharedKeys, check_compiler

# More graphs than batches need: one row or several, a prefix for all or for each, with a mask, padded, packed or none.
MOST_GRAPHS = 32


def compile_layers(model: nn.Module, device: torch.device) -> None:
    """Have torch compile vision blocks and decoder layers for training; UsageError where it cannot compile.

    They are compiled at their first use. The layer that drops tokens is not: it waits for the device, and is one of
    many. Evaluation and answering are not either.
    """
    check_compiler(device)
    torch._dynamo.config.optimize_ddp = False  # it would cut graphs up, and cannot cut checkpoints
    torch._dynamo.config.recompile_limit = MOST_GRAPHS
    runs: dict[type, Any] = {
        Qwen2_5_VLVisionBlock: partial(_run_block, torch.compile(_block, dynamic=True)),
        Qwen2_5_VLDecoderLayer: partial(_run_layer, torch.compile(_layer, dynamic=True)),
    }
    module: Any
    for module in model.modules():
        if type(module) in runs:
            module.forward = partial(runs[type(module)], module, module.forward)


def _run_block(compiled: Any, block: Any, plain: Any, *args: Any, **kwargs: Any) -> Any:
    is_heard = block.attn._forward_pre_hooks  # by `attention_received`: compiled code would not call the hook
    return compiled(block, *args, **kwargs) if block.training and not is_heard else plain(*args, **kwargs)


def _run_layer(
    compiled: Any,
    layer: Any,
    plain: Any,
    h_BLD: Tensor,
    shared: SharedKeys | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> Any:
    if not layer.training or past_key_values is not None:
        return plain(h_BLD, shared=shared, past_key_values=past_key_values, **kwargs)
    own = LayerKeys() if shared is None else shared.of(layer.self_attn.layer_idx)
    is_prefix = shared is not None and shared.is_prefix
    h_BLD, own.own = compiled(layer, h_BLD, own.before, is_prefix, **kwargs)
    return h_BLD


def _block(block: Any, *args: Any, **kwargs: Any) -> Any:
    return _checkpointed(block, type(block).forward.__wrapped__, *args, **kwargs)


def _layer(layer: Any, h_BLD: Tensor, before: Pair | None, is_prefix: bool, **kwargs: Any) -> Any:
    return _checkpointed(layer, _forward, h_BLD, before, is_prefix, **kwargs)


def _forward(
    layer: Any, h_BLD: Tensor, before: Pair | None, is_prefix: bool, **kwargs: Any
) -> tuple[Tensor, Pair | None]:
    own = LayerKeys(before)
    h_BLD = type(layer).forward.__wrapped__(layer, h_BLD, shared=own, **kwargs)
    return h_BLD, own.own if is_prefix else None


def _checkpointed(module: Any, forward: Any, *args: Any, **kwargs: Any) -> Any:
    """Return what `forward` does, stock transformers' without its own checkpoint, which knows of no keys."""
    if not module.gradient_checkpointing:
        return forward(module, *args, **kwargs)
    return checkpoint(forward, module, *args, use_reentrant=False, **kwargs)
