"""The routes of `photon serve`. What is allowed in is gate.py's; how answers are made is the engine's."""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import ClientDisconnect

from photon_data.errors import Refused, unforeseen
from photon_data.export import nifti_header
from photon_data.prepare_file import NO_SPACE
from photon_data.questions.table import VIDEO_TAG
from photon_data.store import open_volume
from photon_pipelines.serving.chat import ChatRequest, Completion, question_of, read_chat
from photon_pipelines.serving.gate import ApiError, Gate
from photon_pipelines.serving.upload import receive
from photon_pipelines.serving.volumes import Stored, UnknownVolume, Volumes
from photon_train.serving.question import Answer, Asked, Busy, Closing, Engine, Failure, Piece, Question

logger = logging.getLogger(__name__)
MAX_BODY = 256 * 1024
MAX_KEPT = 2000  # answers whose kept tokens can still be fetched
UPLOADS_AT_ONCE, FILES_AT_ONCE = 4, 2
CLIENT_GONE = 499
# Statuses of refusals; 422 for those of a scan.
STATUSES = {"full": 507, "too-large": 413, "too-many-files": 413, "upload-timeout": 408, "not-multipart": 415}
STATUSES |= {"no-file": 400, "damaged-upload": 400, "not-yours": 403}
KINDS = {"json": "", "nifti": "kept.nii.gz", "saliency": "saliency.nii.gz", "png": "planes.png"}
TYPES = {".gz": "application/gzip", ".png": "image/png"}
# Figures of the engine that go up and down; the others are counters.
GAUGES = ("waiting", "prefixes", "prefix_bytes")

# Write the file that the path is named like (see KINDS): volume, keep_V, saliency_V, title.
Draw = Callable[[Path, Stored, np.ndarray, np.ndarray, str], None]


@dataclass(frozen=True)
class Serving:
    """What the server is told."""

    model: str  # its name for clients
    key: str | None = None
    timeout_s: float = 300  # of a question


class _Kept(NamedTuple):
    volumes: tuple[str, ...]  # ids, in the order of the conversation
    keep_V: np.ndarray
    saliency_V: np.ndarray
    title: str


