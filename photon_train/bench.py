"""What is measured of training and answering, and what it is compared with: a table of ways of reading a volume.

a way and K questions -> training step | prefill | decode | disk to answer -> seconds, memory, MFU, beside the published

The published figures are a secondary source's, for one question at a time.
"""

from __future__ import annotations

import math
import platform
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from photon_data.errors import UsageError
from photon_data.files import jsonl_bytes
from photon_train.costs import peak_tflops
from photon_train.measuring import (
    ANSWER,
    PATCH_SLICES,
    SIZES,
    Measured,
    Subject,
    attention,
    device,
    dtype,
    keep_counts,
    measure_answers,
    peak_gib,
    question_rows,
    random_subject,
    tidy,
    write_random_store,
)
from photon_train.training.config import TrainConfig
from photon_train.training.loop import run_steps
from photon_train.training.setup import checkpoint_activations, start

WHAT = {"train": "training step", "prefill": "prefill", "decode": "decode", "predict": "disk to answer"}
FRAME_SLICES = 2  # of Qwen2.5-VL's patches
STEPS_AHEAD = 2  # rows beyond the measured steps, so that a run is stopped before it ends and saves


class Way(NamedTuple):
    """A way of reading a volume: a row of the table."""

    title: str
    scheduler: str
    slices: int = PATCH_SLICES  # of a patch, along z
    shares: bool = False  # questions on a volume share its encoding; else each of them has it encoded anew


WAYS = {
    "qwen": Way("Qwen2.5-VL, 7.0K tokens", "none", FRAME_SLICES),
    "none": Way("1.0K tokens", "none"),
    "none-shared": Way("1.0K tokens, shared", "none", shares=True),
    "its": Way("ITS, 390 tokens", "its"),
    "its-shared": Way("ITS, 390 tokens, shared", "its", shares=True),
}
BASELINE = "qwen"

# Iterations and tokens per second and GiB, of one question at a time. What the tokens per second of inference include
# is not said; a 3B model decodes faster than that alone, so they stand beside the whole way from disk to answer.
PUBLISHED: dict[tuple[str, str], dict[str, float]] = {
    ("qwen", "train"): {"iterations_per_second": 0.15, "peak_memory_gib": 134.0},
    ("none", "train"): {"iterations_per_second": 0.64},
    ("its", "train"): {"iterations_per_second": 0.85, "peak_memory_gib": 34.8},
    ("qwen", "predict"): {"tokens_per_second": 2.30, "peak_memory_gib": 26.0},
    ("its", "predict"): {"tokens_per_second": 4.12, "peak_memory_gib": 9.2},
}
PUBLISHED_RATE = {"train": "iterations_per_second", "predict": "tokens_per_second"}

NOTES = (
    "Weights and voxels are random. The threshold is set so that 39 % of the visual tokens stay.",
    "Qwen2.5-VL is emulated: this model without scheduling, its patches of 2 slices, not 14, so that the volume has "
    "28,000 patches and 7,000 tokens; one channel, not three.",
    "Published training ran on several GPUs that shared the optimizer's state (ZeRO-2); here one has all of it.",
    "Published token/s stand beside disk to answer; the source does not say what they include.",
    "tokens/s: text and visual tokens of training and prefill; generated tokens of decode and disk to answer.",
    "Stores were read before: they come from the page cache.",
)


@dataclass(frozen=True)
class BenchSettings:
    """What is measured."""

    size: str = "tiny"  # 3b: the published shapes
    what: tuple[str, ...] = tuple(WHAT)
    questions: tuple[int, ...] = (1, 8)  # K
    ways: tuple[str, ...] = tuple(WAYS)
    repeats: int = 3
    new_tokens: int = 32
    model_shape_zyx: tuple[int, int, int] = (140, 280, 280)
    checkpoints: bool = True  # training computes activations again

    def __post_init__(self) -> None:
        """UsageError for what cannot be measured."""
        for name, found, known in (
            ("size", (self.size,), SIZES),
            ("what", self.what, tuple(WHAT)),
            ("ways", self.ways, tuple(WAYS)),
        ):
            odd = [one for one in found if one not in known]
            if odd or not found:
                said = ", ".join(odd) or "nothing"
                raise UsageError(
                    f"{name}: expected {'some ' if name != 'size' else 'one '}of {', '.join(known)}, found {said}"
                )
        if not self.questions or min(self.questions) < 1:
            raise UsageError(f"questions: expected numbers from 1 on, found {self.questions}; for example 1,8,40")
        if self.repeats < 1 or self.new_tokens < 2:
            raise UsageError(f"expected a repeat and two new tokens, found {self.repeats} and {self.new_tokens}")
        if self.size == "3b" and device().type != "cuda":
            raise UsageError("size: expected tiny on a machine without a GPU, found 3b; it would take hours")


