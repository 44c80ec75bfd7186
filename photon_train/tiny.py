"""Models to start from: stage 1 on a Qwen2.5-VL checkpoint, and a tiny random one to try things out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from photon_data.phantom.plan import EASY_FINDINGS, FINDINGS
from photon_data.phantom.questions import CAPTION, WORDINGS
from photon_train.checkpoint import loading
from photon_train.configuration_photon import PhotonConfig
from photon_train.modeling_photon import PhotonForConditionalGeneration
from photon_train.processing_photon import PhotonProcessor

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INITIAL_STD = 0.12  # of weights: about 1 / sqrt(64), not the 0.02 that suits thousands of features
PAD, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")

# Sizes of Qwen2.5-VL-3B, as its config.json says.
QWEN_3B: dict[str, Any] = {
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
ROPE_3B = {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}


def start_from(
    path_or_id: str, output: Path, revision: str | None = None, seed: int = 0
) -> PhotonForConditionalGeneration:
    """Return the stage-1 start of a Qwen2.5-VL checkpoint, its 3D patch embedding drawn with `seed`; write it too."""
    torch.manual_seed(seed)
    with loading(path_or_id):
        model = PhotonForConditionalGeneration.from_pretrained(path_or_id, revision=revision)
        tokenizer = AutoTokenizer.from_pretrained(path_or_id, revision=revision)
    if model.config.stage != 1:
        raise ValueError(
            f"expected a Qwen2.5-VL or stage-1 checkpoint, found one of stage 2 at {path_or_id}; start from the "
            "checkpoint that it was trained from"
        )
    processor = PhotonProcessor(tokenizer, model.config)
    model.save_pretrained(output)
    processor.save_pretrained(output)
    return model


def tiny(output: Path, stage: int = 1, seed: int = 0, **settings: Any) -> PhotonForConditionalGeneration:
    """Return a random model of 4 small layers that reads real stores, and write it with a byte-level tokenizer.

    `settings` are PhotonConfig's, e.g. model_shape_zyx=(70, 140, 140) for an eighth of the visual tokens.
    The vision tower can be trained in minutes: the patch embedding has no bias and every block normalises its input, so
    the brightness of a patch shows only in what the blocks add, if that is not small beside it.
    """
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer(phantom_texts())
    model = PhotonForConditionalGeneration(tiny_config(tokenizer, stage, **settings))
    visual = model.model.visual
    with torch.no_grad():
        visual.patch_embed.proj.weight.normal_(0, 0.01)  # it sums over 2744 voxels
        for name, parameter in visual.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(output)
    PhotonProcessor(tokenizer, model.config).save_pretrained(output)
    return model


def phantom_texts() -> list[str]:
    """Return every question and answer there can be about a phantom's findings; their words become tokens."""
    texts = [CAPTION]
    for finding in (*FINDINGS, *EASY_FINDINGS):
        names = {"noun": finding.noun, "plural": finding.plural, "organ": finding.organ}
        names["choices"] = ", ".join(finding.places)
        texts += [wording.format(**names) for wordings in WORDINGS.values() for wording in wordings]
        texts += [*finding.sides, *finding.places, *finding.substances, "yes", "no"]
    return texts


def byte_tokenizer(texts: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token per byte, role, special token and word of `texts`, with Qwen's chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    size = len(alphabet) + (400 if texts else 0)  # more than the phantoms' texts have words
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(role, normalized=False) for role in ("system", "user", "assistant")])
    tokenizer.add_special_tokens([PAD, IM_START, IM_END, *VISION])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=IM_END, chat_template=CHAT_TEMPLATE, padding_side="left"
    )


def tiny_config(tokenizer: PreTrainedTokenizerFast, stage: int, **settings: Any) -> PhotonConfig:
    """Return the configuration of the tiny model: the published volume geometry, 4 layers of width 64."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "initializer_range": INITIAL_STD,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "tie_word_embeddings": True,
        "its_layer": 1,
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
        "initializer_range": INITIAL_STD,
    }
    return PhotonConfig(**{**text, **_token_ids(tokenizer), **settings}, vision_config=vision, stage=stage)


def published_config(tokenizer: PreTrainedTokenizerFast, stage: int, **settings: Any) -> PhotonConfig:
    """Return the configuration of a model of the published sizes, with the special tokens of any tokenizer."""
    return PhotonConfig(**{**QWEN_3B, **ROPE_3B, **_token_ids(tokenizer), **settings}, stage=stage)


def _token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    names = ("bos", "eos", "im_start", "im_end", "vision_start", "vision_end", "image", "video")
    tokens = (PAD, IM_END, IM_START, IM_END, *VISION)
    return {f"{name}_token_id": tokenizer.convert_tokens_to_ids(t) for name, t in zip(names, tokens, strict=True)}
