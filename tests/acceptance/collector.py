"""A collector as OpenTelemetry describes one: OTLP over HTTP, kept in memory."""

from __future__ import annotations

import gzip
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class Hop:
    """One span, ids as W3C writes them."""

    service: str
    name: str
    trace: str
    id: str
    parent: str
    began: int
    ended: int
    attributes: dict[str, Any]
    error: bool


@dataclass
class Collector:
    """What came in; use :func:`collecting`."""

    url: str = ""
    hops: list[Hop] = field(default_factory=list)
    numbers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Service → name of a metric → its newest data."""
    headers: list[dict[str, str]] = field(default_factory=list)
    text: list[bytes] = field(default_factory=list)
    """Everything as it came, to be searched."""
    runner: web.AppRunner | None = None

    async def stop(self) -> None:
        """Be there no more."""
        assert self.runner is not None
        await self.runner.cleanup()

    def of(self, trace: str) -> list[Hop]:
        return [hop for hop in self.hops if hop.trace == trace]

    async def _body(self, request: web.Request) -> bytes:
        body = await request.read()
        if body[:2] == b"\x1f\x8b":  # aiohttp opens what says that it is compressed
            body = gzip.decompress(body)
        self.headers.append(dict(request.headers))
        self.text.append(body)
        return body

    async def traces(self, request: web.Request) -> web.Response:
        for of_service in ExportTraceServiceRequest.FromString(await self._body(request)).resource_spans:
            service = _plain(of_service.resource.attributes)["service.name"]
            for scope in of_service.scope_spans:
                self.hops += [
                    Hop(
                        service,
                        span.name,
                        span.trace_id.hex(),
                        span.span_id.hex(),
                        span.parent_span_id.hex(),
                        span.start_time_unix_nano,
                        span.end_time_unix_nano,
                        _plain(span.attributes),
                        span.status.code == 2,
                    )
                    for span in scope.spans
                ]
        return web.Response()

    async def metrics(self, request: web.Request) -> web.Response:
        for of_service in ExportMetricsServiceRequest.FromString(await self._body(request)).resource_metrics:
            service = _plain(of_service.resource.attributes)["service.name"]
            for scope in of_service.scope_metrics:
                self.numbers.setdefault(service, {}).update({m.name: m for m in scope.metrics})
        return web.Response()


@asynccontextmanager
async def collecting() -> AsyncIterator[Collector]:
    """A collector on a free port."""
    collector = Collector()
    app = web.Application(client_max_size=64 * 1024**2)
    app.router.add_post("/v1/traces", collector.traces)
    app.router.add_post("/v1/metrics", collector.metrics)
    runner = collector.runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    collector.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield collector
    finally:
        await runner.cleanup()


def plain_labels(point: Any) -> dict[str, Any]:
    """What a data point is of."""
    return _plain(point.attributes)


def _plain(attributes: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in attributes}
