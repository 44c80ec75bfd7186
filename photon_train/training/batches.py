"""The micro-batches of a plan -> model inputs, read by worker processes.

What is random in a micro-batch (perturbation, flips, augmentation) is drawn from the seed, the epoch and the number
of the micro-batch. The number of workers or devices changes nothing, nor does a restart.

Legend: K rows of a micro-batch, L tokens of a padded row, P tokens of a prefix or patch rows, X voxels of a patch.
"""

from __future__ import annotations

import random
import resource
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from photon_data.store import NIFTI, open_volume
from photon_train.attention import rope_index
from photon_train.configuration_photon import IGNORED, PhotonConfig
from photon_train.losses import answers_of
from photon_train.prefix import with_suffixes
from photon_train.processing_photon import PhotonProcessor
from photon_train.rows import Row, TrainRow, volume_id_of
from photon_train.scheduling import prefix_length, question_mask, visual_mask
from photon_train.training.config import TrainConfig, worker_count
from photon_train.training.plan import MicroBatch
from photon_train.training.processes import read_on

ON_HOST = ("video_grid_thw", "second_per_grid_ts")  # the model would ask the device for their values
VOLUMES = "pixel_values_videos"
PADDING = {  # what stands where a row has no token
    "input_ids": 0,
    "attention_mask": 0,
    "labels": IGNORED,
    "mm_token_type_ids": 0,
    "question_mask": 0,
    "position_ids": 1,
}
STAND_IN = [{"role": "user", "content": "."}, {"role": "assistant", "content": "."}]  # for rows that cannot be read


