"""The body of `photon predict`.

One scan and some questions -> answers on the terminal. Rows of manifests -> a file of predictions.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import TextStreamer
from transformers.utils.logging import disable_progress_bar

from photon_cli.terminal import ProgressBar, console, numbers, print_lines, window_of
from photon_data.errors import UsageError
from photon_data.files import NO_SPACE, write_whole
from photon_data.picture import AUTO, resolve_window
from photon_data.questions.table import VIDEO_TAG
from photon_train.answering import manifest
from photon_train.answering.generation import AnswerSettings
from photon_train.answering.loading import load_predictor
from photon_train.answering.manifest import WHOLE, Outcome, Shard
from photon_train.answering.predictor import Predictor, Reply, answer_questions
from photon_train.answering.request import RequestGroup
from photon_train.answering.scan import ScanInput, open_input
from photon_train.kept_tokens import CountedMask, MaskFolder, counted_masks
from photon_train.overlay import ASKED, Canvas, View, folders_of, write_overlay
from photon_train.rows import Row, plain_row, prompt_of, read_rows, volume_id_of

RECALL = "recall.json"
SHOWN_FAILURES = 10

Load = partial[Predictor]  # called with keywords that replace some of its own


def batch_of(text: str) -> int | None:
    """Return what --batch says: a number of questions, or None for as many as memory holds."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--batch: expected a number above 0 or auto, found {text!r}")
    return int(text)


def loader(model: str, answers: AnswerSettings, dtype: str, revision: str | None, **options: Any) -> Load:
    """Return the function that loads the model of the command's options; its keywords replace some of them."""
    disable_progress_bar()
    return partial(load_predictor, model, answers, dtype=dtype, revision=revision, **options)


class Overlays(NamedTuple):
    """What is to be shown of kept tokens."""

    folder: Path | None  # for pictures and NIfTI files
    view: View
    masks: str | None  # a folder of masks, or a prepared one; the recall of its masks is measured


def overlays_of(folder: Path | None, window: str, at: str | None, masks: str | None) -> Overlays:
    """Return what --overlay, --window, --at and --masks say; UsageError now, not when everything is answered."""
    window_hu = window_of(window)
    if window_hu not in (ASKED, AUTO):
        resolve_window(window_hu, [])
    return Overlays(folder, View(window_hu, numbers(at, 3, "--at") if at else None), masks)


class _ShownScan:
    """A scan on which the kept tokens of several questions are drawn and measured: volume `number` of `count`."""

    def __init__(self, overlays: Overlays, scan: ScanInput, predictor: Predictor, number: int, count: int) -> None:
        self.folder, self.number, self.count = overlays.folder, number, count
        canvas = Canvas(scan.volume, scan.native, predictor.processor.config.tokens_thw, overlays.view)
        masks = _masks(scan, overlays.masks, canvas) if overlays.masks else []
        self.canvas = replace(canvas, masks=masks)

    def write(self, reply: Reply, title: str) -> dict[str, Any]:
        """Write the overlay of one question, if there is a folder, and return the recall of each mask by name."""
        keep_V, saliency_V = (np.split(each, self.count)[self.number] for each in (reply.keep_V, reply.saliency_V))
        found = {mask.name: mask.recall(keep_V)._asdict() for mask in self.canvas.masks}
        recalls = {name: {k: v if v == v else None for k, v in one.items()} for name, one in found.items()}  # no NaN
        if self.folder:
            folder = folders_of(self.folder, reply.prediction.id, self.count)[self.number]
            write_overlay(folder, self.canvas, keep_V, saliency_V, title, reply.prediction.response)
            if recalls:
                with write_whole(folder / RECALL) as temporary:
                    temporary.write_text(json.dumps(recalls, indent=1) + "\n")
        return recalls


def _masks(scan: ScanInput, place: str, canvas: Canvas) -> list[CountedMask]:
    """Return the masks of a scan, counted on its tokens; of a prepared folder, print those that were refused."""
    home = MaskFolder(place)
    if not home.is_prepared:
        return counted_masks(home.out.path, canvas.cells)
    masks, refused = home.stored(scan.store, canvas.tokens_zyx)
    print_lines(f"no mask {name} of {scan.id}: {why}" for name, why in refused.items())
    return masks


# One scan


