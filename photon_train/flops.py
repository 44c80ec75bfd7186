"""What an answer costs: FLOPs and bytes of one volume from the configuration alone, and the memory a process used.

A multiply-add is two FLOPs. Attention is counted over all pairs, as torch's counter does (a causal kernel does about
half). Norms, activations and softmax are left out. Bytes: weights read by a prefill, and the KV cache that it leaves.
tests/model/test_flops.py compares the counts with torch's counter on a small model.
"""

from __future__ import annotations

import resource
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

    from photon_train.configuration_photon import PhotonConfig

BF16 = 2
# Tokens around volume and question: system turn and start of the volume; its end and the assistant's header.
BEFORE, FRAME_AFTER = 15, 6


@dataclass(frozen=True)
class PromptSize:
    """Token counts of one prompt: text, volume, question with the assistant's header."""

    before: int  # up to <|vision_start|>, included
    visual: int
    after: int  # from <|vision_end|> on
    question: int  # those after, that the scheduler scores by

    @property
    def length(self) -> int:
        """All tokens."""
        return self.before + self.visual + self.after

    @property
    def prefix(self) -> int:
        """Tokens up to <|vision_end|>, included."""
        return self.before + self.visual + 1


def prompt_size(text: int, visual: int) -> PromptSize:
    """Return the size of a prompt about one volume, with so many tokens of text in all."""
    after = max(text - BEFORE, 0)
    return PromptSize(before=text - after, visual=visual, after=after, question=max(after - FRAME_AFTER, 0))


class Flops(NamedTuple):
    """Of one prefill, by part."""

    vision: int = 0
    below: int = 0  # layers 0..its
    scoring: int = 0
    above: int = 0
    head: int = 0

    def total(self) -> int:
        """Sum of the parts."""
        return sum(self)

    def times(self, n: int) -> Flops:
        """The same done n times."""
        return Flops(*(n * part for part in self))


def vision(config: PhotonConfig, grid_thw: tuple[int, int, int]) -> int:
    """FLOPs of the vision tower on one volume: patches, blocks with windowed or slab attention, merger."""
    v = config.vision_config
    t, h, w = grid_thw
    patches, weights = t * h * w, tower_weights(config)
    slab = t * attention(h * w, h * w, v.hidden_size)
    windows = t * sum(attention(n, n, v.hidden_size) for n in window_sizes(config, h, w))
    full = len([i for i in v.fullatt_block_indexes if i < v.depth])
    linear = patches * (weights.embed + v.depth * weights.block) + patches // v.spatial_merge_size**2 * weights.merger
    return 2 * linear + full * slab + (v.depth - full) * windows


class TowerWeights(NamedTuple):
    """Matrix weights of the vision tower: patch embedding, one block, merger."""

    embed: int
    block: int
    merger: int


def tower_weights(config: PhotonConfig) -> TowerWeights:
    """Return the numbers of weights, from the configuration."""
    v = config.vision_config
    wide = v.hidden_size * v.spatial_merge_size**2
    return TowerWeights(
        embed=v.in_channels * v.temporal_patch_size * v.patch_size**2 * v.hidden_size,
        block=v.hidden_size * (4 * v.hidden_size + 3 * v.intermediate_size),
        merger=wide * (wide + v.out_hidden_size),
    )


def window_sizes(config: PhotonConfig, h: int, w: int) -> list[int]:
    """Patches of each attention window of a slab of h x w patches; those at the edges are smaller."""
    v = config.vision_config
    side = v.window_size // v.patch_size

    def pieces(n: int) -> list[int]:
        return [min(side, n - start) for start in range(0, n, side)]

    return [a * b for a in pieces(h) for b in pieces(w)]


def attention(queries: int, keys: int, width: int) -> int:
    """FLOPs of q k^T and of the weighted sum of values."""
    return 4 * queries * keys * width


