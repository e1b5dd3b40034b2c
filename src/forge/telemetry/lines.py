"""Log lines, and what they concern: said once, at the door or at the order, it stands in every line."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

from opentelemetry import trace

from forge.telemetry import numbers

_concerns: ContextVar[Mapping[str, str]] = ContextVar("forge_concerns", default=MappingProxyType({}))

_SECRET = re.compile(r"://[^/@\s\"\\]+@")
"""Who and with which password, in an address: a server's error may quote the one it was reached at."""

_OF_ONE_TRY = re.compile(r"\bfollow-[0-9a-f]+\b")
"""Names that are another with each try."""

AGAIN_SECONDS = 60.0

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


def about(**fields: str) -> None:
    """What the current task and those it starts from now on are about: fields of each line they log."""
    _concerns.set({**_concerns.get(), **fields})


def correlation(otherwise: str) -> str:
    """The request on whose behalf this is done, as its client may have named it; else ``otherwise``."""
    return _concerns.get().get("correlation", otherwise)


def write(role: str, level: str) -> logging.Handler:
    """From now on log as JSON lines on stderr, through the handler that is returned."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(role))
    handler.addFilter(_Again())
    handler.addFilter(_counted)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for noisy in ("httpx", "httpcore", "apscheduler", "websockets", "urllib3", "uvicorn"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return handler


class _Again(logging.Filter):
    """A loop that is interrupted tries again every few seconds: the same reason is told once a minute."""

    def __init__(self) -> None:
        super().__init__()
        self._told_at: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        said = record.getMessage()
        if not said.startswith("pulling failed") and "is interrupted" not in said:
            return True
        named = ("stream", "consumer", "subject", "reason", "error")
        fields = (record.__dict__.get(name, "") for name in named)
        what = _OF_ONE_TRY.sub("", f"{record.name} {said} {' '.join(map(str, fields))}")
        now = time.monotonic()
        self._told_at = {one: at for one, at in self._told_at.items() if now - at < AGAIN_SECONDS}
        if what in self._told_at:
            return False
        self._told_at[what] = now
        return True


def _counted(record: logging.LogRecord) -> bool:
    numbers.lines.labels(record.levelname.lower()).inc()
    return True


class JsonLines(logging.Formatter):
    """One object a line: time, level, role, logger, event, what it concerns, then the ``extra`` fields."""

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
        current = trace.get_current_span().get_span_context()
        if current.is_valid:
            line["trace"] = trace.format_trace_id(current.trace_id)
            line["span"] = trace.format_span_id(current.span_id)
        line |= _concerns.get()
        line |= {key: value for key, value in record.__dict__.items() if key not in _STANDARD}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return _SECRET.sub("://…@", json.dumps(line, default=str, ensure_ascii=False))
