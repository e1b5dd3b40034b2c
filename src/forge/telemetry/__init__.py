"""Traces, logs and numbers of every process; what each is called stands in ``docs/TELEMETRY.md``.

A trace travels inside the envelope of each event (``traceparent``), so that a job's run in a worker is part
of the trace of the request that asked for it. Without a collector in ``OTEL_*`` nothing is collected, and a
trace that a client began is only handed on.
"""

from __future__ import annotations

from forge.telemetry.lines import about, correlation
from forge.telemetry.otlp import exporting, start
from forge.telemetry.tracing import (
    CLIENT,
    CONSUMER,
    PRODUCER,
    SERVER,
    afterwards,
    collecting,
    failed,
    part,
    span,
    traceparent,
)

__all__ = [
    "CLIENT",
    "CONSUMER",
    "PRODUCER",
    "SERVER",
    "about",
    "afterwards",
    "collecting",
    "correlation",
    "exporting",
    "failed",
    "part",
    "span",
    "start",
    "traceparent",
]