@dataclass(frozen=True)
class Cell:
    """One measurement. None where a number is not known, or was not reached: see `error`."""

    way: str
    what: str
    questions: int
    seconds: float | None = None  # of all K questions, the median
    questions_per_second: float | None = None
    iterations_per_second: float | None = None
    tokens_per_second: float | None = None
    peak_memory_gib: float | None = None  # on a GPU
    tflops: float | None = None  # that are needed
    mfu: float | None = None
    kept_tokens: float | None = None  # of a row's visual tokens, the mean
    visual_tokens: int | None = None
    data_wait_share: float | None = None  # of training
    error: str = ""

    def filled(self, found: Measured) -> Cell:
        """Return the cell with what was measured."""
        peak, seconds = peak_tflops(device()), found.seconds
        return replace(
            self,
            seconds=seconds,
            questions_per_second=self.questions / seconds,
            iterations_per_second=1 / seconds,
            tokens_per_second=found.tokens / seconds,
            peak_memory_gib=found.peak_memory_gib,
            tflops=found.tflops,
            mfu=found.tflops / seconds / peak if peak else None,
            kept_tokens=found.kept_tokens,
            visual_tokens=found.visual_tokens,
            data_wait_share=found.data_wait_share,
        )


def cells_of(settings: BenchSettings) -> list[Cell]:
    """Return what is to be measured, in the order of the table.

    Sharing means nothing to one question alone, and to the baseline further questions are the same once more.
    """
    least = min(settings.questions)
    return [
        Cell(way, what, k)
        for what in settings.what
        for way in settings.ways
        for k in settings.questions
        if (k > 1 or not WAYS[way].shares) and (k == least or way != BASELINE)
    ]


def bench(
    settings: BenchSettings, on_cell: Callable[[int, int, Cell], object] = lambda done, total, cell: None
) -> dict[str, Any]:
    """Return bench.json: the place, the notes, and all cells beside what was published.

    A cell that fails, for want of memory or otherwise, costs that cell. `on_cell` is told how many are done, of how
    many, and the last one.
    """
    cells = cells_of(settings)
    # Training comes last, with a model of its own each time; models of one geometry are built once for the rest.
    order = sorted(range(len(cells)), key=lambda i: (cells[i].what == "train", WAYS[cells[i].way].slices))
    found: dict[int, Cell] = {}
    with tempfile.TemporaryDirectory(prefix="photon-") as name:
        models = _Models(settings, write_random_store(Path(name), settings.model_shape_zyx))
        for i in order:
            found[i] = _attempt(cells[i], settings, models, Path(name) / str(i))
            on_cell(len(found), len(cells), found[i])
    rows = [found[i] for i in range(len(cells))]
    return {
        **place(),
        "settings": asdict(settings),
        "weights": models.weights,
        "ways": {name: WAYS[name].title for name in settings.ways},
        "notes": list(NOTES),
        "cells": [{**asdict(cell), **beside(cell, rows, settings.size)} for cell in rows],
    }