def predict_scan(
    load: Load,
    model: str,
    scans: Sequence[ScanInput],
    questions: list[str],
    overlays: Overlays,
    *,
    as_json: bool,
    stream: bool,
) -> bool:
    """Answer questions about a scan, and those before it, and print the answers, what was kept and what it took.

    Return whether all is there; an overlay that fails costs no answer, and is named behind the answers.
    """
    predictor, last = load(), scans[-1]
    streamer = _streamer(predictor, questions) if stream and not as_json else None
    spent = {stage: sum(scan.seconds[stage] for scan in scans) for stage in last.seconds}
    volumes = [scan.model for scan in scans]
    replies, seconds = answer_questions(predictor, questions, volumes, last.id, spent, streamer)
    answers: list[dict[str, Any]] = [
        {"question": question, **asdict(reply.prediction), "recall": {}}
        for question, reply in zip(questions, replies, strict=True)
    ]
    failures = [f"{answer['id']}: {answer['error']}" for answer in answers if answer["error"]]
    if not failures:
        try:
            _show(overlays, scans, predictor, answers, replies)
        except (ValueError, OSError) as error:
            failures.append(f"no overlay: {error}")
    if as_json:
        content = {"model": model, "volume_id": last.id, "seconds": seconds, "predictions": answers}
        print(json.dumps(content, indent=1))
    else:
        for answer in answers:
            _print_answer(answer, with_response=not stream)
        if overlays.folder and not failures:
            console.print(f"overlays: {overlays.folder}", soft_wrap=True)
        names = " and ".join(scan.id for scan in scans)
        console.print(f"{names}: " + ", ".join(f"{stage} {duration:.2f} s" for stage, duration in seconds.items()))
    print_lines(failures)
    return not failures


def _show(
    overlays: Overlays,
    scans: Sequence[ScanInput],
    predictor: Predictor,
    answers: Sequence[dict[str, Any]],
    replies: Sequence[Reply],
) -> None:
    """Write the overlays of the answers, and add the recall of masks, which are those of the last scan, to each."""
    for number, scan in enumerate(scans):
        of_scan = overlays if number == len(scans) - 1 else overlays._replace(masks=None)
        shown = _ShownScan(of_scan, scan, predictor, number, len(scans))
        for answer, reply in zip(answers, replies, strict=True):
            answer["recall"] = shown.write(reply, answer["question"])


def _streamer(predictor: Predictor, questions: Sequence[str]) -> TextStreamer:
    """Return a streamer that prints each question, then its answer while it is generated."""
    questions_left = iter(questions)

    class Streamer(TextStreamer):
        def put(self, value: Any) -> None:
            if self.next_tokens_are_prompt:
                console.print(next(questions_left), style="bold", soft_wrap=True)
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            console.print(text, end="\n" if stream_end else "", soft_wrap=True)

    return Streamer(predictor.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)


def _print_answer(answer: dict[str, Any], *, with_response: bool) -> None:
    if with_response:
        console.print(answer["question"], style="bold", soft_wrap=True)
        for text in answer["samples"] or [answer["response"]]:
            console.print(text, soft_wrap=True)
    kept = f"{answer['kept_tokens']} of {answer['visual_tokens']} tokens kept"
    console.print(f"{answer['id']}: {kept} ({answer['scheduler']})", style="dim")
    for name, found in answer["recall"].items():
        of_voxels = f"{found['recall']:.1%} of {found['voxels']} voxels kept" if found["voxels"] else "an empty mask"
        console.print(f"  {name}: {of_voxels}" + (f", chance {found['chance']:.1%}" if found["voxels"] else ""))


# Rows of manifests


def predict_rows(
    load: Load, device: str, data: Sequence[Path], output: Path, shard: str | None, overlays: Overlays
) -> bool:
    """Answer the rows into a file, with progress; return whether all of this part have an answer."""
    rows = read_all(data)
    part, local_rank = shard_of(shard)
    predictor = load(device=device_of(device, local_rank))
    unshown: dict[str, str] = {}

    def on_replies(group: RequestGroup, replies: Sequence[Reply]) -> None:
        bar.on_replies(group, replies)
        try:
            if overlays.folder:
                _write_overlays(overlays, predictor, group, replies)
        except (ValueError, OSError) as error:  # no reason not to answer the others
            if isinstance(error, OSError) and error.errno in NO_SPACE:
                raise
            unshown[group.name] = str(error)

    with _AnsweringBar("answering") as bar:
        outcome = manifest.predict_rows(predictor, rows, output, part, on_start=bar.on_start, on_batch=on_replies)
    place = str(output) if outcome.merged else f"{part.path(output)}; the last part to end writes {output}"
    _print_outcome(outcome, bar, place, unshown)
    return not (outcome.failed or unshown)


