"""`photon predict --manifest ROWS --output PREDICTIONS`: progress, and what failed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from photon_cli.answering_show import Show, print_outcome
from photon_cli.kept import KeptOrder, show_rows
from photon_cli.predict_model import Model
from photon_data.errors import UsageError
from photon_train.answering import manifest as predict
from photon_train.answering.manifest import Shard
from photon_train.answering.predictor import Reply, RequestGroup
from photon_train.rows import read_rows


def predict_rows(model: Model, manifest: Path, output: Path, shard: str | None, kept: KeptOrder) -> bool:
    """Answer the rows and return whether all of this part have an answer."""
    rows = read_rows(manifest)
    part, local = _part(shard)
    device = f"cuda:{local}" if local is not None and model.device in ("auto", "cuda") and _has_gpu() else None
    asker = model.load(device)
    tokens_zyx = asker.processor.config.tokens_thw

    def on_replies(group: RequestGroup, replies: Sequence[Reply]) -> None:
        show.replies(group, replies)
        if kept.overlay:
            with show.costing_itself(group.name):
                show_rows(kept, group, replies, tokens_zyx)

    with Show() as show:
        outcome = predict.predict_rows(asker, rows, output, part, on_start=show.start, on_batch=on_replies)
    print_outcome(outcome, output, show, part)
    return not (outcome.failed or show.unshown)


def _part(shard: str | None) -> tuple[Shard, int | None]:
    """Return this process's part, and its number on this machine under torchrun; UsageError for no I/N."""
    if shard is None and "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        local = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
        return Shard(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])), local
    if shard is None:
        return predict.WHOLE, None
    index, _, count = shard.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UsageError(f"--shard: I/N with I from 0 to N - 1 wanted, for example 0/4, got {shard!r}")
    return Shard(int(index), int(count)), None


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
