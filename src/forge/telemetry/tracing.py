"""Spans: pieces of work within a trace.

The cheap path is what counts: without a collector a span is a look at one flag.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from forge.telemetry import numbers

if TYPE_CHECKING:
    from forge.events.envelope import Recorded

P = ParamSpec("P")
T = TypeVar("T")
Attributes = Mapping[str, str | int]

FRESH_SECONDS = 60.0
"""Up to which age an event's trace is told what is done with it."""

CLIENT, CONSUMER, PRODUCER, SERVER = SpanKind.CLIENT, SpanKind.CONSUMER, SpanKind.PRODUCER, SpanKind.SERVER

_propagator = TraceContextTextMapPropagator()
_tracer = trace.get_tracer("forge")
_NONE: AbstractContextManager[Span] = nullcontext(trace.INVALID_SPAN)


def collecting() -> bool:
    """Whether spans go anywhere."""
    return _Collected.anywhere


class _Collected:
    anywhere = False


def collect(provider: trace.TracerProvider) -> None:
    """Give all spans from now on to this provider."""
    trace.set_tracer_provider(provider)
    _Collected.anywhere = True


def traceparent() -> str:
    """The current trace as a W3C header value; empty where there is none."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier)
    return carrier.get("traceparent", "")


def span(
    name: str, parent: str = "", attributes: Attributes | None = None, *, kind: SpanKind = SpanKind.INTERNAL
) -> AbstractContextManager[Span]:
    """Do a piece of work as part of the trace that ``parent`` (a traceparent) belongs to, or of the current.

    Without a collector a trace that somebody else began is still handed on; nothing else is worth its time.
    """
    return _span(name, parent, attributes, kind) if parent or _Collected.anywhere else _NONE


@contextmanager
def _span(name: str, parent: str, attributes: Attributes | None, kind: SpanKind) -> Iterator[Span]:
    context = _propagator.extract({"traceparent": parent}) if parent else None
    # an exception's text may hold what a user wrote: its kind says enough
    with _tracer.start_as_current_span(
        name, context, kind, attributes, record_exception=False, set_status_on_exception=False
    ) as current:
        try:
            yield current
        except Exception as error:
            failed(current, str(getattr(error, "code", type(error).__name__)))
            raise


def failed(current: Span, why: str) -> None:
    """Mark a span as one that came to nothing."""
    current.set_status(trace.StatusCode.ERROR)
    current.set_attribute("error.type", why)


def part(
    name: str, *, kind: SpanKind = SpanKind.INTERNAL
) -> Callable[[Callable[P, Awaitable[T]]], Callable[P, Awaitable[T]]]:
    """Time each call of a coroutine function; within a trace it is a span as well, alone it begins none."""
    seconds = numbers.parts.labels(name)

    def wrap(call: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
        @functools.wraps(call)
        async def inside(*args: P.args, **kwargs: P.kwargs) -> T:
            began = time.perf_counter()
            traced = _Collected.anywhere and trace.get_current_span().is_recording()
            try:
                with _span(name, "", None, kind) if traced else _NONE:
                    return await call(*args, **kwargs)
            finally:
                seconds.observe(time.perf_counter() - began)

        return inside

    return wrap


def afterwards(
    name: str, record: Recorded, began: float, attributes: Attributes | None = None, *, kind: SpanKind
) -> None:
    """Tell of what was done with an event and is over by now, in its trace; ``began`` in Unix seconds.

    Of old events nothing is told: who reads the log again would flood the collector.
    """
    meta = record.meta
    if not _Collected.anywhere or not meta.traceparent or began - meta.at.timestamp() > FRESH_SECONDS:
        return
    context = _propagator.extract({"traceparent": meta.traceparent})
    fields = {"forge.event": record.event.type, "forge.seq": record.seq, **(attributes or {})}
    _tracer.start_span(name, context, kind, fields, start_time=int(began * 1e9)).end(time.time_ns())
