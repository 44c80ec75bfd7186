"""What is asked of the engine, and what comes back while it answers: pieces of text, then an answer or a failure.

A `Draft` is an answer while it is generated: its tokens, the text that may be shown of them, and whether it has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from photon_train.rows import Prediction, Row


@dataclass(frozen=True)
class Question:
    """A conversation that ends with a question, and how it is to be answered."""

    row: Row  # its `videos` are places of stores
    contents: tuple[str, ...] = ()  # of each of them, a digest of all that decides its voxels
    max_tokens: int = 512  # as photon predict
    temperature: float = 0.0  # 0: the likeliest token at each step
    top_p: float = 1.0
    seed: int = 0
    answers: int = 1
    stop: tuple[str, ...] = ()  # an answer ends before the first of these texts
    logprobs: int | None = None  # with each token, so many of the likeliest; None: no log-probabilities at all
    streams: bool = False  # pieces of text are wanted while they come

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn."""
        return self.temperature > 0


class TokenScore(NamedTuple):
    """A token of an answer and its log-probability, as the model gave it (no temperature), and those of others."""

    text: str
    logprob: float
    others: tuple[tuple[str, float], ...]  # the likeliest, at most as many as asked for


class Piece(NamedTuple):
    """The next piece of an answer."""

    number: int  # of the answer, from 0
    text: str
    scores: tuple[TokenScore, ...]


class Text(NamedTuple):
    """A whole answer."""

    text: str
    finish: str  # "stop": the model or a stop text ended it; "length": max_tokens did
    tokens: int
    scores: tuple[TokenScore, ...]


class Answer(NamedTuple):
    """All answers to a question, and what was kept of the volumes for it."""

    texts: tuple[Text, ...]
    prediction: Prediction
    keep_V: np.ndarray  # bool
    saliency_V: np.ndarray  # float32
    cached_tokens: int  # tokens of the prompt that an earlier question had computed


class Failure(NamedTuple):
    """Why there is no answer."""

    reason: str
    is_of_question: bool  # else something is wrong here


OnEvent = Callable[[Piece | Answer | Failure], object]


class Busy(RuntimeError):
    """Too many questions wait."""

    def __init__(self, waiting: int, retry_after_s: int) -> None:
        super().__init__(f"expected fewer than {waiting} waiting questions, found {waiting}; ask again later")
        self.retry_after_s = retry_after_s


class Closing(RuntimeError):
    """The engine takes no more questions."""


class Asked(Protocol):
    """A question that was submitted."""

    def cancel(self) -> None:
        """Give its place free: nobody waits for the answer any more."""


class Engine(Protocol):
    """What answers questions; photon_train/serving/engine.py has the one that does."""

    def submit(self, question: Question, on_event: OnEvent) -> Asked:
        """Queue a question. ValueError for one that cannot be asked; Busy, Closing."""

    def forget(self, content: str) -> None:
        """Remove what is kept of a volume."""

    def figures(self) -> Mapping[str, float]:
        """Return counts and sizes by name."""

    def close(self, timeout_s: float | None = None) -> int:
        """Answer what waits, then end; after `timeout_s` what is left fails. Return how many questions that are."""

    @property
    def is_open(self) -> bool:
        """Whether questions are taken."""


UNFINISHED = "\ufffd"  # what a letter decodes to whose bytes are not all there yet


@dataclass
class Draft:
    """An answer to a question. If it streams, `on_piece` gets the text piece by piece, each once."""

    number: int
    question: Question
    tokenizer: Any
    ends: Collection[int]  # tokens that end an answer
    on_piece: Callable[[Piece], object]
    is_abandoned: Callable[[], bool]
    tokens: list[int] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    finish: str = ""
    cut: int | None = None  # the letter where a stop text begins
    sent: int = 0  # letters
    sent_scores: int = 0

    def restart(self) -> None:
        """Begin again, for another try; what was sent is not sent again."""
        self.tokens, self.scores, self.finish, self.cut = [], [], "", None

    def add(self, token: int, logits_C: Tensor | None) -> None:
        """Take the next token, and the model's logits that it was chosen from (if they are to be reported)."""
        if self.finish or self.is_abandoned():
            self.finish = self.finish or "stop"
            return
        if token in self.ends:
            self.finish = "stop"
        else:
            self.tokens.append(token)
            if logits_C is not None and self.question.logprobs is not None:
                self.scores.append(self._score(token, logits_C, self.question.logprobs))
            if len(self.tokens) >= self.question.max_tokens:
                self.finish = "length"
        if self.question.stop or self.question.streams:
            text = self._decoded(self.tokens)
            self._end_at_stop(text)
            self._send(text[: self.cut])

    def text(self) -> Text:
        """Return the answer as it is."""
        return Text(self._decoded(self.tokens)[: self.cut], self.finish, len(self.tokens), tuple(self.scores))

    def _decoded(self, tokens: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _end_at_stop(self, text: str) -> None:
        """End the answer where a stop text begins in its text; tokens that lie behind that are dropped."""
        self.cut = min((at for stop in self.question.stop if (at := text.find(stop)) >= 0), default=None)
        if self.cut is not None:
            self.finish = "stop"
            while self.tokens and self._decoded(self.tokens[:-1]).startswith(text[: self.cut]):
                self.tokens.pop()
            del self.scores[len(self.tokens) :]

    def _send(self, text: str) -> None:
        """Send what is new and will stay: no half letter, and no beginning of a stop text, unless this is the end."""
        if not self.question.streams:
            return
        if not self.finish:
            text = text.rstrip(UNFINISHED)
            lengths = (n for stop in self.question.stop for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n]))
            text = text[: len(text) - max(lengths, default=0)]
        if len(text) > self.sent or (self.finish and len(self.scores) > self.sent_scores):
            self.on_piece(Piece(self.number, text[self.sent :], tuple(self.scores[self.sent_scores :])))
            self.sent, self.sent_scores = max(self.sent, len(text)), max(self.sent_scores, len(self.scores))

    def _score(self, token: int, logits_C: Tensor, count: int) -> TokenScore:
        log_C = logits_C.float().log_softmax(-1)
        best = log_C.topk(min(count, len(log_C))) if count else None
        others = () if best is None else zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return TokenScore(
            self._decoded([token]), float(log_C[token]), tuple((self._decoded([i]), v) for i, v in others)
        )


def following(drafts: Sequence[Draft]) -> dict[str, Any]:
    """Return the arguments of `generate` that let the drafts of its rows follow it, and end it."""
    look = _Look()
    processors = [look] if any(draft.question.logprobs is not None for draft in drafts) else []
    return {"logits_processor": processors, "stopping_criteria": [_Follow(drafts, look)]}


class _Follow(StoppingCriteria):
    """Gives every row's token to its draft, and ends the rows whose drafts have ended."""

    def __init__(self, drafts: Sequence[Draft], look: _Look) -> None:
        self.drafts, self.look = drafts, look

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        for b, (draft, token) in enumerate(zip(self.drafts, input_ids[:, -1].tolist(), strict=True)):
            draft.add(token, None if self.look.logits_BC is None else self.look.logits_BC[b])
        return torch.tensor([bool(draft.finish) for draft in self.drafts], device=input_ids.device)


class _Look(LogitsProcessor):
    """Changes nothing. It stands before temperature and top_p, so it sees the model's own logits."""

    logits_BC: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.logits_BC = scores
        return scores
