"""Rows -> groups that share a prefix -> batches: the same batches whatever the order of the rows.

A group is all rows that show the same volumes with the same text before the end of the last one (system message, what stands
before <video>); what follows is their own. Rows without volumes are one group, with nothing shared.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from photon_train.layout import prefix_length
from photon_train.processing_photon import PhotonProcessor
from photon_train.rows import Row, asked_of, without_answer

WORST_AS_TEXT = (ValueError, KeyError, TypeError, AttributeError)  # what a row that is no row can raise


class Prompt(NamedTuple):
    """A row to answer: its given answer is left out; own_L are the ids int64[L] behind the shared prefix; asked: `asked_of`."""

    row: Row
    own_L: Tensor
    asked: str

    @property
    def id(self) -> str:
        """The row's id."""
        return str(self.row["id"])


class Group(NamedTuple):
    """Prompts on one prefix, by id. `videos` are the row's (paths or Volumes), none for text alone."""

    videos: tuple[Any, ...]
    prompts: list[Prompt]

    @property
    def name(self) -> str:
        """Say which volumes it is about; "" for text alone, or for volumes that are in memory."""
        return "\n".join(str(video) for video in self.videos if isinstance(video, str | Path))

    def batches(self, most: int) -> Iterator[list[Prompt]]:
        """Yield the prompts, at most `most` at a time."""
        for at in range(0, len(self.prompts), most):
            yield self.prompts[at : at + most]


class Grouped(NamedTuple):
    """The groups, in an order of their own, and why a row is in none: {id: reason}."""

    groups: list[Group]
    problems: dict[str, str]


def group_rows(rows: Sequence[Row], processor: PhotonProcessor) -> Grouped:
    """Return the groups of rows (each with an `id` of its own), in an order that does not depend on the rows' order."""
    prompts: dict[tuple[Any, ...], list[Prompt]] = defaultdict(list)
    videos: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    problems: dict[str, str] = {}
    for row in rows:
        try:
            key, prompt = _prompt(row, processor)
        except WORST_AS_TEXT as error:
            problems[str(row["id"])] = _reason(error)
        else:
            prompts[key].append(prompt)
            videos.setdefault(key, tuple(prompt.row.get("videos") or ()))
    groups = [Group(videos[key], sorted(found, key=lambda prompt: prompt.id)) for key, found in prompts.items()]
    return Grouped(sorted(groups, key=lambda group: (group.name, group.prompts[0].id)), problems)


def _prompt(row: Row, processor: PhotonProcessor) -> tuple[tuple[Any, ...], Prompt]:
    asked = without_answer(row)
    ids_L = processor.ids(asked)
    shared = prefix_length(ids_L, processor.config)
    digest = hashlib.sha256(ids_L[:shared].numpy().tobytes()).hexdigest() if shared else ""
    volumes = (video if isinstance(video, str | Path) else id(video) for video in asked.get("videos") or ())
    return (*volumes, digest), Prompt(asked, ids_L[shared:].clone(), asked_of(row))


def answer_ids(prompt: Prompt, text: str, processor: PhotonProcessor) -> Tensor:
    """Return int64[n]: the ids that the assistant says when it answers `text`, with the end marker, as training sees them.

    ValueError where the text changes how the prompt itself becomes ids.
    """
    said = {**prompt.row, "messages": [*prompt.row["messages"], {"role": "assistant", "content": text}]}
    ids_L, asked_L = processor.ids(said, for_training=True), processor.ids(prompt.row)
    if not ids_L[: len(asked_L)].equal(asked_L):
        raise ValueError(f"{prompt.id}: an answer that stands for itself wanted, got {text!r}; remove space at its start")
    end = int((ids_L == processor.config.im_end_token_id).nonzero()[-1]) + 1
    return ids_L[len(asked_L) : end]


def _reason(error: Exception) -> str:
    return str(error) if type(error) is ValueError else f"a row of messages and videos wanted ({type(error).__name__}: {error})"


def seed_of(seed: int, prompts: Sequence[Prompt]) -> int:
    """Return a seed for one batch, from the run's and the ids: sampling does not depend on the order of batches."""
    text = "\n".join([str(seed), *(prompt.id for prompt in prompts)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])
