"""Rows -> the groups of an epoch, in the order of its steps. The same for any number of devices.

[a1 a2 a3 b1 c1 c2] (letter: volume), 2 questions per volume, 2 groups per step -> [a3 a1 | b1] [c2 c1 | a2]

Augmentation of training volumes with torchio: never a reflection, which would swap left and right.

Groups -> model inputs, read and cut into patches in worker processes.

What is random in a group (perturbation, flips, augmentation) is drawn from (seed, epoch, number of the group): neither the
number of workers or devices nor a restart changes it.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from photon_data import open_volume
from photon_train.configuration_photon import PhotonConfig
from photon_train.losses import IGNORED, draw_perturbation, perturb
from photon_train.prefix import with_suffixes
from photon_train.processing_photon import PhotonProcessor, prefix_length
from photon_train.rows import NIFTI, Row, TrainRow
from photon_train.training.grounding import of_rows

VOLUME_COST = 4000  # characters of text that cost as much as a volume, roughly; it only balances devices
WINDOW = 32  # steps within which groups of about equal cost are brought together
ALIKE = 1.25  # costs within this factor are


class Group(NamedTuple):
    """Rows that are computed together: indices into the manifest's rows.

    weight: what its loss counts, 1 but in the last step of an epoch: [g g g .] of 4 slots -> 4/3, 4/3, 4/3, 0.
    """

    rows: tuple[int, ...]
    number: int  # within its epoch: what random draws are seeded with
    weight: float = 1.0


def group_indices(rows: Sequence[TrainRow], questions_per_volume: int, rng: random.Random | None = None) -> list[tuple[int, ...]]:
    """Return every row index once, rows of one prefix together, at most `questions_per_volume`, as evenly as can be.

    With `rng`, which questions go together is drawn; else they keep their order. Rows without a volume are grouped as if
    they shared one.
    """
    shelves: dict[Hashable, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        shelves[index if row.answers_before_head else (row.videos, row.head if row.videos else "")].append(index)
    groups = []
    for shelf in shelves.values():
        if rng:
            rng.shuffle(shelf)
        parts = -(-len(shelf) // questions_per_volume)
        groups += [tuple(shelf[part::parts]) for part in range(parts)]
    return groups


def plan_epoch(
    rows: Sequence[TrainRow], questions_per_volume: int, groups_per_step: int, seed: int, epoch: int
) -> list[list[Group]]:
    """Return the steps of an epoch, each of exactly `groups_per_step` groups. Every row is in one group of weight above 0.

    Groups of about equal cost share a step, so that devices do not wait for each other; which, and in what order, is drawn
    from (seed, epoch). About: sorted by their exact length, volumes whose answers are "yes" would meet in one step, those of
    "no" in another, and a model would learn neither. The last step is filled up with groups of weight 0.
    """
    rng = random.Random(f"{seed} {epoch}")
    groups = group_indices(rows, questions_per_volume, rng)
    rng.shuffle(groups)
    size = WINDOW * groups_per_step
    steps = [step for at in range(0, len(groups), size) for step in _window(rows, groups[at : at + size], groups_per_step, rng)]
    steps.sort(key=len, reverse=True)  # stable: the short one goes last
    numbered = iter(range(len(groups)))
    return [_filled([Group(group, next(numbered)) for group in step], groups_per_step) for step in steps]


def steps_per_epoch(rows: Sequence[TrainRow], questions_per_volume: int, groups_per_step: int) -> int:
    """Return how many steps any epoch has."""
    return -(-len(group_indices(rows, questions_per_volume)) // groups_per_step)


def cost(rows: Sequence[TrainRow], group: Sequence[int]) -> int:
    """Return roughly what a group costs, in characters of text."""
    return sum(rows[index].size + VOLUME_COST * len(rows[index].videos) for index in group)


def _window(
    rows: Sequence[TrainRow], groups: list[tuple[int, ...]], groups_per_step: int, rng: random.Random
) -> list[list[tuple[int, ...]]]:
    offset = rng.random()  # no two lengths are told apart in every epoch
    ordered = sorted(groups, key=lambda group: math.floor(math.log(cost(rows, group), ALIKE) + offset))
    steps = [ordered[at : at + groups_per_step] for at in range(0, len(ordered), groups_per_step)]
    rng.shuffle(steps)
    return steps


def _filled(step: list[Group], slots: int) -> list[Group]:
    empty = slots - len(step)
    weight = slots / len(step)
    return [group._replace(weight=weight) for group in step] + [step[-1]._replace(weight=0.0)] * empty


AIR_HU = -1000


@dataclass(frozen=True)
class Augment:
    """What is done to a volume, drawn anew for every reading. kind: none, intensity, affine or both."""

    kind: str = "none"
    degrees: float = 5.0
    translation_mm: float = 10.0
    scale: float = 0.1
    noise_hu: float = 25.0
    log_gamma: float = 0.1

    def __call__(self, path: str, rng: random.Random) -> Any:
        """Return the path when nothing is to be done, else int16 HU [z, y, x] on the model grid."""
        if self.kind == "none" or path.endswith(NIFTI):
            return path
        volume = open_volume(path, grid="model")
        return self.applied(volume.numpy(), volume.geometry.spacing_zyx_mm, rng)

    def applied(self, hu_zyx: np.ndarray, spacing_zyx_mm: tuple[float, float, float], rng: random.Random) -> np.ndarray:
        """Return the augmented array. torchio draws from torch's generator, which is left as it was."""
        import torchio  # an extra

        image = torchio.ScalarImage(
            tensor=torch.from_numpy(hu_zyx[None].astype(np.float32)), affine=np.diag([*spacing_zyx_mm, 1.0])
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.getrandbits(63))
            for transform in self._transforms(torchio):
                image = transform(image)
        low, high = float(hu_zyx.min()), float(hu_zyx.max())
        return np.rint(image.data[0].numpy()).clip(low, high).astype(np.int16)

    def _transforms(self, torchio: Any) -> list[Any]:
        found = []
        if self.kind in ("affine", "both"):
            found.append(
                torchio.RandomAffine(
                    scales=self.scale, degrees=self.degrees, translation=self.translation_mm, default_pad_value=AIR_HU
                )
            )
        if self.kind in ("intensity", "both"):
            found += [torchio.RandomGamma(log_gamma=self.log_gamma), torchio.RandomNoise(std=(0, self.noise_hu))]
        return found


