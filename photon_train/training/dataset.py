"""Groups -> model inputs, read and cut into patches in worker processes.

What is random in a group (perturbation, flips, augmentation) is drawn from (seed, epoch, number of the group): neither the
number of workers or devices nor a restart changes it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from photon_train.configuration_photon import PhotonConfig
from photon_train.layout import IGNORED, behind, prefix_length
from photon_train.processing_photon import PhotonProcessor
from photon_train.regularizers import draw_perturbation, perturb
from photon_train.rows import Row
from photon_train.training.augment import Augment
from photon_train.training.grounding import of_rows
from photon_train.training.plan import Group
from photon_train.training.rows import TrainRow

STAND_IN = [{"role": "user", "content": "."}, {"role": "assistant", "content": "."}]


@dataclass(frozen=True)
class Batch:
    """A group, ready for the model.

    inputs   of PhotonForConditionalGeneration.forward; `prefix_length` is there when the rows share a volume's encoding
    flips    bool[K], rows to flip once the curriculum flips
    ids      of its rows
    weight   what its loss counts: 0 for one that only fills up a step, or that could not be read
    volumes  how many volumes were read
    error    why it could not be read, "" if it could
    """

    inputs: dict[str, Any]
    flips: Tensor
    ids: list[str]
    weight: float
    volumes: int = 0
    error: str = ""

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with its tensors on the device."""
        moved = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in self.inputs.items()}
        return replace(self, inputs=moved, flips=self.flips.to(device))

    def pin_memory(self) -> Batch:
        """Return the batch with its inputs where a GPU fetches them from; torch's DataLoader calls it in a thread of its own."""
        return replace(self, inputs={k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in self.inputs.items()})


@dataclass(frozen=True)
class Reading:
    """How groups are read. robustness: chance of a perturbed volume; flip: of a flipped row; both 0 in evaluation.

    same_calls: every group calls the same modules in the same order and gives the same weights a gradient, as processes must
    that share weights: volumes are encoded ahead of one question too, and rows without one get an idle one.
    """

    share_prefix: bool = True
    max_length: int | None = None
    robustness: float = 0.0
    flip: float = 0.0
    augment: Augment = field(default_factory=Augment)
    groundings: Mapping[str, Tensor] = field(default_factory=dict)
    same_calls: bool = False
    seed: int = 0


class GroupDataset(Dataset[Batch]):
    """The groups of one epoch; item i is group i of `groups`."""

    def __init__(
        self, rows: Sequence[TrainRow], groups: Sequence[Group], processor: PhotonProcessor, reading: Reading, epoch: int = 0
    ) -> None:
        self.rows = rows
        self.groups = groups
        self.processor = processor
        self.reading = reading
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> Batch:
        """Return the batch of a group. One that cannot be read comes back with `error` set and weight 0."""
        group = self.groups[index]
        rows = [self.rows[i] for i in group.rows]
        try:
            return self._read(group, rows)
        except Exception as error:  # the edge of a work item: the loop stops or skips, by name
            inputs = self._inputs([{"messages": STAND_IN}], shares=False)
            reason = f"{rows[0].id}: {error}"
            return Batch(inputs, torch.zeros(1, dtype=torch.bool), [row.id for row in rows], 0.0, 0, reason)

    def _read(self, group: Group, rows: list[TrainRow]) -> Batch:
        rng = random.Random(f"{self.reading.seed} {self.epoch} {group.number}")
        shares = bool(rows[0].videos) and (self.reading.same_calls or (len(rows) > 1 and self.reading.share_prefix))
        read = {path: self.reading.augment(path, rng) for path in dict.fromkeys(video for row in rows for video in row.videos)}
        asked = [{"id": row.id, "messages": row.messages, "videos": [read[video] for video in row.videos]} for row in rows]
        inputs = self._inputs(asked, shares)
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        if rng.random() < self.reading.robustness and rows[0].videos:
            self._perturb(inputs, len(rows), generator)
        elif self.reading.groundings and rows[0].videos:
            visual_KL = inputs["input_ids"] == self.processor.config.video_token_id
            inputs["grounding"] = of_rows(rows, self.reading.groundings, visual_KL)
        longest = int(inputs["attention_mask"].sum(1).max())
        if self.reading.max_length is not None and longest > self.reading.max_length:
            raise ValueError(f"at most {self.reading.max_length} tokens wanted, got {longest}; raise max_length")
        flips = torch.rand(len(rows), generator=generator) < self.reading.flip
        volumes = len(rows[0].videos) if shares else sum(len(row.videos) for row in rows)
        return Batch(inputs, flips, [row.id for row in rows], group.weight, volumes)

    def _inputs(self, asked: Sequence[Row], shares: bool) -> dict[str, Any]:
        if shares:
            return shared_inputs(self.processor, asked)
        inputs = dict(self.processor(rows=asked, for_training=True))
        return inputs | behind_idle_volume(inputs, self.processor.config) if self.reading.same_calls else inputs

    def _perturb(self, inputs: dict[str, Any], rows: int, generator: torch.Generator) -> None:
        """Perturb every volume of the group in one way; all its rows are then trained to be unsure."""
        config = self.processor.config
        how, patches = draw_perturbation(config, generator), inputs["pixel_values_videos"]
        sizes = inputs["video_grid_thw"].prod(1).tolist()
        seed = int(torch.randint(2**31, (1,), generator=generator))
        parts = [perturb(part, how, config, torch.Generator().manual_seed(seed)) for part in patches.split(sizes)]
        inputs["pixel_values_videos"] = torch.cat(parts)
        inputs["perturbed"] = torch.ones(rows, dtype=torch.bool)


