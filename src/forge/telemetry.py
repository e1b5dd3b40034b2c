"""Traces and logs. Names first:

========================  =======  ==============================================
span                      kind     what it covers
========================  =======  ==============================================
``forge.request``         server   one HTTP request that writes
``forge.job.run``         consumer one order, from delivery to ack
========================  =======  ==============================================

A trace travels inside the envelope of each event (``traceparent``), so that a job's run in a worker is part
of the trace of the request that asked for it. Without ``OTEL_EXPORTER_OTLP_ENDPOINT`` nothing is collected
and a span costs next to nothing.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime
from typing import Any

from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_propagator = TraceContextTextMapPropagator()
_tracer = trace.get_tracer("forge")

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


def start(role: str) -> None:
    """Logs as JSON lines on stderr; traces to OTLP where the environment names a collector."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines(role))
    logging.basicConfig(
        level=os.environ.get("FORGE_LOG_LEVEL", "INFO").upper(), handlers=[handler], force=True
    )
    for noisy in ("httpx", "httpcore", "apscheduler", "websockets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        _export(role)


def _export(role: str) -> None:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import (
        OTLPSpanExporter,
    )  # heavy: only when used
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": f"forge-{role}"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)


def traceparent() -> str:
    """The current trace as a W3C header value; empty where there is none."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier)
    return carrier.get("traceparent", "")


def span(
    name: str, parent: str = "", attributes: Mapping[str, Any] | None = None
) -> AbstractContextManager[None]:
    """Time a piece of work as part of the trace that ``parent`` (a traceparent) belongs to.

    Without a collector a trace that somebody else began is still handed on; nothing else is worth its time.
    """
    return _span(name, parent, attributes) if parent or _collecting() else nullcontext()


def _collecting() -> bool:
    return not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)


@contextmanager
def _span(name: str, parent: str, attributes: Mapping[str, Any] | None) -> Iterator[None]:
    context = _propagator.extract({"traceparent": parent}) if parent else None
    with _tracer.start_as_current_span(name, context=context, attributes=dict(attributes or {})):
        yield


class _JsonLines(logging.Formatter):
    """One object a line: time, level, role, logger, event, then the fields given as ``extra``."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self.role = role

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "role": self.role,
            "logger": record.name,
            "event": record.getMessage(),
        }
        line |= {key: value for key, value in record.__dict__.items() if key not in _STANDARD}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)
