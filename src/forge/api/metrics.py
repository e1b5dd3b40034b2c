"""Numbers for Prometheus.

======================================  =========  ==========================================
name                                    kind       labels
======================================  =========  ==========================================
``forge_http_requests_total``           counter    ``method``, ``path`` (template), ``status``
``forge_http_request_duration_seconds``  histogram  ``method``, ``path``
``forge_http_refusals_total``           counter    ``code`` of the problem; ``limit``, where one is reached
``forge_jobs_pending``                  gauge
``forge_jobs_running``                  gauge
``forge_queue_oldest_seconds``          gauge
``forge_queue_limit``                   gauge
``forge_sockets``                       gauge
``forge_sockets_limit``                 gauge
``forge_sockets_ended_total``           counter    ``code`` of the close frame, of those that forge ended
``forge_log_head``                      gauge      last sequence this process has read
``forge_projection_lag``                gauge      events the tables are behind, as last heard
``forge_archive_lag``                   gauge      events the second copy of the log is behind
``forge_disk_used_bytes``               gauge
``forge_disk_limit_bytes``              gauge      size of the asset volume, or what the settings say
``forge_disk_free_bytes``               gauge
``forge_disk_level``                    gauge      0 ok, 1 warn, 2 clean, 3 full
``forge_disk_bytes``                    gauge      ``type``: asset types and other files, newest sample
``forge_memory_used_bytes``             gauge      ``bound``: process, machine, container
``forge_memory_limit_bytes``            gauge      ``bound``
``forge_memory_short``                  gauge      1 while work is refused for want of memory
``forge_backend_healthy``               gauge      ``rank``, 1 is preferred; absent while no worker speaks
``forge_backend_queue``                 gauge      ``rank``; prompts that run or wait there, as it counts them
======================================  =========  ==========================================

What happened, by the log, is counted in :mod:`forge.api.happened`; what every process counts in
:mod:`forge.telemetry.numbers`, workers beside it in :mod:`forge.workers.numbers`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from typing import Any

from litestar import Request, Response, get
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from forge import archive
from forge.api.live import Live
from forge.api.parts import Parts
from forge.api.problems import Problem
from forge.database import Pool
from forge.domain.disk import Disk, rank
from forge.domain.jobs import Status
from forge.errors import ForgeError
from forge.projections import usage
from forge.projections.reading import looking
from forge.resources import Capacity
from forge.settings import Settings
from forge.telemetry import numbers

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_UNMATCHED = "unmatched"
_SAMPLE_SECONDS = 5.0
_MEDIA_TYPE = CONTENT_TYPE_LATEST.removesuffix("; charset=utf-8")  # Litestar adds it to every text


class Metrics:
    """The numbers of an API process."""

    def __init__(self, parts: Parts) -> None:
        live, capacity, self._pool = parts.live, parts.capacity, parts.pool
        self.registry = CollectorRegistry()
        self.registry.register(numbers.registry)
        self.registry.register(_Now(live, parts.settings))
        self.registry.register(_Backends(live))
        self.registry.register(live.happened.registry)
        self.resources = _Resources(capacity, live)
        self.registry.register(self.resources)
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
            "forge_http_refusals", "Answers that were problems.", ("code", "limit"), registry=self.registry
        )

        self._of = cache(self._find)

    def _find(self, method: str, path: str, status: int) -> tuple[Counter, Histogram]:
        return self._requests.labels(method, path, status), self._durations.labels(method, path)

    async def now(self) -> Iterable[Metric]:
        """Every number of this process."""
        await self.resources.look(self._pool)
        return self.registry.collect()

    def answered(self, scope: dict[str, Any], status: int, seconds: float) -> None:
        """Count and time a request that has a route."""
        requests, durations = self._of(scope["method"], scope["path_template"], status)
        requests.inc()
        durations.observe(seconds)

    def refused(self, scope: dict[str, Any], problem: Problem) -> None:
        """Count an answer that is a problem, and the request, where it has no route."""
        self._refusals.labels(problem.code, problem.limit.name if problem.limit else "").inc()
        if "path_template" not in scope:
            self._requests.labels("-", _UNMATCHED, problem.status).inc()


class _Now(Collector):
    """What is so at the moment of asking."""

    def __init__(self, live: Live, settings: Settings) -> None:
        self._live, self._settings = live, settings

    def collect(self) -> Iterator[GaugeMetricFamily]:
        live, line = self._live, self._live.admissions.line
        waiting = [job.admitted_at for job in line.jobs.values() if job.status is Status.PENDING]
        oldest = (datetime.now(UTC) - min(waiting)).total_seconds() if waiting else 0.0
        for name, text, value in (
            ("forge_jobs_pending", "Jobs that wait.", len(waiting)),
            ("forge_jobs_running", "Jobs that run.", len(line.jobs) - len(waiting)),
            ("forge_queue_oldest_seconds", "Age of the job that waits the longest.", oldest),
            ("forge_queue_limit", "Jobs that may wait.", self._settings.queue_limit),
            ("forge_sockets", "Open event sockets.", len(live.listeners)),
            ("forge_sockets_limit", "Event sockets that may be open.", self._settings.sockets),
            ("forge_log_head", "Last event this process has read.", live.head),
            (
                "forge_projection_lag",
                "Events the tables are behind.",
                max(0, live.head - live.checkpoint.seq),
            ),
        ):
            yield GaugeMetricFamily(name, text, value=value)


class _Backends(Collector):
    """Each ComfyUI as the workers tell of it; not where it is, since everybody may read this."""

    def __init__(self, live: Live) -> None:
        self._live = live

    def collect(self) -> Iterator[GaugeMetricFamily]:
        healthy = GaugeMetricFamily("forge_backend_healthy", "Whether a ComfyUI is usable.", labels=["rank"])
        queue = GaugeMetricFamily("forge_backend_queue", "Prompts running or waiting there.", labels=["rank"])
        for rank_, backend in enumerate(self._live.backends.now(), 1):
            healthy.add_metric([str(rank_)], float(backend.healthy))
            if backend.queue_remaining is not None:
                queue.add_metric([str(rank_)], backend.queue_remaining)
        yield from (healthy, queue)


class _Resources(Collector):
    """Disk, memory and the second copy; :meth:`look` is to be called before they are collected."""

    def __init__(self, capacity: Capacity, live: Live) -> None:
        self._capacity, self._live = capacity, live
        self._copied: int | None = None
        self._disk: Disk | None = None
        self._by_type: dict[str, int] = {}
        self._sampled_at = -_SAMPLE_SECONDS

    async def look(self, pool: Pool) -> None:
        """Bring the numbers up to date; what does not answer stays as it was, or is left out."""
        with suppress(ForgeError):
            async with looking(pool) as tables:
                self._copied = (await archive.head(tables.connection)).seq
            # of an API that has just started nobody says how far they are, until something happens
            await self._live.checkpoint.reached(tables.seq)
        with suppress(ForgeError):
            self._disk = await self._capacity.disk()
        if time.monotonic() - self._sampled_at > _SAMPLE_SECONDS:
            self._sampled_at = time.monotonic()
            with suppress(ForgeError):
                async with looking(pool) as tables:
                    newest = await usage.latest(tables.connection, "disk_usage")
                self._by_type = newest["details"].get("by_type", {}) if newest else {}

    def collect(self) -> Iterator[GaugeMetricFamily]:
        if self._disk is not None:
            level = rank(self._disk, self._capacity.lines)
            for name, text, value in (
                ("forge_disk_used_bytes", "Bytes in use on the asset volume.", self._disk.used),
                ("forge_disk_limit_bytes", "Size of the asset volume.", self._disk.limit),
                ("forge_disk_free_bytes", "Bytes that can still be written there.", self._disk.free),
                ("forge_disk_level", "0 ok, 1 warn, 2 clean, 3 full.", level),
            ):
                yield GaugeMetricFamily(name, text, value=value)
        if self._copied is not None:
            lag = max(0, self._live.head - self._copied)
            yield GaugeMetricFamily("forge_archive_lag", "Events the second copy is behind.", value=lag)
        of_type = GaugeMetricFamily("forge_disk_bytes", "Bytes on the asset volume by type.", labels=["type"])
        for type_, size in self._by_type.items():
            of_type.add_metric([type_], size)
        used = GaugeMetricFamily("forge_memory_used_bytes", "Memory in use.", labels=["bound"])
        limit = GaugeMetricFamily("forge_memory_limit_bytes", "Memory that may be used.", labels=["bound"])
        for bound in self._capacity.memory():
            used.add_metric([bound.name], bound.used)
            limit.add_metric([bound.name], bound.limit)
        short = float(self._capacity.short)
        yield from (of_type, used, limit)
        yield GaugeMetricFamily("forge_memory_short", "Whether work is refused for memory.", value=short)


@get("/metrics", include_in_schema=False)
async def metrics(request: Request[Any, Any, Any]) -> Response[bytes]:
    """The numbers of this process."""
    counters = request.app.state.metrics
    await counters.resources.look(request.app.state.parts.pool)
    return Response(generate_latest(counters.registry), media_type=_MEDIA_TYPE)