def place() -> dict[str, Any]:
    """Return where and with what is measured."""
    gpu = torch.cuda.get_device_name() if device().type == "cuda" else ""
    return {
        "device": gpu or f"CPU ({platform.machine()}, threads: {torch.get_num_threads()})",
        "dtype": str(dtype()).removeprefix("torch."),
        "attention": attention(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def beside(cell: Cell, rows: Sequence[Cell], size: str) -> dict[str, Any]:
    """Return what was published of a cell, ours as a multiple of it, and both as multiples of the baseline.

    Nothing of a tiny model is a multiple of what was published. Multiples of the baseline are of questions per second,
    by which ways that share can be compared too.
    """
    published = PUBLISHED.get((cell.way, cell.what), {}) if cell.questions == 1 else {}
    ours: dict[str, Any] = asdict(cell) if size == "3b" else {}
    rate_name = PUBLISHED_RATE.get(cell.what, "")
    base = next((row.questions_per_second for row in rows if (row.way, row.what) == (BASELINE, cell.what)), None)
    rate, published_rate = cell.questions_per_second, published.get(rate_name)
    return {
        "published": published,
        "of_published": {name: ours[name] / value for name, value in published.items() if ours.get(name)},
        "speedup": rate / base if rate and base else None,
        "published_speedup": published_rate / PUBLISHED[BASELINE, cell.what][rate_name] if published_rate else None,
    }


class _Models:
    """The last model that was built, for what reads the volume in the same way."""

    def __init__(self, settings: BenchSettings, store: str) -> None:
        self._settings, self._store = settings, store
        self._subject: Subject | None = None
        self.weights = 0

    def subject(self, way: Way) -> Subject:
        """Return a model that reads a volume in the given way."""
        if self._subject is None or self._subject.model.config.vision_config.temporal_patch_size != way.slices:
            self.forget()
            shape = self._settings.model_shape_zyx
            self._subject = random_subject(self._settings.size, self._store, way.slices, model_shape_zyx=shape)
            self.weights = self._subject.model.num_parameters()
        self._subject.model.config.scheduler = way.scheduler
        return self._subject

    def forget(self) -> None:
        """Let the memory of the model go."""
        self._subject = None
        tidy()


def _attempt(cell: Cell, settings: BenchSettings, models: _Models, folder: Path) -> Cell:
    """Return the cell measured, or with the error that it met, whose memory is free again."""
    try:
        return cell.filled(_measured(cell, settings, models, folder))
    except Exception as error:  # the edge of a work item, which records it
        kind = "out of memory" if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
        first = str(error).strip().partition("\n")[0]
        return replace(cell, error=f"{kind}: {first}" if first else kind)
    finally:
        tidy()


def _measured(cell: Cell, settings: BenchSettings, models: _Models, folder: Path) -> Measured:
    way = WAYS[cell.way]
    how: dict[str, Any] = {"shares": way.shares, "repeats": settings.repeats}
    if cell.what != "train":
        return measure_answers(models.subject(way), cell.what, cell.questions, new_tokens=settings.new_tokens, **how)
    models.forget()
    try:
        return measure_training(models.subject(way), cell.questions, folder, checkpoints=settings.checkpoints, **how)
    finally:
        models.forget()


def measure_training(
    subject: Subject, questions: int, folder: Path, *, shares: bool, repeats: int, checkpoints: bool = True
) -> Measured:
    """Return what an optimizer step of K questions takes: reading, forward, backward, clipping, AdamW.

    Without `checkpoints`, activations are kept, not computed again. The subject is changed by it.
    """
    rows = question_rows(subject.store, questions, (repeats + 1 + STEPS_AHEAD) * questions, ANSWER)
    with torch.no_grad():
        keep_counts(subject, [subject.processor.ids(row, for_training=True) for row in rows[:questions]])
    tidy()
    folder.mkdir()
    manifest = folder / "train.jsonl"
    manifest.write_bytes(jsonl_bytes(rows))
    config = TrainConfig(
        stage="s2",
        data=(str(manifest),),
        output=str(folder / "run"),
        groups_per_step=1 if shares else questions,
        questions_per_volume=questions if shares else 1,
        epochs=1,
        precision="bf16" if dtype() is torch.bfloat16 else "fp32",
        gradient_checkpointing=checkpoints,
        vision_gradient_checkpointing=checkpoints,
        max_length=2**20,
        save_every=0,
        track=(),
    )
    rates: dict[str, Any] = {f.name: 1e-12 for f in fields(config) if f.name.startswith("lr_")}
    config = replace(config, **rates)  # what is kept stays as it is
    steps: list[dict[str, Any]] = []

    def on_step(row: dict[str, Any]) -> None:
        steps.append(row)
        if len(steps) == repeats + 1:
            raise _MeasuredError

    checkpoint_activations(subject.model, config)
    with suppress(_MeasuredError):
        run_steps(start(config, resume=False, callback=on_step, loaded=(subject.model, subject.processor)))

    def median(name: str, default: float = math.nan) -> float:
        return statistics.median(row.get(name, default) for row in steps[1:])

    seconds, visual = median("seconds"), subject.processor.visual_tokens()
    tokens, tflops = (seconds * median(f"{name}_per_second") for name in ("tokens", "tflops"))
    kept = visual * median("keep_ratio", 1.0)
    return Measured(seconds, peak_gib(), tokens, tflops, kept, visual, median("data_wait_share"))


class _MeasuredError(Exception):
    """Ends a run before it would save."""
