"""What training and answering cost: FLOPs of one volume's prefill, from the configuration alone; what a GPU can do at
most; the memory that was needed.

A multiply-add is two FLOPs. Attention is counted over all pairs, as torch's counter does (a causal kernel does about
half). Norms, activations and softmax are left out. tests/model/test_flops.py compares the counts with torch's counter;
benchmarks/model_flops.py adds bytes.
"""

from __future__ import annotations

import resource
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # scores are made without waiting for transformers
    import torch

    from photon_train.configuration_photon import PhotonConfig

# Dense bfloat16 TFLOP/s by the name of a GPU, from the makers' data sheets; the first that fits counts.
PEAK_TFLOPS = {
    **{"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "H800": 989, "GH200": 989},
    **{"B200": 2250, "A100": 312, "A800": 312, "L40S": 362, "RTX 4090": 165},
}

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


def without_scheduling(config: PhotonConfig, prompt: PromptSize, grid_thw: tuple[int, int, int]) -> Flops:
    """FLOPs of a prefill that keeps everything."""
    return with_its(config, prompt, grid_thw, kept=prompt.visual)._replace(scoring=0)


def prefill(
    config: PhotonConfig, scheduler: str, prompt: PromptSize, grid_thw: tuple[int, int, int], kept: int
) -> Flops:
    """FLOPs of a prefill of one question alone, under a scheduler that keeps `kept` visual tokens."""
    if scheduler == "its":
        return with_its(config, prompt, grid_thw, kept)
    if scheduler == "none":
        return without_scheduling(config, prompt, grid_thw)
    m = prompt.length - prompt.visual + kept
    if config.drops_before_decoder(scheduler):
        return Flops(
            vision(config, grid_thw),
            layers(config, config.its_layer + 1, m, m),
            choosing(config, scheduler, grid_thw, kept),
            layers(config, config.text_config.num_hidden_layers - config.its_layer - 1, m, m),
            head(config),
        )
    below, n = config.drop_layer_of(scheduler) + 1, prompt.length
    return Flops(
        vision(config, grid_thw),
        layers(config, below, n, n),
        attending(config, n, n) if scheduler == "fastv" else 0,
        layers(config, config.text_config.num_hidden_layers - below, m, m),
        head(config),
    )


def on_a_prefix(
    config: PhotonConfig,
    scheduler: str,
    prompt: PromptSize,
    grid_thw: tuple[int, int, int],
    kept: int,
    questions: int,
) -> Flops:
    """FLOPs of K prefills about one volume as `photon predict` does them: what no question decides is computed once.

    its, fastv, random, uniform, foreground: the layers below the drop are shared, each question's suffix runs through
    them, and its kept row through those above. The others: all layers are shared.
    """
    c, below, p = config.text_config, config.drop_layer_of(scheduler) + 1, prompt.before + prompt.visual + 1
    q, m, count = prompt.length - p, prompt.length - prompt.visual + kept, c.num_hidden_layers
    fixed = Flops(vision=vision(config, grid_thw), head=questions * head(config))
    if scheduler == "none" or config.drops_before_decoder(scheduler):
        return fixed._replace(
            below=layers(config, below, m - q, m - q) + questions * layers(config, below, q, m),
            scoring=choosing(config, scheduler, grid_thw, kept),
            above=layers(config, count - below, m - q, m - q) + questions * layers(config, count - below, q, m),
        )
    of_prefix = 2 * p * c.hidden_size * (c.hidden_size + key_width(config))  # q and k of the layer, kept for all
    each = {"its": scoring(config, q, p + q, prompt.question), "fastv": attending(config, q, p + q)}
    return fixed._replace(
        below=layers(config, below, p, p) + questions * layers(config, below, q, p + q),
        scoring=of_prefix + questions * each.get(scheduler, 0),
        above=questions * layers(config, count - below, m, m),
    )


def vision(config: PhotonConfig, grid_thw: tuple[int, int, int]) -> int:
    """FLOPs of the vision tower on one volume: patches, blocks with windowed or slab attention, merger."""
    v, (t, h, w) = config.vision_config, grid_thw
    patches, (embed, block, merger) = t * h * w, tower_weights(config)
    side = v.window_size // v.patch_size
    rows, columns = ([min(side, n - start) for start in range(0, n, side)] for n in (h, w))  # less at the edges
    windows = t * sum(attention(a * b, a * b, v.hidden_size) for a in rows for b in columns)
    full = len([i for i in v.fullatt_block_indexes if i < v.depth])
    linear = patches * (embed + v.depth * block) + patches // v.spatial_merge_size**2 * merger
    return 2 * linear + full * t * attention(h * w, h * w, v.hidden_size) + (v.depth - full) * windows


def tower_weights(config: PhotonConfig) -> tuple[int, int, int]:
    """Return how many matrix weights the vision tower has: patch embedding, one block, merger."""
    v = config.vision_config
    wide = v.hidden_size * v.spatial_merge_size**2
    embed = v.in_channels * v.temporal_patch_size * v.patch_size**2 * v.hidden_size
    return embed, v.hidden_size * (4 * v.hidden_size + 3 * v.intermediate_size), wide * (wide + v.out_hidden_size)


def attention(queries: int, keys: int, width: int) -> int:
    """FLOPs of q k^T and of the weighted sum of values."""
    return 4 * queries * keys * width


def layers(config: PhotonConfig, count: int, queries: int, keys: int) -> int:
    """FLOPs of `count` decoder layers for `queries` tokens that attend to `keys`."""
    return count * (2 * queries * layer_weights(config) + attention(queries, keys, config.text_config.hidden_size))


def layer_weights(config: PhotonConfig) -> int:
    """Matrix weights of a decoder layer."""
    c = config.text_config
    return c.hidden_size * (2 * c.hidden_size + 2 * key_width(config) + 3 * c.intermediate_size)


def key_width(config: PhotonConfig) -> int:
    """Width of a token's keys, and of its values."""
    c = config.text_config
    return c.hidden_size // c.num_attention_heads * c.num_key_value_heads


def scoring(config: PhotonConfig, tokens: int, length: int, question: int) -> int:
    """FLOPs of ITS: q and k again of `tokens` tokens, centrality, alignment with a row of `length`, the threshold."""
    d = config.text_config.hidden_size
    qk, predictor = 2 * tokens * d * (d + key_width(config)), 2 * 13 * (d // 8)
    return qk + 2 * question * question * d + 2 * question * d + 2 * length * d + predictor


def attending(config: PhotonConfig, tokens: int, length: int) -> int:
    """FLOPs of FastV: q and k again of `tokens` tokens, one query on a row of `length`."""
    d = config.text_config.hidden_size
    return 2 * tokens * d * (d + key_width(config)) + 2 * length * d


def choosing(config: PhotonConfig, scheduler: str, grid_thw: tuple[int, int, int], kept: int) -> int:
    """FLOPs of what a scheduler before the decoder decides by; 0 for one that is none."""
    v, (t, h, w) = config.vision_config, grid_thw
    tokens = t * h * w // v.spatial_merge_size**2
    if scheduler == "divprune":  # cosine of all pairs
        return 2 * tokens**2 * config.text_config.hidden_size
    if scheduler not in ("visionzip", "nucleus"):
        return 0
    # q, k and v of one block again, and q k^T within slabs.
    received = 2 * t * h * w * 3 * v.hidden_size**2 + 2 * t * (h * w) ** 2 * v.hidden_size
    targets = round(kept * 10 / 64) if scheduler == "visionzip" else 0
    return received + 2 * targets * (tokens - kept) * (v.hidden_size // v.num_heads)


def head(config: PhotonConfig) -> int:
    """FLOPs of the logits at one position."""
    return 2 * config.text_config.hidden_size * config.text_config.vocab_size


def peak_tflops(device: torch.device) -> float | None:
    """Return how many TFLOP/s a GPU can do at most, dense and in bfloat16; None where that is not known."""
    if device.type != "cuda":
        return None
    import torch  # late: scores are made without it

    name_of_gpu = torch.cuda.get_device_name(device)
    return next((float(peak) for name, peak in PEAK_TFLOPS.items() if name in name_of_gpu), None)


def peak_memory_mib(device: torch.device) -> float:
    """Return the most memory this process has used since `reset_peak_memory`: allocated on the GPU, resident on a CPU.

    In MiB.
    """
    if device.type == "cuda":
        import torch  # late: scores are made without it

        return torch.cuda.max_memory_allocated(device) / 2**20
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def reset_peak_memory(device: torch.device) -> None:
    """Begin to count peak memory anew; where the system cannot, the peak goes on to be that of the whole process."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
