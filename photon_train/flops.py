"""FLOPs and bytes of one answered volume, from the configuration alone: no weights, no GPU.

A multiply-add is two FLOPs; attention is counted over all pairs, as torch's counter does (a causal kernel does about half).
Norms, activations and softmax are left out. Bytes: weights read by a prefill, and the KV cache that it leaves behind.
tests/model/test_flops.py holds the counts against torch's counter on a small model.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from photon_train.configuration_photon import PhotonConfig

BF16 = 2


@dataclass(frozen=True)
class Prompt:
    """Token counts of one prompt: text, volume, question with the assistant's header."""

    before: int  # up to and with <|vision_start|>
    visual: int
    after: int  # from <|vision_end|> on
    question: int  # of which the scheduler looks at

    @property
    def length(self) -> int:
        """All tokens."""
        return self.before + self.visual + self.after

    @property
    def prefix(self) -> int:
        """Tokens up to and with <|vision_end|>."""
        return self.before + self.visual + 1


@dataclass(frozen=True)
class Flops:
    """Of one prefill, by part."""

    vision: int = 0
    below: int = 0  # layers 0..its
    scoring: int = 0
    above: int = 0
    head: int = 0

    def total(self) -> int:
        """Sum of the parts."""
        return sum(getattr(self, field.name) for field in fields(self))

    def __add__(self, other: Flops) -> Flops:
        return Flops(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def times(self, n: int) -> Flops:
        """The same done n times."""
        return Flops(*(n * getattr(self, f.name) for f in fields(self)))


def vision(config: PhotonConfig, grid_thw: tuple[int, int, int]) -> int:
    """FLOPs of the vision tower on one volume: patches, blocks with windowed or slab attention, merger."""
    v = config.vision_config
    t, h, w = grid_thw
    patches, wide = t * h * w, v.hidden_size * v.spatial_merge_size**2
    embed = 2 * patches * v.in_channels * v.temporal_patch_size * v.patch_size**2 * v.hidden_size
    linear = 2 * patches * v.hidden_size * (4 * v.hidden_size + 3 * v.intermediate_size)
    slab = t * attention(h * w, h * w, v.hidden_size)
    windows = t * sum(attention(n, n, v.hidden_size) for n in window_sizes(config, h, w))
    full = len([i for i in v.fullatt_block_indexes if i < v.depth])
    merger = 2 * (patches // v.spatial_merge_size**2) * wide * (wide + v.out_hidden_size)
    return embed + v.depth * linear + full * slab + (v.depth - full) * windows + merger


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
    kv = c.hidden_size // c.num_attention_heads * c.num_key_value_heads
    return c.hidden_size * (2 * c.hidden_size + 2 * kv + 3 * c.intermediate_size)


def scoring(config: PhotonConfig, own: int, length: int, question: int) -> int:
    """FLOPs of ITS: q and k once more for `own` tokens, centrality, alignment with a row of `length`, the threshold."""
    c = config.text_config
    d, kv = c.hidden_size, c.hidden_size // c.num_attention_heads * c.num_key_value_heads
    predictor = 2 * 13 * (d // 8)
    return 2 * own * d * (d + kv) + 2 * question * question * d + 2 * question * d + 2 * length * d + predictor


def head(config: PhotonConfig) -> int:
    """FLOPs of the logits at one position."""
    return 2 * config.text_config.hidden_size * config.text_config.vocab_size


def without_scheduling(config: PhotonConfig, prompt: Prompt, grid_thw: tuple[int, int, int]) -> Flops:
    """FLOPs of a prefill that keeps everything."""
    below, n = config.its + 1, prompt.length
    above = config.text_config.num_hidden_layers - below
    return Flops(vision(config, grid_thw), layers(config, below, n, n), 0, layers(config, above, n, n), head(config))


def with_its(config: PhotonConfig, prompt: Prompt, grid_thw: tuple[int, int, int], kept: int) -> Flops:
    """FLOPs of a prefill that keeps `kept` visual tokens above layer its."""
    below, n = config.its + 1, prompt.length
    above, m = config.text_config.num_hidden_layers - below, prompt.length - prompt.visual + kept
    return Flops(
        vision(config, grid_thw),
        layers(config, below, n, n),
        scoring(config, n, n, prompt.question),
        layers(config, above, m, m),
        head(config),
    )


def on_a_prefix(config: PhotonConfig, prompt: Prompt, grid_thw: tuple[int, int, int], kept: int, questions: int) -> Flops:
    """FLOPs of K prefills that share the prefix: it once, then each question's own tokens below and its kept row above."""
    below, p, q = config.its + 1, prompt.prefix, prompt.length - prompt.prefix
    c = config.text_config
    kv = c.hidden_size // c.num_attention_heads * c.num_key_value_heads
    shared = Flops(
        vision=vision(config, grid_thw),
        below=layers(config, below, p, p),
        scoring=2 * p * c.hidden_size * (c.hidden_size + kv),
    )
    m = prompt.length - prompt.visual + kept
    each = Flops(
        below=layers(config, below, q, p + q),
        scoring=scoring(config, q, p + q, prompt.question),
        above=layers(config, c.num_hidden_layers - below, m, m),
        head=head(config),
    )
    return shared + each.times(questions)


def weight_bytes(config: PhotonConfig) -> int:
    """Bytes of the bf16 matrices that a prefill reads, embeddings counted once."""
    c, v = config.text_config, config.vision_config
    wide = v.hidden_size * v.spatial_merge_size**2
    tower = v.depth * v.hidden_size * (4 * v.hidden_size + 3 * v.intermediate_size) + wide * (wide + v.out_hidden_size)
    embed = v.in_channels * v.temporal_patch_size * v.patch_size**2 * v.hidden_size
    tables = c.vocab_size * c.hidden_size * (1 if config.tie_word_embeddings else 2)
    return BF16 * (tower + embed + c.num_hidden_layers * layer_weights(config) + tables)


def cache_bytes(config: PhotonConfig, length: int) -> int:
    """Bytes of the bf16 keys and values of `length` tokens in all layers."""
    c = config.text_config
    return BF16 * 2 * c.num_hidden_layers * c.num_key_value_heads * (c.hidden_size // c.num_attention_heads) * length