def answer_rows(predictor: Predictor, rows: Sequence[Row], path: Path, part: Shard = WHOLE) -> None:
    """Answer this part of the rows into a file, with progress and a summary; what it answers already stays."""
    with _AnsweringBar("answering") as bar:
        outcome = manifest.predict_rows(predictor, rows, path, part, on_start=bar.on_start, on_batch=bar.on_replies)
    _print_outcome(outcome, bar, str(path), {})


def read_all(data: Sequence[Path]) -> list[Row]:
    """Return the rows of manifests, of other makers' too: a row without an id is called after its line."""
    return [plain_row(row, f"{path.stem}-{number}") for path in data for number, row in enumerate(read_rows(path), 1)]


def device_of(device: str, local_rank: int | None) -> str:
    """Return the device of this process: under torchrun, a GPU of its own."""
    is_free = local_rank is not None and device in ("auto", "cuda") and torch.cuda.is_available()
    return f"cuda:{local_rank}" if is_free else device


def shard_of(shard: str | None) -> tuple[Shard, int | None]:
    """Return this process's part of the rows, and its local rank under torchrun; UsageError for what is no I/N."""
    if shard is None and "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        rank = int(os.environ["RANK"])
        return Shard(rank, int(os.environ["WORLD_SIZE"])), int(os.environ.get("LOCAL_RANK", rank))
    if shard is None:
        return WHOLE, None
    index, _, count = shard.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UsageError(f"--shard: expected I/N with I from 0 to N - 1, for example 0/4, found {shard!r}")
    return Shard(int(index), int(count)), None


def _write_overlays(overlays: Overlays, predictor: Predictor, group: RequestGroup, replies: Sequence[Reply]) -> None:
    """Write what was kept of each volume of a group; a volume with masks has their recall beside it."""
    titles = {one.id: prompt_of(one.row).replace(VIDEO_TAG, "").strip() for one in group.requests}
    for number, video in enumerate(group.videos):
        scan = open_input(str(video), id=volume_id_of(group.requests[0].row))
        home = MaskFolder(overlays.masks) if overlays.masks else None
        masks = home and home.has(scan.id) and (home.out.url if home.is_prepared else home.out.at(scan.id))
        of_volume = overlays._replace(masks=masks or None)
        shown = _ShownScan(of_volume, scan, predictor, number, len(group.videos))
        for reply in replies:
            if not reply.prediction.error:
                shown.write(reply, titles[reply.prediction.id])


class _AnsweringBar(ProgressBar):
    """Counts the rows that are answered, and the visual tokens that are kept."""

    total = done = kept = visual = 0

    def on_start(self, total: int, done_before: int) -> None:
        self.total, self.done = total, done_before
        console.print(f"{total} rows, {done_before} of them answered before", soft_wrap=True)
        self.update(total=total, completed=done_before)

    def on_replies(self, group: RequestGroup, replies: Sequence[Reply]) -> None:
        self.done += len(replies)
        self.kept += sum(reply.prediction.kept_tokens for reply in replies)
        self.visual += sum(reply.prediction.visual_tokens for reply in replies)
        self.update(completed=self.done, detail=self.kept_share())
        self.line(f"{self.done} of {self.total} {self.kept_share()}")

    def kept_share(self) -> str:
        return f"{self.kept / self.visual:.1%} of visual tokens kept" if self.visual else ""


def _print_outcome(outcome: Outcome, bar: _AnsweringBar, place: str, unshown: dict[str, str]) -> None:
    """Print how many rows were answered, why some were not, and where the predictions are."""
    rate = f", {outcome.answered / (time.monotonic() - bar.start_s):.2f} questions/s" if outcome.answered else ""
    counts = f"{outcome.answered} answered, {outcome.before} before, {len(outcome.failed)} failed"
    console.print(f"{counts}{rate} {bar.kept_share()}")
    if outcome.answered:
        waited = outcome.waited_s / max(time.monotonic() - bar.start_s, 1e-9)
        console.print(f"{outcome.batch} questions at a time; waited for volumes {waited:.1%} of the time")
    if outcome.recipes > 1:
        console.print(f"note: the stores were prepared by {outcome.recipes} recipes: sizes in mm may not be comparable")
    if outcome.changed:
        console.print(f"{outcome.changed} of them again: their questions or the names of their volumes changed")
    for title, reasons, rest in (
        ("failed", outcome.failed, "their lines have an error"),
        ("no overlay of", unshown, "none of these has an overlay"),
    ):
        print_lines(f"{title} {name}: {reason}" for name, reason in list(reasons.items())[:SHOWN_FAILURES])
        if len(reasons) > SHOWN_FAILURES:
            console.print(f"and {len(reasons) - SHOWN_FAILURES} more; {rest}")
    console.print(f"predictions: {place}", soft_wrap=True)
