"""Models to start from: stage 1 on a Qwen2.5-VL checkpoint, and a tiny random one for trying things out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from photon_train.configuration_photon import PhotonConfig
from photon_train.modeling_photon import PhotonForConditionalGeneration
from photon_train.processing_photon import PhotonProcessor

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROLES = ("system", "user", "assistant")
PAD, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def start_from(path_or_id: str, output: Path, revision: str | None = None, seed: int = 0) -> PhotonForConditionalGeneration:
    """Return the stage-1 start of a Qwen2.5-VL checkpoint, and write it with its tokenizer to `output`.

    The fresh 3D patch embedding is drawn with `seed`. Raises ValueError as from_pretrained does.
    """
    torch.manual_seed(seed)
    model = PhotonForConditionalGeneration.from_pretrained(path_or_id, revision=revision)
    processor = PhotonProcessor(AutoTokenizer.from_pretrained(path_or_id, revision=revision), model.config)
    model.save_pretrained(output)
    processor.tokenizer.save_pretrained(output)
    return model


def tiny(output: Path, stage: int = 1, seed: int = 0, **settings: Any) -> PhotonForConditionalGeneration:
    """Return a random model of 8 small layers that reads real stores, and write it with a byte-level tokenizer.

    `settings` are PhotonConfig's.
    """
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    model = PhotonForConditionalGeneration(tiny_config(tokenizer, stage, **settings))
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return model


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token per byte, role name and special token, with Qwen's chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(role, normalized=False) for role in ROLES])
    tokenizer.add_special_tokens([PAD, IM_START, IM_END, *VISION])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=IM_END, chat_template=CHAT_TEMPLATE, padding_side="left"
    )


def tiny_config(tokenizer: PreTrainedTokenizerFast, stage: int, **settings: Any) -> PhotonConfig:
    """Return the configuration of the tiny model: the published volume geometry, 8 layers of width 64."""
    ids: dict[str, Any] = {token: tokenizer.convert_tokens_to_ids(token) for token in (PAD, IM_START, IM_END, *VISION)}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "bos_token_id": ids[PAD],
        "eos_token_id": ids[IM_END],
    }
    vision = {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1, 3],
    }
    names = ("vision_start", "vision_end", "image", "video")
    tokens = {f"{name}_token_id": ids[token] for name, token in zip(names, VISION, strict=True)}
    return PhotonConfig(
        **{**text, **tokens, **settings},
        vision_config=vision,
        stage=stage,
        im_start_token_id=ids[IM_START],
        im_end_token_id=ids[IM_END],
        tie_word_embeddings=True,
    )
