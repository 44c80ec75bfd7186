"""What a server says of itself in numbers, in the format of Prometheus, and in one line of the log for each request.

Neither holds an id or a name: those of volumes may be a patient's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

logger = logging.getLogger(__name__)
# Figures that go up and down; the others are counters.
GAUGES = ("waiting", "prefixes", "prefix_bytes", "volumes", "uploads_running")
FIXED = ("/", "/health", "/ready", "/metrics", "/v1/models", "/v1/chat/completions", "/ask", "/upload")


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

    def on_response(self, method: str, path: str, status: int, seconds: float) -> None:
        """Count and log a request."""
        route, method = _route_of(path), method if method in ("GET", "POST", "DELETE") else "other"
        self._seconds.labels(method, route, status).observe(seconds)
        logger.info("%s %s %d %.3f s", method, route, status, seconds)


def _route_of(path: str) -> str:
    """Return a path with {id} in place of ids, "other" for one that is no route: labels and logs hold no names."""
    parts = path.strip("/").split("/")
    if parts[:2] == ["v1", "volumes"] and len(parts) <= 5:
        known = ["v1", "volumes", "{id}", "{grid or kept}", "{id}"][: len(parts)]
        return "/" + "/".join([*known[:3], *(p if p in ("grid", "kept") else "{id}" for p in parts[3:])])
    return path if path in FIXED else "other"
