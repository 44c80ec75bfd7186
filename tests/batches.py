"""Putting single rows together into one padded batch, and taking it apart."""

from typing import Any

import torch
from torch import Tensor

PADDING = {"input_ids": 0, "attention_mask": 0, "labels": -100}
PER_VOLUME = ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts")


def batch_of(rows: list[dict[str, Tensor]], side: str) -> dict[str, Any]:
    """One batch of single rows, padded on `side` ("left" or "right")."""
    longest = max(row["input_ids"].shape[1] for row in rows)
    batch: dict[str, Any] = {}
    for name, value in PADDING.items():
        padded = []
        for row in rows:
            missing = longest - row["input_ids"].shape[1]
            edges = (missing, 0) if side == "left" else (0, missing)
            padded.append(torch.nn.functional.pad(row[name], edges, value=value))
        batch[name] = torch.cat(padded)
    for name in PER_VOLUME:
        found = [row[name] for row in rows if name in row]
        if found:
            batch[name] = torch.cat(found)
    return batch


def prompts_of(rows: list[dict[str, Tensor]], side: str) -> dict[str, Any]:
    """The same without labels, for generation."""
    batch = batch_of([{**row, "labels": torch.zeros_like(row["input_ids"])} for row in rows], side)
    return {k: v for k, v in batch.items() if k != "labels"}
