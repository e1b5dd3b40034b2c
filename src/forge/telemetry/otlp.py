"""To a collector, where ``OTEL_*`` names one: OTLP over HTTP. What it does or fails to do harms no work."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING

from forge.telemetry import lines, tracing

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from prometheus_client.metrics_core import Metric as Family

log = logging.getLogger("forge.telemetry")

FLUSH_SECONDS = 3.0
"""How long the end of a process may wait for a collector to take the last of it."""

SELDOM_SECONDS = 60.0
"""How often a collector that fails is mentioned."""

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_{}_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_{}_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


def start(role: str, level: str = "INFO") -> None:
    """Logs as JSON lines on stderr; traces to OTLP where the environment names a collector."""
    handler = lines.write(role, level)
    handler.addFilter(_Seldom())
    if wanted("TRACES"):
        _trace(resource(role))


def wanted(signal: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a signal (``TRACES``, ``METRICS``) is to be exported, by the variables of OpenTelemetry."""
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    if environ.get(f"OTEL_{signal}_EXPORTER", "").strip() not in ("", "otlp"):
        return False
    wrong = misset(environ, signal)
    if wrong:
        log.error("nothing is exported: %s", wrong[0])
    return not wrong and bool(_given(_ENDPOINTS, signal, environ)[1])


def misset(environ: Mapping[str, str], *signals: str) -> list[str]:
    """What these signals (default: all) cannot be exported with, each as ``NAME=value: why``."""
    wrong = []
    for signal in signals or ("TRACES", "METRICS"):
        name, value = _given(_ENDPOINTS, signal, environ)
        if value and not value.startswith(("http://", "https://")):
            wrong.append(f"{name}={value}: not an http:// or https:// address")
        protocol, spoken = _given(_PROTOCOLS, signal, environ)
        if value and spoken not in ("", "http/protobuf"):
            wrong.append(f"{protocol}={spoken}: forge speaks http/protobuf (port 4318) only")
    return list(dict.fromkeys(wrong))


def _given(names: tuple[str, ...], signal: str, environ: Mapping[str, str]) -> tuple[str, str]:
    """The variable that counts, and its value, empty where none is set."""
    found = [(name, environ.get(name, "").strip()) for name in (name.format(signal) for name in names)]
    return next((one for one in found if one[1]), found[-1])


def resource(role: str) -> Resource:
    """What this process is called; ``OTEL_SERVICE_NAME`` and ``OTEL_RESOURCE_ATTRIBUTES`` come first."""
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource

    mine = {
        "service.name": f"forge-{role}",
        "service.version": version("forge"),
        "service.instance.id": f"{socket.gethostname()}-{os.getpid()}",
    }
    said = OTELResourceDetector().detect().attributes
    return Resource.create({name: value for name, value in mine.items() if name not in said})


def _trace(about: Resource) -> None:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import (
        OTLPSpanExporter,
    )  # heavy: only when used
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=about, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    tracing.collect(provider)
    atexit.register(bounded, provider.shutdown)


@asynccontextmanager
async def exporting(role: str, collect: Callable[[], Awaitable[Iterable[Family]]]) -> AsyncIterator[None]:
    """Export numbers meanwhile, every ``OTEL_METRIC_EXPORT_INTERVAL`` ms, where a collector is named."""
    if not wanted("METRICS"):
        yield
        return
    exporting = asyncio.create_task(_export(role, collect), name="export of numbers")
    try:
        yield
    finally:
        exporting.cancel()
        await asyncio.gather(exporting, return_exceptions=True)


async def _export(role: str, collect: Callable[[], Awaitable[Iterable[Family]]]) -> None:
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter

    from forge.telemetry.export import data

    exporter, about, began = OTLPMetricExporter(), resource(role), time.time_ns()
    pause = _interval(os.environ.get("OTEL_METRIC_EXPORT_INTERVAL", ""))

    async def once() -> None:
        now = data(await collect(), about, began)
        await asyncio.to_thread(bounded, partial(exporter.export, now))

    try:
        while True:
            await asyncio.sleep(pause)
            with suppress(Exception):  # the exporter logs what goes wrong with it
                await once()
    finally:
        await once()


def _interval(milliseconds: str) -> float:
    try:
        return max(0.1, float(milliseconds or 60_000) / 1000)
    except ValueError:
        log.error("OTEL_METRIC_EXPORT_INTERVAL is no number of milliseconds", extra={"is": milliseconds})
        return 60.0


def bounded(flush: Callable[[], object]) -> None:
    """Hand over what is left; a collector that does not answer holds up nobody's end for long."""
    flushing = threading.Thread(target=flush, daemon=True, name="last spans")
    flushing.start()
    flushing.join(FLUSH_SECONDS)


class _Seldom(logging.Filter):
    """Lets the exporter, which speaks of every try, say only now and then that it fails or drops spans."""

    _said_at = -SELDOM_SECONDS

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.name.startswith("opentelemetry"):
            return True
        now = time.monotonic()
        matters = record.levelno >= logging.ERROR or "dropping" in record.msg
        if not matters or now - self._said_at < SELDOM_SECONDS:
            return False
        self._said_at = now
        return True
