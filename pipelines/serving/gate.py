"""What every request passes before a route sees it: host, origin, key and size; and what every response gets.

A response is counted for Prometheus and has a line in the log. Neither holds an id or a name: those of volumes may be
a patient's.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hmac
import ipaddress
import json
import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from photon_data.errors import unforeseen

logger = logging.getLogger(__name__)
# A client that is refused while it sends is listened to for a while: else it may never see why.
LINGER_S, LINGER_BYTES = 2, 64 << 20
OPEN_PATHS = ("/health", "/ready")  # for those who watch over the server; they tell nothing
CLIENT_GONE = 499  # the status in the log; nobody gets it
UPLOADS = "/v1/volumes"
HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",  # with no-referrer, the forms of our own page would have no Origin
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cache-control": "no-store",
}


class ApiError(Exception):
    """What a client did wrong, or cannot have now: a status, a sentence, and a code to act on."""

    def __init__(self, status: int, message: str, code: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def body(self) -> bytes:
        """Return it in the form of OpenAI's errors."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": str(self), "type": kind, "param": None, "code": self.code}
        return json.dumps({"error": error}).encode()


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches a host name or address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Gate:
    """An ASGI application around another. Its `on_response` gets method, route, status and seconds of every request."""

    def __init__(
        self,
        app: Any,
        key: str | None,
        max_body: int,
        max_upload: int,
        on_response: Callable[[str, str, int, float], object] = lambda method, route, status, seconds: None,
    ) -> None:
        self.app, self.key, self.max_body, self.max_upload, self.on_response = (
            app,
            key,
            max_body,
            max_upload,
            on_response,
        )

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request, or let it through."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no websockets
        started_s, status = time.perf_counter(), 0
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        limit = self.max_upload if scope["path"] == UPLOADS else self.max_body
        body = _CountedBody(receive, limit)

        async def sending(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status, given = message["status"], {name.lower() for name, _ in message["headers"]}
                more = [(n.encode(), v.encode()) for n, v in HEADERS.items() if n.encode() not in given]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        async def sending_if_whole(message: Any) -> None:
            if not body.is_too_large:  # else it is an answer to half a body
                await sending(message)

        try:
            self._check(scope, headers, limit)
            await self.app(scope, body.receive, sending_if_whole)
            if body.is_too_large:
                raise _too_large(limit)
        except ApiError as error:
            await _refuse(error, receive, sending)
        except Exception as error:  # the edge of a request; its text may quote what was sent
            if status != 500:  # else the application has logged and sent it, and Starlette raises it again
                logger.error("a request failed: %s", unforeseen(error))
            if not status:
                await _refuse(ApiError(500, f"{unforeseen(error)}; please report it", "internal"), receive, sending)
        finally:
            route = getattr(scope.get("route"), "path", "other")  # none where the gate refused it, or nothing is there
            self.on_response(scope["method"], route, status, time.perf_counter() - started_s)

    def _check(self, scope: Any, headers: dict[str, str], limit: int) -> None:
        """Raise ApiError for a request that must not be looked at."""
        host = headers.get("host", "")
        if self.key is None and not is_loopback(_without_port(host)):
            # A web page can point its own name at this machine; it cannot send another Host.
            raise ApiError(403, "expected localhost or a loopback address as Host, found another name", "host")
        origin, is_visit = headers.get("origin"), (scope["method"], scope["path"]) == ("GET", "/")
        is_elsewhere = origin is not None and urlsplit(origin).netloc.lower() != host.lower()
        if is_elsewhere or (headers.get("sec-fetch-site") in ("cross-site", "same-site") and not is_visit):
            raise ApiError(403, "expected a request of this server's own pages, found one of another site", "origin")
        if self.key is not None and scope["path"] not in OPEN_PATHS and not self._has_key(headers):
            message = "expected the server's key as 'Authorization: Bearer KEY', found another or none"
            raise ApiError(401, message, "invalid_api_key", www_authenticate='Basic realm="photon", charset="UTF-8"')
        length = headers.get("content-length", "0")
        if not re.fullmatch(r"\d{1,18}", length):
            raise ApiError(400, "expected a number as Content-Length, found something else", "content-length")
        if int(length) > limit:
            raise _too_large(limit)

    def _has_key(self, headers: dict[str, str]) -> bool:
        """Tell whether the key is there: as a bearer token, or as the password that a browser asks for."""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "basic":
            try:
                given = base64.b64decode(given.strip(), validate=True).decode("utf-8").partition(":")[2]
            except (binascii.Error, UnicodeDecodeError):
                return False
        elif scheme.lower() != "bearer":
            return False
        return hmac.compare_digest(given.strip().encode(), str(self.key).encode())


def _without_port(host: str) -> str:
    return re.sub(r":\d*$", "", host)


def _too_large(limit: int) -> ApiError:
    message = f"expected a body of at most {limit:,} bytes, found a larger one; send less"
    return ApiError(413, message, "too-large", connection="close")


class _CountedBody:
    """`receive` of a request whose body ends, as if the client had gone, after `left` bytes: a chunked body may lie."""

    def __init__(self, receive: Any, left: int) -> None:
        self._receive, self.left = receive, left

    @property
    def is_too_large(self) -> bool:
        return self.left < 0

    async def receive(self) -> Any:
        message = {} if self.is_too_large else await self._receive()
        self.left -= len(message.get("body", b""))
        return {"type": "http.disconnect"} if self.is_too_large else message


async def _refuse(error: ApiError, receive: Any, send: Any) -> None:
    """Send an error; where a body is still coming, let go of it for a while before the line is closed."""
    body = error.body()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    left = LINGER_BYTES
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while left > 0 and (message := await receive()).get("more_body"):
                left -= len(message.get("body", b""))
    await send({"type": "http.response.body", "body": b""})


# --- what the server says of itself in numbers

# Figures that go up and down; the others are counters.
GAUGES = ("waiting", "prefixes", "prefix_bytes", "volumes", "uploads_running")


class Figures(Collector):
    """The figures that `read` returns whenever they are asked for, and what is counted here."""

    def __init__(self, read: Callable[[], Mapping[str, float]]) -> None:
        self.read, self._registry = read, CollectorRegistry()
        self._registry.register(self)
        labels = ("method", "route", "status")
        self._seconds = Histogram("photon_request_seconds", "Time to answer a request", labels, registry=self._registry)
        self.uploads = Counter("photon_uploads", "Uploads by outcome", ("outcome",), registry=self._registry)

    def describe(self) -> Iterable[Metric]:
        """Return nothing: without this, `collect` would be called before there is anything to read."""
        return []

    def collect(self) -> Iterable[Metric]:
        """Yield each figure."""
        for name, value in self.read().items():
            kind = GaugeMetricFamily if name in GAUGES else CounterMetricFamily
            yield kind(f"photon_{name}", name.replace("_", " "), value=value)

    def text(self) -> bytes:
        """Return all of it."""
        return generate_latest(self._registry)

    def on_response(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count and log a request: its route with {id} in place of ids, since labels and logs hold no names."""
        method = method if method in ("GET", "POST", "DELETE") else "other"
        self._seconds.labels(method, route, status).observe(seconds)
        logger.info("%s %s %d %.3f s", method, route, status, seconds)