def layers(config: PhotonConfig, count: int, queries: int, keys: int) -> int:
    """FLOPs of `count` decoder layers for `queries` tokens that attend to `keys`."""
    return count * (2 * queries * layer_weights(config) + attention(queries, keys, config.text_config.hidden_size))


def layer_weights(config: PhotonConfig) -> int:
    """Matrix weights of a decoder layer."""
    c = config.text_config
    return c.hidden_size * (2 * c.hidden_size + 2 * _kv_width(config) + 3 * c.intermediate_size)


def scoring(config: PhotonConfig, tokens: int, length: int, question: int) -> int:
    """FLOPs of ITS: q and k again of `tokens` tokens, centrality, alignment with a row of `length`, the threshold."""
    d = config.text_config.hidden_size
    qk, predictor = 2 * tokens * d * (d + _kv_width(config)), 2 * 13 * (d // 8)
    return qk + 2 * question * question * d + 2 * question * d + 2 * length * d + predictor


def head(config: PhotonConfig) -> int:
    """FLOPs of the logits at one position."""
    return 2 * config.text_config.hidden_size * config.text_config.vocab_size


def without_scheduling(config: PhotonConfig, prompt: PromptSize, grid_thw: tuple[int, int, int]) -> Flops:
    """FLOPs of a prefill that keeps everything."""
    return with_its(config, prompt, grid_thw, kept=prompt.visual)._replace(scoring=0)


def with_its(config: PhotonConfig, prompt: PromptSize, grid_thw: tuple[int, int, int], kept: int) -> Flops:
    """FLOPs of a prefill that keeps `kept` visual tokens above layer its."""
    below, n = config.its_layer + 1, prompt.length
    above, m = config.text_config.num_hidden_layers - below, prompt.length - prompt.visual + kept
    return Flops(
        vision(config, grid_thw),
        layers(config, below, n, n),
        scoring(config, n, n, prompt.question),
        layers(config, above, m, m),
        head(config),
    )


def on_a_prefix(
    config: PhotonConfig, prompt: PromptSize, grid_thw: tuple[int, int, int], kept: int, questions: int
) -> Flops:
    """FLOPs of K prefills that share the prefix: it once, then each question's suffix below and its kept row above."""
    below, p, q = config.its_layer + 1, prompt.prefix, prompt.length - prompt.prefix
    c = config.text_config
    shared = Flops(
        vision=vision(config, grid_thw),
        below=layers(config, below, p, p),
        scoring=2 * p * c.hidden_size * (c.hidden_size + _kv_width(config)),
    )
    m = prompt.length - prompt.visual + kept
    each = Flops(
        below=layers(config, below, q, p + q),
        scoring=scoring(config, q, p + q, prompt.question),
        above=layers(config, c.num_hidden_layers - below, m, m),
        head=head(config),
    )
    return Flops(*map(sum, zip(shared, each.times(questions), strict=True)))


def weight_bytes(config: PhotonConfig) -> int:
    """Bytes of the bf16 matrices that a prefill reads, embeddings counted once."""
    c, weights = config.text_config, tower_weights(config)
    tower = weights.embed + config.vision_config.depth * weights.block + weights.merger
    tables = c.vocab_size * c.hidden_size * (1 if config.tie_word_embeddings else 2)
    return BF16 * (tower + c.num_hidden_layers * layer_weights(config) + tables)


def cache_bytes(config: PhotonConfig, length: int) -> int:
    """Bytes of the bf16 keys and values of `length` tokens in all layers."""
    return BF16 * 2 * config.text_config.num_hidden_layers * _kv_width(config) * length


def peak_memory_mib(device: torch.device) -> float:
    """Return the most memory this process has used so far, in MiB: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        import torch  # late: counting FLOPs does not wait for it

        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _kv_width(config: PhotonConfig) -> int:
    """Width of a token's keys, and of its values."""
    c = config.text_config
    width: int = c.hidden_size // c.num_attention_heads * c.num_key_value_heads
    return width
