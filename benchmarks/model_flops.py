"""TFLOP of one answered volume by way of asking, from the configuration alone: no weights, no GPU
(photon_train/costs.py). And of a training group, as torch's counter finds them in a model without weights (on "meta").

python benchmarks/model_flops.py                       Qwen2.5-VL-3B with Photon's volume
python benchmarks/model_flops.py --config DIR --keep-ratio 0.2 --questions 43
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from photon_train import costs
from photon_train.configuration_photon import PhotonConfig
from photon_train.modeling_photon import PhotonForConditionalGeneration
from photon_train.tiny import QWEN_3B, ROPE_3B

BF16 = 2
ANSWER = 6  # tokens, its end marker included


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


def training_table(config: PhotonConfig, prompt: costs.PromptSize) -> str:
    """One line per number of questions of a training group in which nothing is dropped, in TFLOP of the forward."""
    c, p = config.text_config, prompt.before + prompt.visual + 1
    q, lines = prompt.length - p, [f"{'TFLOP of a training group, nothing dropped':44}{'needed':>9}{'executed':>10}"]
    for questions in (1, 4, 8, 16):
        shared = costs.layers(config, c.num_hidden_layers, p, p)
        each = costs.layers(config, c.num_hidden_layers, q, p + q) + ANSWER * costs.head(config)
        needed = costs.vision(config, config.patches_thw) + shared + questions * each
        executed = executed_flops(config, p, q, questions)
        lines.append(f"{f'{questions} questions':44}{needed / 1e12:9.2f}{executed / 1e12:10.2f}")
    return "\n".join(lines)


def executed_flops(config: PhotonConfig, prefix: int, suffix: int, questions: int) -> int:
    """FLOPs that torch counts in the forward of a training group on one volume, as `photon train s1c` runs it."""

    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    with torch.device("meta"):
        model = PhotonForConditionalGeneration(config).train()
    row, vision = (questions, prefix + suffix), config.vision_config
    voxels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    inputs = {
        **{name: empty(*row) for name in ("input_ids", "attention_mask", "labels")},
        "position_ids": empty(3, *row),
        "question_mask": empty(*row, dtype=torch.bool),
        "question_tokens": suffix,
        "answers": empty(3, questions * ANSWER),
        "prefix": prefix,
        "pixel_values_videos": empty(math.prod(config.patches_thw), voxels, dtype=torch.float32),
        "video_grid_thw": torch.tensor([config.patches_thw]),
        "second_per_grid_ts": torch.tensor([14.0]),
    }
    with FlopCounterMode(display=False) as counter:
        model(**inputs)
    return int(counter.get_total_flops())


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
    if not args.config:
        print(training_table(PhotonConfig(**QWEN_3B, **ROPE_3B, stage=1), prompt))


if __name__ == "__main__":
    main()
