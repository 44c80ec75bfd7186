"""One model, many clients: a queue, a thread that answers, and the prefixes of the volumes that were asked about.

Questions that wait for one volume are answered in one batch, on one encoding of it; those that wait for other encoded
volumes fill it up. Volumes take turns. A question that fails costs itself. How an answer is made is
`photon_train/answering/predictor.py`'s, so it is that of `photon predict`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from math import ceil
from typing import Any, NamedTuple

import torch

from photon_data.errors import unforeseen
from photon_train.answering.predictor import Encoded, Predictor, Reply, settings_of
from photon_train.answering.request import Request, RequestGroup, request_of
from photon_train.prefix import Prefix, PrefixCache
from photon_train.pruners import OWN_NUMBER
from photon_train.rows import text_before_volumes
from photon_train.serving.question import Answer, Busy, Closing, Draft, Failure, OnEvent, Piece, Question, following

logger = logging.getLogger(__name__)
FIRST_GUESS_S = 1.0  # of the time that a question takes, before there was one
RECENT = 0.1  # weight of the newest question in that time


class Ticket:
    """A question in the queue, or being answered."""

    def __init__(self, engine: Engine, question: Question, request: Request, on_event: OnEvent) -> None:
        self.engine, self.question, self.request, self._on_event = engine, question, request, on_event
        self.group = RequestGroup(tuple(request.row.get("videos") or ()), [request])
        self.is_cancelled = self.is_done = False
        self.drafts: list[Draft] = []
        text = text_before_volumes(request.row) if question.contents else ()
        # All that the encoding depends on; names of volumes do not count.
        self.key = (question.contents, text, engine.weights)

    def cancel(self) -> None:
        """Give its place free: nobody waits for the answer any more."""
        if not self.is_done:
            self.is_cancelled = True
            self.engine.leave(self)

    def tell(self, event: Piece | Answer | Failure) -> None:
        """Pass on what happens, unless nobody listens. After an Answer or a Failure nothing comes."""
        if not (self.is_cancelled or self.is_done):
            self.is_done = not isinstance(event, Piece)
            try:
                self._on_event(event)
            except Exception as error:  # the listener's fault must not end the engine
                logger.warning("a listener failed: %s", unforeseen(error))
                self.is_cancelled = True


class _Shared(NamedTuple):
    """What the tickets of a key share in a batch."""

    encoded: Encoded
    cached_tokens: int  # of the prompt, computed before


class Engine:
    """Answers questions, one batch at a time, in a thread of its own."""

    def __init__(self, predictor: Predictor, cache_bytes: int, max_waiting: int = 256) -> None:
        self.predictor, self.max_waiting = predictor, max_waiting
        self.prefixes = PrefixCache(cache_bytes)
        made_with = settings_of(predictor)
        self.weights = (made_with["config"], made_with["weights"], made_with["dtype"])
        ends = predictor.model.generation_config.eos_token_id
        self._ends = {ends} if isinstance(ends, int) else set(ends or ())
        self._waiting: OrderedDict[tuple[str, ...], list[Ticket]] = OrderedDict()  # by volumes, whose turn it is first
        self._answering: list[Ticket] = []
        self._changed = threading.Condition()
        self._is_closing = False
        self._counts: Counter[str] = Counter()
        self._question_s = FIRST_GUESS_S
        self._thread = threading.Thread(target=self._run, name="photon-engine", daemon=True)
        self._thread.start()

    # For the threads of clients

    def submit(self, question: Question, on_event: OnEvent) -> Ticket:
        """Queue a question and return its ticket; `on_event` gets pieces, then an Answer or a Failure, in our thread.

        ValueError for a question that cannot be asked; Busy where too many wait; Closing after `close`.
        """
        ticket = Ticket(self, question, request_of(question.row, self.predictor.processor), on_event)
        with self._changed:
            if not self.is_open:
                raise Closing("expected a running server, found one that is closing; ask again later")
            if (count := self._count()) >= self.max_waiting:
                self._counts["turned_away"] += 1
                raise Busy(count, max(1, ceil(count * self._question_s)))
            self._counts["asked"] += 1
            self._waiting.setdefault(question.contents, []).append(ticket)
            self._changed.notify()
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Take a cancelled ticket out of the queue; one that is being answered ends at its next token."""
        with self._changed:
            self._counts["left"] += 1
            self._take(ticket)

    def _take(self, ticket: Ticket) -> None:
        """Take a ticket out of the queue, if it is there. The others of its volume keep their turn."""
        queue = self._waiting.get(ticket.question.contents, [])
        if ticket in queue:
            queue.remove(ticket)
            if not queue:
                del self._waiting[ticket.question.contents]

    def forget(self, content: str) -> None:
        """Remove the prefixes of a volume, those in use as soon as they are not."""
        self.prefixes.forget(lambda key: isinstance(key, tuple) and content in key[0])

    def figures(self) -> Mapping[str, float]:
        """Return counts and sizes by name."""
        cache = self.prefixes
        names = ("asked", "answered", "failed", "left", "turned_away", "batches", "visual_tokens", "kept_tokens")
        return {
            **{name: self._counts[name] for name in names},
            "waiting": self._count(),
            "prefix_hits": cache.hits,
            "prefix_misses": cache.misses,
            "prefix_evictions": cache.evictions,
            "prefixes": len(cache),
            "prefix_bytes": cache.bytes,
        }

    @property
    def is_open(self) -> bool:
        """Whether questions are taken."""
        return self._thread.is_alive() and not self._is_closing

    def close(self, timeout_s: float | None = None) -> int:
        """Answer what waits, then end; after `timeout_s` what is left fails. Return how many questions that are.

        What is being answered then ends at its next token, and is waited for: a thread that computes while the
        interpreter is taken down aborts the process.
        """
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join(timeout_s)
        with self._changed:
            tickets = [*self._answering, *(ticket for queue in self._waiting.values() for ticket in queue)]
            self._waiting.clear()
        left = [ticket for ticket in tickets if not (ticket.is_cancelled or ticket.is_done)]
        for ticket in left:
            ticket.tell(Failure("the server closed before this question was answered; ask again later", False))
            ticket.is_cancelled = True
        self._thread.join()
        return len(left)

    def _count(self) -> int:
        with self._changed:
            return sum(map(len, self._waiting.values()))

    # In our thread

    def _run(self) -> None:
        while tickets := self._next():
            started_s = time.perf_counter()
            try:
                self._answer_with(tickets)
            except Exception as error:  # the edge of a work item: it costs these questions only
                for each in tickets:
                    self._fail(each, error)
            share_s = (time.perf_counter() - started_s) / len(tickets)
            self._question_s += RECENT * (share_s - self._question_s)

    def _next(self) -> list[Ticket]:
        """Return the first ticket of the volume whose turn it is; none at the end. That volume is last in turn then."""
        with self._changed:
            self._answering = []
            while not self._waiting and not self._is_closing:
                self._changed.wait()
            if self._waiting:
                contents, queue = self._waiting.popitem(last=False)
                self._answering = [queue.pop(0)]
                if queue:
                    self._waiting[contents] = queue
            return self._answering

    def _answer_with(self, tickets: list[Ticket]) -> None:
        """Answer the ticket, with those that can be answered in one batch by the time that its prefix is there."""
        with ExitStack() as pins:
            shared = {tickets[0].key: self._pinned(tickets[0], pins)}
            self._join(tickets)
            for ticket in tickets:
                try:
                    shared[ticket.key] = shared.get(ticket.key) or self._pinned(ticket, pins)
                except Exception as error:  # a volume that was forgotten since, and cannot be read again
                    self._fail(ticket, error)
            self._answer([ticket for ticket in tickets if ticket.key in shared], shared)

    def _pinned(self, ticket: Ticket, pins: ExitStack) -> _Shared:
        """Return what is shared with the ticket; its prefix stays until `pins` end. Raises what encoding raises."""
        seconds = {"read": 0.0, "encode": 0.0}
        if not ticket.group.videos:
            return _Shared(Encoded(None, seconds), 0)

        def encode() -> Prefix:
            encoded = self.predictor.encode(ticket.group)
            seconds.update(encoded.seconds_each)
            assert encoded.prefix is not None, "there are volumes"
            return encoded.prefix

        misses = self.prefixes.misses
        prefix = pins.enter_context(self.prefixes.pinned(ticket.key, encode))
        return _Shared(Encoded(prefix, seconds), prefix.length if misses == self.prefixes.misses else 0)

    def _join(self, tickets: list[Ticket]) -> None:
        """Add the waiting tickets that can be answered in one batch with the first: its own, then others by turn.

        Where its own fill half a batch they stay alone: they copy one prefix, others one for each row.
        """
        first, batch = tickets[0], 1 if tickets[0].question.samples else self.predictor.batch
        with self._changed:
            waiting = [ticket for queue in self._waiting.values() for ticket in queue if not ticket.question.samples]
            found = [ticket for ticket in waiting if ticket.key == first.key]
            if 1 + len(found) < batch // 2:
                found += [ticket for ticket in waiting if ticket.key != first.key and self._can_join(first, ticket)]
            tickets += found[: batch - 1]
            for ticket in tickets[1:]:
                self._take(ticket)

    def _can_join(self, first: Ticket, other: Ticket) -> bool:
        """Return whether the prefix of the other is there, and of the length of the first's."""
        is_of_one_length = str(self.predictor.model.config.scheduler) not in OWN_NUMBER
        return is_of_one_length and other.group.shape == first.group.shape and other.key in self.prefixes

    def _answer(self, tickets: list[Ticket], shared: Mapping[Any, _Shared]) -> None:
        """Answer tickets in one batch; where they fail together, each half is tried."""
        try:
            self._answer_batch(tickets, shared)
            return
        except Exception as error:
            has_room = isinstance(error, torch.OutOfMemoryError) and self.prefixes.clear() > 0
            if len(tickets) == 1 and not has_room:
                self._fail(tickets[0], error)
                return
        if has_room and torch.cuda.is_available():
            torch.cuda.empty_cache()
        half = (len(tickets) + 1) // 2
        for part in filter(None, (tickets[:half], tickets[half:])):
            self._answer(part, shared)

    def _answer_batch(self, tickets: list[Ticket], shared: Mapping[Any, _Shared]) -> None:
        tickets = [ticket for ticket in tickets if not (ticket.is_cancelled or ticket.is_done)]
        if not tickets:
            return
        for ticket in tickets:
            ticket.drafts = ticket.drafts or self._drafts(ticket)
            for draft in ticket.drafts:
                draft.restart()
        question, requests, encoded = tickets[0].question, list[Request](), list[Encoded]()
        for ticket in tickets:
            for _ in ticket.drafts:  # with the ids of `photon predict`, which what is drawn depends on
                named = {**ticket.request.row, "id": f"q{len(requests) + 1}"}
                requests.append(ticket.request._replace(row=named))
                encoded.append(shared[ticket.key].encoded)
        settings = replace(
            self.predictor.settings,
            max_new_tokens=max(ticket.question.max_tokens for ticket in tickets),
            sample=question.samples,
            temperature=question.temperature or 1.0,
            top_p=question.top_p,
            seed=question.seed,
            choices=False,
            samples=1,
        )
        drafts = [draft for ticket in tickets for draft in ticket.drafts]
        replies = iter(replace(self.predictor, settings=settings).answer(encoded, requests, **following(drafts)))
        self._counts["batches"] += 1
        for ticket in tickets:
            own = [next(replies) for _ in ticket.drafts]
            if error := next((reply.prediction.error for reply in own if reply.prediction.error), ""):
                self._fail(ticket, error)
            else:
                self._finish(ticket, own[0], shared[ticket.key].cached_tokens)

    def _drafts(self, ticket: Ticket) -> list[Draft]:
        question, tokenizer = ticket.question, self.predictor.processor.tokenizer

        def on_piece(piece: Piece) -> None:
            copies = [piece] if question.samples else [piece._replace(number=i) for i in range(question.answers)]
            for copy in copies:
                ticket.tell(copy)

        rows = question.answers if question.samples else 1  # without drawing all answers are the same
        return [
            Draft(number, question, tokenizer, self._ends, on_piece, lambda: ticket.is_cancelled)
            for number in range(rows)
        ]

    def _finish(self, ticket: Ticket, reply: Reply, cached_tokens: int) -> None:
        if ticket.is_cancelled:
            return
        texts = tuple(draft.text() for draft in ticket.drafts)
        texts = texts if ticket.question.samples else texts * ticket.question.answers
        self._counts["answered"] += 1
        self._counts["visual_tokens"] += reply.prediction.visual_tokens
        self._counts["kept_tokens"] += reply.prediction.kept_tokens
        ticket.tell(Answer(texts, reply.prediction, reply.keep_V, reply.saliency_V, cached_tokens))

    def _fail(self, ticket: Ticket, error: Exception | str) -> None:
        """Tell the client why there is no answer: a sentence of ours, or what may be said of an error."""
        if ticket.is_cancelled or ticket.is_done:
            return
        self._counts["failed"] += 1
        if isinstance(error, str):
            reason = error
        elif isinstance(error, torch.OutOfMemoryError):
            reason = "expected an answer that fits into memory, found none left; ask for fewer answers or tokens"
        elif isinstance(error, ValueError):
            reason = str(error)
            for place in ticket.request.row.get("videos") or ():  # places on this machine are not a client's business
                reason = reason.replace(str(place), "the volume")
        else:
            reason = unforeseen(error)
            logger.error("a question failed: %s", reason)
        ticket.tell(Failure(reason, isinstance(error, ValueError)))
