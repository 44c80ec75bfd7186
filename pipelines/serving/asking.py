"""A question between its client and the engine: whoever goes away, or waits too long, gives its place free."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse

from photon_data.questions.table import VIDEO_TAG
from photon_pipelines.serving.gate import ApiError
from photon_train.serving.question import Answer, Asked, Busy, Closing, Engine, Failure, Piece, Question

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
