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
