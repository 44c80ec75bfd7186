"""`photon predict SCAN question...`: prints answers, what was kept and what it took."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any, NamedTuple

from photon_cli.options import console
from photon_cli.predict_model import Model
from photon_data.recipe import Recipe
from photon_train.answering import Asker, Reply
from photon_train.asking import Asked, ask_scan
from photon_train.scan_input import ScanInput, open_input


class Look(NamedTuple):
    """How answers are shown: as JSON, and while they come."""

    json: bool
    stream: bool


def predict_scan(model: Model, place: str, questions: list[str], recipe: Recipe, look: Look) -> None:
    """Answer and print. The scan is read before the model: most of what can be wrong is wrong with the scan."""
    scan = open_input(place, recipe)
    asker = model.load()
    asked = _streamed(asker, scan, questions) if look.stream and not look.json else ask_scan(asker, scan, questions)
    if look.json:
        print(json.dumps(_as_json(model, scan, questions, asked), indent=1))
        return
    if not look.stream:
        for question, reply in zip(questions, asked.replies, strict=True):
            _print_reply(question, reply)
    console.print(f"{scan.id}: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in asked.seconds.items()))


def _streamed(asker: Asker, scan: ScanInput, questions: list[str]) -> Asked:
    """Print each answer while it comes, behind its question."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            console.print(text, end="\n" if stream_end else "", soft_wrap=True)

    waiting = iter(questions)

    class Announcing(Streamer):
        def put(self, value: Any) -> None:
            if self.next_tokens_are_prompt:
                console.print(next(waiting), style="bold", soft_wrap=True)
            super().put(value)

    asked = ask_scan(asker, scan, questions, Announcing(asker.processor.tokenizer, skip_prompt=True, skip_special_tokens=True))
    for reply in asked.replies:
        console.print(_kept(reply), style="dim")
    return asked


def _print_reply(question: str, reply: Reply) -> None:
    console.print(question, style="bold", soft_wrap=True)
    console.print(reply.prediction.response, soft_wrap=True)
    console.print(_kept(reply), style="dim")


def _kept(reply: Reply) -> str:
    return f"{reply.prediction.kept_tokens} of {reply.prediction.visual_tokens} tokens kept ({reply.prediction.scheduler})"


def _as_json(model: Model, scan: ScanInput, questions: list[str], asked: Asked) -> dict[str, Any]:
    rows = [{"question": question, **asdict(reply.prediction)} for question, reply in zip(questions, asked.replies, strict=True)]
    return {"model": model.place, "volume_id": scan.id, "seconds": asked.seconds, "predictions": rows}