def shared_inputs(processor: PhotonProcessor, rows: Sequence[Row]) -> dict[str, Any]:
    """Return inputs of rows that begin alike up to the end of their last volume, which they bring once: see `layout.behind`."""
    first = processor(rows=rows[:1], for_training=True)
    encoded = [(first["input_ids"][0], first["labels"][0]), *map(processor.training_ids, rows[1:])]
    length = prefix_length(first["input_ids"][0], processor.config)
    shared_P = first["input_ids"][0, :length]
    assert all(ids[:length].equal(shared_P) for ids, _ in encoded), "rows of one group begin alike"
    own = [ids[length:] for ids, _ in encoded]
    return {
        "input_ids": behind(shared_P, own, processor.tokenizer.pad_token_id),
        "attention_mask": behind(torch.ones_like(shared_P), [torch.ones_like(ids) for ids in own], 0),
        "labels": behind(first["labels"][0, :length], [labels[length:] for _, labels in encoded], IGNORED),
        "prefix_length": length,
        **{name: first[name] for name in ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts")},
    }


def behind_idle_volume(inputs: Mapping[str, Any], config: PhotonConfig) -> dict[str, Any]:
    """Return what to change of inputs without a volume: one of air and one token stands first, which nothing attends to."""
    vision, rows = config.vision_config, len(inputs["input_ids"])
    side, voxels = vision.spatial_merge_size, vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    ids_P = torch.tensor([config.vision_start_token_id, config.video_token_id, config.vision_end_token_id])
    first = {
        "input_ids": ids_P,
        "attention_mask": torch.zeros_like(ids_P),
        "labels": torch.full_like(ids_P, IGNORED),
        "question_mask": torch.zeros_like(ids_P).bool(),
        "mm_token_type_ids": torch.tensor([0, 2, 0]),
    }
    return {
        **{name: torch.cat([value_P.expand(rows, -1), inputs[name]], dim=1) for name, value_P in first.items()},
        "prefix_length": len(ids_P),
        "pixel_values_videos": torch.zeros(side**2, voxels),
        "video_grid_thw": torch.tensor([[1, side, side]]),
    }


class Turn(NamedTuple):
    """The micro-batches of one rank: which groups, in order."""

    rank: int
    world: int

    def of(self, steps: Sequence[Sequence[Group]]) -> list[Group]:
        """Return this rank's groups: of every step each world-th."""
        return [group for step in steps for group in step[self.rank :: self.world]]


def batches(dataset: GroupDataset, workers: int, prefetch: int, pin: bool) -> Iterator[Batch]:
    """Yield the batches in order, read ahead by `workers` processes (0: in this one)."""
    ahead: dict[str, Any] = {"prefetch_factor": prefetch} if workers else {}
    yield from DataLoader(dataset, batch_size=None, num_workers=workers, pin_memory=pin, **ahead)
