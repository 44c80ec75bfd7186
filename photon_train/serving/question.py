"""What is asked of the engine, and what comes back while it answers: pieces of text, then an answer or a failure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from photon_train.answering.prediction import Prediction, Row


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
