"""TFLOP of one answered volume by way of asking, from the configuration alone: no weights, no GPU
(photon_train/flops.py).

python benchmarks/model_flops.py                       Qwen2.5-VL-3B with Photon's volume
python benchmarks/model_flops.py --config DIR --keep-ratio 0.2 --questions 43
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from photon_train import flops as costs
from photon_train.configuration_photon import PhotonConfig

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


BF16 = 2


def weight_bytes(config: PhotonConfig) -> int:
    """Bytes of the bf16 matrices that a prefill reads, embeddings counted once."""
    c, (embed, block, merger) = config.text_config, costs.tower_weights(config)
    tower = embed + config.vision_config.depth * block + merger
    tables = c.vocab_size * c.hidden_size * (1 if config.tie_word_embeddings else 2)
    return BF16 * (tower + c.num_hidden_layers * costs.layer_weights(config) + tables)


def cache_bytes(config: PhotonConfig, length: int) -> int:
    """Bytes of the bf16 keys and values of `length` tokens in all layers."""
    return BF16 * 2 * config.text_config.num_hidden_layers * costs.key_width(config) * length


def table(config: PhotonConfig, prompt: costs.PromptSize, keep_ratio: float, questions: int) -> str:
    """One line per way of asking, in TFLOP; bytes behind."""
    grid, kept = config.patches_thw, round(keep_ratio * prompt.visual)
    short = prompt.length - prompt.visual + kept

    def times(n: int, flops: costs.Flops) -> costs.Flops:
        return costs.Flops(*(n * part for part in flops))

    plain, pruned = costs.without_scheduling(config, prompt, grid), costs.with_its(config, prompt, grid, kept)
    ways = {
        "1 question, none": (plain, cache_bytes(config, prompt.length)),
        f"1 question, ITS at {keep_ratio:.2f}": (pruned, cache_bytes(config, short)),
        f"{questions} questions, none": (times(questions, plain), questions * cache_bytes(config, prompt.length)),
        f"{questions} questions, ITS": (times(questions, pruned), questions * cache_bytes(config, short)),
        **{
            f"{questions} questions, {name} on a prefix": (
                costs.on_a_prefix(config, name, prompt, grid, prompt.visual if name == "none" else kept, questions),
                questions * cache_bytes(config, prompt.length if name == "none" else short),
            )
            for name in ("none", "its", "random", "fastv", "visionzip", "divprune", "nucleus")
        },
    }
    names = costs.Flops._fields
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
    prompt = costs.prompt_size(costs.BEFORE + costs.FRAME_AFTER + args.question_tokens, math.prod(config.tokens_thw))
    print(table(config, prompt, args.keep_ratio, args.questions))


if __name__ == "__main__":
    main()
