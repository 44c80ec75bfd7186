"""The routes of `photon serve`, and its page. What is allowed in is gate.py's; how answers are made is the engine's."""

from __future__ import annotations

import asyncio
import logging
import re
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from photon_data.errors import Refused, unforeseen
from photon_data.files import NO_SPACE
from photon_data.readers.nifti import nifti_header
from photon_data.resample import model_grid
from photon_data.store import open_volume
from photon_pipelines.serving.chat import Asking, Completion, Event, EventStream, failed, question_of, read_chat, submit
from photon_pipelines.serving.gate import CLIENT_GONE, ApiError, Figures, Gate
from photon_pipelines.serving.upload import receive
from photon_pipelines.serving.volumes import Stored, UnknownVolume, Volumes
from photon_train.serving.question import Answer, Engine, Failure, Piece

logger = logging.getLogger(__name__)
MAX_BODY = 256 * 1024
BODY_S = 60  # to send it, of a question
MAX_KEPT = 2000  # answers whose kept tokens can still be fetched
UPLOADS_AT_ONCE, FILES_AT_ONCE = 4, 2
# Statuses of refusals; 422 for those of a scan.
STATUSES = {"full": 507, "too-large": 413, "too-many-files": 413, "upload-timeout": 408, "not-multipart": 415}
STATUSES |= {"no-file": 400, "damaged-upload": 400, "not-yours": 403}
KINDS = {"json": "", "nifti": "kept.nii.gz", "saliency": "saliency.nii.gz", "png": "planes.png"}
TYPES = {".gz": "application/gzip", ".png": "image/png"}

# Write the file that the path is named like (see KINDS): volume, keep_V, saliency_V, question, answer.
Draw = Callable[[Path, Stored, np.ndarray, np.ndarray, str, str], None]


@dataclass(frozen=True)
class ServerSettings:
    """What the server is told."""

    model: str  # its name for clients
    tokens_zyx: tuple[int, int, int]  # into how many a volume is cut
    key: str | None = None
    timeout_s: float = 300  # of a question


class _Kept(NamedTuple):
    volumes: tuple[str, ...]  # ids, in the order of the conversation
    keep_V: np.ndarray
    saliency_V: np.ndarray
    question: str
    answer: str


