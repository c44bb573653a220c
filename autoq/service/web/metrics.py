"""Figures for Prometheus; every label has few values, whatever is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from time import perf_counter

import psutil  # type: ignore[import-untyped]
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

METRICS_MEDIA_TYPE = CONTENT_TYPE_PLAIN_0_0_4

_METHODS = frozenset({"GET", "HEAD", "POST", "DELETE", "OPTIONS", "PUT", "PATCH"})
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)

Numbers = Callable[[], Mapping[str, int]]


class Metrics:
    """What one service counted since it started."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        labels = ("route", "method", "status")
        self._requests = Counter(
            "autoq_requests", "Requests that were answered.", labels, registry=self._registry
        )
        self._seconds = Histogram(
            "autoq_request_seconds",
            "Time to the first byte of the reply.",
            ("route", "method"),
            buckets=_SECONDS,
            registry=self._registry,
        )

    def watch(self, *, jobs: Numbers, tables: Numbers, events: Callable[[], int]) -> None:
        """Ask these whenever the figures are read.

        Args:
            jobs: status -> number.
            tables: "hit" and "miss" of the tables of studies, which are kept in memory.
            events: how many events were streamed.
        """
        self._registry.register(_Asked(jobs, tables, events))

    def count(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count one reply."""
        method = method if method in _METHODS else "other"
        self._requests.labels(route, method, str(status)).inc()
        self._seconds.labels(route, method).observe(seconds)

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)


class _Asked(Collector):
    """Figures that are kept elsewhere."""

    def __init__(self, jobs: Numbers, tables: Numbers, events: Callable[[], int]) -> None:
        self._jobs = jobs
        self._tables = tables
        self._events = events
        self._process = psutil.Process()

    def describe(self) -> Iterator[Metric]:
        """Nothing: registering asks nobody."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Ask."""
        jobs = GaugeMetricFamily("autoq_jobs", "Jobs in the store.", labels=["status"])
        for status, number in self._jobs().items():
            jobs.add_metric([status], number)
        yield jobs
        tables = CounterMetricFamily(
            "autoq_study_tables",
            "Tables that plans needed, and had at hand or not.",
            labels=["cache"],
        )
        for result, number in self._tables().items():
            tables.add_metric([result], number)
        yield tables
        yield CounterMetricFamily(
            "autoq_events_streamed", "Events sent to listeners.", value=self._events()
        )
        memory = self._process.memory_info().rss
        yield GaugeMetricFamily("autoq_process_resident_bytes", "Memory in use.", value=memory)


class MetricsMiddleware:
    """Counts every reply by its route's template, never by its path."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and count what came of it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = perf_counter()

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                seconds = perf_counter() - began
                self._metrics.count(_template(scope), scope["method"], message["status"], seconds)
            await send(message)

        await self._app(scope, receive, counted)


def _template(scope: Scope) -> str:
    return str(getattr(scope.get("route"), "path", "none"))