STAND_IN = [{"role": "user", "content": "."}, {"role": "assistant", "content": "."}]


@dataclass(frozen=True)
class Batch:
    """A group, ready for the model.

    inputs   of PhotonForConditionalGeneration.forward; `prefix` is there when the rows share a volume's encoding
    flips    bool[K], rows to flip once the curriculum flips
    ids      of its rows
    weight   what its loss counts: 0 for one that only fills up a step, or that could not be read
    volumes  how many volumes were read
    error    why it could not be read, "" if it could
    grounding  float32[K, L], where each row's subject lies (see grounding.of_rows); None for a group that has none
    """

    inputs: dict[str, Any]
    flips: Tensor
    ids: list[str]
    weight: float
    volumes: int = 0
    error: str = ""
    grounding: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with its tensors on the device."""
        moved = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in self.inputs.items()}
        grounding = None if self.grounding is None else self.grounding.to(device)
        return replace(self, inputs=moved, flips=self.flips.to(device), grounding=grounding)

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
        grounding = None
        if rng.random() < self.reading.robustness and rows[0].videos:
            self._perturb(inputs, len(rows), generator)
        elif self.reading.groundings and rows[0].videos:
            visual_KL = inputs["input_ids"] == self.processor.config.video_token_id
            grounding = of_rows(rows, self.reading.groundings, visual_KL)
        longest = int(inputs["attention_mask"].sum(1).max())
        if self.reading.max_length is not None and longest > self.reading.max_length:
            raise ValueError(f"at most {self.reading.max_length} tokens wanted, got {longest}; raise max_length")
        flips = torch.rand(len(rows), generator=generator) < self.reading.flip
        volumes = len(rows[0].videos) if shares else sum(len(row.videos) for row in rows)
        return Batch(inputs, flips, [row.id for row in rows], group.weight, volumes, grounding=grounding)

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
    """Return inputs of rows that begin alike up to the end of their last volume, given once; see `with_suffixes`."""
    first = processor(rows=rows[:1], for_training=True)
    encoded = [(first["input_ids"][0], first["labels"][0]), *map(processor.training_ids, rows[1:])]
    length = prefix_length(first["input_ids"][0], processor.config)
    shared_P = first["input_ids"][0, :length]
    assert all(ids[:length].equal(shared_P) for ids, _ in encoded), "rows of one group begin alike"
    own = [ids[length:] for ids, _ in encoded]
    return {
        "input_ids": with_suffixes(shared_P, own, processor.tokenizer.pad_token_id),
        "attention_mask": with_suffixes(torch.ones_like(shared_P), [torch.ones_like(ids) for ids in own], 0),
        "labels": with_suffixes(first["labels"][0, :length], [labels[length:] for _, labels in encoded], IGNORED),
        "prefix": length,
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
        "prefix": len(ids_P),
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