class Server:
    """The engine and the volumes behind the routes, and the answers whose kept tokens can be looked at."""

    def __init__(self, engine: Engine, volumes: Volumes, draw: Draw, settings: ServerSettings) -> None:
        self.engine, self.volumes, self.draw, self.settings = engine, volumes, draw, settings
        self.kept: OrderedDict[str, _Kept] = OrderedDict()
        self.uploading = 0
        self.files, self.preparing = asyncio.Semaphore(FILES_AT_ONCE), asyncio.Lock()
        self.tokenizing = asyncio.Lock()  # a fast tokenizer is not for several threads at once
        self.figures = Figures(self._figures)

    def application(self) -> Gate:
        """Return the ASGI application."""
        page = Page()
        app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
        routes: Iterable[tuple[str, str, Any]] = (
            ("GET", "/", page.show),
            ("GET", "/page/{name}", page.file),
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
        return Gate(app, self.settings.key, MAX_BODY, limits.bytes + limits.files * 1024, self.figures.on_response)

    # What is there

    async def health(self) -> Response:
        """Return 200 while the process lives."""
        return JSONResponse({"status": "ok"})

    async def ready(self) -> Response:
        """Return 200 while questions are taken."""
        is_open = self.engine.is_open
        return JSONResponse({"status": "ready" if is_open else "closing"}, 200 if is_open else 503)

    def _figures(self) -> dict[str, float]:
        own = {"volumes": len(self.volumes), "uploads_running": self.uploading}
        return {**self.engine.figures(), **own}

    async def metrics(self) -> Response:
        """Return the counts in the format of Prometheus."""
        return Response(self.figures.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self) -> Response:
        """Return the one model."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def one_model(self, name: str) -> Response:
        """Return the model of that name."""
        if name != self.settings.model:
            raise ApiError(404, "expected the name of the model, found another; /v1/models lists it", "model_not_found")
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        return {"id": self.settings.model, "object": "model", "created": 0, "owned_by": "photon"}

    # Volumes

    async def list_volumes(self, request: Request) -> Response:
        """Return ids, uploads first: at most `limit`, those behind `after`."""
        ids, after = self.volumes.ids(), request.query_params.get("after")
        limit = request.query_params.get("limit", "1000")
        if not (re.fullmatch("[0-9]{1,5}", limit) and 1 <= int(limit) <= 10_000):
            raise ApiError(400, "limit: expected a number of 1 to 10000, found something else", "invalid_request")
        start = ids.index(after) + 1 if after in ids else 0
        found = ids[start : start + int(limit)]
        data = [{"id": id, "object": "volume"} for id in found]
        return JSONResponse({"object": "list", "data": data, "has_more": start + len(found) < len(ids)})

    async def upload(self, request: Request) -> Response:
        """Return the volume that a scan has become: files as the parts of a form, one of them a zip perhaps."""
        return JSONResponse(await asyncio.to_thread(self._described, await self._take_in(request)), 201)

    async def _take_in(self, request: Request) -> Stored:
        """Return the volume that the body of a request has become. ApiError, Refused, ClientDisconnect."""
        if self.uploading >= UPLOADS_AT_ONCE:
            message = "expected few uploads at once, found too many; send it again later"
            raise ApiError(429, message, "busy", retry_after="5")
        self.uploading += 1
        outcome = "broken"
        try:
            with self.volumes.incoming() as folder:
                content_type = request.headers.get("content-type", "")
                fields = await receive(request.stream(), content_type, folder, self.volumes.intake.limits)
                if unknown := fields.keys() - {"series", "purpose"}:
                    message = f"expected files and the field series, found {len(unknown)} other"
                    raise ApiError(400, message, "invalid_request")
                async with self.preparing:
                    volume = await asyncio.to_thread(self.volumes.take_in, folder, fields.get("series", ""))
            if await request.is_disconnected():  # nobody knows its id
                await asyncio.to_thread(self.volumes.delete, volume.id)
                raise ClientDisconnect
            outcome = "prepared"
            return volume
        except Refused as refused:
            outcome = refused.code
            raise
        finally:
            self.uploading -= 1
            self.figures.uploads.labels(outcome).inc()

    async def one_volume(self, id: str) -> Response:
        """Return where a volume and its tokens lie in the world, and what was cut off."""
        return JSONResponse(await asyncio.to_thread(lambda: self._described(self.volumes.find(id))))

    async def delete_volume(self, id: str) -> Response:
        """Remove an upload and all that was kept of it."""
        volume = await asyncio.to_thread(self.volumes.delete, id)
        self.engine.forget(volume.content)
        for name in [name for name, kept in self.kept.items() if id in kept.volumes]:
            del self.kept[name]
        return JSONResponse({"id": id, "object": "volume", "deleted": True})

    async def grid(self, id: str, request: Request) -> Response:
        """Return voxels: int16 HU, little-endian, [z, y, x]; with ?format=nifti, a file.

        Those that the model reads; with ?of=volume, those of the prepared volume, where the store has them.
        """
        kind, of = _one_of(request, ("raw", "nifti")), _one_of(request, ("model", "volume"), "of")

        def content() -> bytes:
            volume = open_volume(self.volumes.find(id).place, "model" if of == "model" else None)
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
            content = await asyncio.to_thread(self._drawn, volume, kind, keep_V, saliency_V, kept)
        name = KINDS[kind]
        shown = {"content-disposition": f'{"inline" if kind == "png" else "attachment"}; filename="{name}"'}
        return Response(content, media_type=TYPES[Path(name).suffix], headers=shown)

    def _described(self, volume: Stored) -> dict[str, Any]:
        facts, model = volume.facts, open_volume(volume.place, "model").geometry
        more: dict[str, Any] = {name: facts[name] for name in ("format", "cut_mm", "pad_mm") if name in facts}
        grids = {"native": facts["geometry"], "prepared": facts["grid"], "grid": model.to_json()}
        grids["tokens"] = model_grid(model, self.settings.tokens_zyx).to_json()
        return {"id": volume.id, "object": "volume", "uploaded": volume.uploaded, **more, **grids}

    def _drawn(self, volume: Stored, kind: str, keep_V: np.ndarray, saliency_V: np.ndarray, kept: _Kept) -> bytes:
        folder = Path(tempfile.mkdtemp(dir=self.volumes.private / "incoming"))
        try:
            self.draw(folder / KINDS[kind], volume, keep_V, saliency_V, kept.question, kept.answer)
            return (folder / KINDS[kind]).read_bytes()
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    # Questions

    async def chat(self, request: Request) -> Response:
        """Return the answer to a conversation, or a stream of events with it."""
        try:
            async with asyncio.timeout(BODY_S):
                body = await request.body()
        except TimeoutError:
            message = f"expected a question within {BODY_S} s, found one that is still coming; send it faster"
            raise ApiError(408, message, "body-timeout", connection="close") from None
        completion, asking, first = await self._ask(body, request)
        if first is None:
            return Response(status_code=CLIENT_GONE)
        if isinstance(first, Answer) and not completion.question.streams:
            return JSONResponse(completion.whole(first))
        return EventStream(self._events(completion, asking, first), asking.ticket)

    async def _ask(self, body: bytes, request: Request) -> tuple[Completion, Asking, Piece | Answer | None]:
        """Submit a conversation; return what responds to it and its first event, None where the client has gone."""
        chat = read_chat(body, self.settings.model)
        question, volumes = await asyncio.to_thread(question_of, chat, self.volumes.find)
        wants_usage = bool(chat.stream_options and chat.stream_options.include_usage)
        completion = Completion(self.settings.model, question, volumes, wants_usage)
        async with self.tokenizing:
            asking = await submit(self.engine, question, self.settings.timeout_s)
        first = await asking.first(request)
        if isinstance(first, Failure):
            raise failed(first)
        if isinstance(first, Answer):
            self._remember(completion, asking, first)
        return completion, asking, first

    def _remember(self, completion: Completion, asking: Asking, answer: Answer) -> None:
        """Keep what was kept for an answer, for a while."""
        volumes = tuple(volume.id for volume in completion.volumes)
        if volumes and len(answer.keep_V):
            self.kept[completion.id] = _Kept(
                volumes, answer.keep_V, answer.saliency_V, asking.title, answer.prediction.response
            )
            while len(self.kept) > MAX_KEPT:
                self.kept.popitem(last=False)

    async def _events(self, completion: Completion, asking: Asking, event: Event) -> AsyncIterator[bytes]:
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
            yield b"data: " + failed(event).body() + b"\n\n"
            return
        self._remember(completion, asking, event)
        for each in completion.end(event):
            yield each


def _one_of(request: Request, kinds: tuple[str, ...], name: str = "format") -> str:
    kind = request.query_params.get(name, kinds[0])
    if kind not in kinds:
        raise ApiError(400, f"{name}: expected one of {', '.join(kinds)}, found another", "invalid_request")
    return kind


async def _error(request: Request, error: Exception) -> Response:
    """Return the response to an error, in the form of OpenAI's."""
    if not isinstance(error, ApiError | Refused | UnknownVolume | HTTPException | ClientDisconnect):
        logger.error("a request failed: %s", unforeseen(error))
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
        error = ApiError(500, f"{unforeseen(error)}; please report it", "internal")
    return Response(error.body(), error.status, error.headers, "application/json")


# --- the page

FOLDER = Path(__file__).with_name("static")
FILE_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
# NiiVue keeps its font in a data: URL. Nothing is inline, and nothing comes from elsewhere.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Page:
    """The page: files of the package, as they are, read once. What it shows, its scripts ask the API for."""

    def __init__(self) -> None:
        self._files = {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.suffix in FILE_TYPES}

    async def show(self) -> Response:
        """Return the page."""
        return self._response("index.html", {"content-security-policy": POLICY})

    async def file(self, name: str) -> Response:
        """Return a file of it."""
        if name not in self._files:
            remedy = "; make viewer builds it" if name == "niivue.js" else ""
            raise ApiError(404, f"expected a file of the page, found none of this name{remedy}", "not_found")
        return self._response(name)

    def _response(self, name: str, headers: dict[str, str] | None = None) -> Response:
        return Response(self._files[name], 200, headers, FILE_TYPES[Path(name).suffix])
