"""Seconds and memory of a training step, an answer, and answers on a shared prefix; random weights, random volume.

    python benchmarks/model_speed.py                      the 3B configuration in bf16 on a GPU
    python benchmarks/model_speed.py --size tiny --device cpu --dtype float32
    python benchmarks/model_speed.py --attention flash_attention_2     and how far its logits are from sdpa's

One line per measurement: the median of --repeats after one warm-up, and the peak of allocated GPU memory.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from model_flops import QWEN_3B
from torch import Tensor

from photon_train.configuration_photon import PhotonConfig
from photon_train.modeling_photon import PhotonForConditionalGeneration
from photon_train.processing_photon import PhotonProcessor
from photon_train.tiny import byte_tokenizer, tiny_config

QUESTION = "Is there a pulmonary nodule, and if so, in which lobe does it lie?"


def build(args: argparse.Namespace, **settings: Any) -> tuple[PhotonForConditionalGeneration, PhotonProcessor]:
    """Return a random model on the device and a processor with a byte tokenizer."""
    tokenizer = byte_tokenizer()
    config = tiny_config(tokenizer, stage=2, **settings)
    if args.size == "3b":
        sizes = {k: v for k, v in QWEN_3B.items() if k != "tie_word_embeddings"}
        rope = {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
        tokens = {name: getattr(config, name) for name in vars(config) if name.endswith("_token_id")}
        config = PhotonConfig(**sizes, **rope, **tokens, tie_word_embeddings=True, stage=2, **settings)
    config._attn_implementation = args.attention
    torch.manual_seed(0)
    with torch.device(args.device):
        model = PhotonForConditionalGeneration._from_config(config, dtype=getattr(torch, args.dtype))
    return model, PhotonProcessor(tokenizer, config)


def measured(args: argparse.Namespace, name: str, call: Callable[[], Any]) -> None:
    """Print the median seconds of `call` and the GPU memory it peaked at."""
    call()
    seconds = list(_timed(args, call))
    peak = f"{torch.cuda.max_memory_allocated() / 2**30:8.2f} GiB" if args.device == "cuda" else "       -    "
    print(f"{name:44} {statistics.median(seconds):9.3f} s {peak}", flush=True)


def _timed(args: argparse.Namespace, call: Callable[[], Any]) -> Iterator[float]:
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(args.repeats):
        start = time.perf_counter()
        call()
        if args.device == "cuda":
            torch.cuda.synchronize()
        yield time.perf_counter() - start


def train_step(model: PhotonForConditionalGeneration, x: dict[str, Tensor], step: int) -> None:
    """Forward and backward; no optimizer, whose state is a matter of the recipe."""
    model.train()
    model.zero_grad(set_to_none=True)
    model(**x, step=step).loss.backward()


def compare_attention(args: argparse.Namespace, x: dict[str, Tensor]) -> None:
    """Print how far the chosen back end is from sdpa, on the same weights, and on which share of tokens they agree."""
    outputs = []
    for attention in ("sdpa", args.attention):
        chosen = argparse.Namespace(**{**vars(args), "attention": attention})
        model, _ = build(chosen, scheduler="uniform")
        with torch.no_grad():
            outputs.append(model.eval()(**x, logits_to_keep=1).logits.float())
    gap = (outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max()
    print(f"{args.attention} against sdpa: largest logit difference {gap:.2e} of the largest logit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("3b", "tiny"), default="3b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--questions", type=int, default=10)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {args.size}, {args.device}, {args.dtype}, {args.attention}")

    # An untrained predictor keeps nearly everything; theta = 0.6 of the saliency's range is nearer to a trained one.
    model, processor = build(args, initial_threshold=0.6)
    hu = torch.randint(-1000, 1000, tuple(processor.config.model_shape_zyx))
    turn = [
        {"role": "user", "content": f"<video>{QUESTION}"},
        {"role": "assistant", "content": "Yes, in the right upper lobe."},
    ]
    sample = processor(hu, turn, for_training=True).to(args.device)
    prompt = processor(hu, QUESTION).to(args.device)
    with torch.no_grad():
        scheduled = model.eval()(**prompt, logits_to_keep=1).scheduled
    visual = int((prompt["input_ids"] == processor.config.video_token_id).sum())
    print(f"kept {int(scheduled.keep_BL.sum()) - prompt['input_ids'].shape[1] + visual} of {visual} visual tokens")

    for name, step in (("dense", 0), ("soft", model.config.soft_start), ("hard, SGP", model.config.hard_start)):
        measured(args, f"training step, {name}", lambda step=step: train_step(model, sample, step))
    model.gradient_checkpointing_enable()
    measured(args, "training step, hard, checkpointed", lambda: train_step(model, sample, model.config.hard_start))
    model.gradient_checkpointing_disable()
    model.zero_grad(set_to_none=True)
    model.eval()

    how = {"max_new_tokens": args.new_tokens, "min_new_tokens": args.new_tokens, "do_sample": False}
    measured(args, f"answer, {args.new_tokens} tokens", lambda: model.generate(**prompt, **how))
    asked = [q.to(args.device) for q in processor.questions([QUESTION] * args.questions)]

    def on_a_prefix() -> None:
        with torch.no_grad():
            model.answer(model.encode_prefix(prompt), asked, **how)

    measured(args, f"{args.questions} answers on a prefix", on_a_prefix)
    if args.attention != "sdpa":
        compare_attention(args, prompt)


if __name__ == "__main__":
    main()
