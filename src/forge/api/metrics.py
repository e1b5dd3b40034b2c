"""Numbers for Prometheus.

======================================  =========  ==========================================
name                                    kind       labels
======================================  =========  ==========================================
``forge_http_requests_total``           counter    ``method``, ``path`` (template), ``status``
``forge_http_request_duration_seconds``  histogram  ``method``, ``path``
``forge_http_refusals_total``           counter    ``code`` of the problem
``forge_jobs_pending``                  gauge
``forge_jobs_running``                  gauge
``forge_queue_oldest_seconds``          gauge
``forge_sockets``                       gauge
``forge_log_head``                      gauge      last sequence this process has read
``forge_projection_lag``                gauge      events the tables are behind, as last heard
======================================  =========  ==========================================
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, cast

from litestar import Request, Response, get
from litestar.enums import ScopeType
from litestar.middleware import ASGIMiddleware
from litestar.types import ASGIApp, Message, Receive, Scope, Send
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from forge.api.live import Live
from forge.domain.jobs import Status

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_UNMATCHED = "unmatched"
_MEDIA_TYPE = CONTENT_TYPE_LATEST.removesuffix("; charset=utf-8")  # Litestar adds it to every text


class Metrics(ASGIMiddleware):
    """Counts and times every request that has a route; :meth:`refused` counts answers that were problems."""

    scopes = (ScopeType.HTTP,)

    def __init__(self, live: Live) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Now(live))
        self._requests = Counter(
            "forge_http_requests", "Answered requests.", ("method", "path", "status"), registry=self.registry
        )
        self._durations = Histogram(
            "forge_http_request_duration_seconds",
            "Seconds until an answer began.",
            ("method", "path"),
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self._refusals = Counter(
            "forge_http_refusals", "Answers that were problems.", ("code",), registry=self.registry
        )

    async def handle(self, scope: Scope, receive: Receive, send: Send, next_app: ASGIApp) -> None:
        began, given = time.perf_counter(), cast("dict[str, Any]", scope)

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                method, path = given["method"], given["path_template"]
                self._requests.labels(method, path, message["status"]).inc()
                self._durations.labels(method, path).observe(time.perf_counter() - began)
            await send(message)

        await next_app(scope, receive, counted)

    def refused(self, scope: dict[str, Any], status: int, code: str) -> None:
        """Take note of a problem; unrouted requests pass no middleware and are counted here."""
        self._refusals.labels(code).inc()
        if "path_template" not in scope:
            self._requests.labels("-", _UNMATCHED, status).inc()


class _Now(Collector):
    """What is so at the moment of asking."""

    def __init__(self, live: Live) -> None:
        self._live = live

    def collect(self) -> Iterator[GaugeMetricFamily]:
        live, line = self._live, self._live.admissions.line
        waiting = [job.admitted_at for job in line.jobs.values() if job.status is Status.PENDING]
        oldest = (datetime.now(UTC) - min(waiting)).total_seconds() if waiting else 0.0
        for name, text, value in (
            ("forge_jobs_pending", "Jobs that wait.", len(waiting)),
            ("forge_jobs_running", "Jobs that run.", len(line.jobs) - len(waiting)),
            ("forge_queue_oldest_seconds", "Age of the job that waits the longest.", oldest),
            ("forge_sockets", "Open event sockets.", len(live.listeners)),
            ("forge_log_head", "Last event this process has read.", live.head),
            (
                "forge_projection_lag",
                "Events the tables are behind.",
                max(0, live.head - live.checkpoint.seq),
            ),
        ):
            yield GaugeMetricFamily(name, text, value=value)


@get("/metrics", include_in_schema=False)
async def metrics(request: Request[Any, Any, Any]) -> Response[bytes]:
    """The numbers of this process."""
    registry = request.app.state.metrics.registry
    return Response(generate_latest(registry), media_type=_MEDIA_TYPE)
