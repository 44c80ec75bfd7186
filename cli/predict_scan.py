"""`photon predict SCAN question...`: prints answers, what was kept and what it took."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from photon_cli.kept import KeptOrder, Shown
from photon_cli.options import console
from photon_cli.predict_model import Model
from photon_data.recipe import Policy, Recipe
from photon_train.answering.predictor import Predictor, Reply, ScanAnswers, answer_questions, model_shape_of
from photon_train.answering.scan import ScanInput, open_input
from photon_train.overlay import folders_of


class Look(NamedTuple):
    """How answers are shown: as JSON, and while they come."""

    json: bool
    stream: bool


def predict_scan(
    model: Model, place: str, questions: list[str], made_by: tuple[Recipe, Policy], look: Look, kept: KeptOrder
) -> None:
    """Answer and print, on the grid that the model reads, whatever the recipe's.

    The scan is read before the model: most of what can be wrong is wrong with the scan.
    """
    recipe, policy = made_by
    scan = open_input(place, replace(recipe, model_shape_zyx=model_shape_of(model.place, model.revision)), policy)
    asker = model.load()
    shown = Shown.of(kept, scan, asker.processor.config.tokens_thw, kept.masks)
    if look.stream and not look.json:
        asked = _streamed(asker, scan, questions)
    else:
        asked = answer_questions(asker, questions, scan.model, scan.id, scan.seconds)
    recalls = [_show(shown, question, reply) for question, reply in zip(questions, asked.replies, strict=True)]
    if look.json:
        print(json.dumps(_as_json(model, scan, questions, asked, recalls), indent=1))
        return
    for question, reply, recall in zip(questions, asked.replies, recalls, strict=True):
        if not look.stream:
            _print_answer(question, reply)
        _print_kept(reply, recall)
    if kept.overlay:
        console.print(f"overlays: {kept.overlay}", soft_wrap=True)
    console.print(f"{scan.id}: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in asked.seconds.items()))


def _streamed(asker: Predictor, scan: ScanInput, questions: list[str]) -> ScanAnswers:
    """Print each answer while it comes, behind its question."""
    from transformers import TextStreamer

    waiting = iter(questions)

    class Streamer(TextStreamer):
        def put(self, value: Any) -> None:
            if self.next_tokens_are_prompt:
                console.print(next(waiting), style="bold", soft_wrap=True)
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            console.print(text, end="\n" if stream_end else "", soft_wrap=True)

    streamer = Streamer(asker.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    return answer_questions(asker, questions, scan.model, scan.id, scan.seconds, streamer)


def _show(shown: Shown, question: str, reply: Reply) -> dict[str, Any]:
    """Write what was kept for one question where that was asked for; return the recall of each mask."""
    overlay = shown.order.overlay
    folder = folders_of(overlay, reply.prediction.id, 1)[0] if overlay else None
    return shown.show(folder, question, reply.keep_V, reply.saliency_V)


def _print_answer(question: str, reply: Reply) -> None:
    console.print(question, style="bold", soft_wrap=True)
    console.print(reply.prediction.response, soft_wrap=True)


def _print_kept(reply: Reply, recalls: dict[str, Any]) -> None:
    row = reply.prediction
    console.print(f"{row.id}: {row.kept_tokens} of {row.visual_tokens} tokens kept ({row.scheduler})", style="dim")
    for name, recall in recalls.items():
        console.print(f"  {name}: {recall['recall']:.1%} of {recall['voxels']} voxels kept, chance {recall['chance']:.1%}")


def _as_json(
    model: Model, scan: ScanInput, questions: list[str], asked: ScanAnswers, recalls: list[dict[str, Any]]
) -> dict[str, Any]:
    rows = [
        {"question": question, **asdict(reply.prediction), "recall": recall}
        for question, reply, recall in zip(questions, asked.replies, recalls, strict=True)
    ]
    return {"model": model.place, "volume_id": scan.id, "seconds": asked.seconds, "predictions": rows}
