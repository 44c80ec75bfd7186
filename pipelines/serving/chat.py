"""OpenAI's chat completions: a request -> a question for the engine, its answer -> a response or the chunks of one.

Between them a question waits: whoever goes away, or waits too long, gives its place free.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from photon_data.questions.table import VIDEO_TAG
from photon_pipelines.serving.gate import ApiError
from photon_pipelines.serving.volumes import Stored
from photon_train.serving.question import Answer, Asked, Busy, Closing, Engine, Failure, Piece, Question, TokenScore

MAX_TEXT = 20_000  # letters of a conversation
MAX_TOKENS = 4096
MAX_VOLUMES = 4
WORDS = {
    "Input should be": "expected",
    "Extra inputs are not permitted": "expected no such field, found one",
    "Field required": "expected this field, found none",
}


# --- the request


class _Closed(BaseModel):
    """What is not known is refused: it would change an answer, and silently does not."""

    model_config = ConfigDict(extra="forbid")


class _Url(_Closed):
    url: str


class _Id(_Closed):
    id: str


def _wrapped(wrap: Callable[[str], Any]) -> BeforeValidator:
    """Accept a text in place of what `wrap` makes of it."""
    return BeforeValidator(lambda given: wrap(given) if isinstance(given, str) else given)


class _Part(_Closed):
    type: Literal["text", "volume", "video_url"]
    text: str = ""
    volume: Annotated[_Id, _wrapped(lambda id: {"id": id})] = _Id(id="")
    video_url: _Url = _Url(url="")

    def volume_id(self) -> str | None:
        """The id of a part that is a volume; None for text."""
        return {"text": None, "volume": self.volume.id, "video_url": self.video_url.url}[self.type]


class _Message(_Closed):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[_Part], _wrapped(lambda text: [{"type": "text", "text": text}])]

    @property
    def text(self) -> str:
        """All its text."""
        return "".join(part.text for part in self.content if part.type == "text")


class _StreamOptions(_Closed):
    include_usage: bool = False
    include_obfuscation: Any = None


class _ResponseFormat(_Closed):
    type: Literal["text"]


_StopText = Annotated[str, Field(min_length=1, max_length=100)]


class ChatRequest(_Closed):
    """The body of a request. `temperature` is 0 where it is not given: the likeliest token, as photon predict."""

    model: str
    messages: Annotated[list[_Message], Field(min_length=1, max_length=200)]
    stream: bool | None = False
    stream_options: _StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = 1
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    stop: Annotated[list[_StopText], Field(max_length=4), _wrapped(lambda text: [text])] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    response_format: _ResponseFormat | None = None
    # These change no answer.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None


def read_chat(body: bytes, model: str) -> ChatRequest:
    """Return the request of a body; ApiError with a sentence for one that cannot be followed."""
    try:
        chat = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])[:100]
        expected = first["msg"]
        for pydantic, ours in WORDS.items():
            expected = expected.replace(pydantic, ours)
        raise ApiError(400, f"{place or 'body'}: {expected}; see docs/serve.md", "invalid_request") from None
    if chat.model != model:
        raise ApiError(404, f"expected {model!r} as model, found another name; /v1/models lists it", "model_not_found")
    if chat.messages[-1].role != "user":
        raise ApiError(400, "expected a user's message last, found another role", "invalid_request")
    if sum(len(message.text) for message in chat.messages) > MAX_TEXT:
        raise ApiError(400, f"expected at most {MAX_TEXT:,} letters, found more; ask less at once", "too-long")
    return chat


def question_of(chat: ChatRequest, find: Callable[[str], Stored]) -> tuple[Question, tuple[Stored, ...]]:
    """Return the question, and its volumes in the order of the conversation. Raises what `find` raises; ApiError.

    The volumes of a message stand before its text, as in training, wherever the client put them.
    """
    messages, volumes = [], list[Stored]()
    for message in chat.messages:
        ids, text = [id for part in message.content if (id := part.volume_id()) is not None], message.text
        if VIDEO_TAG in text:
            raise ApiError(
                400, f"expected volumes as parts, found {VIDEO_TAG} in a text; take it out", "invalid_request"
            )
        role = "system" if message.role == "developer" else message.role
        messages.append({"role": role, "content": VIDEO_TAG * len(ids) + text})
        volumes += map(find, ids[: MAX_VOLUMES + 1])
    if len(volumes) > MAX_VOLUMES:
        raise ApiError(400, f"expected at most {MAX_VOLUMES} volumes in a conversation, found more", "too-many-volumes")
    row = {"id": "q1", "messages": messages, "videos": [one.place for one in volumes]}
    question = Question(
        row=row,
        contents=tuple(one.content for one in volumes),
        max_tokens=chat.max_completion_tokens or chat.max_tokens or Question.max_tokens,
        temperature=chat.temperature or 0.0,
        top_p=chat.top_p or 1.0,
        seed=secrets.randbits(31) if chat.seed is None else chat.seed,
        answers=chat.n or 1,
        stop=tuple(chat.stop or ()),
        logprobs=(chat.top_logprobs or 0) if chat.logprobs else None,
        streams=bool(chat.stream),
    )
    return question, tuple(volumes)


# --- the question while it waits

Event = Piece | Answer | Failure


async def submit(engine: Engine, question: Question, timeout_s: float) -> Asking:
    """Queue a question; ApiError where that cannot be. Its text is cut into tokens in a thread."""
    loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

    def on_event(event: Event) -> None:
        loop.call_soon_threadsafe(events.put_nowait, event)

    try:
        ticket = await asyncio.to_thread(engine.submit, question, on_event)
    except Busy as busy:
        raise ApiError(429, str(busy), "busy", retry_after=str(busy.retry_after_s)) from None
    except Closing as closing:
        raise ApiError(503, str(closing), "closing", retry_after="5") from None
    except ValueError as error:
        raise ApiError(400, str(error).removeprefix("q1: "), "invalid_request") from None
    return Asking(ticket, question, events, loop.time() + timeout_s)


def failed(failure: Failure) -> ApiError:
    """Return a failure of the engine as an error of the API."""
    return ApiError(400 if failure.is_of_question else 500, failure.reason, "failed")


@dataclass(frozen=True)
class Asking:
    """A question that was submitted, and its events."""

    ticket: Asked
    question: Question
    events: asyncio.Queue[Event]
    deadline_s: float

    @property
    def title(self) -> str:
        """The question in words."""
        text: str = self.question.row["messages"][-1]["content"]
        return text.replace(VIDEO_TAG, "").strip()

    async def next(self) -> Event:
        """Return the next event; ApiError after the deadline."""
        try:
            async with asyncio.timeout_at(self.deadline_s):
                return await self.events.get()
        except TimeoutError:
            self.ticket.cancel()
            raise ApiError(504, "expected an answer in time, found none yet; ask again later", "timeout") from None

    async def first(self, request: Request) -> Event | None:
        """Return the first event, None where the client goes away before; ApiError after the deadline.

        The question is given up where there is none.
        """

        async def gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        waiting = asyncio.ensure_future(self.next()), asyncio.ensure_future(gone())
        event: Event | None = None
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            event = waiting[0].result() if waiting[0].done() else None
            return event
        finally:
            if event is None:
                self.ticket.cancel()
            for task in waiting:
                task.cancel()


class EventStream(StreamingResponse):
    """Server-sent events; the question is given up where the client goes away."""

    def __init__(self, events: AsyncIterator[bytes], ticket: Asked) -> None:
        super().__init__(events, media_type="text/event-stream")
        self.ticket = ticket

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send them all, or give up."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.ticket.cancel()


# --- the response


@dataclass(frozen=True)
class Completion:
    """The response to one request, whole or in chunks."""

    model: str
    question: Question
    volumes: Sequence[Stored]
    wants_usage: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answer: Answer) -> dict[str, Any]:
        """Return the body of a response that does not stream."""
        choices = [
            {
                "index": number,
                "message": {"role": "assistant", "content": text.text, "refusal": None},
                "logprobs": self._logprobs(text.scores),
                "finish_reason": text.finish,
            }
            for number, text in enumerate(answer.texts)
        ]
        return self._object("chat.completion", choices, usage=_usage(answer), photon=self._photon(answer))

    def begin(self) -> Iterator[bytes]:
        """Yield the events before the first text."""
        for number in range(self.question.answers):
            yield self._chunk(number, {"role": "assistant", "content": ""})

    def piece(self, piece: Piece) -> bytes:
        """Return the event of a piece of text."""
        return self._chunk(piece.number, {"content": piece.text}, logprobs=self._logprobs(piece.scores))

    def end(self, answer: Answer) -> Iterator[bytes]:
        """Yield the events after the last text."""
        for number, text in enumerate(answer.texts):
            yield self._chunk(number, {}, text.finish, photon=self._photon(answer))
        if self.wants_usage:
            yield _event(self._object("chat.completion.chunk", [], usage=_usage(answer)))
        yield b"data: [DONE]\n\n"

    def _object(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices, **more}

    def _chunk(
        self, number: int, delta: dict[str, Any], finish: str | None = None, logprobs: Any = None, **more: Any
    ) -> bytes:
        choice = {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return _event(self._object("chat.completion.chunk", [choice], **more))

    def _logprobs(self, scores: Sequence[TokenScore]) -> dict[str, Any] | None:
        if self.question.logprobs is None:
            return None

        def one(text: str, logprob: float) -> dict[str, Any]:
            return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}

        content = [
            {**one(score.text, score.logprob), "top_logprobs": [one(*other) for other in score.others]}
            for score in scores
        ]
        return {"content": content, "refusal": None}

    def _photon(self, answer: Answer) -> dict[str, Any]:
        """Return what only Photon has to say of an answer."""
        p = answer.prediction
        return {
            "kept": [
                f"/v1/volumes/{quote(id, safe='')}/kept/{self.id}"
                for id in dict.fromkeys(one.id for one in self.volumes)
            ],
            "visual_tokens": p.visual_tokens,
            "kept_tokens": p.kept_tokens,
            "scheduler": p.scheduler,
            "threshold": p.threshold,
            "seed": self.question.seed if self.question.samples else None,
            "seconds": p.seconds,
        }


def _usage(answer: Answer) -> dict[str, Any]:
    """Return OpenAI's counts; visual tokens count as prompt, whether they were kept or not."""
    p = answer.prediction
    prompt, completion = p.text_tokens + p.visual_tokens, sum(text.tokens for text in answer.texts)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": answer.cached_tokens},
        "visual_tokens": p.visual_tokens,
        "kept_tokens": p.kept_tokens,
    }


def _event(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()