@dataclass(frozen=True)
class Batch:
    """A micro-batch, or several that go through the model together, ready for it."""

    # Of the model's forward; with `prefix`, the rows share a volume's encoding. Volumes are as stored until `to`.
    inputs: dict[str, Any]
    flips: Tensor  # bool[K], rows to flip once the curriculum flips
    ids: list[str]  # of its rows
    weight: float  # what its loss counts: 0 for one that only fills up a step, or that could not be read
    volumes: int = 0  # how many were read
    error: str = ""  # why it could not be read
    # Of several: how many rows each has, and the share of its loss in theirs.
    group_sizes: tuple[int, ...] = ()
    group_shares: tuple[float, ...] = ()

    @property
    def groups(self) -> int:
        """How many micro-batches there are."""
        return max(len(self.group_sizes), 1)

    def to(self, device: torch.device | str, processor: PhotonProcessor) -> Batch:
        """Return the batch with its tensors on the device, where its volumes are made patches."""
        moved = {
            k: v.to(device, non_blocking=True) if isinstance(v, Tensor) and k not in ON_HOST else v
            for k, v in self.inputs.items()
        }
        if VOLUMES in moved:
            stored = [volume.to(device, non_blocking=True) for volume in moved[VOLUMES]]
            moved[VOLUMES] = torch.cat(list(map(processor.patches_of, stored)))
        return replace(self, inputs=moved, flips=self.flips.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Return the batch with its inputs in pinned memory; torch's DataLoader calls it in a thread of its own."""
        pinned = {k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in self.inputs.items()}
        if VOLUMES in pinned:
            pinned[VOLUMES] = [volume.pin_memory() for volume in pinned[VOLUMES]]
        return replace(self, inputs=pinned, flips=self.flips.pin_memory())


@dataclass(frozen=True, eq=False)
class MicroBatches(Dataset[Batch]):
    """The batch of any micro-batch. Nothing is random unless `training`.

    same_calls: every micro-batch calls the same modules in the same order and gives the same weights a gradient.
    Processes that share weights need it. A volume is then encoded ahead of one question too, and rows without one get
    an idle volume.
    """

    rows: Sequence[TrainRow]
    processor: PhotonProcessor
    config: TrainConfig
    training: bool
    same_calls: bool = False

    def __getitem__(self, micro_batch: MicroBatch) -> Batch:
        """Return its batch. One that cannot be read comes back with `error` set and weight 0."""
        rows = [self.rows[i] for i in micro_batch.rows]
        ids = [row.id for row in rows]
        try:
            inputs, flips, volumes = self._read(rows, micro_batch)
            return Batch(inputs, flips, ids, micro_batch.weight, volumes)
        except Exception as error:  # the edge of a work item: the loop stops or skips, by name
            inputs = self._inputs([{"messages": STAND_IN}], shared=False)
            return Batch(inputs, torch.zeros(1, dtype=torch.bool), ids, 0.0, 0, f"{ids[0]}: {error}")

    def _read(self, rows: list[TrainRow], drawn_for: MicroBatch) -> tuple[dict[str, Any], Tensor, int]:
        """Return the model inputs, which rows to flip, and how many volumes were read."""
        rng = random.Random(f"{self.config.seed} {drawn_for.epoch} {drawn_for.number}")
        videos = [video for row in rows for video in row.videos]
        shared = bool(videos) and (self.same_calls or (len(rows) > 1 and self.config.share_prefix))
        ids = {video: volume_id_of(row._asdict()) for row in rows for video in row.videos}
        volumes = {path: self._volume(path, id, rng) for path, id in ids.items()}
        inputs = self._inputs([row._asdict() | {"videos": [volumes[v] for v in row.videos]} for row in rows], shared)
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        photon = self.processor.config
        draws = self.training and self.config.stage == "s2"
        if draws and videos and rng.random() < photon.robustness_probability:
            self._perturb(inputs, len(rows), generator)
        inputs |= self._known(inputs)
        longest = int(inputs["attention_mask"].sum(1).max())
        if longest > self.config.max_length:
            raise ValueError(f"expected at most {self.config.max_length} tokens, found {longest}; raise max_length")
        flips = torch.rand(len(rows), generator=generator) < (photon.flip_probability if draws else 0.0)
        return inputs, flips, len(rows[0].videos if shared else videos)

    def _volume(self, path: str, id: str | None, rng: random.Random) -> Any:
        """Return what the processor reads: the path, or an augmented volume, int16 HU [z, y, x] on the model grid."""
        if not self.training or self.config.augment == "none" or path.endswith(NIFTI):
            return path
        volume = open_volume(path, grid="model", id=id)
        return augmented(volume.numpy(), volume.geometry.spacing_zyx_mm, self.config.augment, rng)

    def _inputs(self, rows: Sequence[Row], shared: bool) -> dict[str, Any]:
        if shared:
            return shared_inputs(self.processor, rows)
        inputs = dict(self.processor(rows=rows, for_training=True, as_stored=True))
        return inputs | idle_volume_before(inputs, self.processor.config) if self.same_calls else inputs

    def _known(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the model would have to ask the device for: positions, questions, where answers stand."""
        photon, ids_BL, mask_BL = self.processor.config, inputs["input_ids"], inputs["attention_mask"]
        grids, seconds = (inputs.get(name) for name in ("video_grid_thw", "second_per_grid_ts"))
        repeats = len(ids_BL) if "prefix" in inputs else 1  # volumes of a prefix are given once
        grids, seconds = ([] if x is None else x.tolist() * repeats for x in (grids, seconds))
        seconds = seconds or [1.0] * len(grids)
        question_BL = inputs.get("question_mask")
        question_BL = question_mask(ids_BL, photon) & mask_BL.bool() if question_BL is None else question_BL
        return {
            "position_ids": rope_index(2 * visual_mask(ids_BL, photon), mask_BL, [], grids, seconds, photon)[0],
            "question_mask": question_BL,
            "question_tokens": int(question_BL.sum(1).max()),
            "answers": answers_of(inputs["labels"], mask_BL),
        }

    def _perturb(self, inputs: dict[str, Any], rows: int, generator: torch.Generator) -> None:
        """Perturb every volume in one way; all rows are then trained to be unsure."""
        photon = self.processor.config
        how = draw_perturbation(photon, generator)
        seed = int(torch.randint(2**31, (1,), generator=generator))
        patches = map(self.processor.patches_of, inputs[VOLUMES])
        inputs[VOLUMES] = [perturb(each, how, photon, torch.Generator().manual_seed(seed)) for each in patches]
        inputs["perturbed"] = torch.ones(rows, dtype=torch.bool)


class Perturbation(Enum):
    """What is done to a volume's patch rows."""

    SHUFFLE_PATCHES = "rows in another order"
    SHUFFLE_VOXELS = "rows in another order, and the voxels in each row"
    KEEP_PATCHES = "some of the rows stay, the others are 0"
    KEEP_VOXELS = "some of the voxel positions stay, the others are 0"
    NOISE = "uniform noise"
    ZEROS = "zeros"


def draw_perturbation(config: PhotonConfig, generator: torch.Generator) -> Perturbation:
    """Return one perturbation, drawn by the configuration's chances."""
    chances = config.perturbation_chances
    index = torch.multinomial(torch.tensor(list(chances.values())), 1, generator=generator)
    return Perturbation[list(chances)[int(index)].upper()]


def perturb(patches_PX: Tensor, how: Perturbation, config: PhotonConfig, generator: torch.Generator) -> Tensor:
    """Return a new float[P, X], the patch rows of one volume, perturbed. Draws from the (CPU) generator only."""

    def permuted(n: int) -> Tensor:
        return torch.randperm(n, generator=generator).to(patches_PX.device)

    rows, voxels = patches_PX.shape
    match how:
        case Perturbation.SHUFFLE_PATCHES:
            return patches_PX[permuted(rows)]
        case Perturbation.SHUFFLE_VOXELS:
            order_PX = torch.rand(rows, voxels, generator=generator).argsort(1).to(patches_PX.device)
            return patches_PX[permuted(rows)].gather(1, order_PX)
        case Perturbation.KEEP_PATCHES:
            kept = permuted(rows)[: round(config.perturb_kept_patches * rows)]
            return torch.zeros_like(patches_PX).index_copy(0, kept, patches_PX[kept])
        case Perturbation.KEEP_VOXELS:
            kept = permuted(voxels)[: round(config.perturb_kept_voxels * voxels)]
            return torch.zeros_like(patches_PX).index_copy(1, kept, patches_PX[:, kept])
        case Perturbation.NOISE:
            return torch.rand(rows, voxels, generator=generator).to(patches_PX)
        case Perturbation.ZEROS:
            return torch.zeros_like(patches_PX)


def augmented(hu_zyx: np.ndarray, spacing_zyx_mm: Sequence[float], kind: str, rng: random.Random) -> np.ndarray:
    """Return int16 HU of the same shape, changed at random by torchio (an extra). kind: intensity, affine or both.

    torchio draws from torch's own generator, which is left as it was.
    """
    import torchio

    transforms: list[Any] = []
    if kind in ("affine", "both"):  # never a reflection: left stays left; what comes in is air
        transforms += [torchio.RandomAffine(scales=0.1, degrees=5.0, translation=10.0, default_pad_value=-1000)]
    if kind in ("intensity", "both"):
        transforms += [torchio.RandomGamma(log_gamma=0.1), torchio.RandomNoise(std=(0, 25.0))]
    tensor = torch.from_numpy(hu_zyx[None].astype(np.float32))
    image = torchio.ScalarImage(tensor=tensor, affine=np.diag([*spacing_zyx_mm, 1.0]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.getrandbits(63))
        for transform in transforms:
            image = transform(image)
    return np.rint(image.data[0].numpy()).clip(float(hu_zyx.min()), float(hu_zyx.max())).astype(np.int16)


def shared_inputs(processor: PhotonProcessor, rows: Sequence[Row]) -> dict[str, Any]:
    """Return inputs of rows that share a prefix: the ids as `with_suffixes` lays them out, the volumes once."""
    first = processor(rows=rows[:1], for_training=True, as_stored=True)
    encoded = [(first["input_ids"][0], first["labels"][0]), *map(processor.training_ids, rows[1:])]
    length = prefix_length(first["input_ids"][0], processor.config)
    prefix_P = first["input_ids"][0, :length]
    assert all(ids[:length].equal(prefix_P) for ids, _ in encoded), "rows of one micro-batch share a prefix"
    suffixes = [ids[length:] for ids, _ in encoded]
    return {
        "input_ids": with_suffixes(prefix_P, suffixes, processor.tokenizer.pad_token_id),
        "attention_mask": with_suffixes(torch.ones_like(prefix_P), [torch.ones_like(ids) for ids in suffixes], 0),
        "labels": with_suffixes(first["labels"][0, :length], [labels[length:] for _, labels in encoded], IGNORED),
        "prefix": length,
        **{name: first[name] for name in (VOLUMES, *ON_HOST)},
    }


def together(batches: Sequence[Batch], processor: PhotonProcessor) -> list[Batch]:
    """Return the batches, those of one shape as one: a prefix of one length or none, as many volumes.

    Loss and gradients of one, times its weight, are the sums of those of its parts. What has weight 0 only fills up,
    and is left out beside others. What could not be read stays alone.
    """
    readable = [batch for batch in batches if not batch.error]
    readable = [batch for batch in readable if batch.weight] or readable[:1]
    of_shape: dict[Hashable, list[Batch]] = defaultdict(list)
    for number, batch in enumerate(readable):
        rows, grids = len(batch.flips), batch.inputs.get("video_grid_thw", ())
        shape = (0, len(grids) / rows) if "prefix" not in batch.inputs else (batch.inputs["prefix"], len(grids))
        # Rows of a prefix keep as many tokens as those of the next, or cannot stand beside them.
        is_alone = "prefix" in batch.inputs and processor.config.scheduler == "nucleus"
        of_shape[shape, number if is_alone else None].append(batch)
    joined = [own[0] if len(own) == 1 else _joined(own, processor.tokenizer.pad_token_id) for own in of_shape.values()]
    return joined + [batch for batch in batches if batch.error]


def _joined(batches: Sequence[Batch], pad_token_id: int) -> Batch:
    """Return batches of one shape as one. What is missing in the shorter rows is put before or behind their prefix."""
    every, padding = [batch.inputs for batch in batches], {**PADDING, "input_ids": pad_token_id}
    prefix: int = every[0].get("prefix", 0)
    longest = max(inputs["input_ids"].shape[1] for inputs in every)

    def padded(x_KL: Tensor, value: int) -> Tensor:
        own = F.pad(x_KL[..., prefix:], (longest - x_KL.shape[-1], 0), value=value)
        return torch.cat([x_KL[..., :prefix], own], dim=-1)

    inputs: dict[str, Any] = {
        name: torch.cat([padded(one[name], value) for one in every], dim=-2)
        for name, value in padding.items()
        if name in every[0]
    }
    if VOLUMES in every[0]:
        inputs |= {name: torch.cat([one[name] for one in every]) for name in ON_HOST}
        inputs[VOLUMES] = [volume for one in every for volume in one[VOLUMES]]
    sizes, weight = tuple(len(batch.flips) for batch in batches), sum(batch.weight for batch in batches)
    if prefix:
        inputs |= {"prefix": prefix, "group_sizes": sizes}
    if any("perturbed" in one for one in every):
        of_each = [one.get("perturbed", torch.zeros(n).bool()) for one, n in zip(every, sizes, strict=True)]
        inputs["perturbed"] = torch.cat(of_each)
    # The loss of a group is the mean over its answer tokens; that of the batch, the weighted mean over groups.
    shares = tuple(batch.weight / weight for batch in batches)
    answered = [max(batch.inputs["answers"].shape[1], 1) for batch in batches]
    counts = [share / n for share, n in zip(shares, answered, strict=True)]
    inputs |= {
        "question_tokens": max(one["question_tokens"] for one in every),
        "answers": answers_of(inputs["labels"], inputs["attention_mask"]),
        "answer_weights": torch.cat([torch.full((n,), count) for n, count in zip(sizes, counts, strict=True)]),
    }
    ids, volumes = [id for batch in batches for id in batch.ids], sum(batch.volumes for batch in batches)
    flips = torch.cat([batch.flips for batch in batches])
    return Batch(inputs, flips, ids, weight, volumes, group_sizes=sizes, group_shares=shares)


def idle_volume_before(inputs: Mapping[str, Any], config: PhotonConfig) -> dict[str, Any]:
    """Return what changes in inputs without a volume: one of air and one token stands first. Nothing attends to it."""
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
        VOLUMES: [torch.zeros(side**2, voxels)],
        "video_grid_thw": torch.tensor([[1, side, side]]),
    }


def read_ahead(dataset: MicroBatches, parts: Iterable[list[MicroBatch]], device: torch.device) -> Iterator[list[Batch]]:
    """Yield the batches of each part, `together`; read by worker processes while the device computes.

    The same processes read all parts, which are looked up as they are needed. With workers=0 this process reads.

    OSError when the workers cannot go on: one was killed, or there are too few open files for them.
    """
    workers = worker_count(dataset.config)
    ahead = dataset.config.prefetch if workers else None
    pinned = device.type == "cuda"
    try:
        options: dict[str, Any] = {"prefetch_factor": ahead, "pin_memory": pinned, "worker_init_fn": read_on}
        collate = partial(together, processor=dataset.processor)
        yield from DataLoader(dataset, batch_sampler=parts, collate_fn=collate, num_workers=workers, **options)
    except (RuntimeError, OSError, EOFError) as error:  # of torch: a row that cannot be read is a batch with an error
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        first = str(error).partition(". ")[0] or "one of them ended while it sent a batch"
        remedy = f"raise `ulimit -n` (now {limit}), give them more memory, or set workers to fewer or 0"
        raise OSError(f"the {workers} processes that read ahead cannot go on: {first}; {remedy}") from error
