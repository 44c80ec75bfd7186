"""How fast a run is: tokens and FLOPs per second of its steps, and a profile of a few of them.

Legend: B rows of a micro-batch, M tokens of a row after pruning.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, schedule

from photon_data.files import write_whole
from photon_train import costs
from photon_train.configuration_photon import Phase, PhotonConfig
from photon_train.costs import peak_memory_mib, peak_tflops
from photon_train.modeling_photon import PhotonOutput
from photon_train.scheduling import is_passive
from photon_train.training.batches import Batch
from photon_train.training.config import TrainConfig

PROFILE = "profile"  # folder of the run
TRACE, SNAPSHOT = "trace.json.gz", "memory.pickle"  # for perfetto.dev, and for pytorch.org/memory_viz
PROFILED = {"wait": 1, "warmup": 1, "active": 3, "repeat": 1}  # steps, of which the first ones start things up


def training_flops(
    photon: PhotonConfig, config: TrainConfig, batch: Batch, output: PhotonOutput, phase: Phase
) -> Tensor:
    """Return the FLOPs that a micro-batch needs, 0-d float64: forward, and gradients of activations and weights.

    What is computed again, or for every question where once would do (all layers of a prefix that nothing is dropped
    of, or before the decoder), does not count. Frozen weights have no gradients.
    """
    layers: Any = costs.layers  # of tensors too
    length_B = batch.inputs["attention_mask"].sum(1).double()
    kept_B = length_B if output.scheduled is None else output.scheduled.kept.mask_BM.sum(1).double()
    shared: Any = batch.inputs.get("prefix") or 0
    count, prefixes = photon.text_config.num_hidden_layers, len(batch.inputs.get("group_sizes", ())) or 1
    lower = count if is_passive(photon, phase) else photon.drop_layer + 1
    if (
        output.scheduled is not None
        and photon.drops_before_decoder(photon.scheduler)
        and phase in (Phase.HARD, Phase.FLIP)
    ):
        lower, length_B, shared = count, kept_B, output.scheduled.keep_BL[0, :shared].sum()
    decoder = prefixes * layers(photon, lower, shared, shared) + layers(photon, count - lower, kept_B, kept_B).sum()
    decoder += layers(photon, lower, length_B - shared, length_B).sum()
    decoder += costs.head(photon) * len(output.answer_rows_N if output.answer_rows_N is not None else ())
    tower, embedding = costs.vision(photon, photon.patches_thw), costs.tower_weights(photon)[0]
    embedding *= 2 * math.prod(photon.patches_thw)
    with_weights = config.lr_language_model > 0 and not config.lora_rank
    through_tower = 3 if config.lr_vision else 2 if config.lr_patch_embedding else 1
    of_volume = through_tower * tower - (embedding if config.lr_vision else 0)  # voxels have no gradient
    return decoder * (3 if with_weights else 2) + batch.volumes * of_volume


def rates(
    row: dict[str, float], seconds: float, waited: float, accelerator: Accelerator, precision: str
) -> dict[str, float]:
    """Return what the log says of the time of a step, given its sums over all processes, and takes "flops" from them.

    tflops_per_second is of one device; mfu is its share of the device's peak in bfloat16, left out where that is not
    known, and for fp32.
    """
    tflops = row.pop("flops") / seconds / accelerator.num_processes / 1e12
    peak = None if precision == "fp32" else peak_tflops(accelerator.device)
    return {
        "seconds": seconds,
        "questions_per_second": row["questions"] / seconds,
        "volumes_per_second": row["volumes"] / seconds,
        "tokens_per_second": row["tokens"] / seconds,
        "tflops_per_second": tflops,
        **({"mfu": tflops / peak} if peak else {}),
        "data_wait_share": waited / seconds,
        "peak_memory_mib": peak_memory_mib(accelerator.device),
    }


class Profiler:
    """A context that writes RUN/profile in the main process: a trace of three steps, and on a GPU their memory."""

    def __init__(self, run: Path, accelerator: Accelerator, *, enabled: bool) -> None:
        self._folder, self._on_gpu = run / PROFILE, accelerator.device.type == "cuda"
        self._profile: Any = None
        if enabled and accelerator.is_main_process:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
            self._profile = profile(
                activities=activities,
                schedule=schedule(**PROFILED),
                on_trace_ready=self._write,
                record_shapes=True,
                profile_memory=True,
            )

    def __enter__(self) -> Self:
        if self._profile:
            if self._on_gpu:
                torch.cuda.memory._record_memory_history(max_entries=200_000)
            self._profile.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._profile:
            self._profile.stop()

    def step(self) -> None:
        """Note that a step is over."""
        if self._profile:
            self._profile.step()

    def _write(self, traced: Any) -> None:
        with write_whole(self._folder) as folder:
            folder.mkdir()
            traced.export_chrome_trace(str(folder / TRACE))
            if self._on_gpu:
                torch.cuda.memory._dump_snapshot(str(folder / SNAPSHOT))
                torch.cuda.memory._record_memory_history(enabled=None)
