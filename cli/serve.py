"""The body of `photon serve`: what is loaded and started, said, and drained at the end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h11
import numpy as np
import uvicorn
from transformers.utils.logging import disable_progress_bar
from uvicorn.protocols.http.h11_impl import H11Protocol

from photon_cli.terminal import console
from photon_data.errors import UsageError
from photon_data.files import Location
from photon_data.recipe import named_recipe
from photon_data.records import FAILED, OUT_FULL, NoSpace
from photon_data.store import open_volume
from photon_pipelines.child import Child, ChildError, child_of
from photon_pipelines.serving.app import Draw, Server, ServerSettings
from photon_pipelines.serving.gate import is_loopback
from photon_pipelines.serving.volumes import Intake, Limits, Stored, Volumes, private_folder
from photon_train.answering.loading import load_predictor
from photon_train.answering.predictor import Predictor
from photon_train.overlay import Canvas, write_one
from photon_train.serving.engine import Engine

INTAKE = "photon_pipelines.serving.intake"
SHORTEST_KEY = 16
MAX_FILES = 20_000
MAX_CONNECTIONS = 1024
MAX_HEADERS = 16 * 1024
HEADERS_S = 20  # to send them
GB = 10**9


@dataclass(frozen=True)
class Options:
    """What the command is told, beside the model."""

    host: str
    port: int
    data: str | None
    key_file: Path | None
    keep: Path | None
    max_volumes: int
    cache_gb: float
    max_upload_gb: float
    max_waiting: int
    timeout_s: float
    upload_timeout_s: float
    memory_gb: float
    recipe: str
    settings: Sequence[str]


def serve(model: str, load: dict[str, Any], questions_per_batch: int, options: Options) -> None:
    """Serve a model until SIGTERM or Ctrl-C; what is asked by then is answered. UsageError for what cannot start.

    SIGUSR1, by which SLURM warns of a job's end, does as SIGTERM.
    """
    signal.signal(signal.SIGUSR1, lambda *_: signal.raise_signal(signal.SIGTERM))
    disable_progress_bar()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    with assembled(model, load, questions_per_batch, options) as (http, server, listening):
        host, port = listening.getsockname()[:2]
        place = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        console.print(f"Open {place}  (API: {place}/v1; process {os.getpid()})", soft_wrap=True)
        with suppress(KeyboardInterrupt):  # uvicorn raises the signal again once it has drained
            http.run(sockets=[listening])
        left = server.engine.close(options.timeout_s)
        console.print(f"closed; {left or 'no'} questions were left without an answer")


def serve_tools(model: str, load: dict[str, Any], questions_per_batch: int, options: Options, scans: Path) -> None:
    """Serve a model over stdin and stdout as tools of MCP, until stdin ends; they read scans in that folder only."""
    try:
        from photon_pipelines.serving.mcp import Tools
    except ImportError as error:
        raise UsageError(f"--mcp: expected the extra mcp, found none: {error}; pip install 'photon-ct[mcp]'") from None
    if not scans.is_dir():
        raise UsageError(f"--mcp: expected a folder with scans, found none at {scans}")
    disable_progress_bar()
    with behind(model, load, questions_per_batch, options) as server:
        asyncio.run(Tools(server, scans).protocol().run_stdio_async())


@contextmanager
def assembled(
    model: str, load: dict[str, Any], questions_per_batch: int, options: Options
) -> Iterator[tuple[uvicorn.Server, Server, socket.socket]]:
    """Yield what is ready to run, what is behind its routes, and its socket; all of it is gone at the end."""
    logging.getLogger("uvicorn.access").disabled = True  # it would log ids; the gate logs routes
    key = key_of(options)
    with (
        listen(options.host, options.port) as listening,
        behind(model, load, questions_per_batch, options, key) as server,
    ):
        config = uvicorn.Config(
            server.application(),
            log_config=None,
            access_log=False,
            server_header=False,
            ws="none",
            http=Punctual,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=int(options.timeout_s) + 1,
            limit_concurrency=MAX_CONNECTIONS,
            h11_max_incomplete_event_size=MAX_HEADERS,
        )
        yield uvicorn.Server(config), server, listening


@contextmanager
def behind(
    model: str, load: dict[str, Any], questions_per_batch: int, options: Options, key: str | None = None
) -> Iterator[Server]:
    """Yield the model, the volumes and what is done with them; all of it is gone at the end."""
    recipe, policy = named_recipe(options.recipe, options.settings)
    with ExitStack() as stack:
        private = stack.enter_context(private_folder(options.keep))
        predictor = load_predictor(model, batch=questions_per_batch, **load)
        depth, height, width = predictor.model.config.model_shape_zyx
        recipe = replace(recipe, model_shape_zyx=(depth, height, width))
        child = child_of(INTAKE, int(options.memory_gb * GB))
        stack.callback(child.kill)
        limits = Limits(int(options.max_upload_gb * GB), MAX_FILES, options.upload_timeout_s)
        prepared = Location(options.data) if options.data else None
        volumes = Volumes(private, Intake(preparing_in(child), recipe, policy, limits), options.max_volumes, prepared)
        engine = Engine(predictor, int(options.cache_gb * GB), options.max_waiting)
        stack.callback(engine.close, 0)
        name = Path(model).resolve().name if Path(model).exists() else model
        settings = ServerSettings(name, predictor.processor.config.tokens_thw, key, options.timeout_s)
        yield Server(engine, volumes, drawing(predictor), settings)


class Punctual(H11Protocol):
    """A connection that is closed where the headers of a request do not come in time. uvicorn waits forever."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin to wait."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Wait on while there is no whole request."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        super().connection_lost(exc)
        self._stop()

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop()
        elif self._late is None:
            self._late = self.loop.call_later(HEADERS_S, self.transport.close)

    def _stop(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


def key_of(options: Options) -> str | None:
    """Return the key that clients need; UsageError for a host that others reach without one."""
    if options.key_file is None:
        if not is_loopback(options.host):
            found = f"{options.host}, which other machines reach; anybody there could ask and upload"
            raise UsageError(f"--host: expected a loopback address, or --api-key-file beside it, found {found}")
        return None
    try:
        key = options.key_file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--api-key-file: expected a file with a key, found: {error}") from None
    if len(key) < SHORTEST_KEY or not key.isprintable() or " " in key:
        expected = f"one key of at least {SHORTEST_KEY} letters without spaces"
        raise UsageError(f"--api-key-file: expected {expected}, found another text; openssl rand -hex 32 makes one")
    return key


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; UsageError where that cannot be."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host.strip("[]"), port), family=family, backlog=MAX_CONNECTIONS)
    except OSError as error:
        raise UsageError(f"--port: expected one that is free at {host}, found {port}: {error.strerror}") from None


def preparing_in(child: Child) -> Callable[[dict[str, Any], float], dict[str, Any]]:
    """Return the function that has the child make a store of an upload. Raises NoSpace."""

    def ask(job: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        try:
            reply = child.ask(job, timeout_s)
        except ChildError as error:
            return {"state": FAILED, "code": error.code}
        if OUT_FULL in reply:
            raise NoSpace(*reply[OUT_FULL])
        return reply

    return ask


def drawing(predictor: Predictor) -> Draw:
    """Return the function that draws what was kept of a volume."""

    def draw(
        path: Path, volume: Stored, keep_V: np.ndarray, saliency_V: np.ndarray, question: str, answer: str
    ) -> None:
        canvas = Canvas(open_volume(volume.place, None), volume.native, predictor.processor.config.tokens_thw)
        write_one(path, canvas, keep_V, saliency_V, question, answer)

    return draw
