"""FLOPs and bytes of one answered volume, from the configuration alone: no weights, no GPU.

    python benchmarks/model_flops.py                       Qwen2.5-VL-3B with Photon's volume
    python benchmarks/model_flops.py --config DIR --keep-ratio 0.2 --questions 43

A multiply-add is two FLOPs; attention is counted over all pairs, as torch's counter does (a causal kernel does about half).
Norms, activations and softmax are left out. Bytes: weights read by a prefill, and the KV cache that it leaves behind.
tests/model/test_flops.py holds the counts against torch's counter on a small model.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from pathlib import Path

from photon_train.configuration_photon import PhotonConfig

BF16 = 2
QWEN_3B = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 2048,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
}


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


def table(config: PhotonConfig, prompt: Prompt, keep_ratio: float, questions: int) -> str:
    """One line per way of asking, in TFLOP; bytes behind."""
    grid = tuple(n // config.vision_config.patch_size for n in config.model_shape_zyx)
    kept = round(keep_ratio * prompt.visual)
    short = prompt.length - prompt.visual + kept
    plain, pruned = without_scheduling(config, prompt, grid), with_its(config, prompt, grid, kept)
    ways = {
        "1 question, none": (plain, cache_bytes(config, prompt.length)),
        f"1 question, ITS at {keep_ratio:.2f}": (pruned, cache_bytes(config, short)),
        f"{questions} questions, none": (plain.times(questions), questions * cache_bytes(config, prompt.length)),
        f"{questions} questions, ITS": (pruned.times(questions), questions * cache_bytes(config, short)),
        f"{questions} questions, ITS on a prefix": (
            on_a_prefix(config, prompt, grid, kept, questions),
            questions * cache_bytes(config, short),
        ),
    }
    names = [field.name for field in fields(Flops)]
    lines = [f"{'TFLOP of prefill':34}" + "".join(f"{n:>9}" for n in (*names, "total")) + f"{'KV MiB':>10}"]
    for way, (flops, cache) in ways.items():
        numbers = [getattr(flops, name) for name in names] + [flops.total()]
        lines.append(f"{way:34}" + "".join(f"{n / 1e12:9.2f}" for n in numbers) + f"{cache / 2**20:10.1f}")
    return "\n".join([*lines, f"weights: {weight_bytes(config) / 2**30:.2f} GiB in bf16"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="directory with a config.json; default: Qwen2.5-VL-3B's sizes")
    parser.add_argument("--keep-ratio", type=float, default=0.39)
    parser.add_argument("--questions", type=int, default=10)
    parser.add_argument("--question-tokens", type=int, default=32)
    args = parser.parse_args()
    config = PhotonConfig.from_pretrained(args.config) if args.config else PhotonConfig(**QWEN_3B, stage=2)
    t, h, w = (n // config.vision_config.patch_size for n in config.model_shape_zyx)
    visual = t * h * w // config.vision_config.spatial_merge_size**2
    prompt = Prompt(before=15, visual=visual, after=1 + args.question_tokens + 5, question=args.question_tokens)
    print(table(config, prompt, args.keep_ratio, args.questions))


if __name__ == "__main__":
    main()