class Server:
    """The engine and the volumes behind the routes, and the answers whose kept tokens can be looked at."""

    def __init__(self, engine: Engine, volumes: Volumes, draw: Draw, serving: Serving) -> None:
        self.engine, self.volumes, self.draw, self.serving = engine, volumes, draw, serving
        self.kept: OrderedDict[str, _Kept] = OrderedDict()
        self.uploading = 0
        self.files = asyncio.Semaphore(FILES_AT_ONCE)
        self.registry = CollectorRegistry()
        self.registry.register(_Figures(self))
        labels = ("method", "route", "status")
        self.seconds = Histogram("photon_request_seconds", "Time to answer a request", labels, registry=self.registry)
        self.uploads = Counter("photon_uploads", "Uploads by outcome", ("outcome",), registry=self.registry)

    def application(self) -> Gate:
        """Return the ASGI application."""
        app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
        routes: Iterable[tuple[str, str, Any]] = (
            ("GET", "/health", self.health),
            ("GET", "/ready", self.ready),
            ("GET", "/metrics", self.metrics),
            ("GET", "/v1/models", self.models),
            ("GET", "/v1/models/{name:path}", self.one_model),
            ("POST", "/v1/chat/completions", self.chat),
            ("GET", "/v1/volumes", self.list_volumes),
            ("POST", "/v1/volumes", self.upload),
            ("GET", "/v1/volumes/{id}", self.one_volume),
            ("DELETE", "/v1/volumes/{id}", self.delete_volume),
            ("GET", "/v1/volumes/{id}/grid", self.grid),
            ("GET", "/v1/volumes/{id}/kept/{answer}", self.kept_tokens),
        )
        for method, path, endpoint in routes:
            app.add_api_route(path, endpoint, methods=[method], response_model=None)
        for kind in (Exception, ApiError, HTTPException, Refused, UnknownVolume, ClientDisconnect, OSError):
            app.add_exception_handler(kind, _error)
        limits = self.volumes.intake.limits
        # Of an upload, what stands between its files is not much.
        return Gate(app, self.serving.key, MAX_BODY, limits.bytes + limits.files * 1024, self.on_response)

    def on_response(self, method: str, path: str, status: int, seconds: float) -> None:
        """Count and log a request; ids do not go into the log."""
        route = _route_of(path)
        self.seconds.labels(method, route, status).observe(seconds)
        logger.info("%s %s %d %.3f s", method, route, status, seconds)

    # What is there

    async def health(self) -> Response:
        """Return 200 while the process lives."""
        return JSONResponse({"status": "ok"})

    async def ready(self) -> Response:
        """Return 200 while questions are taken."""
        is_open = self.engine.is_open
        return JSONResponse({"status": "ready" if is_open else "closing"}, 200 if is_open else 503)

    async def metrics(self) -> Response:
        """Return the counts in the format of Prometheus."""
        return Response(generate_latest(self.registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self) -> Response:
        """Return the one model."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def one_model(self, name: str) -> Response:
        """Return the model of that name."""
        if name != self.serving.model:
            raise ApiError(404, "expected the name of the model, found another; /v1/models lists it", "model_not_found")
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        return {"id": self.serving.model, "object": "model", "created": 0, "owned_by": "photon"}

    # Volumes

    async def list_volumes(self, request: Request) -> Response:
        """Return ids, uploads first: at most `limit`, those behind `after`."""
        ids, after = self.volumes.ids(), request.query_params.get("after")
        limit = request.query_params.get("limit", "1000")
        if not (limit.isdecimal() and 1 <= int(limit[:6]) <= 10_000):
            raise ApiError(400, "limit: expected a number of 1 to 10000, found something else", "invalid_request")
        start = ids.index(after) + 1 if after in ids else 0
        found = ids[start : start + int(limit)]
        data = [{"id": id, "object": "volume"} for id in found]
        return JSONResponse({"object": "list", "data": data, "has_more": start + len(found) < len(ids)})

    async def upload(self, request: Request) -> Response:
        """Return the volume that a scan has become: files as the parts of a form, one of them a zip perhaps."""
        if self.uploading >= UPLOADS_AT_ONCE:
            raise ApiError(
                429, "expected few uploads at once, found too many; send it again later", "busy", retry_after="5"
            )
        self.uploading += 1
        outcome = "broken"
        try:
            with self.volumes.incoming() as folder:
                content_type = request.headers.get("content-type", "")
                fields = await receive(request.stream(), content_type, folder, self.volumes.intake.limits)
                if unknown := fields.keys() - {"series", "purpose"}:
                    raise ApiError(
                        400, f"expected files and the field series, found {len(unknown)} other", "invalid_request"
                    )
                volume = await asyncio.to_thread(self.volumes.take_in, folder, fields.get("series", ""))
            outcome = "prepared"
        except Refused as refused:
            outcome = refused.code
            raise
        finally:
            self.uploading -= 1
            self.uploads.labels(outcome).inc()
        return JSONResponse(await asyncio.to_thread(_described, volume), 201)

    async def one_volume(self, id: str) -> Response:
        """Return where a volume lies in the world, and what was cut off."""
        return JSONResponse(await asyncio.to_thread(lambda: _described(self.volumes.find(id))))

    async def delete_volume(self, id: str) -> Response:
        """Remove an upload and all that was kept of it."""
        volume = await asyncio.to_thread(self.volumes.delete, id)
        self.engine.forget(volume.content)
        for name in [name for name, kept in self.kept.items() if id in kept.volumes]:
            del self.kept[name]
        return JSONResponse({"id": id, "object": "volume", "deleted": True})

    async def grid(self, id: str, request: Request) -> Response:
        """Return the voxels that the model reads: int16 HU, little-endian, [z, y, x]; with ?format=nifti, a file."""
        kind = _one_of(request, ("raw", "nifti"))

        def content() -> bytes:
            volume = open_volume(self.volumes.find(id).place, "model")
            header = nifti_header(volume.geometry, "<i2") if kind == "nifti" else b""
            return header + volume.numpy().astype("<i2", copy=False).tobytes()

        async with self.files:
            return Response(await asyncio.to_thread(content), media_type="application/octet-stream")

    async def kept_tokens(self, id: str, answer: str, request: Request) -> Response:
        """Return which regions of a volume an answer was made from, in one of the formats of KINDS."""
        kind, kept = _one_of(request, tuple(KINDS)), self.kept.get(answer)
        volume = await asyncio.to_thread(self.volumes.find, id)
        if kept is None or id not in kept.volumes:
            found = "another, or one that is too long ago"
            raise ApiError(404, f"expected an answer about this volume, found {found}; ask again", "unknown_answer")
        number, count = kept.volumes.index(id), len(kept.volumes)
        keep_V, saliency_V = (np.split(each, count)[number] for each in (kept.keep_V, kept.saliency_V))
        if kind == "json":
            tokens = {"kept": keep_V.astype(int).tolist(), "saliency": [round(float(s), 6) for s in saliency_V]}
            return JSONResponse({"answer": answer, "volume": id, "tokens": len(keep_V), **tokens})
        async with self.files:
            content = await asyncio.to_thread(self._drawn, volume, kind, keep_V, saliency_V, kept.title)
        name = KINDS[kind]
        shown = {"content-disposition": f'{"inline" if kind == "png" else "attachment"}; filename="{name}"'}
        return Response(content, media_type=TYPES[Path(name).suffix], headers=shown)

    def _drawn(self, volume: Stored, kind: str, keep_V: np.ndarray, saliency_V: np.ndarray, title: str) -> bytes:
        folder = Path(tempfile.mkdtemp(dir=self.volumes.private / "incoming"))
        try:
            self.draw(folder / KINDS[kind], volume, keep_V, saliency_V, title)
            return (folder / KINDS[kind]).read_bytes()
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    # Questions

    async def chat(self, request: Request) -> Response:
        """Return the answer to a conversation, or a stream of events with it."""
        chat = read_chat(await request.body(), self.serving.model)
        asking = await self.ask(chat)
        try:
            first = await asking.first(request)
        except BaseException:
            asking.ticket.cancel()
            raise
        if first is None:
            asking.ticket.cancel()
            return Response(status_code=CLIENT_GONE)
        if isinstance(first, Failure):
            raise _failed(first)
        if not chat.stream:
            assert isinstance(first, Answer), "only questions that stream have pieces"
            self.remember(asking, first)
            return JSONResponse(asking.completion.whole(first))
        return _Stream(self._events(asking, first), asking.ticket)

    async def ask(self, chat: ChatRequest) -> Asking:
        """Submit a conversation and return it; ApiError where that cannot be."""
        question, volumes = await asyncio.to_thread(question_of, chat, self.volumes.find)
        wants_usage = bool(chat.stream_options and chat.stream_options.include_usage)
        completion = Completion(self.serving.model, question, volumes, wants_usage)
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Piece | Answer | Failure]()
        try:
            ticket = self.engine.submit(question, lambda event: loop.call_soon_threadsafe(events.put_nowait, event))
        except Busy as busy:
            raise ApiError(429, str(busy), "busy", retry_after=str(busy.retry_after_s)) from None
        except Closing as closing:
            raise ApiError(503, str(closing), "closing", retry_after="5") from None
        except ValueError as error:
            raise ApiError(400, str(error).removeprefix("q1: "), "invalid_request") from None
        return Asking(ticket, completion, question, events, loop.time() + self.serving.timeout_s)

    def remember(self, asking: Asking, answer: Answer) -> None:
        """Keep what was kept for an answer, for a while."""
        volumes = tuple(volume.id for volume in asking.completion.volumes)
        if volumes and len(answer.keep_V):
            self.kept[asking.completion.id] = _Kept(volumes, answer.keep_V, answer.saliency_V, asking.title)
            while len(self.kept) > MAX_KEPT:
                self.kept.popitem(last=False)

    async def _events(self, asking: Asking, event: Piece | Answer | Failure) -> AsyncIterator[bytes]:
        completion = asking.completion
        for each in completion.begin():
            yield each
        while isinstance(event, Piece):
            yield completion.piece(event)
            try:
                event = await asking.next()
            except ApiError as error:
                yield b"data: " + error.body() + b"\n\n"
                return
        if isinstance(event, Failure):
            yield b"data: " + _failed(event).body() + b"\n\n"
            return
        self.remember(asking, event)
        for each in completion.end(event):
            yield each


@dataclass(frozen=True)
class Asking:
    """A question that was submitted, and its events."""

    ticket: Asked
    completion: Completion
    question: Question
    events: asyncio.Queue[Piece | Answer | Failure]
    deadline_s: float

    @property
    def title(self) -> str:
        """The question in words."""
        text: str = self.question.row["messages"][-1]["content"]
        return text.replace(VIDEO_TAG, "").strip()

    async def next(self) -> Piece | Answer | Failure:
        """Return the next event; ApiError after the deadline."""
        try:
            async with asyncio.timeout_at(self.deadline_s):
                return await self.events.get()
        except TimeoutError:
            self.ticket.cancel()
            raise ApiError(504, "expected an answer in time, found none yet; ask again later", "timeout") from None

    async def first(self, request: Request) -> Piece | Answer | Failure | None:
        """Return the first event, None where the client goes away before; ApiError after the deadline."""

        async def gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        waiting = asyncio.ensure_future(self.next()), asyncio.ensure_future(gone())
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            return waiting[0].result() if waiting[0].done() else None
        finally:
            for task in waiting:
                task.cancel()


class _Stream(StreamingResponse):
    """Server-sent events; the question is given up where the client goes away."""

    def __init__(self, events: AsyncIterator[bytes], ticket: Asked) -> None:
        super().__init__(events, media_type="text/event-stream")
        self.ticket = ticket

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.ticket.cancel()


class _Figures(Collector):
    """The figures of a server, read when they are asked for."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def collect(self) -> Iterable[Metric]:
        """Yield each figure."""
        for name, value in self.server.engine.figures().items():
            kind = GaugeMetricFamily if name in GAUGES else CounterMetricFamily
            yield kind(f"photon_{name}", name.replace("_", " "), value=value)
        yield GaugeMetricFamily("photon_volumes", "volumes that may be asked about", value=len(self.server.volumes))
        yield GaugeMetricFamily("photon_uploads_running", "uploads that are coming in", value=self.server.uploading)


def _route_of(path: str) -> str:
    """Return a path with {id} in place of ids, "other" for one that is no route: labels and logs hold no names."""
    parts = path.strip("/").split("/")
    if parts[:2] == ["v1", "volumes"] and len(parts) <= 5:
        known = ["v1", "volumes", "{id}", "{grid or kept}", "{id}"][: len(parts)]
        return "/" + "/".join([*known[:3], *(p if p in ("grid", "kept") else "{id}" for p in parts[3:])])
    is_fixed = path in ("/", "/health", "/ready", "/metrics", "/v1/models", "/v1/chat/completions")
    return path if is_fixed else "other"


def _one_of(request: Request, kinds: tuple[str, ...]) -> str:
    kind = request.query_params.get("format", kinds[0])
    if kind not in kinds:
        raise ApiError(400, f"format: expected one of {', '.join(kinds)}, found another", "invalid_request")
    return kind


def _described(volume: Stored) -> dict[str, Any]:
    facts, model = volume.facts, open_volume(volume.place, "model").geometry
    more: dict[str, Any] = {name: facts[name] for name in ("format", "cut_mm", "pad_mm") if name in facts}
    grids = {"native": facts["geometry"], "prepared": facts["grid"], "grid": model.to_json()}
    return {"id": volume.id, "object": "volume", "uploaded": volume.uploaded, **more, **grids}


def _failed(failure: Failure) -> ApiError:
    return ApiError(400 if failure.is_of_question else 500, failure.reason, "failed")


async def _error(request: Request, error: Exception) -> Response:
    """Return the response to an error, in the form of OpenAI's."""
    if isinstance(error, Refused):
        error = ApiError(STATUSES.get(error.code, 422), error.message, error.code)
    elif isinstance(error, UnknownVolume):
        error = ApiError(404, str(error), "unknown_volume")
    elif isinstance(error, HTTPException):
        error = ApiError(error.status_code, "expected a route of docs/serve.md, found another", "not_found")
    elif isinstance(error, OSError) and error.errno in NO_SPACE:
        error = ApiError(507, "expected space on the server's disk, found none; ask for some", "no-space")
    elif isinstance(error, ClientDisconnect):
        return Response(status_code=CLIENT_GONE)
    if not isinstance(error, ApiError):
        logger.error("a request failed: %s", unforeseen(error))
        error = ApiError(500, f"{unforeseen(error)}; please report it", "internal")
    return Response(error.body(), error.status, error.headers, "application/json")
