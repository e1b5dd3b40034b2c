"""To a collector, where ``OTEL_*`` names one: OTLP over HTTP. What it does or fails to do harms no work."""

from __future__ import annotations

import atexit
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING

from forge.telemetry import lines, tracing

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource

log = logging.getLogger("forge.telemetry")

FLUSH_SECONDS = 3.0
"""How long the end of a process may wait for a collector to take the last of it."""

SELDOM_SECONDS = 60.0
"""How often a collector that fails is mentioned."""

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_{}_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_{}_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


def start(role: str) -> None:
    """Logs as JSON lines on stderr; traces to OTLP where the environment names a collector."""
    handler = lines.write(role)
    handler.addFilter(_Seldom())
    if wanted("TRACES"):
        _trace(resource(role))


def wanted(signal: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a signal (``TRACES``, ``METRICS``) is to be exported, by the variables of OpenTelemetry."""

    def given(names: tuple[str, ...]) -> str:
        found = (environ.get(name.format(signal), "").strip() for name in names)
        return next(filter(None, found), "")

    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true" or not given(_ENDPOINTS):
        return False
    if environ.get(f"OTEL_{signal}_EXPORTER", "").strip() not in ("", "otlp"):
        return False
    if given(_PROTOCOLS) not in ("", "http/protobuf"):
        log.error(
            "nothing is exported: forge speaks OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf (port 4318) only",
            extra={"asked": given(_PROTOCOLS)},
        )
        return False
    return True


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


def bounded(flush: Callable[[], object]) -> None:
    """Hand over what is left; a collector that does not answer holds up nobody's end for long."""
    flushing = threading.Thread(target=flush, daemon=True, name="last spans")
    flushing.start()
    flushing.join(FLUSH_SECONDS)


class _Seldom(logging.Filter):
    """Lets the exporter, which speaks of every try, say only now and then that it fails."""

    _said_at = -SELDOM_SECONDS

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.name.startswith("opentelemetry"):
            return True
        now = time.monotonic()
        if record.levelno < logging.ERROR or now - self._said_at < SELDOM_SECONDS:
            return False
        self._said_at = now
        return True
